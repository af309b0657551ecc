"""A switching linear model as matrices, one set a regime: what its filters read off a bound model and its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import SwitchingInitial, SwitchingLinear
from pyro_ssm.emissions import SwitchingLinear as SwitchingEmission
from pyro_ssm.infer.discrete.system import check_observed, held_inputs, seen_steps
from pyro_ssm.models.laws import batch_shape
from pyro_ssm.ops.finite import log_identity

__all__ = ["SwitchingStep", "SwitchingSystem", "switching_system"]


class SwitchingStep(NamedTuple):
    """The matrices of one step with a dim K of regimes before their events, and what is seen.

    >>> from pyro_ssm.infer.discrete import SwitchingStep
    >>> SwitchingStep._fields
    ('transition', 'emission', 'values', 'mask')
    """

    transition: Affine | None  # (..., K, n, n), (..., K, n), (..., K, n, n): into this time; None at the first
    emission: Affine | None  # (..., K, obs, n), ...; None where nothing can be seen
    values: Tensor | None  # (*batch, obs)
    mask: Tensor | None  # bool, as values


@dataclass(frozen=True)
class SwitchingSystem:
    """The matrices of a switching linear model over one data set, leading dims and time broadcast.

    >>> from pyro_ssm.infer.discrete import SwitchingSystem
    >>> "log_initial" in SwitchingSystem.__dataclass_fields__
    True
    """

    bound: Any
    data: TimeSeries
    log_initial: Tensor  # (..., K)
    mean: Tensor  # (..., K, n)  of the first x
    scale_tril: Tensor  # (..., K, n, n)
    log_transition: Tensor | None  # (..., time - 1 or 1, K, K)  None for a recurrent model
    transition: Affine  # (..., time - 1 or 1, K, n, n), ...
    emission: Affine  # (..., observed or 1, K, obs, n), ...
    values: Tensor  # (*batch, observed, obs)
    mask: Tensor
    seen: Tensor  # bool (*batch, time)
    lead: torch.Size  # (*draws, *batch)

    @property
    def num_regimes(self) -> int:
        """K."""
        return self.mean.shape[-2]

    @property
    def num_times(self) -> int:
        """Size of the latent time axis."""
        return self.data.num_times

    def step(self, k: int) -> SwitchingStep:
        """The matrices into time k, and what is seen there."""
        index = self.data.observed_index
        at = k if index is None else {int(t): j for j, t in enumerate(index)}.get(k)
        into = None if k == 0 else _at(self.transition, k - 1)
        if at is None:
            return SwitchingStep(into, None, None, None)
        return SwitchingStep(into, _at(self.emission, at), self.values[..., at, :], self.mask[..., at, :])

    def real(self, k: int) -> Tensor | None:
        """Which series have a time k, bool ``(*batch,)``; None if all have."""
        if not self.data.is_ragged or bool((self.data.lengths > k).all()):
            return None
        return self.data.lengths > k

    def log_matrix(self, k: int, mean: Tensor, scale_tril: Tensor) -> Tensor:
        """:math:`\\log P(s_k = j \\mid s_{k-1} = i)` ``(..., K, K)``, given the law of x in each regime at k - 1.

        A recurrent model's is averaged over that law by the 2 n points of the spherical rule, :math:`m_i \\pm \\sqrt{n}
        L_i e_c`.
        """
        if self.log_transition is not None:
            return self.log_transition[..., min(k, self.log_transition.shape[-3]) - 1, :, :]
        n = mean.shape[-1]
        arms = n**0.5 * scale_tril.mT  # (*lead, K, points, n)
        points = torch.cat([mean.unsqueeze(-2) + arms, mean.unsqueeze(-2) - arms], -2)
        x = points.movedim((-3, -2), (0, 1)).unsqueeze(-2)  # (K, points, *lead, 1, n)
        times, inputs = self.data.times, held_inputs(self.data.inputs, slice(k - 1, k))
        table = self.bound.transition.log_matrix(times[..., k - 1 : k], times[..., k : k + 1], inputs, x)
        table = table.expand(x.shape[:-1] + table.shape[-2:]).squeeze(-3).logsumexp(1)
        rows = table.diagonal(dim1=0, dim2=-2).mT  # (*lead, i, j): row i at the points of regime i
        return rows - torch.tensor(2.0 * n, dtype=rows.dtype, device=rows.device).log()


def _at(law: Affine, k: int) -> Affine:
    """One step of an affine law with regimes; a time size of 1 stands for all."""
    return Affine(*(part.select(-2 - event, min(k, part.shape[-2 - event] - 1)) for part, event in zip(law, (2, 1, 2))))


def switching_system(model: Any, data: TimeSeries, method: str = "switching_system") -> SwitchingSystem:
    """Bind a switching linear model, check what ``method`` needs, and evaluate its matrices at the times of ``data``.

    Raises:
        TypeError: a part is not of the switching kind, or the model has a memory.
        ValueError: the data has no values, or the numbers of regimes differ.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.discrete import switching_system
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1)] * 2),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> switching_system(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1))).step(1).transition.matrix.shape
    torch.Size([2, 1, 1])
    """
    wanted = (("initial", SwitchingInitial), ("transition", SwitchingLinear), ("emission", SwitchingEmission))
    for name, kind in wanted:
        part = getattr(model, name)
        if not isinstance(part, kind):
            place = "emissions" if name == "emission" else "dynamics"
            raise TypeError(
                f"{method} needs a switching linear model, got {name} {type(part).__name__.removeprefix('Bound')}. "
                f"Build it with {place}.{kind.__name__}; or use kalman_filter (one regime), hmm_filter "
                "(finite states), or a particle filter"
            )
    numbers = {name: getattr(model, name).num_regimes for name, _ in wanted}
    if len(set(numbers.values())) > 1:
        raise ValueError(f"the parts have different numbers of regimes: {numbers}")
    check_observed(model, data, method)
    bound = model.bind()
    times, inputs, index = data.times, data.inputs, data.observed_index
    first = held_inputs(inputs, slice(0, 1))
    mean, scale_tril = bound.initial.by_regime(times[..., :1], first)
    log_initial = bound.initial.chain.log_weights(times[..., :1], first)[..., 0, :]
    at_observed = inputs if inputs is None or index is None else inputs[..., index, :]
    emission = bound.emission.by_regime(data.observed_times, at_observed)
    K, n = mean.shape[-2:]
    log_transition = None
    if data.num_times > 1:
        moves = times[..., :-1], times[..., 1:], held_inputs(inputs, slice(0, -1))
        transition = bound.transition.by_regime(*moves)
        if not bound.transition.recurrent:
            log_transition = bound.transition.log_matrix(*moves)
    else:
        transition = Affine(mean.new_zeros(1, K, n, n), mean.new_zeros(1, K, n), mean.new_zeros(1, K, n, n))
        log_transition = mean.new_zeros(1, K, K)
    if log_transition is not None and data.is_ragged:
        stay = log_identity(K, log_transition)
        log_transition = torch.where(data.step_mask[..., 1:, None, None], log_transition, stay)
    dtype = data.values.dtype
    for tensor in (mean, scale_tril, *transition, *emission):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return SwitchingSystem(
        bound,
        data,
        log_initial.to(dtype),
        mean[..., 0, :, :].to(dtype),
        scale_tril[..., 0, :, :, :].to(dtype),
        None if log_transition is None else log_transition.to(dtype),
        Affine(*(part.to(dtype) for part in transition)),
        Affine(*(part.to(dtype) for part in emission)),
        data.values.to(dtype),
        data.mask,
        seen_steps(data),
        batch_shape(bound, data),
    )
