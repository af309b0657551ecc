"""The filter of a model without a state: its own one-step predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel, empty_path, history, observation_law

__all__ = ["PredictiveFiltered", "predictive_filter"]


class PredictiveFiltered(NamedTuple):
    """What :func:`predictive_filter` returns.

    >>> from pyro_ssm.infer import PredictiveFiltered
    >>> PredictiveFiltered._fields
    ('log_likelihood', 'predicted')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k); exactly 0 where nothing is observed
    predicted: Any  # the laws p(y_k | y_<k), batch (*batch, time), event (obs,)

    @property
    def exact(self) -> bool:
        """True: nothing is integrated out."""
        return True


def predictive_filter(model: StateSpaceModel, data: TimeSeries) -> PredictiveFiltered:
    """The one-step predictions of a model without a state, and the log-likelihood of what was then seen.

    .. math:: \\log p(y_k \\mid y_{<k}) = \\log p(y_k \\mid m'_k), \\qquad m' = \\text{memory}(y_{<k}, t_{\\le k})

    It is what a filter is for other models: ``infer.Marginal(model, filter=infer.predictive_filter)``, scores of
    predictions, model comparison.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel` of ``state_dim`` 0, bound, or without random parameters
            (``models.ode_rnn``, ``models.gru_ode_bayes``, ``models.neural_cde``, ``models.predictor``).
        data: with values; not refined.

    Returns:
        :class:`PredictiveFiltered`; differentiable in parameters and values.

    Raises:
        TypeError: the model has a state.
        ValueError: there are no values, or the grid is refined.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.ode_rnn(1, hidden_dim=8)
    >>> data = ssm.TimeSeries(torch.arange(3.0), torch.tensor([[1.0], [float("nan")], [2.0]]))
    >>> found = ssm.infer.predictive_filter(model, data)
    >>> found.log_likelihood[1].item(), found.predicted.mean.shape
    (0.0, torch.Size([3, 1]))
    """
    if model.initial.state_dim:
        raise TypeError(
            f"predictive_filter is for models without a state, and this one has state_dim={model.initial.state_dim}: "
            "use infer.kalman_filter, infer.extended_kalman_filter, infer.hmm_filter or infer.particle_filter"
        )
    if data.values is None:
        raise ValueError("predictive_filter needs observations, but `data` has no values")
    if data.observed_index is not None:
        raise ValueError("`data` is refined, and a model without a state has no use for times between observations")
    bound = model.bind()
    run, states = history(bound, data), empty_path(bound, data)
    law = observation_law(bound, data, states, run).law
    shape = torch.broadcast_shapes(law.batch_shape, states.shape[:-1])
    predicted = law.law if law.law.batch_shape == shape else law.law.expand(shape)
    return PredictiveFiltered(law.log_prob(data.values).expand(shape), predicted)
