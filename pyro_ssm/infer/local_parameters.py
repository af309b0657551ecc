"""Parameters that belong to their module, and to no global store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import nn

__all__ = ["local_parameters"]


@contextmanager
def local_parameters(*programs: Callable[..., Any]) -> Iterator[None]:
    """Run models and guides without Pyro's global parameter store.

    In Pyro's default mode a module copies its parameters into a global store under their names, and a second model of
    the same class silently finds those of the first. Inside this context each module reads its own tensors.

    Args:
        programs: the models and guides that will run inside; those that are no ``nn.Module`` are left as they are.

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
    >>> with local_parameters(first, second):
    ...     print(first().item(), second().item())
    1.0 2.0
    """
    for program in programs:
        for module in program.modules() if isinstance(program, nn.Module) else ():
            if isinstance(module, PyroModule):
                # Pyro makes this table when the module is made, and only if the mode is already on
                vars(module._pyro_context).setdefault("param_state", {"params": {}, "constraints": {}})
    with pyro.settings.context(module_local_params=True):
        yield
