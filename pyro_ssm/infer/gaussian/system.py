"""What the Kalman family asks of a model and its data, and of the laws that it finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import AffineGaussian, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics.timed import refuse_intensity
from pyro_ssm.models.linear_gaussian import System, system_of
from pyro_ssm.ops.kalman import FilterSteps, hide_rows
from pyro_ssm.ops.linalg import tria, vanishing_pivots

__all__ = [
    "INSTEAD",
    "check_request",
    "check_values",
    "linear_gaussian_system",
    "no_pivot",
    "noise_is_singular",
    "require_density",
    "require_finite",
    "require_finite_terms",
    "require_linear_gaussian",
]

INSTEAD = "SVI with a guide (infer.fit)"


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
    refuse_intensity(model.transition, method)
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
    return bound, system_of(bound, data)


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
