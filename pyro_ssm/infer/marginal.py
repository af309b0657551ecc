"""A state-space model with its states integrated out, as a Pyro program over its parameters."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ssm.binding import is_bound
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.filter_terms import Filter, log_likelihood_terms
from pyro_ssm.infer.gaussian import kalman_filter
from pyro_ssm.infer.smc import ParticleFiltered, ParticleMarginal
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.laws import batch_shape as shape_of
from pyro_ssm.models.laws import history, observation_law, path_law
from pyro_ssm.models.parameter_store import mcmc_begins, refuse_strangers_in_mcmc
from pyro_ssm.models.plates import series_plate, site_name

__all__ = ["Marginal", "MarginalLaw"]


class Marginal(nn.Module):
    """The model's Pyro program with its states integrated out by a filter: one site ``"y"``.

    .. math:: p(y) = \\int p(z_{1:T})\\, p(y \\mid z_{1:T})\\, dz = \\prod_k p(y_k \\mid y_{<k})

    ``Marginal(model)(data)`` reads every parameter once (a ``PyroSample`` is a site, shared by all series), opens the
    same plate as the model itself, and samples ``"y"``, which is observed exactly when ``data.values is not None``. It
    therefore goes wherever a Pyro model goes: ``MCMC(NUTS(exact))``, ``SVI`` with an autoguide, ``Predictive``. Site
    names are those of the model, which stays the root.

    The density is exact where the filter is (``kalman_filter``), and the filter's approximation otherwise. Gradients
    with respect to parameters are those of the filter. A particle filter
    (:class:`~pyro_ssm.infer.ParticleMarginal`) makes the objective of SVI a lower bound; Pyro's MCMC kernels refuse it
    unless its noise is fixed and its resampling smooth.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`.
        filter: a function of a bound model and data whose result has ``log_likelihood`` ``(*batch, time)``. Where the
            function itself has an attribute ``log_likelihood``, as ``kalman_filter`` has, that one is called in its
            place: it returns these terms alone, faster (:func:`~pyro_ssm.infer.filter_terms.log_likelihood_terms`).

    Raises:
        TypeError: ``model`` is not an unbound StateSpaceModel, or ``filter`` is not callable.
        ValueError: NUTS, HMC or Pyro's random walk on a particle filter whose density is not one smooth function.

    >>> import torch, pyro, pyro_ssm as ssm
    >>> from pyro.infer import MCMC, NUTS
    >>> from pyro_ssm.infer.marginal import Marginal
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> trace = pyro.poutine.trace(Marginal(model)).get_trace(data)
    >>> trace.compute_log_prob()
    >>> trace.nodes["y"]["log_prob"].shape
    torch.Size([3])
    """

    def __init__(self, model: StateSpaceModel, filter: Filter = kalman_filter) -> None:
        super().__init__()
        if not isinstance(model, StateSpaceModel) or is_bound(model):
            raise TypeError(
                f"`model` must be an unbound StateSpaceModel, got {type(model).__name__}. "
                "Marginal(model) binds it anew for every draw of its parameters"
            )
        if not callable(filter):
            raise TypeError(f"`filter` must be a function of a bound model and data, got {type(filter).__name__}")
        self.model, self.filter = model, filter

    def forward(self, data: TimeSeries) -> Tensor:
        """The generative program over ``data``; returns the record ``y``, ``(*batch, time, obs)``."""
        if not isinstance(data, TimeSeries):
            raise TypeError(
                f"marginal(data) needs a TimeSeries, got {type(data).__name__}. Wrap it: TimeSeries(times, values)"
            )
        refuse_strangers_in_mcmc(self.model)
        bound = self.model.bind()  # outside the plate: random parameters are shared by the series
        if data.values is not None and mcmc_begins():
            self._refuse_rough(bound, data)
        with series_plate(self.model, data):
            return pyro.sample(site_name(self.model, "y"), MarginalLaw(bound, data, self.filter), obs=data.values)

    @torch.no_grad()
    def _refuse_rough(self, bound: StateSpaceModel, data: TimeSeries) -> None:
        """MCMC asks for the same density each time; by gradients, for a smooth one."""
        if isinstance(self.filter, ParticleMarginal):
            reasons = self.filter.obstacles
        elif isinstance(self.filter(bound, data), ParticleFiltered):
            reasons = [
                "whether its noise is fixed and its resampling smooth cannot be seen in a function: give "
                "filter=ParticleMarginal(num_particles, resampling=smc.TransportResampling(), ess_threshold=1.0, "
                "noise=smc.FixedNoise(normals))"
            ]
        else:
            reasons = []
        if reasons:
            raise ValueError(
                "NUTS, HMC and Pyro's random walk need a density that is one smooth function of the parameters, and "
                f"this particle filter's is not: {'; '.join(reasons)}. Or use SVI, or particle MCMC"
            )


class MarginalLaw(TorchDistribution):
    """The law of the record with the states integrated out; batch ``(*draws, *batch)``, event ``(time, obs)``.

    ``log_prob(value)`` is the filter's total log-likelihood of ``value``, missing and padded entries of ``data`` left
    out; ``sample`` simulates the model, path and record, at every entry.

    Args:
        model: bound.
        data: gives times, inputs, mask and lengths.
        filter: as for :class:`Marginal`.
        batch_shape: of the law; by default that of parameters and data together.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import kalman_filter
    >>> from pyro_ssm.infer.marginal import MarginalLaw
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> law = MarginalLaw(model.bind(), ssm.TimeSeries(torch.arange(4.0)), kalman_filter)
    >>> y = law.sample((5,))
    >>> y.shape, law.log_prob(y).shape
    (torch.Size([5, 4, 1]), torch.Size([5]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self, model: StateSpaceModel, data: TimeSeries, filter: Filter, batch_shape: torch.Size | None = None
    ) -> None:
        self._model, self._data, self._filter = model, data, filter
        event = torch.Size([data.num_observed_times, model.emission.obs_dim])
        super().__init__(shape_of(model, data) if batch_shape is None else batch_shape, event, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Records of real numbers."""
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarginalLaw:
        """The same law for a larger batch; its draws are independent."""
        return MarginalLaw(self._model, self._data, self._filter, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Records ``(*sample_shape, *batch, time, obs)`` of paths drawn afresh; not differentiable."""
        with torch.no_grad():
            run = history(self._model, self._data)
            path = path_law(self._model, self._data, run).expand(torch.Size(sample_shape) + self.batch_shape).sample()
            return observation_law(self._model, self._data, path, run).sample()

    def log_prob(self, value: Tensor) -> Tensor:
        """The filter's total log-likelihood of ``value`` ``(*sample, *batch, time, obs)``, one number a series."""
        total = log_likelihood_terms(self._filter, self._model, self._seen_as(value)).sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def _seen_as(self, value: Tensor) -> TimeSeries:
        """The data with ``value`` in the place of its values, and nothing seen that was not."""
        data = self._data
        if value is data.values:
            return data
        mask = data.observed_step_mask.unsqueeze(-1) if data.mask is None else data.mask
        lead = torch.broadcast_shapes(value.shape[:-2], mask.shape[:-2])
        shape = lead + self.event_shape
        return data.replace(values=value.expand(shape), mask=mask.expand(shape))
