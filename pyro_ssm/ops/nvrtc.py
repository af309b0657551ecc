"""The run-time compiler of CUDA, NVRTC: machine code of the kernels where no nvcc was there to build them.

Every torch for CUDA brings the library. It is loaded with ctypes, and compiles the sources of ``csrc/cuda`` as they
are: kernels need no header of the system (:func:`device_source`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Compiled", "Nvrtc", "NvrtcError", "device_source", "find_nvrtc"]

OPTIONS = ("-std=c++17", "-default-device")
#: what the headers of the system would give the sources
PRELUDE = """\
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
namespace std { using ::memcpy; }
"""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_SIGNATURES: dict[str, tuple] = {
    "nvrtcVersion": (ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)),
    "nvrtcGetNumSupportedArchs": (ctypes.POINTER(ctypes.c_int),),
    "nvrtcGetSupportedArchs": (ctypes.POINTER(ctypes.c_int),),
    "nvrtcCreateProgram": (_POINTER, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, _STRINGS, _STRINGS),
    "nvrtcAddNameExpression": (_POINTER, ctypes.c_char_p),
    "nvrtcCompileProgram": (_POINTER, ctypes.c_int, _STRINGS),
    "nvrtcGetProgramLogSize": (_POINTER, _SIZE),
    "nvrtcGetProgramLog": (_POINTER, ctypes.c_char_p),
    "nvrtcGetLoweredName": (_POINTER, ctypes.c_char_p, _STRINGS),
    "nvrtcGetCUBINSize": (_POINTER, _SIZE),
    "nvrtcGetCUBIN": (_POINTER, ctypes.c_char_p),
    "nvrtcGetPTXSize": (_POINTER, _SIZE),
    "nvrtcGetPTX": (_POINTER, ctypes.c_char_p),
    "nvrtcDestroyProgram": (_POINTER,),
}


class NvrtcError(RuntimeError):
    """The compiler is not there, or refused.

    >>> from pyro_ssm.ops.nvrtc import NvrtcError
    >>> issubclass(NvrtcError, RuntimeError)
    True
    """


class Compiled(NamedTuple):
    """Machine code, and what its kernels are called in it.

    >>> from pyro_ssm.ops.nvrtc import Compiled
    >>> Compiled(b"", {"outputs<float>": "_Z7outputsIfE"}, "").names["outputs<float>"]
    '_Z7outputsIfE'
    """

    image: bytes
    names: dict[str, str]
    log: str = ""  # warnings


class Nvrtc:
    """The library at a path.

    Args:
        path: of the shared library; the one with its built-in functions is looked for beside it.

    Raises:
        NvrtcError: it cannot be loaded.

    >>> from pyro_ssm.ops.nvrtc import Nvrtc, NvrtcError
    >>> try:
    ...     Nvrtc("nowhere.so")
    ... except NvrtcError as error:
    ...     "nowhere.so" in str(error)
    True
    """

    def __init__(self, path: str | Path) -> None:
        try:
            for builtins in sorted(Path(path).parent.glob("*nvrtc-builtins*")):
                if ".alt." not in builtins.name:  # it would be looked for by name, in the folders of the system only
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            self.functions: Any = ctypes.CDLL(str(path))
            for name, arguments in _SIGNATURES.items():
                getattr(self.functions, name).argtypes = arguments
            self.functions.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            self._call("nvrtcVersion", major, minor)
            self._call("nvrtcGetNumSupportedArchs", count)
            found = (ctypes.c_int * count.value)()
            self._call("nvrtcGetSupportedArchs", found)
        except (OSError, AttributeError) as error:
            raise NvrtcError(f"NVRTC could not be loaded from {path} ({error})") from None
        self.version = (major.value, minor.value)
        self.architectures = tuple(found)  # 80, 90, ...

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise NvrtcError(f"{name}: {self.functions.nvrtcGetErrorString(status).decode()}")

    def target(self, capability: int) -> str:
        """The architecture to compile for: the device's own, or code that its driver finishes where that is newer.

        Args:
            capability: of the device, 90 for 9.0.

        Raises:
            NvrtcError: the device is too old for this compiler.
        """
        if capability in self.architectures:
            return f"sm_{capability}"
        older = [arch for arch in self.architectures if arch < capability]
        if not older:
            raise NvrtcError(f"NVRTC {self.version[0]}.{self.version[1]} no longer compiles for sm_{capability}")
        return f"compute_{max(older)}"

    def compile(self, text: str, name: str, kernels: Sequence[str], target: str) -> Compiled:
        """Compile kernels of a source.

        Args:
            text: the source.
            name: of the source, for messages.
            kernels: ``"outputs<float>"``, ...
            target: of :meth:`target`.

        Raises:
            NvrtcError: with what the compiler says.
        """
        program = _POINTER()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            for kernel in kernels:
                self._call("nvrtcAddNameExpression", program, kernel.encode())
            options = [option.encode() for option in (f"-arch={target}", *OPTIONS)]
            failed = self.functions.nvrtcCompileProgram(
                program, len(options), (_STRINGS._type_ * len(options))(*options)
            )
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if failed:
                why = self.functions.nvrtcGetErrorString(failed).decode()
                raise NvrtcError(f"NVRTC could not compile {name} for {target} ({why}): {log}")
            names = {}
            for kernel in kernels:
                lowered = ctypes.c_char_p()
                self._call("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(lowered))
                names[kernel] = (lowered.value or b"").decode()
            image = self._bytes(program, "CUBIN" if target.startswith("sm_") else "PTX")
            return Compiled(image, names, log)
        finally:
            self.functions.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: Any, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


def find_nvrtc() -> Nvrtc:
    """The compiler that torch brings: of the version of CUDA that torch was built for, if there are several.

    Raises:
        NvrtcError: none is found; says where it was looked for.

    >>> from pyro_ssm.ops.nvrtc import NvrtcError, find_nvrtc
    >>> try:
    ...     found = find_nvrtc().version >= (11, 0)
    ... except NvrtcError as error:
    ...     found = "NVRTC" in str(error)
    >>> found
    True
    """
    wanted = (torch.version.cuda or "").partition(".")[0]
    found = list(_candidates())
    found.sort(key=lambda path: not re.search(rf"(\.so\.|64_){wanted}", path.name))  # stable: the rest in order
    reasons = []
    for path in (*found, "libnvrtc.so" if os.name != "nt" else "nvrtc.dll"):
        try:
            return Nvrtc(path)
        except NvrtcError as error:
            reasons.append(str(error))
    if found:
        raise NvrtcError(reasons[0])
    raise NvrtcError(
        "NVRTC was found neither among the packages of NVIDIA beside torch, nor in CUDA_HOME, nor in the folders of "
        f"the system; `pip install nvidia-cuda-nvrtc{'-cu' + wanted if wanted in ('11', '12') else ''}` brings it"
    )


def _candidates() -> Iterator[Path]:
    # every package of NVIDIA is a folder of the namespace `nvidia`
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    places = [place for folder in folders for place in sorted(folder.glob("*"))]
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for place in (*places, Path(torch.__file__).parent, *homes):
        for pattern in ("lib/libnvrtc.so.*", "lib64/libnvrtc.so.*", "lib/libnvrtc-*.so*", "lib/nvrtc64_*.dll"):
            yield from (path for path in sorted(place.glob(pattern)) if _is_compiler(path))
        for pattern in ("bin/nvrtc64_*.dll", "bin/*/nvrtc64_*.dll"):
            yield from (path for path in sorted(place.glob(pattern)) if _is_compiler(path))


def _is_compiler(path: Path) -> bool:
    return "builtins" not in path.name and ".alt." not in path.name


def device_source(path: Path) -> str:
    """A source with the headers of the project in their places and those of the system left out.

    Args:
        path: of a ``.cu`` file.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.ops.nvrtc import device_source
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.h").write_text("int a;\\n")
    ...     _ = (Path(folder) / "b.cu").write_text('#include <cstdint>\\n#include "a.h"\\nint b;\\n')
    ...     print(device_source(Path(folder) / "b.cu").partition("memcpy; }")[2].strip())
    #line 1 "b.cu"
    <BLANKLINE>
    #line 1 "a.h"
    int a;
    #line 3 "b.cu"
    int b;
    """
    return "\n".join([PRELUDE, *_lines(path.resolve(), set())])


def _lines(path: Path, seen: set[Path]) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path in seen and "#pragma once" in text:
        return
    seen.add(path)
    yield f'#line 1 "{path.name}"'
    for number, line in enumerate(text.splitlines(), 1):
        include = re.match(r'#include "(.+)"', line)
        if include and not include[1].endswith("launch.h"):  # of the CPU alone
            yield from _lines((path.parent / include[1]).resolve(), seen)
            yield f'#line {number + 1} "{path.name}"'
        else:
            yield "" if line.startswith(("#include", "#pragma once")) else line
