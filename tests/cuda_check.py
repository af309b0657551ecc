"""`make cuda-check`: every CUDA source compiles for each architecture, without a warning and without a spill.

Prints registers and shared memory of every kernel. With nvcc of this interpreter's environment (wheels of NVIDIA), or
that of ``CUDACXX`` or ``PATH``. Nothing is run: no GPU is needed. Needs the standard library alone.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "pyro_ssm" / "ops" / "csrc" / "cuda"
ARCHITECTURES = ("80", "90")
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
PTXAS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>.+?)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Where nvcc is."""
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    return str(wheels[-1]) if wheels else shutil.which(os.environ.get("CUDACXX") or "nvcc")


def kernels_of(text: str) -> list[dict[str, str]]:
    """What ptxas tells of each kernel."""
    return [match.groupdict() for match in KERNEL.finditer(text)]


def short(name: str) -> str:
    """A kernel's name without what all have in common."""
    return re.sub(
        r"\(anonymous namespace\)::|^void |\(.*\)$", "", name.replace("(bool)1", "true").replace("(bool)0", "false")
    )


def check(nvcc: str, source: Path, arch: str) -> bool:
    """Compile one source for one architecture, and print what its kernels use; whether nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        out = str(Path(folder) / "object.o")
        result = subprocess.run(
            [nvcc, *FLAGS, *PTXAS, code, "-c", str(source), "-o", out], capture_output=True, text=True
        )
    text = result.stdout + result.stderr
    filt = shutil.which("c++filt")
    text = subprocess.run([filt], input=text, capture_output=True, text=True).stdout if filt else text
    kernels, good = kernels_of(text), result.returncode == 0 and "warning" not in text
    if not good:
        print(text)
    for kernel in sorted(kernels, key=lambda kernel: short(kernel["name"])):
        spills = int(kernel["stores"]) + int(kernel["loads"]) + int(kernel["stack"])
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        good = good and spills == 0
        print(
            f"sm_{arch} {source.stem:20} {short(kernel['name']):45} {kernel['registers']:>4} registers "
            f"{shared[1] if shared else 0:>6} bytes shared  {'SPILLS' if spills else 'no spills'}"
        )
    return good and bool(kernels)


def main() -> int:
    """0 where everything is as it should be."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: neither in this environment nor in CUDACXX or PATH")
        return 2
    sources = sorted(SOURCES.glob("*.cu"))
    bad = [
        f"{source.name} for sm_{arch}" for source in sources for arch in ARCHITECTURES if not check(nvcc, source, arch)
    ]
    print(f"not good: {', '.join(bad)}" if bad else f"{len(sources)} sources, {len(ARCHITECTURES)} architectures: good")
    return int(bool(bad) or not sources)


if __name__ == "__main__":
    sys.exit(main())
