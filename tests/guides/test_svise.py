"""SVISE: the exact posterior of linear equations, knots, first states, parameters."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroSample
from pyro.poutine import block

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.dynamics import ConstantDiffusion, MLPDrift, NeuralSDE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import SVISE
from pyro_ssm.infer import SolverFree
from tests.infer.solver_free import EXACT, D, bound, linear, log_likelihood, made, series, trained


@pytest.fixture(autouse=True)
def own_parameters():
    with infer.local_parameters():
        yield


def test_svise_reaches_the_exact_likelihood_of_a_linear_equation():
    """From below; what is left (1e-6 nats a series) is the degree of the polynomials. Ragged, own grids."""
    data = series(num=5, lengths=torch.tensor([5, 3, 4]))
    wanted, model = log_likelihood(data), linear()
    gaps = [
        wanted - trained(model, SVISE(model, data, degree=n), data, 150, SolverFree(6, times="quadrature", order=2))
        for n in (1, 2, 4)
    ]
    for gap in gaps:
        assert (gap > -1e-9).all()
    assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all()
    assert (gaps[2] < 1e-5).all(), gaps


@pytest.mark.parametrize("noise", ["diagonal", "additive"])
def test_a_full_covariance_with_spin_reaches_that_of_coupled_equations(noise):
    data = series((), 3)
    wanted, model = log_likelihood(data, 2, noise=noise), linear(2, noise=noise)
    loss = SolverFree(6, times="quadrature", order=2)
    full = SVISE(model, data, covariance="full", degree=6, scale=0.4)
    assert 0 < wanted - trained(model, full, data, 500, loss) < 1e-4
    if noise == "diagonal":  # which independent coordinates do not
        assert wanted - trained(model, SVISE(model, data, scale=0.4), data, 60, loss) > 0.05


def test_inputs_are_held_where_they_hold():
    data = series((), 4, inputs=True)
    wanted, model = log_likelihood(data, input_dim=1), linear(input_dim=1)
    assert (linear(input_dim=1).transition.drift.input_matrix == 1.5).all()
    guide = SVISE(model, data)
    assert 0 < wanted - trained(model, guide, data, 100, SolverFree(6, times="quadrature", order=2)) < 1e-5
    drawn = SolverFree(2000, 4).terms(model, guide, data)
    exact = EXACT.terms(model, guide, data)
    assert abs(float((drawn.path / exact.path).detach()) - 1) < 0.1


def test_series_of_svise_are_apart():
    data = series(num=5, lengths=torch.tensor([5, 2, 4]))
    data = data.hide(torch.rand(data.values.shape) < 0.3)
    model, guide = made("svise", data)
    found = bound(model, guide, data)
    for i in range(3):
        one = data.series(i).trim()
        alone = SVISE(model, one)
        with torch.no_grad():
            alone.ends.copy_(guide.ends[i, : one.num_times])
            alone.bends.copy_(guide.bends[i, : one.num_times - 1])
        torch.testing.assert_close(bound(model, alone, one), found[i])
        torch.testing.assert_close(bound(model, guide, data.minibatch([i])), found[i : i + 1])


def test_knots_and_first_states_of_svise():
    times = torch.linspace(0, 3, 13, dtype=D)
    values = torch.stack([times.sin(), 2 * times], -1).expand(2, 13, 2).clone()
    values[0, 3, 0] = torch.nan
    model = StateSpaceModel(
        NormalInitial(2), NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.7, 2)), LinearNormal(2, 2)
    ).double()
    with torch.no_grad():
        model.emission.matrix.copy_(torch.tensor([[1.0, 0.5], [0.0, 2.0]]))
        model.emission.offset.fill_(0.1)
    data = TimeSeries(times, values, lengths=torch.tensor([13, 9]))
    guide = SVISE(model, data)
    with torch.no_grad():
        seen = model.bind().emission(guide.ends[..., :2], times, None).mean
    filled = values.clone()
    filled[0, 3, 0] = (values[0, 2, 0] + values[0, 4, 0]) / 2
    torch.testing.assert_close(seen[0], filled[0])
    torch.testing.assert_close(seen[1, :9], filled[1, :9])
    few = SVISE(model, data, knots=4)
    torch.testing.assert_close(few.knots, torch.stack([torch.linspace(0, 3, 4), torch.linspace(0, 2, 4)]).double())
    given = SVISE(model, data, knots=torch.tensor([0.0, 1.0, 3.0]), states=torch.zeros(2, 13, 2))
    assert given.knots.shape == (3,) and (given.ends[..., :2] == 0).all()
    for each in (few, given):
        terms = SolverFree(8).terms(model, each, data)
        assert terms.path.shape == (2,) and (terms.path > 0).all()


def test_data_of_other_columns_are_refused():
    sde = NeuralSDE(MLPDrift(1, 4), ConstantDiffusion(0.5, 1))
    model = StateSpaceModel(NormalInitial(1), sde, LinearNormal(1, 1))
    with pytest.raises(ValueError, match="has 2 columns, the emission has obs_dim=1"):
        SVISE(model, TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 2)))


def test_a_point_estimate_of_the_parameters():
    """``parameters=`` takes any guide: here the mode."""
    data, model = series(), linear()
    model.transition.drift.matrix = PyroSample(dist.Laplace(torch.zeros(1, 1, dtype=D), 0.5).to_event(2))
    mode = AutoDelta(block(model, expose=["transition.drift.matrix"]))
    guide = SVISE(model, data, parameters=mode)
    result = infer.fit(model, guide, data, loss=SolverFree(8), num_steps=3, progress=False)
    assert len(result.losses) == 3
