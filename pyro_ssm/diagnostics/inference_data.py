"""Results for ArviZ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.diagnostics.datasets import to_datasets
from pyro_ssm.diagnostics.wrap import wrap
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.predict import Forecast

__all__ = ["to_inference_data"]


def to_inference_data(
    posterior: Any,
    *,
    model: StateSpaceModel,
    data: TimeSeries,
    forecast: Forecast | None = None,
    imputed: Tensor | None = None,
    num_samples: int | None = None,
    log_likelihood: bool | str = True,
    coords: Mapping[str, Any] | None = None,
    chunk: int | None = None,
) -> Any:
    """A posterior, and predictions from it, as ArviZ wants them: ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

    =============================  ==================================================================================
    group                          variables (dims ``chain``, ``draw`` and those named)
    =============================  ==================================================================================
    ``posterior``                  parameters by dotted name; ``z`` (series, time, state)
    ``posterior_predictive``       ``y`` (series, time, obs) drawn given each draw of the path; ``y_imputed``
    ``log_likelihood``             ``y`` (observation): one number for each observed cell, no NaN; the attribute
                                   ``density`` says of what; ``series_of``, ``time_of``, ``obs_of`` say where
    ``sample_stats``               ``lp``; guides: ``log_weight`` (series); MCMC: ``diverging``;
                                   particle MCMC: ``acceptance_rate``, ``log_evidence``
    ``observed_data``              ``y`` (series, time, obs), NaN where missing
    ``constant_data``              ``mask``, ``times``, ``lengths``, ``inputs``, ``date`` (where series have own dates)
    ``predictions``                ``y``, ``z`` at the times of ``forecast``; ``predictions_constant_data``: the times
    =============================  ==================================================================================

    A single series has no dim ``series``. ``time`` carries the dates of the data, where it has them. Draws of a guide
    are one chain; NaN stands at padding. On a refined grid all groups report observation times.

    ``az.loo`` runs on the log likelihood. Which density that is matters: given the path (``"conditional"``, the
    default) every observation has its own latent state, so that leaving one out means little for a flexible path;
    ``"one_step"`` integrates states out, and is the honest target where the model is affine-Gaussian and its parameters
    are random. (ArviZ 1.x refuses terms that are the same at all draws, such as those of a first time whose law has no
    random parameter.)

    Args:
        posterior: what :func:`~pyro_ssm.predict.posterior_draws` takes.
        model: the state-space model (not its ``Marginal``).
        data: what the posterior was given.
        forecast: what :func:`~pyro_ssm.predict.forecast` returned.
        imputed: what :func:`~pyro_ssm.predict.impute` returned, with as many draws.
        num_samples: draws in all; default: all that there are (chains and draws as they were), 200 for guides and None.
        log_likelihood: True or ``"conditional"``, ``"one_step"``, or False.
        coords: labels by name of dim, e.g. ``{"state": ["level", "slope"]}``; they replace those of ``data``.
        chunk: draws at a time; bounds the memory of intermediate results.

    Raises:
        ValueError: labels that do not fit, numbers of draws that do not; and as ``posterior_draws``.
        TypeError: as ``posterior_draws``; ``"one_step"`` with a model that is not affine-Gaussian.
        ImportError: ArviZ is not installed (:func:`~pyro_ssm.diagnostics.to_datasets` works without it).

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics import to_inference_data
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> idata = to_inference_data(None, model=model, data=data, num_samples=10)
    >>> dict(idata["posterior_predictive"]["y"].sizes)
    {'chain': 1, 'draw': 10, 'series': 3, 'time': 4, 'obs': 1}
    """
    return wrap(
        to_datasets(
            posterior,
            model=model,
            data=data,
            forecast=forecast,
            imputed=imputed,
            num_samples=num_samples,
            log_likelihood=log_likelihood,
            coords=coords,
            chunk=chunk,
        )
    )
