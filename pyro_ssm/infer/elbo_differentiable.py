"""What the bounds of this package share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from torch import Tensor

from pyro_ssm.infer.elbo_weights import refuse_score_function

__all__ = ["DifferentiableELBO"]


class DifferentiableELBO(ELBO):
    """What a bound with ``differentiable_loss`` owes to Pyro besides.

    >>> from pyro_ssm.infer.elbo import IWAE, DifferentiableELBO
    >>> issubclass(IWAE, DifferentiableELBO)
    True
    """

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define differentiable_loss(model, guide, *args)")

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> float:
        """The negative bound, a number."""
        return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> float:
        """The negative bound; adds its gradient to the parameters (for ``pyro.infer.SVI``)."""
        loss = self.differentiable_loss(model, guide, *args)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        traces = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        refuse_score_function(traces[1])
        return traces
