"""Fixtures of the tests of operators."""

import pytest

from pyro_ssm.ops import compiled


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    """The same test with the compiled library and without it."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    elif compiled.library().functions is None:
        pytest.skip(f"the compiled library is not in use: {compiled.library().reason}")
    return request.param
