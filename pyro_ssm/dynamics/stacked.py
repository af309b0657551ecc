"""Motions side by side: independent parts of one state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.components import Affine, AffineGaussian, Component, Diffuse, Gaussian, Initial, Transition
from pyro_ssm.distributions import SingularNormal, affine_law, gaussian_moments
from pyro_ssm.ops import block_diagonal

__all__ = ["Stacked", "StackedDiffuseInitial", "StackedInitial", "stack_initials"]


class _SideBySide(Component):
    """Named children, each with its slice of the state."""

    def _adopt(self, parts: Mapping[str, Any], kind: type, article: str) -> None:
        if not parts:
            raise ValueError("`parts` must hold at least one part, got none")
        for name, part in parts.items():
            if not isinstance(part, kind):
                raise TypeError(f"`parts[{name!r}]` must be {article}, got {type(part).__name__}")
            if not name.isidentifier() or hasattr(self, name):
                raise ValueError(f"`parts` has a part called {name!r}, which is not free: give it another name")
        self.names = tuple(parts)
        self.slices, start = {}, 0
        for name, part in parts.items():
            setattr(self, name, part)
            self.slices[name] = slice(start, start + part.state_dim)
            start += part.state_dim
        self.state_dim = start

    @property
    def parts(self) -> dict[str, Any]:
        """Name -> part, in order of the state; of a bound copy, bound parts."""
        return {name: self._modules[name] for name in self.names}

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}"


class Stacked(_SideBySide, AffineGaussian, Transition):
    """Independent linear Gaussian motions side by side in one state,

    .. math:: z = (z^{(1)}, z^{(2)}, \\dots), \\qquad A = \\text{diag}(A^{(1)}, A^{(2)}, \\dots), \\quad
        L = \\text{diag}(L^{(1)}, L^{(2)}, \\dots).

    Every part gets the same times and all inputs (a part with ``input_dim=0`` ignores them). A parameter keeps its
    part's name: ``transition.level.scale``.

    Args:
        parts: name -> transition that is ``AffineGaussian``.

    Attributes:
        names: of the parts, in order of the state.
        slices: name -> slice of the state.

    Raises:
        TypeError: a part is not an ``AffineGaussian`` transition.
        ValueError: a name is taken or no identifier; or, when called, the state has another size.

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearNormal, OrnsteinUhlenbeck, Stacked
    >>> both = Stacked({"fast": OrnsteinUhlenbeck(1, rate=5.0), "walk": LinearNormal(2)})
    >>> times = torch.arange(3.0).double()
    >>> both(torch.ones(2, 3), times[:-1], times[1:], None).mean.shape, both.slices["walk"]
    (torch.Size([2, 3]), slice(1, 3, None))
    """

    def __init__(self, parts: Mapping[str, Transition]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Transition) and not isinstance(part, AffineGaussian):
                raise TypeError(f"`parts[{name!r}]` must be AffineGaussian, got {type(part).__name__}")
        self._adopt(parts, Transition, "a components.Transition")

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        return affine_law(self.affine(time, next_time, inputs, memory), state)

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The parts' matrices along the diagonal."""
        laws = [part.affine(time, next_time, inputs, memory=memory) for part in self.parts.values()]
        return Affine(
            block_diagonal([with_time(law.matrix, 2) for law in laws]),
            end_to_end([with_time(law.offset, 1) for law in laws]),
            block_diagonal([with_time(law.scale_tril, 2) for law in laws]),
        )


class StackedInitial(_SideBySide, Gaussian, Initial):
    """Independent Gaussian starts side by side, for a :class:`Stacked` transition,

    .. math:: p(z_1) = \\prod_i p(z_1^{(i)}).

    Args:
        parts: name -> initial law that is ``Gaussian``; for diffuse ones see :func:`stack_initials`.

    Raises:
        TypeError: a part is not a ``Gaussian`` initial law, or is diffuse.

    >>> import torch
    >>> from pyro_ssm.dynamics import NormalInitial, OrnsteinUhlenbeck, StackedInitial
    >>> start = StackedInitial({"a": NormalInitial(1), "b": OrnsteinUhlenbeck(2).stationary()})
    >>> start(torch.zeros(1), None).variance.detach()
    tensor([[1.0000, 0.5000, 0.5000]])
    """

    def __init__(self, parts: Mapping[str, Initial]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Initial) and not isinstance(part, Gaussian):
                raise TypeError(f"`parts[{name!r}]` must be a Gaussian law, got {type(part).__name__}")
            if isinstance(part, Diffuse) and not isinstance(self, Diffuse):
                raise TypeError(f"`parts[{name!r}]` is diffuse: use dynamics.stack_initials(parts)")
        self._adopt(parts, Initial, "a components.Initial")

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first state; ``time`` ``(..., 1)``, ``inputs`` ``(..., 1, input)`` or None."""
        laws = [gaussian_moments(part(time, inputs, memory=memory)) for part in self.parts.values()]
        mean, root = end_to_end([mean for mean, _ in laws]), block_diagonal([root for _, root in laws])
        return SingularNormal(mean, scale_tril=root, validate_args=False)


class StackedDiffuseInitial(StackedInitial, Diffuse):
    """Independent starts side by side, of which some are diffuse and others are Gaussian,

    .. math:: z_1 = m + L \\varepsilon + D \\delta, \\qquad \\delta \\sim N(0, \\kappa I), \\; \\kappa \\to \\infty,

    each block-diagonal in the parts. Such a law is improper: it is integrated out by the exact Kalman family, and
    calling it raises.

    Args:
        parts: name -> initial law that is ``Gaussian`` or ``Diffuse``.

    >>> import torch
    >>> from pyro_ssm.dynamics import DiffuseInitial, NormalInitial, StackedDiffuseInitial
    >>> start = StackedDiffuseInitial({"level": DiffuseInitial(1), "rest": NormalInitial(1, scale=2.0)})
    >>> mean, root, diffuse = start.moments(torch.zeros(1), None)
    >>> root[0].detach(), diffuse[0].detach()
    (tensor([[0., 0.],
            [0., 2.]]), tensor([[1.],
            [0.]]))
    """

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """Raise: an improper law has neither draws nor a density."""
        raise TypeError(
            "StackedDiffuseInitial has infinite variance: it cannot be drawn from, and a path has no density under it. "
            "Integrate the states out with infer.kalman_filter or infer.Marginal, or give every part a proper start: "
            "Level().named(None, start=dynamics.NormalInitial(1))"
        )

    def moments(self, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``(..., 1, state)``, root ``(..., 1, state, state)`` and diffuse columns ``(..., 1, state, q)``."""
        laws = [_moments(part, time, inputs) for part in self.parts.values()]
        return (
            end_to_end([with_time(mean, 1) for mean, _, _ in laws]),
            block_diagonal([with_time(root, 2) for _, root, _ in laws]),
            block_diagonal([with_time(columns, 2) for _, _, columns in laws]),
        )


def stack_initials(parts: Mapping[str, Initial]) -> StackedInitial:
    """Initial laws side by side: a :class:`StackedDiffuseInitial` where one is diffuse, else a :class:`StackedInitial`.

    >>> from pyro_ssm.dynamics import DiffuseInitial, NormalInitial, stack_initials
    >>> type(stack_initials({"level": DiffuseInitial(1), "rest": NormalInitial(2)})).__name__
    'StackedDiffuseInitial'
    """
    kind = StackedDiffuseInitial if any(isinstance(part, Diffuse) for part in parts.values()) else StackedInitial
    return kind(parts)


def _moments(part: Any, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(part, Diffuse):
        return part.moments(time, inputs)
    mean, root = gaussian_moments(part(time, inputs))
    return mean, root, root[..., :0]


def end_to_end(vectors: list[Tensor]) -> Tensor:
    """``cat`` along the last dim, leading dims broadcast."""
    lead = torch.broadcast_shapes(*(vector.shape[:-1] for vector in vectors))
    return torch.cat([vector.expand(lead + vector.shape[-1:]) for vector in vectors], -1)
