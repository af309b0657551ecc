"""A nonlinear Gaussian model over one data set: its laws, linearised step by step or all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian, Gaussian
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_parts
from pyro_ssm.infer.gaussian.linearise import Law, Linearisation
from pyro_ssm.infer.gaussian.system import INSTEAD, check_request, check_values
from pyro_ssm.models.laws import batch_shape
from pyro_ssm.models.linear_gaussian import initial_moments, over_time

__all__ = ["NonlinearSystem", "nonlinear_system"]


class NonlinearSystem(NamedTuple):
    """What the Gaussian-approximate filters read off a bound model and its data; ``lead`` is ``(*draws, *batch)``.

    >>> from pyro_ssm.infer.gaussian.nonlinear import NonlinearSystem
    >>> NonlinearSystem._fields[:3]
    ('method', 'model', 'data')
    """

    method: str
    model: Any  # bound
    data: TimeSeries
    mean: Tensor  # (*lead, state)  of the first state
    scale_tril: Tensor  # (*lead, state, state)
    values: Tensor  # (*batch, observed, obs)
    mask: Tensor  # bool, as values
    step_mask: Tensor | None  # bool (*batch, time), False on padding; None without padding
    observed_index: list[int] | None  # the times of the values; None where every time has them
    fixed_transition: Affine | None  # of a transition that is affine
    fixed_emission: Affine | None
    state_dtype: torch.dtype  # in which the components are called; all else has the dtype of ``mean``

    @property
    def num_times(self) -> int:
        """Size of the latent time axis."""
        return self.data.num_times

    def transition_law(self, now: slice) -> Law:
        """States ``(..., len(now), state)`` to the laws of the next ones; ``now`` counts moves."""
        times, inputs = self.data.times, self.data.inputs
        args = times[..., :-1][..., now], times[..., 1:][..., now], _held(inputs, now)
        return lambda state: self.model.transition(state.to(self.state_dtype), *args)

    def emission_law(self, now: slice) -> Law:
        """States ``(..., len(now), state)`` to the laws of the observations; ``now`` counts observed times."""
        times, inputs, index = self.data.observed_times, self.data.inputs, self.data.observed_index
        if inputs is not None and index is not None:
            inputs = inputs[..., index, :]
        args = times[..., now], _held(inputs, now)
        return lambda state: self.model.emission(state.to(self.state_dtype), *args)

    def transition(self, linearise: Linearisation, now: slice, mean: Tensor, scale_tril: Tensor) -> Affine:
        """The moves ``now`` as affine laws around ``mean`` ``(..., len(now), state)``."""
        if self.fixed_transition is not None:
            return _at(self.fixed_transition, now)
        law = linearise(self.transition_law(now), mean, scale_tril)
        real = None if self.step_mask is None else self.step_mask[..., 1:][..., now]
        self.check_finite("transition from", now, mean, law, real)
        return law

    def emission(self, linearise: Linearisation, now: slice, mean: Tensor, scale_tril: Tensor) -> Affine:
        """The observations ``now`` as affine laws around ``mean`` ``(..., len(now), state)``."""
        if self.fixed_emission is not None:
            return _at(self.fixed_emission, now)
        law = linearise(self.emission_law(now), mean, scale_tril)
        self.check_finite("emission at", now, mean, law, self.mask.any(-1)[..., now])
        return law

    def check_finite(self, what: str, now: slice, mean: Tensor, law: tuple[Tensor, ...], real: Tensor | None) -> None:
        """Raise where a law ``(offset or mean, ...)`` of a real step is not finite; parts ``(..., time, *event)``."""
        event_dim = mean.dim() - 1
        total = torch.stack([part.detach().flatten(event_dim).sum(-1) for part in law]).sum(0)
        bad = ~total.isfinite() if real is None else ~total.isfinite() & real
        if not bool(bad.any()):
            return
        position = bad.nonzero()[bad.nonzero()[:, -1].argmin()].tolist()  # the earliest
        *series, k = position
        index = now.start + k
        if what == "emission at" and self.observed_index is not None:
            index = self.observed_index[index]
        series = series[len(series) - len(self.data.batch_shape) :]
        own = self.data.times[tuple(series)] if self.data.has_own_times else self.data.times
        state = mean.expand(bad.shape + mean.shape[-1:])[tuple(position)]
        where = f"time index {index} (t = {own[index].item():g}) of {self.data._series_name(tuple(series))}"
        if not bool(state.isfinite().all()):
            raise ValueError(
                f"{self.method}: the law of the state is no longer finite at {where}, although every law of the model "
                "was finite before. The covariance of an observation may be singular: give the emission some noise"
            )
        raise ValueError(
            f"{self.method}: the {what} {where} has a mean, a derivative or a scale that is not finite, for a state "
            f"near {[round(x, 4) for x in state.tolist()]}. Check that component's function there; bound what may "
            "overflow or leave its domain (clamp before a logarithm or a square root)"
        )


def nonlinear_system(model: Any, data: TimeSeries, method: str, use_affine: bool = True) -> NonlinearSystem:
    """Bind the model, check what ``method`` needs, and make ready its laws at the times of ``data``.

    An affine component is used by its matrices, which every linearisation would find, unless ``use_affine`` is False.

    Raises:
        TypeError: a component is not ``Gaussian``, the start is diffuse, or the model has a memory.
        ValueError: the data has no values, or another width than the emission.

    >>> from pyro_ssm.infer.gaussian.nonlinear import nonlinear_system
    >>> nonlinear_system.__name__
    'nonlinear_system'
    """
    check_request(model, method, Gaussian, INSTEAD)
    check_values(data, method)
    bound = model.bind()
    held = None if data.inputs is None else data.inputs[..., :1, :]
    mean, scale_tril, diffuse = initial_moments(bound, data.times[..., :1], held)
    if diffuse is not None:
        raise TypeError(
            f"{method} linearises around a proper law, and {type(bound.initial).__name__.removeprefix('Bound')} is "
            "diffuse. Give a proper start (dynamics.NormalInitial), or use kalman_filter where the model is linear"
        )
    index = data.observed_index
    system = NonlinearSystem(
        method,
        bound,
        data,
        mean,
        scale_tril,
        data.values,
        data.mask,
        data.step_mask if data.is_ragged else None,
        None if index is None else index.tolist(),
        _fixed_transition(bound, data) if use_affine else None,
        _fixed_emission(bound, data) if use_affine else None,
        mean.dtype,
    )
    lead = torch.broadcast_shapes(
        batch_shape(bound, data), data.values.shape[:-2], mean.shape[:-1], scale_tril.shape[:-2]
    )
    dtype = torch.promote_types(torch.promote_types(data.values.dtype, mean.dtype), scale_tril.dtype)
    first = mean.expand(lead + mean.shape[-1:]).unsqueeze(-2)
    moves = [(system.fixed_transition, system.transition_law)] if data.num_times > 1 else []
    for fixed, law_at in [*moves, (system.fixed_emission, system.emission_law)]:
        own_lead, own_dtype, width = _first(fixed, law_at, first)
        lead, dtype = torch.broadcast_shapes(lead, own_lead), torch.promote_types(dtype, own_dtype)
    if width != data.values.shape[-1]:
        raise ValueError(f"`data.values` has {data.values.shape[-1]} columns, but the emission gives {width}")
    return system._replace(
        mean=mean.to(dtype).expand(lead + mean.shape[-1:]),
        scale_tril=scale_tril.to(dtype).expand(lead + scale_tril.shape[-2:]),
        values=data.values.to(dtype),
        fixed_transition=system.fixed_transition and over_time(system.fixed_transition, dtype),
        fixed_emission=system.fixed_emission and over_time(system.fixed_emission, dtype),
    )


def _first(fixed: Affine | None, law_at: Callable[[slice], Law], state: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    """Leading dims (those of the parameters among them), dtype and width of a component's laws, from the first step."""
    if fixed is not None:
        matrix, offset, scale_tril = _at(over_time(fixed, fixed.matrix.dtype), slice(0, 1))
        lead = torch.broadcast_shapes(matrix.shape[:-3], offset.shape[:-2], scale_tril.shape[:-3])
        dtype = torch.promote_types(fixed.offset.dtype, fixed.scale_tril.dtype)
        return lead, torch.promote_types(fixed.matrix.dtype, dtype), offset.shape[-1]
    with torch.no_grad():
        loc, root, _ = gaussian_parts(law_at(slice(0, 1))(state))
    return loc.shape[:-2], torch.promote_types(loc.dtype, root.dtype), loc.shape[-1]


def _fixed_transition(bound: Any, data: TimeSeries) -> Affine | None:
    if data.num_times < 2 or not isinstance(bound.transition, AffineGaussian):
        return None
    times, inputs = data.times, data.inputs
    return bound.transition.affine(times[..., :-1], times[..., 1:], _held(inputs, slice(0, data.num_times - 1)))


def _fixed_emission(bound: Any, data: TimeSeries) -> Affine | None:
    if not isinstance(bound.emission, AffineGaussian):
        return None
    inputs, index = data.inputs, data.observed_index
    return bound.emission.affine(
        data.observed_times, inputs if inputs is None or index is None else inputs[..., index, :]
    )


def _held(inputs: Tensor | None, now: slice) -> Tensor | None:
    return None if inputs is None else inputs[..., now, :]


def _at(law: Affine, now: slice) -> Affine:
    """The steps ``now`` of a law; a time size of 1 stands for all."""
    parts = []
    for part, event in zip(law, (2, 1, 2), strict=True):
        dim = part.dim() - event - 1
        parts.append(part if part.shape[dim] == 1 else part.movedim(dim, 0)[now].movedim(0, dim))
    return Affine(*parts)
