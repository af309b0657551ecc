"""A linear-Gaussian model as matrices: what the Kalman family reads off a bound model and its data."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian, Diffuse, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.ops.kalman import FilterSteps, hide_rows
from pyro_ssm.ops.linalg import tria, vanishing_pivots

__all__ = [
    "INSTEAD",
    "System",
    "check_affine",
    "check_request",
    "check_values",
    "initial_moments",
    "linear_gaussian_system",
    "no_pivot",
    "noise_is_singular",
    "over_time",
    "require_density",
    "require_finite",
    "require_finite_terms",
    "require_linear_gaussian",
]

INSTEAD = "SVI with a guide (infer.fit)"


class System(NamedTuple):
    """The matrices of a linear-Gaussian model over one data set, leading dims and time broadcast.

    >>> from pyro_ssm.infer.gaussian.system import System
    >>> System._fields[:4]
    ('mean', 'scale_tril', 'transition', 'emission')
    """

    mean: Tensor  # (..., state)  of the first state
    scale_tril: Tensor  # (..., state, state)
    transition: Affine  # time - 1 steps, or 1 for all
    emission: Affine  # observed times, or 1 for all
    values: Tensor  # (*batch, observed, obs)
    mask: Tensor  # bool, as values
    step_mask: Tensor | None  # bool (*batch, time), False on padding; None without padding
    observed_index: list[int] | None  # the times of the values; None where every time has them
    num_times: int
    diffuse: Tensor | None = None  # (..., state, q): directions of infinite variance at first; None: there are none

    def to(self, dtype: torch.dtype) -> System:
        """The same in another floating dtype."""
        return self._replace(
            mean=self.mean.to(dtype),
            scale_tril=self.scale_tril.to(dtype),
            transition=Affine(*(part.to(dtype) for part in self.transition)),
            emission=Affine(*(part.to(dtype) for part in self.emission)),
            values=self.values.to(dtype),
            diffuse=None if self.diffuse is None else self.diffuse.to(dtype),
        )


def check_request(model: Any, method: str, capability: type, instead: str) -> None:
    """Raise unless ``method``, which needs transitions and emissions of ``capability``, can run on the model.

    Raises:
        TypeError: a component lacks the capability, or the model has a memory.

    >>> from pyro_ssm.infer.gaussian.system import check_request
    >>> check_request.__name__
    'check_request'
    """
    require(model.initial, Gaussian, method, instead)
    require(model.transition, capability, method, instead)
    require(model.emission, capability, method, instead)
    if model.memory is not None:
        raise TypeError(
            f"{method} integrates the states out, but this model's memory ({type(model.memory).__name__}) follows the "
            f"path that was drawn. Use {INSTEAD}"
        )


def check_values(data: TimeSeries, method: str) -> None:
    """Raise a ``ValueError`` unless there are values.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian.system import check_values
    >>> check_values(ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)), "kalman_filter")
    """
    if data.values is None or data.mask is None:
        raise ValueError(f"{method} needs observations, but `data` has no values. Give TimeSeries(times, values)")


def linear_gaussian_system(model: Any, data: TimeSeries, method: str) -> tuple[Any, System]:
    """Bind the model, check what ``method`` needs, and evaluate its matrices at the times of ``data``.

    All floating tensors take the widest dtype among the matrices and the values.

    Returns:
        The bound model and its matrices.

    Raises:
        TypeError: a component lacks the capability, or the model has a memory.
        ValueError: the data has no values, or another width than the emission.

    >>> from pyro_ssm.infer.gaussian.system import linear_gaussian_system
    >>> linear_gaussian_system.__name__
    'linear_gaussian_system'
    """
    require_linear_gaussian(model, method)
    check_values(data, method)
    bound = model.bind()
    times, inputs, index = data.times, data.inputs, data.observed_index
    held = None if inputs is None else inputs[..., :1, :]
    mean, scale_tril, diffuse = initial_moments(bound, times[..., :1], held)
    emission = bound.emission.affine(
        times if index is None else times[..., index],
        inputs if inputs is None or index is None else inputs[..., index, :],
    )
    n = mean.shape[-1]
    check_affine("emission", emission, n)
    if emission.matrix.shape[-2] != data.values.shape[-1]:
        raise ValueError(
            f"`data.values` has {data.values.shape[-1]} columns, but the emission gives {emission.matrix.shape[-2]}"
        )
    if data.num_times > 1:
        transition = bound.transition.affine(
            times[..., :-1], times[..., 1:], None if inputs is None else inputs[..., :-1, :]
        )
        check_affine("transition", transition, n, n)
    else:  # one time, no move
        transition = Affine(mean.new_zeros(1, n, n), mean.new_zeros(1, n), mean.new_zeros(1, n, n))

    dtypes = {x.dtype for x in (data.values, mean, scale_tril, *transition, *emission)}
    dtype = functools.reduce(torch.promote_types, dtypes)
    system = System(
        mean,
        scale_tril,
        over_time(transition, dtype),
        over_time(emission, dtype),
        data.values,
        data.mask,
        data.step_mask if data.is_ragged else None,
        None if index is None else index.tolist(),
        data.num_times,
        diffuse,
    )
    return bound, system if dtypes == {dtype} and diffuse is None else system.to(dtype)


def require_linear_gaussian(model: Any, method: str) -> None:
    """Raise unless the model is linear-Gaussian and Markov.

    Raises:
        TypeError: a component lacks the capability, or the model has a memory.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian.system import require_linear_gaussian
    >>> require_linear_gaussian(ssm.models.dmm(2, 1), "kalman_filter")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: kalman_filter needs a component that is AffineGaussian, got GatedTransition. Use extended...
    """
    instead = f"extended_kalman_filter or unscented_kalman_filter where it is Gaussian, or {INSTEAD}"
    check_request(model, method, AffineGaussian, instead)


def initial_moments(bound: Any, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean ``(..., n)``, square root ``(..., n, n)`` and diffuse columns ``(..., n, q)`` of the first state.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian.system import initial_moments
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.DiffuseInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> initial_moments(model.bind(), torch.zeros(1, dtype=torch.float64), None)[2]
    tensor([[1., 0.],
            [0., 1.]])
    """
    diffuse: Tensor | None = None
    if isinstance(bound.initial, Diffuse):
        mean, scale_tril, diffuse = bound.initial.moments(time, inputs)
    else:
        mean, scale_tril = gaussian_moments(bound.initial(time, inputs))
    n = mean.shape[-1]
    wanted = {"mean": (mean, (n,)), "scale_tril": (scale_tril, (n, n))}
    if diffuse is not None:
        wanted["diffuse"] = (diffuse, (n, diffuse.shape[-1]))
    for name, (part, shape) in wanted.items():
        if part.shape[-len(shape) :] != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"`{name}` of the initial law has shape {tuple(part.shape)}, but (..., {sizes}) is wanted")

    def at_once(part: Tensor, event: int) -> Tensor:
        return part.select(-event - 1, 0) if part.dim() > event else part  # the batch ends in a time axis of one step

    if diffuse is not None:
        diffuse = at_once(diffuse, 2) if diffuse.shape[-1] else None
    return at_once(mean, 1), at_once(scale_tril, 2), diffuse


def check_affine(name: str, law: Affine, columns: int, rows: int | None = None) -> None:
    """Raise a ``ValueError`` unless the parts of an affine law have shapes that fit each other.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.infer.gaussian.system import check_affine
    >>> check_affine("emission", Affine(torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 2, 3)), 3)
    Traceback (most recent call last):
    ...
    ValueError: `scale_tril` of the emission has shape (1, 2, 3), but (..., 2, 2) is wanted
    """
    rows = law.matrix.shape[-2] if rows is None else rows
    shapes = {"matrix": (rows, columns), "offset": (rows,), "scale_tril": (rows, rows)}
    for part, (field, shape) in zip(law, shapes.items(), strict=True):
        if part.shape[-len(shape) :] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"`{field}` of the {name} has shape {tuple(part.shape)}, but (..., {wanted}) is wanted")


def require_finite(system: System, caller: str) -> None:
    """Raise a ``LinAlgError`` that names the part of the system that is not finite, if one is.

    >>> from pyro_ssm.infer.gaussian.system import require_finite
    >>> require_finite.__name__
    'require_finite'
    """
    fields = ("matrix", "offset", "scale_tril")
    named = {"`mean` of the initial law": system.mean, "`scale_tril` of the initial law": system.scale_tril}
    for name, law in (("transition", system.transition), ("emission", system.emission)):
        named |= {f"`{field}` of the {name}": part for field, part in zip(fields, law, strict=True)}
    for name, part in named.items():
        if not bool(part.isfinite().all()):
            raise torch.linalg.LinAlgError(f"{caller}: {name} is not finite: a singular or overflowing parameter")


def require_density(steps: FilterSteps, system: System, caller: str, first: int = 0) -> None:
    """Raise unless every observed vector has a density given those before it, and a finite one.

    Args:
        steps: what a filter of ``system`` left.
        system: its matrices.
        caller: the method, for the error.
        first: the time from which on the predicted laws are proper.

    Raises:
        torch.linalg.LinAlgError: with the word "singular", by which Pyro's samplers know a divergence.

    >>> from pyro_ssm.infer.gaussian.system import require_density
    >>> require_density.__name__
    'require_density'
    """
    _refuse(~steps.log_likelihood.isfinite() | _repeats(steps, system, first), system, caller)


def require_finite_terms(terms: Tensor, system: System, caller: str) -> None:
    """As :func:`require_density`, of log-likelihoods ``(..., time)`` alone: for noise that is not singular.

    >>> from pyro_ssm.infer.gaussian.system import require_finite_terms
    >>> require_finite_terms.__name__
    'require_finite_terms'
    """
    _refuse(~terms.isfinite(), system, caller)


def noise_is_singular(system: System) -> bool:
    """Whether some observation has no noise in a direction, so that an entry may repeat what is known.

    >>> from pyro_ssm.infer.gaussian.system import noise_is_singular
    >>> noise_is_singular.__name__
    'noise_is_singular'
    """
    return bool(vanishing_pivots(system.emission.scale_tril).any())


def _refuse(broken: Tensor, system: System, caller: str) -> None:
    """Raise if a step ``(..., time)`` is broken."""
    if not bool(broken.any()):
        return
    require_finite(system, caller)
    *series, step = broken.nonzero()[0].tolist()
    where = f" of series {series[0] if len(series) == 1 else tuple(series)}" if series else ""
    raise torch.linalg.LinAlgError(
        f"{caller}: the law of what is observed at step {step}{where} given what was seen before is singular (or "
        "overflows), so it has no density. Give the emission noise in every direction in which the state has none, or "
        "hide entries that repeat others (TimeSeries.hide)"
    )


@torch.no_grad()
def _repeats(steps: FilterSteps, system: System, first: int) -> Tensor:
    """Where an entry is a combination of others and of what is known, to rounding; bool ``(..., time)``.

    It cannot be while the noise is regular, and is not looked for then.
    """
    none = torch.zeros_like(steps.log_likelihood, dtype=torch.bool)
    if not noise_is_singular(system):
        return none
    index = list(range(system.num_times)) if system.observed_index is None else system.observed_index
    _, H, _, R = hide_rows(system.mask, system.values, *system.emission)
    spread = H @ steps.predicted_scale_tril[..., index, :, :]
    found = no_pivot(spread, R)
    found[..., : sum(k < first for k in index)] = False
    return none.index_copy(-1, torch.tensor(index, device=none.device), found.expand(none.shape[:-1] + (len(index),)))


def no_pivot(spread: Tensor, noise: Tensor) -> Tensor:
    """Whether a row of [H L, R] depends on those before it, to rounding; bool ``(...)``.

    >>> import torch
    >>> from pyro_ssm.infer.gaussian.system import no_pivot
    >>> no_pivot(torch.ones(2, 1), torch.zeros(2, 2))
    tensor(True)
    """
    lead = torch.broadcast_shapes(spread.shape[:-2], noise.shape[:-2])
    rows = torch.cat([part.expand(lead + part.shape[-2:]) for part in (spread, noise)], -1)
    size = torch.linalg.vector_norm(rows, dim=-1)
    return (tria(rows).diagonal(dim1=-2, dim2=-1) <= torch.finfo(rows.dtype).eps ** 0.75 * size).any(-1)


def over_time(law: Affine, dtype: torch.dtype | None = None) -> Affine:
    """The same law in one dtype (None: as they are), each part with a time axis (of 1 where it had none).

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.infer.gaussian.system import over_time
    >>> over_time(Affine(torch.eye(2), torch.zeros(2), torch.eye(2)), torch.float64).offset
    tensor([[0., 0.]], dtype=torch.float64)
    """
    parts = []
    for part, event in zip(law, (2, 1, 2), strict=True):
        parts.append((part if part.dim() > event else part.unsqueeze(0)).to(dtype or part.dtype))
    return Affine(*parts)
