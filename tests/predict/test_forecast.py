"""Forecasts have exactly the moments of the joint Gaussian law; memory, raggedness, inputs and refined grids."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import Independent, Normal
from torch import nn

import pyro_ssm as ssm
from pyro_ssm.components import Emission, Initial, Memory, Transition
from pyro_ssm.predict import forecast, posterior_draws
from tests.predict.gaussian import assert_moments, exact, gaussian_model

TIMES = torch.tensor([0.0, 0.5, 2.0, 2.5])
NEW = torch.tensor([3.5, 4.0, 6.0])
S = 20_000


def some_data(batch=(), inputs=False, **fields):
    values = torch.randn(*batch, 4, 2, dtype=torch.float64)
    values[..., 1, 0] = float("nan")
    if inputs:
        fields["inputs"] = torch.randn(*batch, 4, 1, dtype=torch.float64)
    return ssm.TimeSeries(fields.pop("times", TIMES), values, **fields)


def assert_exact(model, series, drawn, times, inputs=None):
    """The draws of one series against the dense answer on the extended grid."""
    horizon = len(times)
    (z_mean, z_cov), (y_mean, y_cov) = exact(model, series.extend(times, inputs))
    last = slice(-2 * horizon, None)
    assert_moments(drawn.states.flatten(1), z_mean[last], z_cov[last, last])
    assert_moments(drawn.values.flatten(1), y_mean[last], y_cov[last, last])


def one(drawn, i):
    return drawn._replace(values=drawn.values[:, i], states=drawn.states[:, i])


class TestGaussian:
    @pytest.mark.parametrize("correlated", [False, True])
    def test_one_series(self, correlated):
        model, data = gaussian_model(correlated=correlated), some_data()
        drawn = forecast(model, None, data, NEW, S)
        assert drawn.values.shape == drawn.states.shape == (S, 3, 2)
        assert torch.equal(drawn.times, NEW.double())
        assert_exact(model, data, drawn, NEW)

    def test_batch_with_inputs(self):
        model, data = gaussian_model(with_inputs=True), some_data((2,), inputs=True)
        inputs = torch.randn(2, 3, 1, dtype=torch.float64)
        drawn = forecast(model, None, data, NEW, S, inputs=inputs, chunk=7000)
        for i in range(2):
            assert_exact(model, data.series(i), one(drawn, i), NEW, inputs[i])

    def test_ragged_series_go_on_from_their_own_ends(self):
        model = gaussian_model(with_inputs=True)
        data = some_data((3,), inputs=True, lengths=[4, 2, 3])
        inputs = torch.randn(3, 1, dtype=torch.float64)
        drawn = forecast(model, None, data, NEW, S, inputs=inputs)
        assert drawn.times.shape == (3, 3)
        for i in range(3):
            assert_exact(model, data.series(i), one(drawn, i), NEW, inputs)

    def test_own_grids_and_own_new_times(self):
        model = gaussian_model()
        data = some_data((2,), times=torch.stack([TIMES, 3 * TIMES]), lengths=[4, 3])
        new = torch.stack([NEW, NEW + 5.0])
        drawn = forecast(model, None, data, new, S)
        assert torch.equal(drawn.times, new.double())
        for i in range(2):
            assert_exact(model, data.series(i), one(drawn, i), new[i])

    def test_two_batch_dims(self):
        model, data = gaussian_model(), some_data((2, 2))
        drawn = forecast(model, None, data, NEW, S)
        assert drawn.values.shape == (S, 2, 2, 3, 2)
        part = drawn._replace(values=drawn.values[:, 1, 0], states=drawn.states[:, 1, 0])
        assert_exact(model, data.series((1, 0)), part, NEW)

    def test_draws_of_a_parameter_stay_with_their_paths(self):
        from pyro.nn import PyroSample

        model, data = gaussian_model(), some_data((2,))
        model.transition.rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        rates = torch.tensor([0.05, 2.0], dtype=torch.float64)
        drawn = forecast(model, {"transition.rate": rates}, data, NEW, 2 * S)
        for rate, values in zip(rates, drawn.values.chunk(2), strict=True):
            _, (mean, cov) = exact(model, data.series(1).extend(NEW), rate)
            assert_moments(values[:, 1].flatten(1), mean[-6:], cov[-6:, -6:])

    def test_refined_grid(self):
        """On a grid refined twice each new gap is crossed in two steps: the dense answer on that finer grid."""
        model, data = gaussian_model(with_inputs=True), some_data(inputs=True)
        inputs = torch.randn(3, 1, dtype=torch.float64)
        drawn = forecast(model, None, data.refine(2), NEW, S, inputs=inputs)
        fine = data.extend(NEW, inputs).refine(2)
        dense = ssm.TimeSeries(
            fine.times,
            torch.full((13, 2), float("nan"), dtype=torch.float64).index_copy(
                0, fine.observed_index, fine.values.where(fine.mask, torch.tensor(float("nan"), dtype=torch.float64))
            ),
            inputs=fine.inputs,
        )
        (z_mean, z_cov), _ = exact(model, dense)
        at = (2 * torch.tensor([8, 10, 12])[:, None] + torch.arange(2)).flatten()
        assert_moments(drawn.states.flatten(1), z_mean[at], z_cov[at][:, at])

    def test_dates(self):
        dates = np.array(["2020-01-01", "2020-01-02", "2020-01-04", "2020-01-05"], dtype="datetime64[ns]")
        data = some_data(times=[0.0, 1.0, 3.0, 4.0], coords={"time": dates})
        new = np.array(["2020-01-06", "2020-01-09"], dtype="datetime64[ns]")
        assert forecast(gaussian_model(), None, data, new, 2).times.tolist() == [5.0, 8.0]

    def test_float32(self):
        data = some_data((2,)).to(dtype=torch.float32)
        drawn = forecast(gaussian_model(dtype=torch.float32), None, data, NEW, 5)
        assert drawn.values.dtype == drawn.states.dtype == torch.float32 and drawn.times.dtype == torch.float64


class Zero(Initial):
    """A law that does not know the batch."""

    state_dim = 1

    def forward(self, time, inputs, memory=None):
        return Independent(Normal(torch.zeros(1, 1, dtype=torch.float64), 1.0), 1)


class Echo(Memory):
    """Remembers the last observation, a decaying sum of states, and the gaps and inputs it was given."""

    features = 4
    sees_observations = True

    def start(self, shape):
        carry = (torch.zeros(*shape, 3, dtype=torch.float64), (torch.zeros(*shape, dtype=torch.float64),))
        return carry, self.summary(carry)

    @staticmethod
    def summary(carry):
        return torch.cat([carry[0], carry[1][0].unsqueeze(-1)], -1).unsqueeze(-2)

    def see_state(self, carry, state, gap, inputs):
        given = torch.zeros_like(state) if inputs is None else inputs.expand(state.shape)
        total = 0.5 * carry[0][..., :1] + state[..., 0, :]
        parts = [total, gap.expand(state.shape)[..., 0, :], given[..., 0, :]]
        carry = (torch.cat(parts, -1), carry[1])
        return carry, self.summary(carry)

    def see_observation(self, carry, values, mask):
        values, mask = torch.broadcast_tensors(values, mask)
        seen = torch.where(mask, values, torch.zeros_like(values))[..., 0, 0]
        carry = (carry[0], (torch.where(mask[..., 0, 0], seen, carry[1][0]),))
        return carry, self.summary(carry)


class Follow(Transition):
    """z' = 0.5 z + 0.8 (last y), and the memory's other features for the tests to read."""

    state_dim = 1

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, state, time, next_time, inputs, memory=None):
        self.log.append(memory)
        return Independent(Normal(0.5 * state + 0.8 * memory[..., 3:], 0.3), 1)


class Read(Emission):
    state_dim = obs_dim = 1

    def forward(self, state, time, inputs, memory=None):
        return Independent(Normal(state + 0.1 * memory[..., :1], 0.2), 1)


class TestMemory:
    def model(self):
        self.log = []
        model = ssm.StateSpaceModel(Zero(), Follow(self.log), Read(), Echo())
        model.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        return model

    def test_moments_of_two_steps(self):
        """By hand: the memory has run through the data, and then sees the draws."""
        states = torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
        data = ssm.TimeSeries([0.0, 1.0, 3.0], torch.tensor([[0.3], [0.7], [float("nan")]], dtype=torch.float64))
        drawn = forecast(self.model(), {"z": states.expand(S, 3, 1)}, data, [3.5, 4.5])
        total = 0.25 * 1.0 - 0.5 + 2.0  # the decaying sum of the path
        z1 = 0.5 * 2.0 + 0.8 * 0.7  # the missing value was skipped
        # y1 = z1 + 0.1 (0.5 total + z1) + e, z2 = 0.5 z1 + 0.8 y1 + d
        y1 = 1.1 * z1 + 0.05 * total
        z2 = 0.5 * z1 + 0.8 * y1
        y2 = 1.1 * z2 + 0.05 * (0.5 * total + z1)
        to_z1, to_y1 = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.1, 1, 0, 0])  # of the noises z1, y1, z2, y2
        to_z2 = 0.5 * to_z1 + 0.8 * to_y1 + torch.tensor([0.0, 0, 1, 0])
        to_y2 = 1.1 * to_z2 + 0.05 * to_z1 + torch.tensor([0.0, 0, 0, 1])
        root = torch.stack([to_z1, to_y1, to_z2, to_y2]).double() * torch.tensor([0.3, 0.2, 0.3, 0.2]).double()
        both = torch.stack([drawn.states[..., 0], drawn.values[..., 0]], -1).flatten(1)
        assert_moments(both, torch.tensor([z1, y1, z2, y2], dtype=torch.float64), root @ root.mT)

    def test_each_ragged_series_keeps_its_own_memory(self):
        states = torch.randn(5, 2, 3, 1, dtype=torch.float64)
        values = torch.randn(2, 3, 1, dtype=torch.float64)
        inputs = torch.randn(2, 3, 1, dtype=torch.float64)
        data = ssm.TimeSeries([0.0, 1.0, 3.0], values, inputs=inputs, lengths=[2, 3])
        new = torch.tensor([9.0, 11.0])
        future = torch.randn(2, 1, dtype=torch.float64)
        forecast(self.model(), {"z": states}, data, new, inputs=future)
        together = [summary.clone() for summary in self.log]
        for i in range(2):
            series = data.series(i)
            forecast(self.model(), {"z": states[:, i, : series.num_times]}, series, new, inputs=future)
            assert torch.equal(together[0][:, i], self.log[0])  # gap, input, sum and last y of the series' own end
            assert torch.equal(together[1][:, i, :, 1:3], self.log[1][..., 1:3])  # the gap and the input of step 1
            assert self.log[1][0, 0, 1] == 9.0 - series.times[-1] and self.log[1][0, 0, 2] == future[0, 0]

    def test_memory_agrees_with_the_whole_sequence_form(self):
        model = ssm.models.vrnn(obs_dim=1, state_dim=2, hidden_dim=3)
        data = ssm.TimeSeries(torch.arange(4.0), torch.randn(2, 4, 1))
        states = torch.randn(3, 2, 4, 2)
        seen = []
        model.transition.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(kwargs["memory"]), with_kwargs=True
        )
        forecast(model, {"z": states}, data, [4.0])
        longer = data.extend([4.0])
        run = ssm.models.history(model.bind(), longer)
        before = run.summaries(torch.cat([states, torch.zeros(3, 2, 1, 2)], -2))[0]
        assert torch.allclose(seen[-1], before[..., 4:5, :], atol=1e-6)


class TestPosteriors:
    def test_a_guide(self):
        model, data = gaussian_model(), some_data((2,))
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        drawn = forecast(model, guide, data, NEW, S, chunk=8000)
        states = posterior_draws(model, guide, data, S).states[..., -1, :]
        bound = model.bind()
        matrix, offset, root = bound.transition.affine(TIMES[-1:].double(), NEW[:1].double(), None)
        mean = states.mean(0) @ matrix[0].mT
        assert ((drawn.states[:, :, 0].mean(0) - mean).abs() < 5 * drawn.states[:, :, 0].std(0) * (2 / S) ** 0.5).all()

    def test_counts(self):
        model = ssm.StateSpaceModel(
            ssm.dynamics.NormalInitial(2), ssm.dynamics.GatedTransition(2, 4), ssm.emissions.Bernoulli(2, 3)
        )
        data = ssm.TimeSeries(torch.arange(5.0), torch.ones(2, 5, 3))
        guide = ssm.guides.Structured(model, hidden_dim=4)
        values = forecast(model, guide, data, [5.0, 6.0], 7).values
        assert values.shape == (7, 2, 2, 3) and ((values == 0) | (values == 1)).all()


class TestErrors:
    def test_times_must_be_later(self):
        with pytest.raises(ValueError, match="later than the last time"):
            forecast(gaussian_model(), None, some_data(), [2.5, 3.0], 3)
        with pytest.raises(ValueError, match="later than the last time.*series 0"):
            forecast(gaussian_model(), None, some_data((2,), lengths=[4, 2]), [1.0], 3)
        with pytest.raises(ValueError, match="strictly increasing"):
            forecast(gaussian_model(), None, some_data(), [4.0, 3.0], 3)

    def test_inputs_must_fit(self):
        model = gaussian_model(with_inputs=True)
        with pytest.raises(ValueError, match="`inputs` are wanted"):
            forecast(model, None, some_data(inputs=True), NEW, 3)
        with pytest.raises(ValueError, match="`inputs` has shape"):
            forecast(model, None, some_data(inputs=True), NEW, 3, inputs=torch.zeros(2, 1))
        with pytest.raises(ValueError, match="the series has none"):
            forecast(gaussian_model(), None, some_data(), NEW, 3, inputs=torch.zeros(3, 1))

    def test_posterior_must_be_known(self):
        with pytest.raises(TypeError, match="`posterior` is a str"):
            forecast(gaussian_model(), "vi", some_data(), NEW, 3)
