"""Fixtures of the tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def data_folder() -> Path:
    """The folder of data sets that are too large for the repository."""
    given = os.environ.get("PYRO_SSM_DATA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """``shared_data("dmm_synthetic9/synthetic9.h5")`` is that file; the test is skipped where it is absent."""

    def path(name: str) -> Path:
        found = data_folder() / name
        if not found.exists():
            pytest.skip(f"needs the data set {name}: set PYRO_SSM_DATA to the folder that holds it")
        return found

    return path
