"""Parameters that belong to their module, and to no global store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from pyro.nn.module import _Context

__all__ = ["local_parameters"]


@contextmanager
def local_parameters() -> Iterator[None]:
    """Run models and guides without Pyro's global parameter store.

    In Pyro's default mode a module copies its parameters into a global store under their names, and a second model of
    the same class silently finds those of the first. Inside this context each module reads its own tensors. Statements
    ``pyro.param`` of plain functions keep to the store; inside a ``PyroModule`` Pyro refuses them in this mode.

    >>> import pyro, torch
    >>> from pyro.nn import PyroModule, PyroParam
    >>> from pyro_ssm.infer import local_parameters
    >>> class Level(PyroModule):
    ...     def __init__(self, value):
    ...         super().__init__()
    ...         self.level = PyroParam(torch.tensor(value))
    ...     def forward(self):
    ...         return self.level
    >>> first, second = Level(1.0), Level(2.0)
    >>> with local_parameters():
    ...     print(first().item(), second().item())
    1.0 2.0
    """
    # Pyro gives a module this table when it is made, and only if the mode is on by then; the others find it here
    before = vars(_Context).get("param_state")
    _Context.param_state = {"params": {}, "constraints": {}}  # type: ignore[misc]
    try:
        with pyro.settings.context(module_local_params=True):
            yield
    finally:
        if before is None:
            del _Context.param_state  # type: ignore[misc]
        else:
            _Context.param_state = before
