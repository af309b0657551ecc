"""What an affine Gaussian transition does at every step of one data set, computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import SingularNormal, affine_law
from pyro_ssm.distributions.diagonal_normal import MovedNormal
from pyro_ssm.infer.smc.step_index import StepIndex

__all__ = ["AffineMoves"]

_MOST = 2**24  # numbers in the matrices of all steps: where there are more, each step makes its own


class AffineMoves:
    """The laws of an affine transition: :math:`N(A_k z + b_k, L_k L_k^T)`, with L often diagonal.

    All that depends on times and inputs is evaluated at once, for all steps, when a run meets its second step; a step
    is then two products. The law is that of ``transition(...)`` up to rounding. Where that does not hold (another kind
    of transition, laws that depend on memory) or does not help (gradients are wanted, and the graph of a step is to be
    its own), there is no law here.

    Args:
        transition: bound.
        data: the times and inputs.
        remembers: whether the model has a memory.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc.affine_moves import AffineMoves
    >>> data = ssm.TimeSeries(torch.tensor([0.0, 1.0, 3.0]), torch.zeros(3, 1))
    >>> with torch.no_grad():
    ...     moves = AffineMoves(ssm.dynamics.OrnsteinUhlenbeck(1), data, False)
    ...     moves.law(2, torch.ones(5, 1, 1)).loc[0]
    tensor([[0.1353]])
    """

    def __init__(self, transition: Any, data: TimeSeries, remembers: bool) -> None:
        #: of independent noise; what a compiled run takes
        self.steps: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._steps: list[tuple[Tensor, Tensor, Tensor]] | None = None  # of any noise
        self._whole: tuple[tuple[Tensor, int], ...] = ()
        self._parameters = list(transition.parameters())
        self._versions = _versions(self._parameters)
        if remembers or torch.is_grad_enabled() or not isinstance(transition, AffineGaussian) or data.num_times < 2:
            return
        if not issubclass(_definer(transition, "affine"), _definer(transition, "forward")):
            return  # a subclass changed the law and left its matrices: the law is what counts
        times, inputs = data.times, None if data.inputs is None else data.inputs[..., :-1, :]
        if times.numel() > _MOST:
            return
        matrix, offset, root = transition.affine(times[..., :-1], times[..., 1:], inputs)
        if matrix.numel() > _MOST:
            return
        scale = root.diagonal(dim1=-2, dim2=-1)
        independent = bool(((root == scale.diag_embed()) & (scale > 0).unsqueeze(-1)).all())
        self._whole = ((matrix, -3), (offset, -2), (scale, -2) if independent else (root, -3))
        num = data.num_times - 1
        self._steps = list(zip(*(_of_steps(x, dim, num) for x, dim in self._whole), strict=True))
        self.steps = self._steps if independent else None

    @property
    def is_stale(self) -> bool:
        """Whether a parameter was changed in place since."""
        return self._versions != _versions(self._parameters)

    def law(self, k: StepIndex, state: Tensor) -> MovedNormal | SingularNormal | None:
        """Of :math:`z_k` given z[k - 1] ``(N, *batch, 1, state)``; None where the transition itself is to be asked."""
        if self._steps is None or torch.is_grad_enabled():
            return None
        if isinstance(k, Tensor):
            now = tuple(x if _is_shared(x, dim) else x.index_select(dim, k - 1) for x, dim in self._whole)
        else:
            now = self._steps[k - 1]
        return affine_law(Affine(*now), state) if self.steps is None else MovedNormal(state, *now)


def _versions(parameters: list[Tensor]) -> list[int]:
    """How often each was changed in place; those made in inference mode do not count."""
    return [0 if x.is_inference() else x._version for x in parameters]


def _definer(component: Any, name: str) -> type:
    """The class that defines a method."""
    return next(cls for cls in type(component).__mro__ if name in vars(cls))


def _is_shared(x: Tensor, dim: int) -> bool:
    """Whether all steps have the same."""
    return x.dim() < -dim or x.shape[dim] == 1


def _of_steps(x: Tensor, dim: int, num: int) -> list[Tensor]:
    """One tensor a step, with a time axis of 1, contiguous."""
    if _is_shared(x, dim):
        return [x.contiguous()] * num
    return [now.contiguous() for now in x.split(1, dim)]
