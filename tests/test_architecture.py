"""The shape of the package: imports one way, Pyro in its places, everything public documented, nothing global changed.

Each rule is applied to the package, and to small trees made here that break it: a rule that cannot fail proves nothing.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import Package

ROOT = Path(__file__).parents[1]
HEADER = '"""Doc."""\n\n__all__ = {names}\n'
GOOD = {
    "__init__.py": HEADER.format(names=[]),
    "ops/__init__.py": HEADER.format(names=["double"]) + "from tree.ops.double import double\n",
    "ops/double.py": 'def double(x):\n    """Twice.\n\n    >>> double(1)\n    2\n    """\n    return 2 * x\n',
    "models/__init__.py": HEADER.format(names=[]) + "import pyro\nfrom tree.ops import double\npyro.sample\n",
}


def tree(folder: Path, changes: dict[str, str]) -> Package:
    """A package that keeps every rule, with some files changed."""
    for name, text in (GOOD | changes).items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(folder / "tree")


@pytest.mark.parametrize("rule", architecture.RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    assert rule(Package(ROOT / "pyro_ssm")) == []


@pytest.mark.parametrize("rule", architecture.RULES, ids=lambda rule: rule.__name__)
def test_a_good_tree_keeps_the_rule(rule, tmp_path):
    assert rule(tree(tmp_path, {})) == []


BROKEN = {
    "unplaced part": ("unknown_parts", {"misc/x.py": ""}),
    "folder without __init__": ("folders_without_init", {"data/x.py": ""}),
    "downward import": ("downward_imports", {"ops/x.py": "from tree.models import law\n"}),
    "downward import of a module": ("downward_imports", {"ops/x.py": "import tree.models\n"}),
    "downward import, relative": ("downward_imports", {"ops/x.py": "from ..models import law\n"}),
    "downward import, lazy": ("downward_imports", {"ops/x.py": "def f():\n    from tree import models\n"}),
    "import of the facade": ("downward_imports", {"ops/x.py": "from tree import double\n"}),
    "cycle": ("cycles", {"ops/x.py": "import tree.ops.y\n", "ops/y.py": "from tree.ops import x\n"}),
    "cycle, lazy": ("cycles", {"ops/x.py": "def f():\n    import tree.ops.y\n", "ops/y.py": "from .x import f\n"}),
    "cycle over a package": ("cycles", {"ops/double.py": GOOD["ops/double.py"] + "from tree.ops import double\n"}),
    "testing imported": ("testing_imports", {"testing/x.py": "", "__main__.py": "import tree.testing.x\n"}),
    "pyro.sample": ("pyro_primitives", {"ops/x.py": "import pyro\npyro.sample\n"}),
    "pyro.plate, other name": ("pyro_primitives", {"ops/x.py": "import pyro as p\np.plate\n"}),
    "pyro.factor, lazy": ("pyro_primitives", {"infer/x.py": "def f():\n    from pyro import factor as f\n    f()\n"}),
    "pyro.primitives.param": ("pyro_primitives", {"ops/x.py": "from pyro import primitives\nprimitives.param\n"}),
    "pyro.deterministic after pyro.nn": ("pyro_primitives", {"ops/x.py": "import pyro.nn\npyro.deterministic\n"}),
    "pyro.module": ("pyro_primitives", {"predict/x.py": "from pyro import module\nmodule('m', None)\n"}),
    "name that is not there": ("missing_names", {"ops/__init__.py": HEADER.format(names=["lost"])}),
    "re-exported name that is not there": (
        "missing_names",
        {"ops/__init__.py": HEADER.format(names=["lost"]) + "from tree.ops.double import lost\n"},
    ),
    "name given twice": ("missing_names", {"ops/__init__.py": HEADER.format(names=["x", "x"]) + "x = 1\n"}),
    "no __all__": ("missing_names", {"ops/__init__.py": '"""Doc."""\n'}),
    "computed __all__": ("missing_names", {"ops/__init__.py": '"""Doc."""\n__all__ = list(dir())\n'}),
    "no doctest": ("undocumented", {"ops/double.py": 'def double(x):\n    """Twice."""\n'}),
    "no docstring": ("undocumented", {"ops/double.py": "class double:\n    pass\n"}),
    "no docstring in a listed module": (
        "undocumented",
        {"ops/__init__.py": HEADER.format(names=["x"]), "ops/x.py": '"""D."""\n__all__ = ["f"]\ndef f(): pass\n'},
    ),
    "no module docstring": ("undocumented", {"ops/__init__.py": "__all__ = []\n"}),
    "long file": ("long_files", {"ops/x.py": "x = 1\n" * (architecture.MAX_LINES + 1)}),
}


@pytest.mark.parametrize(("rule", "changes"), BROKEN.values(), ids=BROKEN)
def test_a_breach_is_found(rule, changes, tmp_path):
    breaches = getattr(architecture, rule)(tree(tmp_path, changes))
    assert len(breaches) == 1, breaches


def test_every_rule_has_a_breach():
    assert {rule for rule, _ in BROKEN.values()} == {rule.__name__ for rule in architecture.RULES}


# Imports every module of a package in a fresh interpreter and prints which global states are no longer what they were.
IMPORT_ALL = """
import importlib, pkgutil, random, sys
import numpy, pyro, torch, torchdiffeq, torchsde
import pyro.distributions, pyro.infer
try:
    import arviz  # what a dependency changes on its own import is not the package's doing
except ImportError:
    pass

def state():
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "numpy random state": str(numpy.random.get_state()),
        "python random state": random.getstate(),
        "torch threads": torch.get_num_threads(),
        "torch grad mode": torch.is_grad_enabled(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch matmul precision": torch.get_float32_matmul_precision(),
        "pyro settings": str(sorted(pyro.settings.get().items())),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro parameters": sorted(pyro.get_param_store().keys()),
        "pyro handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "numpy error handling": numpy.geterr(),
    }

before = state()
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(("__main__", "._cpu", "._cuda")):  # C libraries look like Python modules
        importlib.import_module(module.name)
after = state()
print("changed:", [name for name in before if before[name] != after[name]])
"""


def globals_changed_by_importing(package: str, folder: Path) -> str:
    command = [sys.executable, "-c", IMPORT_ALL, package]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_changes_nothing_global():
    assert globals_changed_by_importing("pyro_ssm", ROOT) == "changed: []"


def test_a_global_change_is_found(tmp_path):
    (tmp_path / "rude").mkdir()
    (tmp_path / "rude" / "__init__.py").write_text("")
    (tmp_path / "rude" / "inner.py").write_text(
        "import pyro, torch\ntorch.set_default_dtype(torch.float64)\ntorch.manual_seed(0)\n"
        "torch.distributions.Distribution.set_default_validate_args(False)\npyro.settings.set(module_local_params=True)\n"
    )
    expected = ["torch default dtype", "torch random state", "pyro settings", "torch validation"]
    assert globals_changed_by_importing("rude", tmp_path) == f"changed: {expected}"
