"""Missing observations, drawn."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import History
from pyro_ssm.models import StateSpaceModel, emission_law, history
from pyro_ssm.predict.posterior import draw_chunks
from pyro_ssm.predict.record import record_of
from pyro_ssm.predict.remember import Remembered

__all__ = ["complete", "impute"]


def impute(
    model: StateSpaceModel,
    posterior: Any,
    data: TimeSeries,
    num_samples: int | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Complete records: what was observed is kept, what is missing is drawn.

    .. math:: \\theta, z \\sim p(\\theta, z \\mid y_{\\text{seen}}), \\qquad
        y_{k, \\text{missing}} \\sim p(y_{k, \\text{missing}} \\mid y_{k, \\text{seen}}, z_k, \\theta)

    Where the noise is correlated (a multivariate normal emission) the seen part of the same vector is conditioned on
    exactly. With a memory that sees observations, missing ones are drawn step by step and memory sees the draws; the
    path was inferred by a model that skips them, so these are ancestral draws given the path, not corrected for what
    the later path says of them.

    Args:
        model: the state-space model.
        posterior: what :func:`~pyro_ssm.predict.posterior_draws` takes.
        data: what the posterior was given.
        num_samples: S; default: all draws that there are, 200 for guides and None.
        chunk: draws at a time; bounds the memory that whole paths take.

    Returns:
        ``(S, *batch, time, obs)``, 0 at padding; not differentiable; draws come from torch's global generator.

    Raises:
        ValueError: part of a vector is missing, and its law can be neither split nor conditioned; and as
            ``posterior_draws``.
        TypeError: as ``posterior_draws``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict import impute
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(3.0), torch.tensor([[1.0], [float("nan")], [3.0]]))
    >>> draws = impute(model, None, data, num_samples=10)
    >>> draws.shape, bool((draws[:, 2] == 3.0).all())
    (torch.Size([10, 3, 1]), True)
    """
    return torch.cat(
        [
            _fill(model.bind(draws.parameters or None), draws.states, data)
            for draws in draw_chunks(model, posterior, data, num_samples, chunk)
        ]
    )


@torch.no_grad()
def _fill(bound: StateSpaceModel, states: Tensor, data: TimeSeries) -> Tensor:
    run = history(bound, data)
    if run is not None and run.memory.sees_observations:
        filled = _fill_by_steps(run, states, data)
    else:
        filled = complete(emission_law(bound, data, states, run), *record_of(data), states.shape[:-2])
    return torch.where(data.observed_step_mask.unsqueeze(-1), filled, torch.zeros_like(filled))


def _fill_by_steps(run: History, states: Tensor, data: TimeSeries) -> Tensor:
    lead, (values, mask) = states.shape[:-2], record_of(data)
    if run.emission is None:
        raise ValueError("the history of a model's memory brings its emission, and this one does not")
    past = Remembered(run.memory, *run.memory.start(lead))
    at = states if data.observed_index is None else states.index_select(-2, data.observed_index)
    filled = []
    for j in range(at.shape[-2]):
        now = slice(j, j + 1)
        inputs = None if run.inputs is None else run.inputs[..., now, :]
        after = past.see_state(at[..., now, :], run.gap[..., now, :], inputs)
        law = run.emission(at[..., now, :], j, after)
        filled.append(complete(law, values[..., now, :], mask[..., now, :], lead))
        past.see_observation(filled[-1])
    return torch.cat(filled, -2)


def complete(law: Any, values: Tensor, mask: Tensor, lead: torch.Size) -> Tensor:
    """Draw the hidden entries of ``values`` given the seen ones of the same vector.

    For a normal law by conditioning a draw (Matheron's rule; e.g. Wilson et al. 2021, Pathwise conditioning of Gaussian
    processes, section 3.1): with :math:`y^* \\sim N(m, S)`,

    .. math:: y_{\\text{hidden}} = y^*_{\\text{hidden}} + S_{hs} S_{ss}^{-1} (y_{\\text{seen}} - y^*_{\\text{seen}})

    Args:
        law: batch ``(..., time)``, event ``(obs,)``.
        values: ``(*batch, time, obs)``.
        mask: as ``values``, True where seen.
        lead: the leading dims ``(*sample, *batch)`` of the result.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.predict.impute import complete
    >>> law = dist.MultivariateNormal(torch.zeros(1, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]]))
    >>> complete(law, torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]]), torch.Size()).round(decimals=1)
    tensor([[3., 3.]])
    """
    shape = lead + values.shape[-2:-1]
    draw = (law if law.batch_shape == shape else law.expand(shape)).sample()
    if isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)):
        covariance = law.covariance_matrix
        both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        seen = torch.where(both, covariance, torch.eye(values.shape[-1], dtype=draw.dtype, device=draw.device))
        residual = torch.where(mask, values - draw, torch.zeros_like(draw)).unsqueeze(-1)
        root = torch.linalg.cholesky(seen)
        weights = torch.cholesky_solve(residual, root.expand(residual.shape[:-2] + root.shape[-2:]))
        draw = draw + (covariance @ weights).squeeze(-1)
    elif not entrywise(law) and bool((mask.any(-1) != mask.all(-1)).any()):
        raise ValueError(
            f"part of a vector is missing, and {type(law).__name__} can be neither split nor conditioned on the other "
            "part. Hide whole times, or use an emission with independent entries or a multivariate normal"
        )
    return torch.where(mask, values.to(draw.dtype), draw)


def entrywise(law: Any) -> bool:
    """Whether the entries of a vector are independent, each with a density of its own.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.predict.impute import entrywise
    >>> entrywise(dist.Normal(torch.zeros(2), 1.0).to_event(1)), entrywise(dist.Dirichlet(torch.ones(3)))
    (True, False)
    """
    return isinstance(law, Independent) and law.base_dist.event_dim == 0
