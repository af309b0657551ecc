"""On a linear model every Gaussian-approximate method is Kalman's, whether or not it knows that the model is linear."""

import pytest
import torch

from pyro_ssm.infer import kalman_filter, kalman_smoother
from tests.infer.gaussian.linear import Decay, random_data, random_model
from tests.infer.gaussian.nonlinear import FILTERS, ITERATED, SMOOTHERS, StateSpaceModel, opaque

CASES = {
    "one series": {},
    "own times": {"batch": (2, 3), "own_times": True},
    "ragged": {"batch": (3,), "own_times": True, "lengths": torch.tensor([6, 1, 4])},
    "all seen": {"batch": (2,), "missing": 0.0},
    "without inputs": {"batch": (2,), "inputs": False},
    "one time": {"batch": (2,), "num_times": 1},
}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def square(root):
    return root @ root.mT


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", FILTERS)
def test_filter(name, case):
    model, data = random_model(seed=3), random_data(seed=3, **case)
    wanted = kalman_filter(model, data)
    for known in (opaque(model), model):
        result = FILTERS[name](known, data)
        assert not result.exact and result.log_likelihood.shape == wanted.log_likelihood.shape
        for one, other in zip(result[:5:2], wanted[::2], strict=True):
            close(*(x if x.dim() == wanted.log_likelihood.dim() else square(x) for x in (one, other)))
        close(result.filtered_mean, wanted.filtered_mean)
        close(result.predicted_mean, wanted.predicted_mean)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("smoother", [*SMOOTHERS.values(), *ITERATED.values()], ids=[*SMOOTHERS, *ITERATED])
def test_smoother(smoother, case):
    model, data = random_model(seed=4), random_data(seed=4, **case)
    wanted, result = kalman_smoother(model, data), smoother(opaque(model), data)
    close(result.mean, wanted.mean)
    close(square(result.scale_tril), square(wanted.scale_tril))
    close(result.log_likelihood, wanted.log_likelihood)
    close(result.lag_one_covariance, wanted.lag_one_covariance)
    if result.converged is not None:
        assert result.converged.all() and result.iterations <= 3


@pytest.mark.parametrize("name", FILTERS)
def test_refined_grid_and_draws_of_parameters(name):
    model = random_model()
    model = StateSpaceModel(model.initial, Decay(3), model.emission)
    data = random_data((2,), own_times=True).refine(2)
    rates = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)[:, None]
    drawn = {"transition.rate": rates}
    hidden = {"transition.inner.rate": rates}
    wanted = kalman_smoother(model.bind(drawn), data)
    result = SMOOTHERS[name](opaque(model).bind(hidden), data)
    assert result.mean.shape == (3, 2, 11, 3)
    close(result.mean, wanted.mean)
    close(result.log_likelihood, wanted.log_likelihood)
    iterated = ITERATED["taylor" if name == "extended" else "cubature"](opaque(model).bind(hidden), data)
    close(iterated.mean, wanted.mean)


@pytest.mark.parametrize("name", FILTERS)
def test_known_start_and_a_deterministic_coordinate(name):
    """Singular covariances."""
    model, data = random_model(n=2), random_data(inputs=False)
    model.initial.root = torch.zeros(2, 2, dtype=torch.float64)
    model.transition.Q = torch.tensor([[0.8, 0.0], [0.0, 0.0]], dtype=torch.float64)
    wanted = kalman_smoother(model, data)
    result = SMOOTHERS[name](StateSpaceModel(model.initial, model.transition, opaque(model).emission), data)
    close(result.mean, wanted.mean)
    close(square(result.scale_tril), square(wanted.scale_tril))
    close(result.log_likelihood, wanted.log_likelihood)


@pytest.mark.parametrize("name", ["extended", "cubature"])
def test_float32_values_with_a_float64_model_take_the_wider_type(name):
    data = random_data()
    narrow = data.to(dtype=torch.float32)
    result = FILTERS[name](opaque(random_model()), narrow)
    assert result.filtered_mean.dtype == torch.float64
    torch.testing.assert_close(
        result.log_likelihood, FILTERS[name](random_model(), data).log_likelihood, rtol=1e-4, atol=1e-4
    )
