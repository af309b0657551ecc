"""Scores against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal

import pyro_ssm as ssm
from pyro_ssm.predict import average, coverage, crps, heldout_log_score, interval, quantile
from tests.predict.gaussian import exact, gaussian_model

TIMES = torch.tensor([0.0, 0.5, 2.0, 2.5, 3.5, 4.0])


def gaussian_crps(mean, scale, y):
    """Gneiting and Raftery (2007), equation (5) in Gneiting et al. (2005)."""
    z = (y - mean) / scale
    unit = Normal(torch.tensor(0.0, dtype=y.dtype), 1.0)
    return scale * (z * (2 * unit.cdf(z) - 1) + 2 * unit.log_prob(z).exp() - 1 / math.sqrt(math.pi))


class TestCRPS:
    def test_of_a_gaussian(self):
        mean, scale = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 0.5, 3.0]).double()
        y = torch.tensor([0.3, 2.5, -2.0]).double()
        draws = mean + scale * torch.randn(2000, 50, 3, dtype=torch.float64)  # 50 estimates from 2000 draws
        estimates = crps(draws, y.expand(50, 3))
        error = estimates.mean(0) - gaussian_crps(mean, scale, y)
        assert (error.abs() < 5 * estimates.std(0) / 50**0.5).all()

    def test_is_unbiased_from_three_draws(self):
        y = torch.tensor([0.7]).double()
        estimates = crps(torch.randn(3, 100_000, 1, dtype=torch.float64), y.expand(100_000, 1))
        error = estimates.mean() - gaussian_crps(torch.zeros(1), torch.ones(1), y)
        assert error.abs() < 5 * estimates.std() / 100_000**0.5

    def test_equals_all_pairs(self):
        draws, y = torch.randn(7, 4, 2).double(), torch.randn(4, 2).double()
        pairs = (draws.unsqueeze(0) - draws.unsqueeze(1)).abs().sum((0, 1)) / (7 * 6)
        assert torch.allclose(crps(draws, y), (draws - y).abs().mean(0) - 0.5 * pairs, rtol=1e-12)

    def test_of_a_point_mass_is_the_absolute_error(self):
        y = torch.tensor([[1.0, -2.0]])
        assert torch.equal(crps(torch.full((9, 1, 2), 0.5), y), (y - 0.5).abs())
        assert torch.equal(crps(torch.full((1, 1, 2), 0.5), y), (y - 0.5).abs())

    def test_hidden_entries_do_not_count(self):
        draws, y, mask = torch.randn(9, 3), torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([True, False, True])
        score = crps(draws, y, mask)
        assert score[1] == 0 and torch.equal(score[mask], crps(draws[:, mask], y[mask]))
        assert torch.isclose(average(score, mask), score[mask].mean())

    def test_shapes(self):
        with pytest.raises(ValueError, match="one dim of draws, leftmost"):
            crps(torch.randn(9, 3, 1), torch.randn(3))
        with pytest.raises(ValueError, match="`mask` must be boolean"):
            crps(torch.randn(9, 3), torch.randn(3), torch.ones(3))


class TestQuantiles:
    @pytest.mark.parametrize("level", [0.0, 0.05, 0.5, 0.9, 1.0])
    def test_as_torch(self, level):
        draws = torch.randn(13, 4, 2).double()
        assert torch.allclose(quantile(draws, level), torch.quantile(draws, level, dim=0))

    def test_interval_and_coverage(self):
        draws = torch.randn(50_000, 1).double()
        lower, upper = interval(draws, 0.9)
        assert abs(lower + 1.645) < 0.03 and abs(upper - 1.645) < 0.03
        y = torch.tensor([-1.6, 1.7, 0.0, 9.0]).double()
        draws = torch.randn(20_000, 4).double()
        assert coverage(draws, y, level=0.9) == 0.5
        assert coverage(draws, y, torch.tensor([True, False, True, True]), level=0.9) == pytest.approx(2 / 3)

    def test_level(self):
        with pytest.raises(ValueError, match="`level` is 1.2"):
            quantile(torch.randn(3), 1.2)


class TestHeldoutLogScore:
    @pytest.mark.parametrize("correlated", [False, True])
    @pytest.mark.parametrize("lengths", [None, [6, 5]])
    def test_is_the_exact_predictive_density(self, correlated, lengths):
        model = gaussian_model(with_inputs=True, correlated=correlated)
        values = torch.randn(2, 6, 2, dtype=torch.float64)
        values[0, 4, 1] = float("nan")
        data = ssm.TimeSeries(TIMES, values, inputs=torch.randn(2, 6, 1, dtype=torch.float64), lengths=lengths)
        before, after = data.split(4)
        score = heldout_log_score(model, None, before, after, 20_000, chunk=9000)
        assert score.shape == (2, 2, 2) and (score[~after.mask] == 0).all()
        for i in range(2):
            series = before.series(i).extend(after.times, after.inputs[i])
            _, (mean, cov) = exact(model, series)
            wanted = Normal(mean[-4:], cov.diagonal()[-4:].sqrt()).log_prob(after.values[i].reshape(-1)).reshape(2, 2)
            found = score[i][after.mask[i]]
            assert (found - wanted[after.mask[i]]).abs().max() < 0.1

    def test_from_one_known_state(self):
        """The last state is known: one step of the transition, and the noise."""
        model = gaussian_model()
        before, after = ssm.TimeSeries(TIMES, torch.zeros(6, 2).double()).split(5)
        states = torch.zeros(4, 5, 2, dtype=torch.float64)
        score = heldout_log_score(model, {"z": states[:1]}, before, after, 5000)
        matrix = model.emission.matrix.detach()
        variance = (matrix @ matrix.mT).diagonal() * 0.25 * 0.5 + torch.tensor([0.16, 0.36]).double()
        wanted = Normal(torch.zeros(2).double(), variance.sqrt()).log_prob(torch.zeros(2).double())
        assert torch.allclose(score[0], wanted, atol=0.03)

    def test_counts(self):
        model = ssm.StateSpaceModel(
            ssm.dynamics.NormalInitial(2), ssm.dynamics.GatedTransition(2, 4), ssm.emissions.Bernoulli(2, 3)
        )
        before, after = ssm.TimeSeries(torch.arange(5.0), torch.ones(2, 5, 3)).split(3)
        score = heldout_log_score(model, ssm.guides.Structured(model, 4), before, after, 20)
        assert score.shape == (2, 2, 3) and (score < 0).all()

    def test_nothing_to_score(self):
        before, after = ssm.TimeSeries(TIMES, torch.zeros(6, 2).double()).split(5)
        with pytest.raises(ValueError, match="`data_after.values` is None"):
            heldout_log_score(gaussian_model(), None, before, after.without_values(), 3)
