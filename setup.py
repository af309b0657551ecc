"""The compiled operators, and nothing else: all metadata is in setup.cfg.

The operators are optional. They are plain C functions that know nothing of torch or of Python, so that building them
needs a C++ compiler only, and one library serves every version of both. ``PYRO_SSM_BUILD`` chooses:

* ``auto`` (default): build them; where that fails, install without them and say so in one line;
* ``require``: a failure to build is a failure to install;
* ``off``: do not try.

Those of CUDA devices are a second library, built wherever nvcc is found (``CUDACXX``, ``CUDA_HOME``, ``PATH``), for the
architectures in ``PYRO_SSM_CUDA_ARCHS`` ("80;90": machine code for each, PTX of the last for later ones). Without nvcc
it is left out, and one line says so.

With no sources under ``pyro_ssm/ops/csrc`` there is nothing to build, and the wheel is pure Python.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "pyro_ssm.ops._cpu"  # loaded with ctypes, never imported
SOURCES = sorted(glob("pyro_ssm/ops/csrc/*.cpp"))
HEADERS = sorted(glob("pyro_ssm/ops/csrc/*.h"))
CUDA_LIBRARY = "pyro_ssm.ops._cuda"
CUDA_SOURCES = sorted(glob("pyro_ssm/ops/csrc/cuda/*.cu"))
CUDA_HEADERS = sorted(glob("pyro_ssm/ops/csrc/cuda/*.h"))

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"]
MSVC_FLAGS = ["/O2", "/std:c++17", "/EHsc"]
# The runtime is linked in: the library then loads everywhere, with a driver or without.
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-cudart", "static", "-shared"]

mode = os.environ.get("PYRO_SSM_BUILD", "auto")
if mode not in ("auto", "require", "off"):
    raise SystemExit(f"PYRO_SSM_BUILD must be auto, require or off, got {mode!r}")


archs = [arch for arch in re.split(r"[;,\s]+", os.environ.get("PYRO_SSM_CUDA_ARCHS", "80;90")) if arch]
if not archs or not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
    raise SystemExit(f"PYRO_SSM_CUDA_ARCHS must be like '80;90', got {os.environ['PYRO_SSM_CUDA_ARCHS']!r}")


def find_nvcc():
    """Where nvcc is, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wanted = [os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc"]
    return next((found for found in (shutil.which(name) for name in wanted if name) if found), None)


class build_library(build_ext):
    """A C library where setuptools expects a Python module."""

    def build_extension(self, ext):
        if ext.name == CUDA_LIBRARY:
            return self.build_cuda(ext)
        # No -ffast-math: with it, loading the library would flush denormals to zero in the whole process. No
        # -march=native: the sources choose among instruction sets when they run.
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = MSVC_FLAGS if msvc else FLAGS
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # one compiler a source, side by side
            one_by_one = self.compiler.compile

            def side_by_side(sources, *args, **kwargs):
                parts = pool.map(lambda source: one_by_one([source], *args, **kwargs), sources)
                return [found for part in parts for found in part]

            self.compiler.compile = side_by_side
            try:
                super().build_extension(ext)
            finally:
                self.compiler.compile = one_by_one

    def build_cuda(self, ext):
        out = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(out), exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        # where a toolkit that was installed by pip keeps its libraries
        libraries = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "lib")
        host = [] if os.name == "nt" else ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-L{libraries}"]
        try:
            subprocess.run([nvcc, *NVCC_FLAGS, *codes, *host, *ext.sources, "-o", out], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"nvcc could not build the CUDA operators ({error})") from None

    def get_ext_filename(self, fullname):
        # The name without the ABI tag of this Python: the library does not depend on it.
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        return ext.export_symbols  # no PyInit_*: this is not a Python module

    def warn(self, msg):
        if "building extension" in msg:
            msg += " (installed without the compiled operators: slower, same results; PYRO_SSM_BUILD=off skips this)"
        super().warn(msg)


def library_wheel():
    """A wheel for one platform but every Python; None where setuptools is too old to bring ``bdist_wheel``."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        try:
            from wheel.bdist_wheel import bdist_wheel
        except ImportError:
            return None

    class bdist_library_wheel(bdist_wheel):
        def get_tag(self):
            return ("py3", "none", super().get_tag()[2])

    return bdist_library_wheel


nvcc = find_nvcc()
if SOURCES and mode != "off":
    # optional: setuptools then turns a failed build into a warning
    optional = mode == "auto"
    libraries = [Extension(LIBRARY, SOURCES, depends=HEADERS, language="c++", optional=optional)]
    if CUDA_SOURCES and nvcc:
        libraries.append(Extension(CUDA_LIBRARY, CUDA_SOURCES, depends=HEADERS + CUDA_HEADERS, optional=optional))
    elif CUDA_SOURCES:
        print("pyro_ssm: no nvcc was found; installed without the CUDA operators (GPU tensors go through torch)")
    commands = {"build_ext": build_library, "bdist_wheel": library_wheel()}
    setup(
        ext_modules=libraries,
        cmdclass={name: command for name, command in commands.items() if command is not None},
    )
else:
    setup()
