"""Counterfactuals against closed forms: shifts, inputs and rates of linear models; nothing changed, nothing differs."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import gru_d
from pyro_ssm.predict import PosteriorDraws, counterfactual, posterior_draws
from tests.predict.gaussian import gaussian_model

D = torch.float64
TIMES = torch.tensor([0.0, 0.5, 2.0, 2.5, 4.0])
NAN = float("nan")
S = 50


def some_data(batch=(), num_times=5, inputs=False, **fields):
    torch.manual_seed(3)
    values = torch.randn(*batch, num_times, 2, dtype=D)
    values[..., 1, 0] = NAN
    values[..., 2, :] = NAN
    if inputs:
        fields["inputs"] = torch.randn(*batch, num_times, 1, dtype=D)
    return ssm.TimeSeries(fields.pop("times", TIMES[:num_times]), values, **fields)


def keep(z):
    return z


class TestLinearGaussian:
    @pytest.mark.parametrize("correlated", [False, True])
    def test_nothing_changed_nothing_differs(self, correlated):
        model, data = gaussian_model(correlated=correlated), some_data((2,), lengths=[5, 3])
        found = counterfactual(model, None, data, 0.5, state=keep, num_samples=S)
        torch.testing.assert_close(found.values, found.factual_values)
        torch.testing.assert_close(found.states, found.factual_states)
        assert torch.equal(found.factual_values[:, data.mask], data.values[data.mask].expand(S, -1))
        assert (found.values[:, 1, 3:] == 0).all()

    def test_a_shift_of_the_state_is_carried_on_by_the_transition(self):
        model, data = gaussian_model(), some_data()
        shift = torch.tensor([1.0, -2.0], dtype=D)
        found = counterfactual(model, None, data, 0.5, state=lambda z: z + shift, num_samples=S)
        effect = shift
        for k in range(5):
            if k == 0:
                wanted = torch.zeros(2, dtype=D)
            elif k == 1:
                wanted = shift
            else:
                matrix = model.bind().transition.affine(data.times[k - 1 : k], data.times[k : k + 1], None).matrix
                wanted = matrix.reshape(2, 2).detach() @ effect
            effect = wanted
            torch.testing.assert_close((found.states - found.factual_states)[:, k], wanted.expand(S, 2))
            seen = model.emission.matrix.detach() @ wanted
            torch.testing.assert_close((found.values - found.factual_values)[:, k], seen.expand(S, 2))

    def test_other_inputs(self):
        model, data = gaussian_model(with_inputs=True), some_data(inputs=True)
        inputs = data.inputs.clone()
        inputs[3] += 2.0  # holds on [t_3, t_4)
        found = counterfactual(model, None, data, 2.5, inputs=inputs, num_samples=S)
        effect = found.states - found.factual_states
        torch.testing.assert_close(effect[:, :4], torch.zeros(S, 4, 2, dtype=D))
        wanted = 2.0 * 1.5 * model.transition.drive.detach()[:, 0]
        torch.testing.assert_close(effect[:, 4], wanted.expand(S, 2))

    def test_another_rate_moves_the_same_noise(self):
        """By hand from the draws themselves."""
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, S)
        found = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": torch.tensor([1.0], dtype=D)})
        z = draws.states
        fact, other = model.bind().transition, model.bind({"transition.rate": torch.tensor([1.0], dtype=D)}).transition
        state = z[:, 2]
        torch.testing.assert_close(found.states[:, :3], z[:, :3])
        for k in (3, 4):
            at = data.times[k - 1 : k], data.times[k : k + 1], None
            A, _, scale = (
                part.detach().reshape(-1, 2).squeeze(0) if i else part.detach().reshape(2, 2)
                for i, part in enumerate((*fact.parts(*at)[:2], fact.parts(*at)[2].expand(1, 2)))
            )
            B = other.parts(*at)[0].detach().reshape(2, 2)
            noise = (z[:, k] - z[:, k - 1] @ A.mT) / scale
            state = state @ B.mT + scale * noise
            torch.testing.assert_close(found.states[:, k], state)

    def test_functions_of_parameters_and_of_coordinates(self):
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, S)
        one = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": lambda rate: 2 * rate})
        torch.manual_seed(0)
        two = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": 2 * model.transition.rate})
        torch.testing.assert_close(one.states, two.states)
        put = counterfactual(model, draws, data, 2.0, state={1: 7.0})
        assert (put.states[:, 2, 1] == 7.0).all() and torch.equal(put.states[:, 2, 0], draws.states[:, 2, 0])
        fixed = counterfactual(model, draws, data, 2.0, state=torch.tensor([3.0, 4.0]))
        assert torch.equal(fixed.states[:, 2], torch.tensor([3.0, 4.0], dtype=D).expand(S, 2))

    def test_another_transition(self):
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, S)
        other = type(model.transition)().double()
        other.rate.data.fill_(1.3)
        found = counterfactual(model, draws, data, 2.0, transition=other)
        wanted = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": torch.tensor([1.3], dtype=D)})
        torch.testing.assert_close(found.states, wanted.states)
        again = counterfactual(model, draws, data, 2.0, transition=other, parameters={"transition.rate": [0.3]})
        torch.testing.assert_close(again.states, again.factual_states, rtol=1e-6, atol=1e-6)

    def test_batch_is_loop_with_own_grids_times_and_lengths(self):
        model = gaussian_model(with_inputs=True)
        data = some_data((3,), inputs=True, times=torch.stack([TIMES, 2 * TIMES, TIMES + 1]), lengths=[5, 4, 5])
        data = data.replace(values=torch.randn(3, 5, 2, dtype=D), mask=torch.ones(3, 5, 2, dtype=torch.bool))
        draws = posterior_draws(model, None, data, S)
        at = torch.tensor([0.5, 4.0, 1.0])
        whole = counterfactual(model, draws, data, at, state={0: 1.0})
        for i in range(3):
            series = data.series(i)
            own = PosteriorDraws({}, draws.states[:, i, : series.num_times])
            alone = counterfactual(model, own, series, at[i], state={0: 1.0})
            torch.testing.assert_close(whole.values[:, i, : series.num_times], alone.values)
            torch.testing.assert_close(whole.states[:, i, : series.num_times], alone.states)

    def test_a_refined_grid(self):
        model, data = gaussian_model(), some_data((2,)).refine(3)
        between = float(data.times[4])
        found = counterfactual(model, None, data, between, state=lambda z: z + 1.0, num_samples=S)
        assert found.values.shape == (S, 2, 5, 2) and torch.equal(found.times, TIMES.double())
        effect = found.states - found.factual_states
        assert (effect[:, :, :2] == 0).all() and (effect[:, :, 2:] != 0).all()

    def test_a_time_that_was_rounded_is_meant(self):
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, 3)
        one, other = (counterfactual(model, draws, data, t, state={0: 1.0}) for t in (2.0, 2.0 + 1e-7))
        assert torch.equal(one.states, other.states)

    def test_fresh_noise_of_what_is_seen(self):
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, 20_000)
        found = counterfactual(model, draws, data, 2.5, state=keep, observation_noise="fresh")
        torch.testing.assert_close(found.states, found.factual_states)
        assert torch.equal(found.values[:, :3], found.factual_values[:, :3])
        residual = found.values[:, 3:] - found.states[:, 3:] @ model.emission.matrix.detach().mT
        assert (residual.std(0) - torch.tensor([0.4, 0.6])).abs().max() < 0.02

    def test_random_parameters(self):
        model, data = gaussian_model(), some_data()
        model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 1.0).to_event(1))
        draws = {"transition.rate": torch.rand(S, 1, dtype=D)}
        found = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": lambda rate: rate})
        torch.testing.assert_close(found.states, found.factual_states)
        halved = counterfactual(model, draws, data, 2.0, parameters={"transition.rate": lambda rate: 0.5 * rate})
        assert (halved.states[:, 3:] != halved.factual_states[:, 3:]).all()


def chain():
    torch.manual_seed(0)
    return ssm.StateSpaceModel(
        ssm.dynamics.CategoricalInitial(3), ssm.dynamics.MarkovChain(3), ssm.emissions.PoissonTable(3, 1)
    )


def sde():
    torch.manual_seed(0)
    drift, diffusion = ssm.dynamics.MLPDrift(2, (8,)), ssm.dynamics.ConstantDiffusion(0.3, 2)
    return ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(2), ssm.dynamics.NeuralSDE(drift, diffusion), ssm.emissions.Poisson(2, 1)
    )


def vrnn():
    torch.manual_seed(0)
    return ssm.models.vrnn(obs_dim=1, state_dim=2, hidden_dim=4)


class TestOtherModels:
    @pytest.mark.parametrize("make", [chain, sde, vrnn])
    def test_nothing_changed_nothing_differs(self, make):
        model = make()
        values = torch.randint(0, 4, (2, 6, 1)).float()
        values[0, 2] = NAN
        data = ssm.TimeSeries(torch.arange(6.0), values)
        with torch.no_grad():
            z = model(data.without_values())[0].expand(2, 6, -1)
        draws = PosteriorDraws({}, z.expand(S, *z.shape))
        if make is vrnn:
            assert model.memory.sees_observations
        found = counterfactual(model, draws, data, 1.0, state=keep)
        torch.testing.assert_close(found.values, found.factual_values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.states, found.factual_states, rtol=1e-4, atol=1e-5)

    def test_an_observation_that_memory_sees_spreads_on(self):
        model, data = vrnn(), ssm.TimeSeries(torch.arange(6.0), torch.randn(6, 1))
        z = model(data.without_values())[0].detach()
        found = counterfactual(model, PosteriorDraws({}, z.expand(3, 6, 2)), data, 2.0, state=lambda z: z + 1.0)
        effect = found.states - found.factual_states
        assert (effect[:, :2] == 0).all() and (effect[:, 3:] != 0).any(-1).all()

    def test_steps_known_by_draws_only_are_refused(self):
        model = ssm.StateSpaceModel(
            ssm.dynamics.NormalInitial(2),
            ssm.dynamics.NeuralSDE(
                ssm.dynamics.MLPDrift(2, (8,)), ssm.dynamics.ElementwiseDiffusion(2), method="milstein"
            ),
            ssm.emissions.LinearNormal(2, 1),
        )
        data = ssm.TimeSeries(torch.arange(4.0), torch.randn(4, 1))
        draws = PosteriorDraws({}, torch.randn(3, 4, 2))
        with pytest.raises(TypeError, match="SimulatedLaw"):
            counterfactual(model, draws, data, 1.0, state={0: 0.0})


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "nothing is changed"),
            ({"time": 0.7, "state": keep}, "nearest time of that series is 0.5"),
            ({"state": {2: 1.0}}, r"coordinates \[2\]"),
            ({"state": torch.tensor([1.0, NAN])}, "must be finite"),
            ({"state": lambda z: torch.zeros(7)}, r"gave the shape \(7,\)"),
            ({"parameters": {"transition.speed": 1.0}}, "does not know"),
            ({"parameters": {"initial.loc": torch.zeros(2)}}, "comes before any intervention"),
            ({"inputs": torch.zeros(5, 1)}, "the data has none"),
            ({"state": keep, "observation_noise": "new"}, '"abducted" or "fresh"'),
        ],
    )
    def test_each_names_its_argument(self, given, message):
        given = {"time": 0.5, **given}
        with pytest.raises((ValueError, KeyError), match=message):
            counterfactual(gaussian_model(), None, some_data(), given.pop("time"), num_samples=2, **given)

    def test_a_model_without_a_state(self):
        data = TimeSeries(torch.arange(3.0), torch.zeros(2, 3, 1))
        with pytest.raises(ValueError, match="this model has no state"):
            counterfactual(gru_d(1, hidden_dim=4), None, data, 1.0, state=torch.zeros(2, 1), num_samples=2)

    def test_inputs_of_the_past(self):
        model, data = gaussian_model(with_inputs=True), some_data(inputs=True)
        with pytest.raises(ValueError, match="differ from those of the data at position 0"):
            counterfactual(model, None, data, 0.5, inputs=data.inputs + 1, num_samples=2)
        with pytest.raises(ValueError, match=r"`inputs` must have the shape .* got"):
            counterfactual(model, None, data, 0.5, inputs=torch.zeros(data.inputs.shape[:-1] + (3,)), num_samples=2)
        with pytest.raises(ValueError, match="of shape"):
            counterfactual(model, None, data, torch.zeros(3), state=keep, num_samples=2)
