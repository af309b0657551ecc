"""What holds for every test and every doctest."""

import importlib
from pathlib import Path
from pkgutil import iter_modules
from warnings import filterwarnings

import pyro
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--jaxtyping", action="store_true", help="check every type annotation of pyro_ssm at run time")


def pytest_configure(config):
    torch.set_num_threads(1)  # tensors are small here: a second thread costs more than it gives
    if config.getoption("--jaxtyping"):
        from jaxtyping import install_import_hook

        filterwarnings("ignore", category=DeprecationWarning, module="beartype")  # of annotations of libraries
        # the tests in pyro_ssm.testing have fixtures, which pytest binds by their own signatures
        parts = [
            f"pyro_ssm.{part.name}"
            for part in iter_modules([str(Path(__file__).parent / "pyro_ssm")])
            if part.name != "testing"
        ]
        install_import_hook(parts, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
    # a module that is collected before its package is there would run twice, and register its operators twice
    importlib.import_module("pyro_ssm")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_pyro():
    """No test sees the parameters or the random state that another left behind."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
