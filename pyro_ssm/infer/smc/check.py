"""What can go wrong in a run, said so that something can be done about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.stepper import Cloud, Step
from pyro_ssm.infer.smc.tree import leaves

__all__ = [
    "NoEvidenceError",
    "ParticleCollapseWarning",
    "check_arguments",
    "check_evidence",
    "check_fraction",
    "check_number",
    "check_states",
    "explained",
    "warn_of_collapse",
    "warn_of_look_ahead",
]

_FEW = 100  # fewer particles than this were not meant to cover a law


class NoEvidenceError(ValueError):
    """The evidence of a step is no positive number.

    >>> from pyro_ssm.infer.smc.check import NoEvidenceError
    >>> issubclass(NoEvidenceError, ValueError)
    True
    """


class ParticleCollapseWarning(UserWarning):
    """A cloud shrank to one or two particles that count.

    >>> from pyro_ssm.infer.smc import ParticleCollapseWarning
    >>> issubclass(ParticleCollapseWarning, UserWarning)
    True
    """


def check_arguments(fk: Any, num_particles: Any, noise: Any, collectors: Any) -> None:
    """Refuse what a filter cannot take, by name.

    >>> from pyro_ssm.infer.smc.check import check_arguments
    >>> check_arguments("a model", 10, None, ())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: `fk` must be a FeynmanKac process, got str. Build one from a model and data: bootstrap(model, data), ...
    """
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"`fk` must be a FeynmanKac process, got {type(fk).__name__}. Build one from a model and data: "
            "bootstrap(model, data), guided(model, guide, data), locally_optimal(model, data)"
        )
    check_number(num_particles)
    if noise is not None and not isinstance(noise, Noise):
        raise TypeError(
            f"`noise` must be a Noise (PseudoRandom(), FixedNoise(normals, uniforms)) or None, got {noise!r}. For "
            "Sobol' points leave it out and give quasi_random=True"
        )
    if isinstance(collectors, Collector) or not isinstance(collectors, Sequence):
        raise TypeError(
            f"`collectors` must be a list of collectors, got {_kind(collectors)}. Give collectors=[Moments()]"
        )
    for collector in collectors:
        if not isinstance(collector, Collector):
            raise TypeError(
                f"`collectors` must hold objects such as Moments(), got {_kind(collector)}"
                + (f". Call it: {collector.__name__}()" if isinstance(collector, type) else "")
            )


def check_number(num_particles: Any) -> None:
    """Refuse numbers of particles that are no positive integers.

    >>> from pyro_ssm.infer.smc.check import check_number
    >>> check_number(100.5)
    Traceback (most recent call last):
    ...
    TypeError: `num_particles` must be an integer of at least 1, got 100.5
    """
    if num_particles is None:
        return
    if isinstance(num_particles, bool) or not isinstance(num_particles, Integral):
        raise TypeError(f"`num_particles` must be an integer of at least 1, got {num_particles!r}")
    if num_particles < 1:
        raise ValueError(f"`num_particles` must be at least 1, got {num_particles}")


def check_fraction(ess_threshold: Any) -> None:
    """Refuse thresholds of the effective sample size that are no fraction of the number of particles.

    >>> from pyro_ssm.infer.smc.check import check_fraction
    >>> check_fraction(50)
    Traceback (most recent call last):
    ...
    ValueError: `ess_threshold` is a fraction of the number of particles, in [0, 1], got 50
    """
    wrong = f"`ess_threshold` is a fraction of the number of particles, in [0, 1], got {ess_threshold!r}"
    if not isinstance(ess_threshold, (Real, Tensor)):
        raise TypeError(wrong)
    if not 0 <= ess_threshold <= 1:
        raise ValueError(wrong)


def _kind(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__


def check_evidence(fk: FeynmanKac, log_likelihood: Tensor, first: int = 0) -> None:
    """Raise for the first increment ``(*batch, time)`` that is not finite, naming the step and the series.

    >>> import torch
    >>> from pyro_ssm.infer.smc import FeynmanKac
    >>> from pyro_ssm.infer.smc.check import check_evidence
    >>> fk = FeynmanKac(None, None, None, num_times=2)
    >>> check_evidence(fk, torch.tensor([0.0, float("-inf")]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyro_ssm.infer.smc.check.NoEvidenceError: particle filter, step 1: no particle can explain the observation ...
    """
    log_likelihood = log_likelihood.detach()
    bad = ~torch.isfinite(log_likelihood)
    if not bool(bad.any()):
        return
    at = bad.nonzero()
    k = int(at[:, -1].min())  # the first step at which anything went wrong
    position = tuple(at[at[:, -1] == k][0, :-1].tolist())
    value = float(log_likelihood[position + (k,)])
    if value == float("-inf"):
        what = (
            "no particle can explain the observation (every weight is 0). Is the observation possible under the "
            "emission? Are its scale or the transition's too small? Use more particles, a proposal that sees the "
            "observation (guided, locally_optimal), or an emission with heavier tails"
        )
    elif value == float("inf"):
        what = "a weight is infinite: the emission has an infinite density here (a scale of 0?)"
    else:
        what = (
            "a weight is NaN: the initial law, the transition, the proposal or the emission returned NaN. Evaluate "
            "them at the states of the step before"
        )
    raise NoEvidenceError(f"particle filter, {fk.describe(k + first, position)}: {what}")


def explained(fk: FeynmanKac, make: Callable[[], Step]) -> Step:
    """A step, or where a law refuses its parameters, the error that names the step and the series.

    Laws that validate their arguments stop at the first NaN, and cannot tell where that is: the step is then made again
    without validation, so that the weights show it.

    >>> import torch
    >>> from torch.distributions import Normal
    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom, Stepper
    >>> from pyro_ssm.infer.smc.check import explained
    >>> seen = lambda k, previous, x: Normal(x / 0 * 0, 1.0, validate_args=None).log_prob(torch.tensor(0.0))
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, seen, 2)
    >>> stepper = Stepper(fk, 10, AncestorResampling(), 0.5, PseudoRandom())
    >>> explained(fk, stepper.init)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyro_ssm.infer.smc.check.NoEvidenceError: particle filter, step 0: a weight is NaN: ...
    """
    try:
        return make()
    except ValueError as error:
        with validation_enabled(False):
            try:
                step = make()
            except Exception:
                raise error from None
        check_evidence(fk, step.log_likelihood.unsqueeze(-1), step.k)
        raise


def check_states(fk: FeynmanKac, cloud: Cloud) -> None:
    """Raise where a final state is NaN: after the last observation no weight would tell.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.check import check_states
    >>> check_states(FeynmanKac(None, None, None, num_times=1), Cloud(torch.zeros(2, 1), torch.zeros(2), 0))
    """
    batch_dims = len(fk.batch_shape)
    for leaf in leaves(cloud.particles):
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            rest = tuple(range(1 + batch_dims, leaf.dim()))
            bad = torch.isnan(leaf).any(0).sum(tuple(dim - 1 for dim in rest)) > 0 if rest else torch.isnan(leaf).any(0)
            position = tuple(bad.nonzero()[0].tolist()) if batch_dims else ()
            raise NoEvidenceError(
                f"particle filter, {fk.describe(cloud.k, position)}: a particle is NaN at the end or before: the "
                "transition or the proposal returned NaN. Evaluate them at states of the prior"
            )


def warn_of_collapse(fk: FeynmanKac, ess: Tensor, num_particles: int, first: int = 0) -> None:
    """Warn where the effective sample size ``(*batch, time)`` fell below two of many particles.

    >>> import torch
    >>> from pyro_ssm.infer.smc import FeynmanKac
    >>> from pyro_ssm.infer.smc.check import warn_of_collapse
    >>> warn_of_collapse(FeynmanKac(None, None, None, num_times=2), torch.tensor([500.0, 80.0]), 1000)
    """
    if num_particles < _FEW or not ess.numel():
        return
    least = int(ess.detach().argmin())
    position = tuple(torch.unravel_index(torch.tensor(least), ess.shape))
    *series, k = (int(p) for p in position)
    if (found := float(ess.reshape(-1)[least])) >= 2:
        return
    warnings.warn(
        f"the cloud of {num_particles} particles collapsed to an effective {found:.1f} at "
        f"{fk.describe(k + first, tuple(series))} (in {int((ess < 2).sum())} of {ess.numel()} steps): estimates rest "
        "on one or two particles there. Use a proposal that sees the observation (locally_optimal, guided with a "
        "trained guide), auxiliary(...) where observations are surprising, more particles, or look for an outlier "
        "and for scales in other units than the data",
        ParticleCollapseWarning,
        stacklevel=3,
    )


def warn_of_look_ahead(fk: FeynmanKac, ess_threshold: float) -> None:
    """Warn where resampling works against a proposal that reads the future.

    >>> from pyro_ssm.infer.smc import FeynmanKac
    >>> from pyro_ssm.infer.smc.check import warn_of_look_ahead
    >>> warn_of_look_ahead(FeynmanKac(None, None, None, num_times=2), 0.5)
    """
    if fk.looks_ahead and fk.log_twist is None and ess_threshold > 0:
        warnings.warn(
            "the guide reads future data (direction 'future' or 'both'): it is a valid proposal, but the weights of a "
            "filter are then the wrong targets on the way, and resampling by them adds variance. Give "
            "guided(..., twist=...) an estimate of log p(y_>k | z_k), train a guide with direction='past', or do not "
            "resample: particle_filter(..., ess_threshold=0)",
            UserWarning,
            stacklevel=3,
        )
