"""Imputed entries have exactly the conditional Gaussian law; observed ones stay."""

import pyro.distributions as dist
import pytest
import torch

import pyro_ssm as ssm
from pyro_ssm.components import Emission
from pyro_ssm.predict import impute
from pyro_ssm.predict.impute import complete
from tests.predict.gaussian import assert_moments, exact, gaussian_model
from tests.predict.test_forecast import Echo, Follow, Read, Zero

TIMES = torch.tensor([0.0, 0.5, 2.0, 2.5])
NAN = float("nan")
S = 20_000


def some_data(batch=(), **fields):
    values = torch.randn(*batch, 4, 2, dtype=torch.float64)
    values[..., 1, 0] = NAN  # part of a vector
    values[..., 2, :] = NAN  # a whole time
    values[..., 3, 1] = NAN
    return ssm.TimeSeries(TIMES, values, **fields)


class TestGaussian:
    @pytest.mark.parametrize("correlated", [False, True])
    def test_moments_are_the_conditional_ones(self, correlated):
        model, data = gaussian_model(correlated=correlated), some_data()
        draws = impute(model, None, data, S, chunk=8000)
        missing = ~data.mask.reshape(-1)
        _, (mean, cov) = exact(model, data)
        assert torch.equal(draws[:, data.mask], data.values[data.mask].expand(S, -1))
        assert_moments(draws.flatten(1)[:, missing], mean[missing], cov[missing][:, missing])

    @pytest.mark.parametrize("correlated", [False, True])
    def test_ragged_batch(self, correlated):
        model, data = gaussian_model(correlated=correlated), some_data((2,), lengths=[4, 2])
        draws = impute(model, None, data, S)
        assert draws.shape == (S, 2, 4, 2) and (draws[:, 1, 2:] == 0).all()
        for i, length in enumerate((4, 2)):
            series = data.series(i)
            missing = ~series.mask.reshape(-1)
            _, (mean, cov) = exact(model, series)
            assert_moments(draws[:, i, :length].flatten(1)[:, missing], mean[missing], cov[missing][:, missing])

    def test_refined_grid_gives_observation_times(self):
        data = some_data((2,))
        draws = impute(gaussian_model(), None, data.refine(3), 5)
        assert draws.shape == (5, 2, 4, 2)
        assert torch.equal(draws[:, data.mask], data.values[data.mask].expand(5, -1))


class TestComplete:
    @pytest.mark.parametrize("low_rank", [False, True])
    def test_conditioning_against_the_textbook(self, low_rank):
        factor, diagonal = torch.randn(4, 2).double(), torch.rand(4).double() + 0.1
        loc = torch.randn(1, 4).double()
        if low_rank:
            law = dist.LowRankMultivariateNormal(loc, factor, diagonal)
        else:
            law = dist.MultivariateNormal(loc, factor @ factor.mT + diagonal.diag())
        values, mask = torch.randn(1, 4).double(), torch.tensor([[True, False, True, False]])
        draws = complete(law, values, mask, torch.Size([S]))[:, 0]
        cov, (s, h) = law.covariance_matrix.reshape(4, 4), (mask[0], ~mask[0])
        gain = cov[h][:, s] @ torch.linalg.inv(cov[s][:, s])
        mean = loc[0, h] + gain @ (values - loc)[0, s]
        assert_moments(draws[:, h], mean, cov[h][:, h] - gain @ cov[s][:, h])
        assert torch.equal(draws[:, s], values[:, s].expand(S, -1))

    def test_a_law_that_cannot_be_split(self):
        law = dist.OneHotCategorical(torch.ones(1, 3) / 3)
        values = torch.tensor([[1.0, 0.0, 0.0]])
        assert complete(law, values, torch.zeros(1, 3, dtype=torch.bool), torch.Size([9])).sum(-1).eq(1).all()
        with pytest.raises(ValueError, match="OneHotCategorical can be neither split"):
            complete(law, values, torch.tensor([[True, False, False]]), torch.Size([2]))


class TestMemory:
    def test_drawn_values_are_seen(self):
        """A missing y is drawn given the path, and the memory of the next step has seen that very draw."""

        class ReadLast(Emission):
            state_dim = obs_dim = 1

            def forward(self, state, time, inputs, memory=None):
                return dist.Normal(state + memory[..., 3:], 0.5).to_event(1)  # the y before

        model = ssm.StateSpaceModel(Zero(), Follow([]), ReadLast(), Echo())
        values = torch.tensor([[0.4], [NAN], [NAN], [1.0]], dtype=torch.float64)
        states = torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=torch.float64)
        data = ssm.TimeSeries(TIMES, values)
        draws = impute(model, {"z": states.expand(S, 4, 1)}, data)[..., 0]
        # y2 = 0.2 + 0.4 + e2, y3 = 0.3 + y2 + e3
        mean = torch.tensor([0.6, 0.9], dtype=torch.float64)
        assert_moments(draws[:, 1:3], mean, 0.25 * torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        assert (draws[:, 0] == 0.4).all() and (draws[:, 3] == 1.0).all()

    def test_with_a_batch(self):
        model = ssm.StateSpaceModel(Zero(), Follow([]), Read(), Echo())
        values = torch.tensor([0.4, NAN, NAN, 1.0], dtype=torch.float64).expand(2, 4).unsqueeze(-1)
        data = ssm.TimeSeries(TIMES, values, lengths=[4, 3])
        draws = impute(model, {"z": torch.randn(6, 2, 4, 1, dtype=torch.float64)}, data)
        assert draws.shape == (6, 2, 4, 1) and (draws[:, 1, 3] == 0).all() and (draws[:, :, 1] != 0).all()
