"""The compiled operators: one C library beside this file, loaded with ctypes; absent or refused, everything is torch.

The library knows nothing of torch or Python (``csrc/``), so one build serves every version of both. Threads are those
of torch where it lends them (``torch_parallel_for``, torch 2.10 and later), else one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["ABI", "Library", "library"]

ABI = 60  # of csrc/library.cpp: pyro_ssm_abi()
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_STRUCT = (ctypes.c_int, _POINTER)  # one struct of eight-byte fields to a status
_NORMALISE = (None, _POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER)
_ANCESTORS = (ctypes.c_int, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER)
_DRAW = (None, *[_POINTER] * 5, _INT, _INT, _POINTER)
_DENSITY = (ctypes.c_int, *[_POINTER, _INT] * 3, _INT, _INT, _INT, _POINTER)
#: of each function, its result and its arguments
SIGNATURES: dict[str, tuple] = {
    "pyro_ssm_kalman_forward": _STRUCT,
    "pyro_ssm_kalman_backward": _STRUCT,
    "pyro_ssm_kalman_backwards": _STRUCT,
    "pyro_ssm_linear_scan_forward": _STRUCT,
    "pyro_ssm_linear_scan_backward": _STRUCT,
    "pyro_ssm_diag_lti_forward": _STRUCT,
    "pyro_ssm_diag_lti_backward": _STRUCT,
    "pyro_ssm_low_rank_bank_forward": _STRUCT,
    "pyro_ssm_low_rank_bank_backward": _STRUCT,
    "pyro_ssm_gap_bank_forward": _STRUCT,
    "pyro_ssm_gap_bank_backward": _STRUCT,
    "pyro_ssm_selective_forward": _STRUCT,
    "pyro_ssm_selective_backward": _STRUCT,
    "pyro_ssm_convolve_forward": _STRUCT,
    "pyro_ssm_convolve_backward": _STRUCT,
    "pyro_ssm_elementwise": _STRUCT,
    "pyro_ssm_coordinate_forward": _STRUCT,
    "pyro_ssm_coordinate_backward": _STRUCT,
    "pyro_ssm_normalise_f32": _NORMALISE,
    "pyro_ssm_normalise_f64": _NORMALISE,
    "pyro_ssm_ancestors_f32": _ANCESTORS,
    "pyro_ssm_ancestors_f64": _ANCESTORS,
    "pyro_ssm_ancestors_of_counts": (None, _POINTER, _INT, _INT, _POINTER),
    "pyro_ssm_take": (ctypes.c_int, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER),
    "pyro_ssm_affine_draw_f32": _DRAW,
    "pyro_ssm_affine_draw_f64": _DRAW,
    "pyro_ssm_normal_density_f32": _DENSITY,
    "pyro_ssm_normal_density_f64": _DENSITY,
    "pyro_ssm_particle_step_f32": _STRUCT,
    "pyro_ssm_particle_step_f64": _STRUCT,
    "pyro_ssm_normals": (None, _INT, _INT, _POINTER, _POINTER),
}
PATH = Path(__file__).with_name("_cpu.dll" if os.name == "nt" else "_cpu.so")


class Library(NamedTuple):
    """The state of the compiled library in this process.

    >>> from pyro_ssm.ops.compiled import Library, library
    >>> isinstance(library(), Library)
    True
    """

    functions: ctypes.CDLL | None  # None where there is no usable library
    reason: str  # why not; "" otherwise
    isa: str  # the instruction set in use
    parallel_for: int  # address of torch's function, 0 where it has none


def library() -> Library:
    """The library, loaded at the first call; never an exception.

    >>> from pyro_ssm.ops.compiled import library
    >>> found = library()
    >>> (found.functions is None) == bool(found.reason)
    True
    """
    global _library
    if _library is None:
        _library = _load(PATH)
    return _library


_library: Library | None = None


def _load(path: Path) -> Library:
    if os.environ.get("PYRO_SSM_COMPILED", "1") == "0":
        return Library(None, "switched off by PYRO_SSM_COMPILED=0", "", 0)
    if not path.exists():
        return Library(None, "not built: `pip install` found no C++ compiler, or was told not to use it", "", 0)
    try:
        functions = ctypes.CDLL(str(path))
        functions.pyro_ssm_abi.restype = ctypes.c_int64
        found = functions.pyro_ssm_abi()
        functions.pyro_ssm_isa.restype = ctypes.c_char_p
        isa = functions.pyro_ssm_isa().decode()
    except (OSError, AttributeError) as error:
        return Library(None, f"{path.name} could not be loaded ({error}); install again", "", 0)
    if found != ABI:
        return Library(None, f"{path.name} is of another version ({found}, wanted {ABI}); install again", "", 0)
    for name, (result, *arguments) in SIGNATURES.items():
        getattr(functions, name).restype = result
        getattr(functions, name).argtypes = arguments
    return Library(functions, "", isa, _torch_parallel_for())


def _torch_parallel_for() -> int:
    """The address of ``torch_parallel_for`` in the process that has torch loaded, 0 where it is not exported."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(folder / name)).torch_parallel_for, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                return 0
    return 0
