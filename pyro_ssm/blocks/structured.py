"""The protocol of structured state-space blocks: sequences, single steps, true gaps, skipped steps, fresh starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks._sequence import check_sequence, wide

__all__ = ["Bank", "StructuredBlock", "log_steps"]

_ALIGNED_FROM = 8  # steps from which moving skipped steps to the front and convolving beats the recurrence


class StructuredBlock(PyroModule):
    """A causal map between sequences that carries a state: S4, Mamba and their kin.

    .. math:: (y_{1:T}, s_T) = \\text{block}(u_{1:T}, s_0)

    ``forward(u, state=None, dt=None, mask=None, reset=None) -> (y, state)`` maps ``(..., time, in_features)`` to
    ``(..., time, out_features)``; leading dims (particles, draws, series) are arbitrary. ``step(u_t, state, dt=None)
    -> (y_t, state)`` is one step of it, without a time axis, and ``start(shape)`` the state before the first step: a
    tensor or a nested tuple of tensors whose leading dims are ``shape``. A sequence in pieces, each with the state that
    the piece before left, is the whole sequence.

    Args of ``forward``:

    * ``dt``: ``(..., time)`` true time since the step before, in units of the block's own step (1 by default), not
      negative (its values are not looked at: that would wait for the device). The time-invariant blocks discretise each
      step by it; each class says what it means there.
    * ``mask``: bool ``(..., time)``; a step that is False (padding, missing) is not there: the state stands exactly
      still, its gap is not counted (where time passes over it, add its gap to that of the next step), the output is 0,
      and what ``u`` and ``dt`` hold there (NaN included) changes nothing, gradients neither.
    * ``reset``: bool ``(..., time)``; where True the block starts afresh before the step (packed sequences).

    A block in half precision (``block.bfloat16()``) keeps its complex states, and computes them, in float32. Under
    ``torch.compile(fullgraph=True)`` compile a bound copy (``pyro_ssm.binding.bind(block)``): a call of a PyroModule
    enters a context that graphs cannot hold.

    Every parameter may have a prior or be bound as ``(*draws, *plates, 1, *event)``. ``slow_parameters`` names those
    that want a smaller learning rate and no weight decay (see :func:`pyro_ssm.infer.parameter_groups`). A subclass
    defines ``start`` and ``_run``.

    >>> import torch
    >>> from pyro_ssm.blocks import S4D
    >>> block = S4D(4)
    >>> y, state = block(torch.zeros(2, 7, 4))
    >>> y_next, state = block.step(torch.zeros(2, 4), state, dt=0.5)
    >>> y.shape, y_next.shape
    (torch.Size([2, 7, 4]), torch.Size([2, 4]))
    """

    in_features: int
    out_features: int
    slow_parameters: ClassVar[tuple[str, ...]] = ()
    #: whether the block ends with a map over all channels and a nonlinearity of its own
    mixes_channels: ClassVar[bool] = False
    #: last dims of each leaf of a state that are no leading dims; None: all that ``start(())`` has
    state_dims: ClassVar[int | None] = None

    def start(self, shape: torch.Size | tuple[int, ...]) -> Any:
        """The state before the first step, for leading dims ``shape``."""
        raise NotImplementedError(f"{type(self).__name__} must define start(shape)")

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The map itself; ``u`` and ``dt`` are clean where the mask is False."""
        raise NotImplementedError(f"{type(self).__name__} must define _run(u, state, dt, mask, reset)")

    def forward(
        self,
        u: Tensor,
        state: Any = None,
        dt: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """A whole sequence ``(..., time, in_features)``."""
        name = type(self).__name__.removeprefix("Bound")
        if u.dim() < 2 or u.shape[-1] != self.in_features:
            raise ValueError(
                f"{name} has in_features={self.in_features}, got `u` of shape {tuple(u.shape)}; "
                f"wanted (..., time, {self.in_features})"
            )
        check_sequence(name, u, self.start(()), state, self.state_dims, dt=dt, mask=mask, reset=reset)
        dt = None if dt is None else dt.to(u.dtype)
        if mask is None:
            return self._run(u, state, dt, None, reset)
        shapes = [u.shape[:-2], mask.shape[:-1]] + ([] if dt is None else [dt.shape[:-1]])
        mask = mask.expand(torch.broadcast_shapes(*shapes) + mask.shape[-1:])
        here, zero = mask.unsqueeze(-1), torch.zeros((), dtype=u.dtype, device=u.device)
        dt = None if dt is None else dt.where(mask, zero)
        y, state = self._run(u.where(here, zero), state, dt, mask, reset)
        return y.where(here, zero), state

    def step(self, u_t: Tensor, state: Any, dt: Tensor | float | None = None) -> tuple[Tensor, Any]:
        """One step ``(..., in_features)`` from ``state``; ``dt`` is a number or ``(...)``."""
        gap = None if dt is None else torch.as_tensor(dt, dtype=u_t.dtype, device=u_t.device).unsqueeze(-1)
        y, state = self(u_t.unsqueeze(-2), state, dt=gap)
        return y.squeeze(-2), state


def gap_of(u: Tensor, dt: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The gaps ``(..., time)``, 0 at skipped steps; None where all are 1."""
    if mask is None:
        return dt
    return mask.to(u.dtype) if dt is None else dt


class Bank(StructuredBlock):
    """One single-input, single-output system a channel, beside a direct way: what S4, S4D, DSS and LSSL share.

    .. math:: y_{td} = \\text{system}_d(u_{\\cdot d})_t + D_d u_{td}

    A subclass defines ``_system(u, gap, state, reset)``; without gaps, resets and states it may convolve.

    >>> from pyro_ssm.blocks import S4D
    >>> from pyro_ssm.blocks.structured import Bank
    >>> issubclass(S4D, Bank)
    True
    """

    def __init__(self, features: int, state_size: int, step_range: tuple[float, float], even: bool = True) -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.state_size = check_size("state_size", state_size, least=2 if even else 1)
        if even and state_size % 2:
            raise ValueError(f"`state_size` must be even (eigenvalues come in pairs), got {state_size}")
        self.log_step = nn.Parameter(log_steps(features, step_range))
        self.direct = nn.Parameter(torch.randn(features))

    def _system(
        self, u: Tensor, gap: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        alone, given = dt is None and state is None and reset is None, u
        u, dt = wide(u), None if dt is None else wide(dt)
        if mask is not None and alone and u.shape[-2] >= _ALIGNED_FROM:
            # Steps that are not there, moved to the front, find the state at zero and leave it there.
            u = u.expand(mask.shape + u.shape[-1:])
            order = torch.argsort(mask.to(torch.int8), dim=-1, stable=True)
            moved = u.gather(-2, order.unsqueeze(-1).expand(u.shape))
            y, state = self._system(moved, None, None, None)
            back = torch.argsort(order, dim=-1).unsqueeze(-1)
            y = y.gather(-2, back.expand(y.shape))
        else:
            y, state = self._system(u, gap_of(u, dt, mask), state, reset)
        return self._with_direct(y, given), state

    def _with_direct(self, y: Tensor, u: Tensor) -> Tensor:
        """What the system gives beside the direct way; halves, which are computed in float32, come back as halves."""
        return (y + u * self.direct).to(torch.promote_types(u.dtype, self.direct.dtype))

    def _step(self, gap: Tensor | None) -> Tensor:
        """The steps ``(..., time or 1, D)``."""
        step = wide(self.log_step).exp()
        step = step if step.dim() > 1 else step.unsqueeze(0)
        return step if gap is None else step * gap.unsqueeze(-1)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, state_size={self.state_size}"


def log_steps(size: int, step_range: tuple[float, float]) -> Tensor:
    """Logarithms of first steps, uniform between those of ``step_range``.

    >>> from pyro_ssm.blocks.structured import log_steps
    >>> bool((log_steps(8, (0.01, 0.1)).exp() <= 0.1).all())
    True
    """
    low, high = step_range
    if not 0 < low <= high < math.inf:
        raise ValueError(f"`step_range` must be 0 < low <= high, got {step_range}")
    return torch.empty(size).uniform_(math.log(low), math.log(high))


def complex_of(real: Tensor, imaginary: Tensor) -> Tensor:
    """A complex tensor from two real ones that broadcast (a drawn one and a learned one, for instance)."""
    return torch.complex(*torch.broadcast_tensors(wide(real), wide(imaginary)))


def check_method(method: str) -> str:
    """``method`` if it discretises."""
    return check_choice("method", method, ("zoh", "bilinear"))


#: event dims of the parameters that banks have
BANK_DIMS: Mapping[str, int] = {"log_step": 1, "direct": 1}
