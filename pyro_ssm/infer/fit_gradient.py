"""Two ways to the gradient of a bound: an ELBO as a module, and Pyro's global parameter store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.models.parameter_store import stored_names, strangers

__all__ = [
    "AbstractGradient",
    "EmptyGuide",
    "ModuleGradient",
    "StoreGradient",
    "gradient_of",
    "has_differentiable_loss",
]


class EmptyGuide(PyroModule):
    """A guide for models without latent sites: the bound is then the log-likelihood itself.

    >>> from pyro_ssm.infer.fit_gradient import EmptyGuide
    >>> EmptyGuide()(None) is None
    True
    """

    def __init__(self) -> None:
        super().__init__(name="guide")

    def forward(self, data: Any) -> None:
        """Sample nothing."""
        return None


def has_differentiable_loss(loss: ELBO) -> bool:
    """Whether an ELBO works as a module (``RenyiELBO``, ``TraceGraph_ELBO`` and ``ReweightedWakeSleep`` do not).

    >>> from pyro.infer import RenyiELBO, Trace_ELBO
    >>> from pyro_ssm.infer.fit_gradient import has_differentiable_loss
    >>> has_differentiable_loss(Trace_ELBO()), has_differentiable_loss(RenyiELBO())
    (True, False)
    """
    return callable(getattr(loss, "differentiable_loss", None))


def _module(program: Callable[..., Any]) -> nn.Module | None:
    """The module inside effect handlers (``pyro.condition(model, ...)``); None for a plain function."""
    inner = poutine.unwrap(program)
    return inner if isinstance(inner, nn.Module) else None


class AbstractGradient(ABC):
    """How to get the loss and its gradient; the parameters exist after :meth:`initialise`.

    >>> from pyro_ssm.infer.fit_gradient import AbstractGradient, ModuleGradient
    >>> issubclass(ModuleGradient, AbstractGradient)
    True
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], loss: ELBO) -> None:
        self.model, self.guide = model, guide
        self.loss: Any = loss  # an ELBO does not declare its losses
        self.modules = {name: m for name, m in (("model", _module(model)), ("guide", _module(guide))) if m is not None}
        self.parameters: dict[str, Tensor] = {}

    @abstractmethod
    def context(self) -> AbstractContextManager[Any]:
        """Where everything must run."""

    def initialise(self, batch: Any) -> None:
        """Run model and guide once, so that parameters that are made lazily exist."""
        with poutine.trace(param_only=True) as capture:
            self.evaluate(self.loss, batch)
        self.parameters = {
            f"{root}.{name}": p for root, module in self.modules.items() for name, p in module.named_parameters()
        }
        owned = {id(p) for p in self.parameters.values()}
        for name, site in capture.trace.nodes.items():  # pyro.param statements of plain functions
            value: Any = site["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if id(leaf) not in owned:
                self.parameters[name] = leaf
        self.parameters = {name: p for name, p in self.parameters.items() if p.requires_grad}

    @abstractmethod
    def loss_and_grads(self, batch: Any, divisor: int) -> Tensor:
        """The loss (nats, detached); adds the gradient of ``loss / divisor`` to the parameters."""

    def evaluate(self, loss: Any, data: Any) -> float:
        """A loss (nats) without gradient."""
        with torch.no_grad():
            value = loss.loss(self.model, self.guide, data)
        return float(value[0] if isinstance(value, tuple) else value)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of model and guide."""
        for module in self.modules.values():
            module.train(mode)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything that is learned, and the buffers; ``functions`` are the parameters of plain functions."""
        state = {root: dict(module.state_dict()) for root, module in self.modules.items()}
        return {**state, "functions": {name: p.detach() for name, p in self._loose().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy a state into the present tensors."""
        for root, module in self.modules.items():
            module.load_state_dict(state[root])
        for name, parameter in self._loose().items():
            parameter.copy_(state["functions"][name])

    def _loose(self) -> dict[str, Tensor]:
        owned = {id(p) for module in self.modules.values() for p in module.parameters()}
        return {name: p for name, p in self.parameters.items() if id(p) not in owned}


class ModuleGradient(AbstractGradient):
    """The gradient of ``loss.differentiable_loss``; each module owns its parameters."""

    def context(self) -> AbstractContextManager[Any]:
        """Without the global store."""
        return local_parameters()

    def loss_and_grads(self, batch: Any, divisor: int) -> Tensor:
        """Forward and backward."""
        value = self.loss.differentiable_loss(self.model, self.guide, batch)
        if isinstance(value, Tensor) and value.requires_grad:
            (value / divisor).backward()
        return torch.as_tensor(value).detach()


class StoreGradient(AbstractGradient):
    """``loss.loss_and_grads`` as ``pyro.infer.SVI`` calls it, with parameters in Pyro's global store."""

    def context(self) -> AbstractContextManager[Any]:
        """With the global store, which ``loss_and_grads`` needs."""
        return pyro.settings.context(module_local_params=False)

    def initialise(self, batch: Any) -> None:
        """Refuse parameters of others, then run the loss once."""
        self._refuse_strangers()
        super().initialise(batch)

    def _refuse_strangers(self) -> None:
        """A name in the store that belongs to another tensor would be read, and trained, in place of the module's."""
        owners: dict[str, Tensor] = {}
        for module in self.modules.values():
            for name, own in stored_names(module).items():
                if owners.setdefault(name, own) is not own:
                    raise RuntimeError(
                        f"model and guide both call a parameter `{name}`, and would share it silently. "
                        'Name the root of the guide: PyroModule.__init__(name="guide")'
                    )
        if found := strangers(owners):
            raise RuntimeError(
                f"{type(self.loss).__name__} trains through Pyro's global parameter store, in which {found} "
                "belong to another model or guide: this one would not be trained. Call pyro.clear_param_store() first"
            )

    def loss_and_grads(self, batch: Any, divisor: int) -> Tensor:
        """What the ELBO does itself, then the division."""
        value = self.loss.loss_and_grads(self.model, self.guide, batch)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients and divisor != 1:
            torch._foreach_mul_(gradients, 1 / divisor)
        return torch.as_tensor(value[0] if isinstance(value, tuple) else value).detach()


def gradient_of(model: Callable[..., Any], guide: Callable[..., Any], loss: ELBO) -> AbstractGradient:
    """The module way where the loss has ``differentiable_loss``, Pyro's store otherwise.

    >>> from pyro.infer import RenyiELBO
    >>> from pyro_ssm.infer.fit_gradient import EmptyGuide, gradient_of
    >>> type(gradient_of(EmptyGuide(), EmptyGuide(), RenyiELBO())).__name__
    'StoreGradient'
    """
    return (ModuleGradient if has_differentiable_loss(loss) else StoreGradient)(model, guide, loss)
