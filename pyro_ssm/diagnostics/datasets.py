"""Results as plain xarray data sets, one for each group of the ArviZ schema; ArviZ itself is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_ssm._version import __version__
from pyro_ssm.binding import random_parameters
from pyro_ssm.components import SampleOnly
from pyro_ssm.data import TimeSeries
from pyro_ssm.diagnostics.axes import Axes
from pyro_ssm.diagnostics.densities import Densities, densities, log_prior, log_weight, one_step
from pyro_ssm.guides import Guide
from pyro_ssm.infer import FitResult
from pyro_ssm.infer.smc import ParameterSMCResult, ParticleMCMCResult
from pyro_ssm.models import StateSpaceModel, emission_law, history
from pyro_ssm.predict import Forecast, PosteriorDraws, posterior_draws
from pyro_ssm.predict.parameters import by_dotted_name
from pyro_ssm.predict.posterior import num_chains, sampled
from pyro_ssm.predict.record import record_of

__all__ = ["to_datasets"]

CONDITIONAL = "log p(y | z, parameters) of each observed {unit}, at each draw of the path"
ONE_STEP = "log p(y_k | y_<k, parameters) of each time with observations, states integrated out (Kalman filter)"


def to_datasets(
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
) -> dict[str, xr.Dataset]:
    """The groups of :func:`~pyro_ssm.diagnostics.to_inference_data` as plain data sets; arguments and errors as there.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics import to_datasets
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> groups = to_datasets(None, model=model, data=data, num_samples=10)
    >>> dict(groups["posterior"]["z"].sizes)
    {'chain': 1, 'draw': 10, 'series': 3, 'time': 4, 'state': 2}
    """
    if log_likelihood not in (True, False, "conditional", "one_step"):
        raise ValueError(
            f"`log_likelihood` is {log_likelihood!r}, but True (or 'conditional'), 'one_step' or False is wanted"
        )
    chains = num_chains(model, posterior, data)
    if num_samples is not None and num_samples % chains:
        raise ValueError(f"`num_samples` is {num_samples}, but a multiple of the {chains} chains is wanted")
    axes = Axes(data, chains, coords)
    draws = posterior_draws(model, posterior, data, num_samples, chunk=chunk)
    guide = posterior.guide if isinstance(posterior, FitResult) else posterior
    known = _densities(model, draws, data, chunk)

    groups = {"posterior": _posterior(model, draws, posterior, axes)}
    groups["posterior_predictive"] = xr.Dataset({"y": _observations(model, draws, axes, chunk)})
    if imputed is not None:
        groups["posterior_predictive"]["y_imputed"] = _imputed(imputed, draws, axes)
    if log_likelihood == "one_step":
        groups["log_likelihood"] = _cells(one_step(model, draws, data), axes, ONE_STEP)
    elif log_likelihood and known is not None:
        groups["log_likelihood"] = _cells(known.entries, axes, CONDITIONAL)
    stats = _sample_stats(model, draws, guide, known, axes)
    if stats:
        groups["sample_stats"] = stats
    groups["observed_data"] = xr.Dataset({"y": axes.batched(_hidden_as_nan(data), ("time", "obs"))})
    groups["constant_data"] = _constant_data(axes)
    if forecast is not None:
        groups |= _predictions(forecast, axes)
    axes.check_given()
    source = "exact" if guide is None else type(guide).__name__
    for group in groups.values():
        group.attrs |= {"inference_library": "pyro_ssm", "inference_library_version": __version__, "posterior": source}
    return groups


def _chunks(draws: PosteriorDraws, chunk: int | None) -> Iterator[PosteriorDraws]:
    number = draws.states.shape[0]
    for start in range(0, number, chunk or number):
        now = slice(start, start + (chunk or number))
        yield PosteriorDraws({name: value[now] for name, value in draws.parameters.items()}, draws.states[now])


def _densities(model: StateSpaceModel, draws: PosteriorDraws, data: TimeSeries, chunk: int | None) -> Densities | None:
    if any(isinstance(part, SampleOnly) for part in (model.initial, model.transition, model.emission)):
        return None
    parts = [densities(model, part, data) for part in _chunks(draws, chunk)]
    return Densities(torch.cat([part.entries for part in parts]), torch.cat([part.joint for part in parts]))


def _real(axes: Axes, values: Tensor) -> Tensor:
    """NaN at padding, where there is no state and no observation."""
    real = axes.data.observed_step_mask.unsqueeze(-1)
    return torch.where(real, values, torch.full((), float("nan"), dtype=values.dtype, device=values.device))


def _posterior(model: StateSpaceModel, draws: PosteriorDraws, posterior: Any, axes: Axes) -> xr.Dataset:
    variables = {name: axes.parameter(name, value) for name, value in draws.parameters.items()}
    if isinstance(posterior, AbstractMCMC):  # parameters of a larger program around the model
        number = draws.states.shape[0]
        for name, value in by_dotted_name(model, sampled(posterior))[1].items():
            if name != "z":
                value = value[torch.arange(number) * value.shape[0] // number]
                dims = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
                variables[name] = axes.array(axes.by_chain(value), ("chain", "draw") + dims)
    index = axes.data.observed_index
    states = draws.states if index is None else draws.states.index_select(-2, index)
    variables["z"] = axes.draws(_real(axes, states), ("time", "state"))
    return xr.Dataset(variables)


@torch.no_grad()
def _observations(model: StateSpaceModel, draws: PosteriorDraws, axes: Axes, chunk: int | None) -> xr.DataArray:
    parts = []
    for part in _chunks(draws, chunk):
        bound = model.bind(part.parameters or None)
        law = emission_law(bound, axes.data, part.states, history(bound, axes.data))
        shape = part.states.shape[:-2] + (axes.data.num_observed_times,)
        parts.append((law if law.batch_shape == shape else law.expand(shape)).sample())
    return axes.draws(_real(axes, torch.cat(parts)), ("time", "obs"))


def _imputed(imputed: Tensor, draws: PosteriorDraws, axes: Axes) -> xr.DataArray:
    number = draws.states.shape[0]
    wanted = (number,) + tuple(axes.data.batch_shape) + (axes.data.num_observed_times, axes.data.obs_dim)
    if tuple(imputed.shape) != wanted:
        raise ValueError(
            f"`imputed` has shape {tuple(imputed.shape)}, but {wanted} is wanted: as many draws as of the posterior; "
            f"call impute(..., num_samples={number})"
        )
    array = axes.draws(_real(axes, imputed), ("time", "obs"))
    array.attrs["description"] = "observed entries as they are, missing ones drawn (not the same draws as z)"
    return array


def _cells(terms: Tensor, axes: Axes, density: str) -> xr.Dataset:
    """Observed cells only, on one dim, so that there is neither NaN nor a 0 that counts as a datum."""
    by_entry, mask = terms.dim() == len(axes.batch_dims) + 3, record_of(axes.data)[1]
    seen = mask if by_entry else mask.any(-1)
    dims = axes.batch_dims + (("time", "obs") if by_entry else ("time",))
    array = axes.array(axes.by_chain(terms[:, seen]), ("chain", "draw", "observation"))
    template = axes.array(seen, dims)
    for dim, at in zip(dims, np.nonzero(seen.cpu().numpy()), strict=True):
        array = array.assign_coords({f"{dim}_of": ("observation", template[dim].values[at])})
    array.attrs["density"] = density.format(unit="entry" if by_entry else "vector")
    return xr.Dataset({"y": array})


def _sample_stats(
    model: StateSpaceModel, draws: PosteriorDraws, guide: Any, known: Densities | None, axes: Axes
) -> xr.Dataset:
    number = draws.states.shape[0]
    stats = xr.Dataset()
    if known is not None:
        prior = log_prior(model, draws.parameters, number)
        joint = prior + known.joint.reshape(number, -1).sum(-1).cpu()
        stats["lp"] = axes.array(axes.by_chain(joint), ("chain", "draw"))
        stats["lp"].attrs["density"] = "log p(parameters, z, y) at each draw"
    if isinstance(guide, Guide) and known is not None:
        weight = log_weight(model, guide, draws, axes.data, known.joint)
        stats["log_weight"] = axes.draws(weight, ())
        stats["log_weight"].attrs["density"] = "log p(y, z | parameters) - log q(z | y, parameters), of each series"
        if not random_parameters(model):
            stats.attrs["elbo"] = float(weight.reshape(number, -1).sum(-1).mean())
    if isinstance(guide, AbstractMCMC):
        stats = stats.merge(_mcmc_stats(guide, number, axes))
    if isinstance(guide, ParticleMCMCResult):
        for name, values in (("acceptance_rate", guide.acceptance), ("log_evidence", guide.log_likelihood)):
            kept = torch.arange(number) * values.numel() // number
            stats[name] = axes.array(axes.by_chain(values.flatten()[kept.to(values.device)]), ("chain", "draw"))
        stats["log_evidence"].attrs["density"] = "log of a particle filter's estimate of p(y | parameters), all series"
    if isinstance(guide, ParameterSMCResult):
        stats.attrs["log_evidence"] = float(guide.log_evidence)
    return stats


def _mcmc_stats(mcmc: Any, number: int, axes: Axes) -> xr.Dataset:
    """``diverging`` of each draw, if the kernel records it; Pyro's summary needs at least four draws of a chain."""
    all_draws = next(iter(mcmc.get_samples(group_by_chain=True).values())).shape[1]
    found = mcmc.diagnostics() if all_draws >= 4 else {}
    stats = xr.Dataset()
    if "divergences" in found:
        diverging = torch.zeros(mcmc.num_chains, all_draws, dtype=torch.bool)
        for chain, at in enumerate(found["divergences"].values()):
            diverging[chain, torch.as_tensor(at, dtype=torch.long)] = True
        kept = torch.arange(number) * diverging.numel() // number
        stats["diverging"] = axes.array(axes.by_chain(diverging.flatten()[kept]), ("chain", "draw"))
    if "acceptance rate" in found:
        stats.attrs["acceptance_rate"] = [float(rate) for rate in found["acceptance rate"].values()]
    return stats


def _hidden_as_nan(data: TimeSeries) -> Tensor:
    values, mask = record_of(data)
    return torch.where(mask, values, torch.full_like(values, float("nan")))


def _constant_data(axes: Axes) -> xr.Dataset:
    data, index = axes.data, axes.data.observed_index
    constant = xr.Dataset({"mask": axes.batched(data.mask, ("time", "obs"))})
    constant["times"] = axes.batched(data.observed_times, ("time",))
    constant["lengths"] = axes.array(data.observed_step_mask.sum(-1), axes.batch_dims)
    if axes.time_labels is not None and data.has_own_times:
        dates = np.broadcast_to(axes.time_labels, data.observed_times.shape)
        if dates.dtype.kind == "M":
            real = data.observed_step_mask.cpu().numpy()
            constant["date"] = axes.batched(np.where(real, dates, np.datetime64("NaT")), ("time",))
    if data.inputs is not None:
        inputs = data.inputs if index is None else data.inputs.index_select(-2, index)
        constant["inputs"] = axes.batched(inputs, ("time", "input"))
    return constant


def _predictions(forecast: Forecast, axes: Axes) -> dict[str, xr.Dataset]:
    time, dates = axes.future_labels(forecast.times)
    labels = {"time": time}
    constant = xr.Dataset({"times": axes.batched(forecast.times, ("time",), labels)})
    if dates is not None:
        constant["date"] = axes.batched(dates, ("time",), labels)
    predictions = xr.Dataset(
        {
            "y": axes.draws(forecast.values, ("time", "obs"), labels),
            "z": axes.draws(forecast.states, ("time", "state"), labels),
        }
    )
    return {"predictions": predictions, "predictions_constant_data": constant}
