"""The compiled operators, and nothing else: all metadata is in setup.cfg.

The operators are optional. They are plain C functions that know nothing of torch or of Python, so that building them
needs a C++ compiler only, and one library serves every version of both. ``PYRO_SSM_BUILD`` chooses:

* ``auto`` (default): build them; where that fails, install without them and say so in one line;
* ``require``: a failure to build is a failure to install;
* ``off``: do not try.

With no sources under ``pyro_ssm/ops/csrc`` there is nothing to build, and the wheel is pure Python.
"""

import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "pyro_ssm.ops._cpu"  # loaded with ctypes, never imported
SOURCES = sorted(glob("pyro_ssm/ops/csrc/*.cpp"))
HEADERS = sorted(glob("pyro_ssm/ops/csrc/*.h"))

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"]
MSVC_FLAGS = ["/O2", "/std:c++17", "/EHsc"]

mode = os.environ.get("PYRO_SSM_BUILD", "auto")
if mode not in ("auto", "require", "off"):
    raise SystemExit(f"PYRO_SSM_BUILD must be auto, require or off, got {mode!r}")


class build_library(build_ext):
    """A C library where setuptools expects a Python module."""

    def build_extension(self, ext):
        # No -ffast-math: with it, loading the library would flush denormals to zero in the whole process. No
        # -march=native: the sources choose among instruction sets when they run.
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = MSVC_FLAGS if msvc else FLAGS
        super().build_extension(ext)

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


if SOURCES and mode != "off":
    commands = {"build_ext": build_library, "bdist_wheel": library_wheel()}
    setup(
        # optional: setuptools then turns a failed build into a warning
        ext_modules=[Extension(LIBRARY, SOURCES, depends=HEADERS, language="c++", optional=mode == "auto")],
        cmdclass={name: command for name, command in commands.items() if command is not None},
    )
else:
    setup()
