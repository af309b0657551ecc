"""An outside check: Hamilton's filter and Kim's smoother of statsmodels at fixed parameters."""

import numpy as np
import pytest
import torch

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import hmm_filter, hmm_smoother

markov = pytest.importorskip("statsmodels.tsa.regime_switching.markov_regression", reason="needs statsmodels")


def test_markov_regression_at_fixed_parameters():
    rng = np.random.default_rng(0)
    y = np.where(np.arange(120) // 20 % 2 == 0, -1.0, 2.0) + rng.normal(size=120)
    p00, p10, means, variances = 0.9, 0.2, (-1.0, 1.8), (0.8, 1.7)
    theirs = markov.MarkovRegression(y, k_regimes=2, switching_variance=True)
    wanted = theirs.smooth(np.array([p00, p10, *means, *variances]))
    first = torch.tensor([p10, 1 - p00]) / (p10 + 1 - p00)  # the stationary law
    model = ssm.StateSpaceModel(
        ssm.dynamics.CategoricalInitial(2, probs=first),
        ssm.dynamics.MarkovChain(2, matrix=torch.tensor([[p00, 1 - p00], [p10, 1 - p10]])),
        ssm.emissions.NormalTable(2, 1, loc=torch.tensor(means), scale=torch.tensor(variances).sqrt()),
    ).double()
    exact = model.bind(
        {
            "initial.probs": first.double() / first.double().sum(),
            "transition.matrix": torch.tensor([[p00, 1 - p00], [p10, 1 - p10]], dtype=torch.float64),
            "emission.loc": torch.tensor(means, dtype=torch.float64)[:, None],
            "emission.scale": torch.tensor(variances, dtype=torch.float64).sqrt()[:, None],
        }
    )
    data = TimeSeries(torch.arange(120.0), torch.as_tensor(y)[:, None])
    assert abs(hmm_filter(exact, data).log_likelihood.sum().item() / wanted.llf - 1) < 1e-7
    probs = hmm_smoother(exact, data).probs.detach().numpy()
    assert np.abs(probs - wanted.smoothed_marginal_probabilities).max() < 1e-6
