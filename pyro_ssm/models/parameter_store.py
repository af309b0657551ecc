"""Pyro's global parameter store: which of its entries a model would read in place of its own parameters."""

from __future__ import annotations

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_ssm.binding import is_bound

__all__ = ["mcmc_begins", "refuse_strangers_in_mcmc", "stored_names", "strangers"]


def mcmc_begins() -> bool:
    """Whether a kernel of ``pyro.infer.MCMC`` (NUTS, HMC, random walk) is setting itself up around the program.

    Such a kernel first runs the model once inside a handler that initialises sites and, within it, one that enumerates
    discrete ones. An automatic guide that prepares itself under ``TraceEnum_ELBO`` has the two the other way round.

    >>> from pyro_ssm.models.parameter_store import mcmc_begins
    >>> mcmc_begins()
    False
    """
    kinds = [type(handler) for handler in _PYRO_STACK]
    return InitMessenger in kinds and EnumMessenger in kinds[kinds.index(InitMessenger) :]


def stored_names(root: nn.Module) -> dict[str, Tensor]:
    """The names under which a module's parameters enter Pyro's global store.

    >>> import torch
    >>> from pyro.nn import PyroModule
    >>> from pyro_ssm.models.parameter_store import stored_names
    >>> module = PyroModule("guide")
    >>> module.net = torch.nn.Linear(1, 1)
    >>> list(stored_names(module))
    ['guide.net$$$weight', 'guide.net$$$bias']
    """
    names: dict[str, Tensor] = {}
    for module in root.modules():
        if not isinstance(module, PyroModule):
            continue
        prefix = f"{module._pyro_name}." if module._pyro_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names[prefix + name.removesuffix("_unconstrained")] = parameter
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, PyroModule):
                names.update({f"{prefix}{name}$$${inner}": p for inner, p in child.named_parameters()})
    return names


def strangers(owners: dict[str, Tensor]) -> list[str]:
    """The names under which the store has another tensor: it would be read, and trained, in place of the module's.

    >>> import torch
    >>> from pyro_ssm.models.parameter_store import strangers
    >>> strangers({"rate": torch.ones(2)})
    []
    """
    store = pyro.get_param_store()
    return [name for name, own in owners.items() if name in store and store._params[name] is not own]


def refuse_strangers_in_mcmc(model: nn.Module) -> None:
    """Raise where a kernel of MCMC begins with a model that would read the parameters of another.

    In Pyro's default mode a module that ran has put its parameters into a global store under their names, and a second
    model with the same names silently finds those of the first. MCMC does not train them: where their values differ it
    would sample from another posterior than that of this model. A bound model reads nothing from the store.

    Raises:
        RuntimeError: names the parameters.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.models.parameter_store import refuse_strangers_in_mcmc
    >>> refuse_strangers_in_mcmc(ssm.dynamics.LinearNormal(2))
    """
    if not mcmc_begins() or pyro.settings.get("module_local_params") or is_bound(model):
        return
    own, store = stored_names(model), pyro.get_param_store()
    if found := [name for name in strangers(own) if not _same(store._params[name], own[name])]:
        raise RuntimeError(
            f"MCMC would run on the values that Pyro's global parameter store has for {found}, which belong to another "
            "model or guide, and not on this model's own. Call pyro.clear_param_store() first"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
