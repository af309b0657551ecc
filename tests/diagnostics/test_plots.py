"""The pictures show the numbers they claim to show."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.dates import date2num

from pyro_ssm.diagnostics import plot_forecast, plot_states
from pyro_ssm.predict import forecast, posterior_draws, quantile
from tests.diagnostics.test_datasets import DATES, TIMES, some_data
from tests.predict.gaussian import gaussian_model

matplotlib.use("Agg")


def lines(ax):
    return {line.get_label().split(":")[0]: line.get_xydata() for line in ax.get_lines()}


def band(ax, i):
    return ax.collections[i].get_paths()[0].vertices


class TestForecast:
    def test_points_mean_and_bands(self):
        model = gaussian_model()
        data = some_data((2,), coords={"time": DATES, "series": ["a", "b"], "obs": ["level", "flow"]})
        before, after = data.split(2)
        drawn = forecast(model, None, before, after.times, 100)
        ax = plot_forecast(before, drawn, "b", 1, held_out=after)
        shown = lines(ax)
        assert np.allclose(shown["observed"][:, 1], before.values[1, :, 1])
        assert (shown["observed"][:, 0] == date2num(DATES[:2])).all()
        assert np.allclose(shown["forecast"][:, 1], drawn.values[:, 1, :, 1].mean(0))
        assert (shown["forecast"][:, 0] == date2num(DATES[2:])).all()
        assert np.isnan(shown["held out"][0, 1]) and shown["held out"][1, 1] == after.values[1, 1, 1].item()
        wide = band(ax, 0)
        assert np.isclose(wide[:, 1].min(), quantile(drawn.values[:, 1, :, 1], 0.05).min())
        assert np.isclose(wide[:, 1].max(), quantile(drawn.values[:, 1, :, 1], 0.95).max())
        assert ax.get_ylabel() == "flow" and ax.get_title("left") == "b"

    def test_own_grids_use_the_times_of_the_series(self):
        data = some_data((2,), times=torch.stack([TIMES, 2 * TIMES]), lengths=[4, 3])
        drawn = forecast(gaussian_model(), None, data, torch.tensor([[5.0], [9.0]]), 20)
        ax = plot_forecast(data, drawn, 1, 0, last=2)
        shown = lines(ax)
        assert shown["observed"][:, 0].tolist() == [2.0, 6.0] and shown["forecast"][:, 0].tolist() == [9.0]

    def test_wrong_series(self):
        data = some_data((2,))
        drawn = forecast(gaussian_model(), None, data, [5.0], 3)
        with pytest.raises(ValueError, match="`series` is 2"):
            plot_forecast(data, drawn, 2)
        with pytest.raises(ValueError, match="names 0 series"):
            plot_forecast(data, drawn, "b")


class TestStates:
    def test_a_panel_for_each_state_and_the_future(self, tmp_path):
        model, data = gaussian_model(), some_data()
        draws, drawn = posterior_draws(model, None, data, 50), forecast(model, None, data, [5.0, 6.0], 50)
        axes = plot_states(data, draws, forecast=drawn)
        assert len(axes) == 2
        for k, ax in enumerate(axes):
            shown = lines(ax)
            assert np.allclose(shown["posterior"][:, 1], draws.states[..., k].mean(0))
            assert np.allclose(shown["forecast"][:, 1], drawn.states[..., k].mean(0))
        axes[0].figure.savefig(tmp_path / "states.png")
        assert (tmp_path / "states.png").stat().st_size > 5000

    def test_ragged_and_refined(self):
        data = some_data((2,), lengths=[4, 3])
        fine = some_data((2,)).refine(2)
        assert len(lines(plot_states(data, torch.randn(5, 2, 4, 2), 1)[0])["posterior"]) == 3
        assert len(lines(plot_states(fine, torch.randn(5, 2, 7, 2), 1, [1])[0])["posterior"]) == 7

    def test_axes_must_fit(self):
        ax = plot_states(some_data(), torch.randn(5, 4, 2), states=[0])[0]
        with pytest.raises(ValueError, match="one for each of the states"):
            plot_states(some_data(), torch.randn(5, 4, 2), axes=ax)
