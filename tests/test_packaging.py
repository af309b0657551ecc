"""What is installed: the metadata, the data files, the optional library, and the command line."""

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pyro_ssm
from pyro_ssm import __main__ as command_line
from pyro_ssm._version import __version__
from pyro_ssm.ops import compiled, kalman_kernel, recurrence_kernel
from pyro_ssm.ops.info import info
from tests.architecture import Package

ROOT = Path(__file__).parents[1]
SETUP_FILES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def requirements(lines: str) -> dict[str, str]:
    """Name -> lower bound."""
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in lines.split())
    return {match[1].lower(): match[2] for match in found if match}


def test_every_requirement_has_a_lower_bound_and_nothing_else():
    lines = SETUP["options"]["install_requires"].split()
    assert len(requirements(SETUP["options"]["install_requires"])) == len(lines)


def test_versions_in_use_are_within_the_bounds():
    def numbers(version):
        return tuple(int(n) for n in re.findall(r"\d+", version)[:3])

    for name, bound in requirements(SETUP["options"]["install_requires"]).items():
        assert numbers(metadata.version(name)) >= numbers(bound), name


def test_every_import_of_the_package_is_a_requirement():
    imported = set()
    for module in Package(ROOT / "pyro_ssm"):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    distributions = {"pyro": "pyro-ppl", "typing_extensions": "typing-extensions"}
    required = set(requirements(SETUP["options"]["install_requires"]))
    # matplotlib is the extra `plots`, pytest is there wherever the contract tests of `testing` are run
    allowed = required | set(sys.stdlib_module_names) | {"pyro_ssm", "matplotlib", "pytest"}
    assert {name for name in imported if distributions.get(name, name) not in allowed} == set()


def test_tested_torch_is_pinned_in_one_place():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) == 1 and pins[0].startswith("torch==")
    assert "torch==" not in (ROOT / "Makefile").read_text() + (ROOT / "setup.cfg").read_text()


def test_version_stands_everywhere():
    assert pyro_ssm.__version__ == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def build(folder: Path, source: str | None, cuda: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Build a wheel of a copy of the package's outline, ``source`` its one C++ file and ``cuda`` its one CUDA file."""
    for name in SETUP_FILES:
        shutil.copy(ROOT / name, folder)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pyro_ssm" / "data", folder / "pyro_ssm" / "data", ignore=unwanted)
    (folder / "pyro_ssm" / "ops" / "csrc").mkdir(parents=True)
    for name in ("__init__.py", "_version.py", "py.typed"):
        shutil.copy(ROOT / "pyro_ssm" / name, folder / "pyro_ssm")
    (folder / "pyro_ssm" / "ops" / "__init__.py").touch()
    if source is not None:
        (folder / "pyro_ssm" / "ops" / "csrc" / "twice.cpp").write_text(source)
    if cuda is not None:
        (folder / "pyro_ssm" / "ops" / "csrc" / "cuda").mkdir()
        (folder / "pyro_ssm" / "ops" / "csrc" / "cuda" / "thrice.cu").write_text(cuda)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def wheel(folder: Path) -> Path:
    (found,) = (folder / "dist").glob("*.whl")
    return found


GOOD = 'extern "C" double twice(double x) { return 2 * x; }\n'
BAD = "this is not C++\n"
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


@pytest.fixture
def bdist_wheel():
    pytest.importorskip("setuptools", minversion="70.1", reason="bdist_wheel is a part of setuptools since 70.1")


def test_without_sources_the_wheel_is_pure(tmp_path, bdist_wheel):
    result = build(tmp_path, None, PYRO_SSM_BUILD="require")
    assert result.returncode == 0, result.stderr
    assert wheel(tmp_path).name == f"pyro_ssm-{__version__}-py3-none-any.whl"


def test_wheel_has_the_bundled_data(tmp_path, bdist_wheel):
    assert build(tmp_path, None).returncode == 0
    names = set(zipfile.ZipFile(wheel(tmp_path)).namelist())
    bundled = [path for path in (ROOT / "pyro_ssm" / "data" / "bundled").glob("*.*") if path.suffix != ".py"]
    assert {path.relative_to(ROOT).as_posix() for path in bundled} <= names
    assert "pyro_ssm/py.typed" in names


@needs_compiler
def test_library_is_built_and_serves_every_python(tmp_path, bdist_wheel):
    result = build(tmp_path, GOOD, PYRO_SSM_BUILD="require")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"pyro_ssm-{__version__}-py3-none-(?!any)\w+\.whl", wheel(tmp_path).name)
    with zipfile.ZipFile(wheel(tmp_path)) as archive:
        (name,) = (name for name in archive.namelist() if name.startswith("pyro_ssm/ops/_cpu."))
        archive.extract(name, tmp_path / "out")
    twice = ctypes.CDLL(str(tmp_path / "out" / name)).twice
    twice.argtypes, twice.restype = [ctypes.c_double], ctypes.c_double
    assert twice(1.5) == 3.0


@pytest.mark.parametrize(("source", "environment"), [(BAD, {}), (GOOD, NO_COMPILER)], ids=["broken", "no compiler"])
def test_failed_build_falls_back_in_one_line(tmp_path, bdist_wheel, source, environment):
    result = build(tmp_path, source, **environment)
    assert result.returncode == 0, result.stderr
    assert "installed without the compiled operators" in result.stdout + result.stderr
    names = zipfile.ZipFile(wheel(tmp_path)).namelist()
    assert not any("_cpu" in name for name in names) and any("data/__init__.py" in name for name in names)


NVCC = """#!{python}
import sys
wanted = ["-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_80,code=sm_80"]
wanted += ["-gencode=arch=compute_80,code=compute_80"]
if {broken} or [word for word in sys.argv if "gencode" in word] != wanted or "static" not in sys.argv:
    sys.exit(1)
open(sys.argv[sys.argv.index("-o") + 1], "w").write("a library")
"""


def fake_nvcc(folder: Path, broken: bool) -> str:
    path = folder / "nvcc"
    path.write_text(NVCC.format(python=sys.executable, broken=broken))
    path.chmod(0o755)
    return str(path)


@needs_compiler
@pytest.mark.skipif(os.name == "nt", reason="the compiler of the test is a script")
@pytest.mark.parametrize("mode", ["auto", "require"])
@pytest.mark.parametrize("broken", [False, True])
def test_cuda_library_is_built_where_nvcc_is(tmp_path, bdist_wheel, mode, broken):
    options = {"PYRO_SSM_BUILD": mode, "PYRO_SSM_CUDA_ARCHS": "75;80", "CUDACXX": fake_nvcc(tmp_path, broken)}
    result = build(tmp_path, GOOD, "some CUDA", **options)
    assert (result.returncode == 0) == (mode == "auto" or not broken), result.stderr
    if broken and mode == "require":
        assert "nvcc could not build the CUDA operators" in result.stderr
        return
    names = zipfile.ZipFile(wheel(tmp_path)).namelist()
    assert any(name.startswith("pyro_ssm/ops/_cpu.") for name in names)
    assert any(name.startswith("pyro_ssm/ops/_cuda.") for name in names) != broken
    assert ("installed without the compiled operators" in result.stdout + result.stderr) == broken


@needs_compiler
def test_without_nvcc_one_line_says_so(tmp_path, bdist_wheel):
    compilers = shutil.which("c++") or shutil.which("g++")
    path = os.pathsep.join({os.path.dirname(compilers), "/usr/bin", "/bin"})
    if shutil.which("nvcc", path=path):
        pytest.skip("nvcc is beside the C++ compiler")
    options = {"CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": path, "PYRO_SSM_BUILD": "require"}
    result = build(tmp_path, GOOD, "some CUDA", **options)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("no nvcc was found") == 1
    assert not any("_cuda" in name for name in zipfile.ZipFile(wheel(tmp_path)).namelist())


def test_unknown_architecture(tmp_path, bdist_wheel):
    result = build(tmp_path, None, PYRO_SSM_CUDA_ARCHS="sm_90")
    assert result.returncode != 0 and "PYRO_SSM_CUDA_ARCHS must be like" in result.stderr


def test_required_build_fails(tmp_path, bdist_wheel):
    assert build(tmp_path, BAD, PYRO_SSM_BUILD="require").returncode != 0
    assert not (tmp_path / "dist").exists()


def test_build_can_be_switched_off(tmp_path, bdist_wheel):
    assert build(tmp_path, BAD, PYRO_SSM_BUILD="off").returncode == 0
    assert wheel(tmp_path).name.endswith("-py3-none-any.whl")


def test_unknown_build_mode(tmp_path, bdist_wheel):
    result = build(tmp_path, None, PYRO_SSM_BUILD="yes")
    assert result.returncode != 0 and "must be auto, require or off, got 'yes'" in result.stderr


def test_info_reports_what_is_in_use(capsys):
    assert command_line.main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["pyro_ssm"] == __version__
    assert rows["torch"] == metadata.version("torch")
    assert rows["threads"].startswith(f"{torch.get_num_threads()} within")
    assert {"python", "pyro-ppl", "torchsde", "torchdiffeq", "arviz", "device"} <= set(rows)
    assert rows["operators"] == info().explanation


def test_sources_of_the_operators_are_distributed(tmp_path):
    """What a source distribution holds is enough to build them."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_ssm" / "ops" / "csrc").rglob("*.*")}
    assert {Path(name).suffix for name in sources} == {".cpp", ".cu", ".h"}
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "pyro_ssm", copy / "pyro_ssm", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.dll"))
    for name in (*SETUP_FILES, "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources <= names


@pytest.mark.slow
@needs_compiler
def test_operators_build_without_a_warning(tmp_path):
    (tmp_path / "pyro_ssm" / "ops").mkdir(parents=True)
    shutil.copytree(ROOT / "pyro_ssm" / "ops" / "csrc", tmp_path / "pyro_ssm" / "ops" / "csrc")
    for name in SETUP_FILES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "pyro_ssm" / "_version.py", tmp_path / "pyro_ssm")
    for folder in (tmp_path / "pyro_ssm", tmp_path / "pyro_ssm" / "ops"):
        (folder / "__init__.py").touch()
    environment = {**os.environ, "PYRO_SSM_BUILD": "require", "CFLAGS": "-Wall -Wextra -Werror"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = (tmp_path / "pyro_ssm" / "ops").glob("_cpu.*")
    found = compiled._load(built)
    assert found.functions is not None and found.reason == ""


def test_a_library_that_cannot_be_used_is_left_aside(tmp_path, monkeypatch):
    assert "not built" in compiled._load(tmp_path / "_cpu.so").reason
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "could not be loaded" in compiled._load(broken).reason
    monkeypatch.setenv("PYRO_SSM_COMPILED", "0")
    assert "PYRO_SSM_COMPILED" in compiled._load(compiled.PATH).reason


@pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
def test_python_and_library_agree_on_their_interface(monkeypatch):
    functions = compiled.library().functions
    functions.pyro_ssm_kalman_args_size.restype = ctypes.c_int64
    assert functions.pyro_ssm_kalman_args_size() == 8 * kalman_kernel.FIELDS
    functions.pyro_ssm_linear_scan_args_size.restype = ctypes.c_int64
    assert functions.pyro_ssm_linear_scan_args_size() == 8 * recurrence_kernel.FIELDS
    functions.pyro_ssm_kalman_tape_size.restype = ctypes.c_int64
    for groups, series, times, n, p in ((1, 1, 1, 1, 1), (2, 1, 7, 4, 3), (3, 9, 5, 13, 2), (1, 17, 2, 17, 20)):
        fields = (ctypes.c_int64 * kalman_kernel.FIELDS)(groups, series, times, 0, n, p)
        size = functions.pyro_ssm_kalman_tape_size(ctypes.byref(fields))
        assert size == kalman_kernel.tape_size(groups, series, times, n, p)
    monkeypatch.setattr(compiled, "ABI", -1)
    assert "another version" in compiled._load(compiled.PATH).reason


@pytest.mark.slow
@pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
def test_every_instruction_set_gives_the_same_results(tmp_path):
    program = """
import sys, torch
from pyro_ssm.ops import diag_lti, dplr_lti, info, kalman_log_likelihood, linear_scan, scan2x2
torch.manual_seed(0)
n, p = 9, 3
eye, rand = torch.eye(n, dtype=torch.float64), lambda *shape: torch.randn(*shape, dtype=torch.float64)
args = [rand(10, 40, p), rand(n), eye, 0.9 * torch.linalg.qr(rand(1, n, n))[0], rand(1, n), eye[None]]
args = [x.requires_grad_() for x in [*args, rand(1, p, n), rand(1, p), eye[None, :p, :p]]]
terms = kalman_log_likelihood(args[0], args[0] == args[0], *args[1:])
scans = [(linear_scan, (2, 9, 45), ()), (linear_scan, (2, 9, 45), (0,)), (scan2x2, (2, 9, 45), (2,))]
found = [terms.detach(), *torch.autograd.grad(terms.sum(), args)]
for scan, shape, more in scans:
    complex_ = more == (0,)
    more = () if complex_ else more
    a, b = (rand(*shape, *more, *extra).requires_grad_() for extra in (more, ()))
    ab = [torch.complex(x, x.flip(0)) for x in (a, b)] if complex_ else [a, b]
    h = scan(0.2 * ab[0], ab[1])
    h = torch.view_as_real(h) if complex_ else h
    found += [h.detach(), *torch.autograd.grad(h.sin().sum(), (a, b))]
u, step, A, B = rand(2, 70, 9), rand(1, 9).exp() / 5, torch.complex(-rand(9, 5).exp(), rand(9, 5)), rand(9, 5) + 0j
inputs = [x.requires_grad_() for x in (u, step, A, B)]
y, _ = diag_lti(*inputs, B)
found += [y.detach(), *(torch.view_as_real(x + 0j) for x in torch.autograd.grad(y.sin().sum(), inputs))]
gaps = rand(2, 70, 9).exp().requires_grad_()
for method in ("zoh", "bilinear"):
    y, _ = diag_lti(u, gaps, A, B, B, method=method)
    found += [y.detach(), *(torch.view_as_real(x + 0j) for x in torch.autograd.grad(y.sin().sum(), (u, gaps, A, B)))]
P = (rand(9, 5, 2) + 1j * rand(9, 5, 2)).requires_grad_()
y, _ = dplr_lti(u, step[0], A, P, B, B)
found += [y.detach(), *(torch.view_as_real(x + 0j) for x in torch.autograd.grad(y.sin().sum(), (u, step, A, P, B)))]
torch.save([info().explanation, *found], sys.argv[1])
"""
    found = {}
    for isa in ("base", "avx2", "best"):
        environment = {**os.environ, "PYRO_SSM_ISA": isa, "PYTHONPATH": str(ROOT)}
        out = tmp_path / f"{isa}.pt"
        subprocess.run([sys.executable, "-c", program, str(out)], env=environment, check=True)
        found[isa] = torch.load(out)
    assert "(base," in found["base"][0] and "(avx512," not in found["avx2"][0]
    for isa in ("base", "avx2"):
        for one, other in zip(found[isa][1:], found["best"][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_info_tells_the_truth_about_operators():
    has_library = any((ROOT / "pyro_ssm" / "ops").glob("_cpu.*"))
    assert bool(info().compiled) == has_library
    assert set(info().compiled).isdisjoint(info().missing)


def test_demo_gets_its_options(monkeypatch):
    called = []
    fake = type(sys)("pyro_ssm.demo")
    fake.run = lambda out, quick: called.append((out, quick))
    monkeypatch.setitem(sys.modules, "pyro_ssm.demo", fake)
    assert command_line.main(["demo", "--quick", "--out", "there"]) == 0
    assert command_line.main(["demo"]) == 0
    assert called == [(Path("there"), True), (Path("demo_output"), False)]


@pytest.mark.parametrize("words", [[], ["fit"]])
def test_wrong_command(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_module_is_a_program():
    result = subprocess.run([sys.executable, "-m", "pyro_ssm", "info"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("pyro_ssm "), result.stderr
