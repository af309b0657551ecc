"""What can go wrong in a step of a differential equation, said with the time, the series and the norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_ssm.ops import SolverError
from pyro_ssm.ops.reading import may_read

__all__ = ["check_scale", "check_steps", "tensors_with_gradient"]


def check_steps(moved: Tensor, state: Tensor, time: Tensor, what: str) -> Tensor:
    """``moved`` ``(..., time, state)``, the states after steps from ``state``, if they are finite."""
    if not may_read() or bool(torch.isfinite(moved.detach().sum())):
        return moved
    bad = ~moved.detach().isfinite().all(-1)
    if not bool(bad.any()):
        return moved
    at = tuple(bad.nonzero()[0].tolist())
    raise SolverError(
        f"{what} is not finite {_where(at, bad, state, time)}. It blows up or returns NaN there: refine the grid "
        "(data.refine), bound the field, or start nearer to the data"
    )


def check_scale(scale: Tensor, state: Tensor, time: Tensor) -> Tensor:
    """``scale`` ``(..., time, state)`` if it is positive and finite everywhere."""
    if not may_read() or bool(torch.isfinite(scale.detach().log().sum())):
        return scale
    bad = ~((scale.detach() > 0) & scale.detach().isfinite()).all(-1)
    if not bool(bad.any()):
        return scale
    at = tuple(bad.nonzero()[0].tolist())
    raise FloatingPointError(
        f"the diffusion has the scale {scale.detach()[at].tolist()} {_where(at, bad, state, time)}, and a path has a "
        'density only where it is positive. For a degenerate diffusion use NeuralSDE(..., site="noise")'
    )


def _where(at: tuple[int, ...], bad: Tensor, state: Tensor, time: Tensor) -> str:
    lead, k = at[:-1], at[-1]
    shape = torch.broadcast_shapes(bad.shape, state.shape[:-1], time.shape)
    at = (0,) * (len(shape) - len(at)) + at
    norm = float(state.detach().expand(shape + state.shape[-1:])[at].norm())
    series = f"series {lead if len(lead) > 1 else lead[0]}" if lead else "the series"
    return f"at step {k} (time {float(time.expand(shape)[at]):.6g}) of {series}, where the state has norm {norm:.4g}"


def tensors_with_gradient(module: nn.Module) -> list[Tensor]:
    """What the fields of a bound module read and what needs a gradient: drawn and constrained values as they stand."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        drawn = {name: value for name, value in part.__dict__.items() if isinstance(value, Tensor)}
        own = {n: p for n, p in part._parameters.items() if n.removesuffix("_unconstrained") not in drawn}
        for value in (*drawn.values(), *own.values()):
            if value is not None and value.requires_grad:
                found[id(value)] = value
    return list(found.values())
