"""Every kind of posterior becomes draws, aligned with the batch."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule, PyroSample

import pyro_ssm as ssm
from pyro_ssm.predict import PosteriorDraws, posterior_draws
from pyro_ssm.predict.posterior import DEFAULT_DRAWS
from tests.predict.gaussian import assert_moments, exact, gaussian_model

TIMES = torch.tensor([0.0, 0.5, 2.0, 2.5])


def some_data(batch=(), seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*batch, 4, 2, generator=generator, dtype=torch.float64)
    values[..., 1, 0] = float("nan")
    return ssm.TimeSeries(TIMES, values, **fields)


def random_rate_model():
    model = gaussian_model()
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
    return model


class TestExactPaths:
    def test_moments_without_random_parameters(self):
        model, data = gaussian_model(), some_data()
        draws = posterior_draws(model, None, data, 20_000)
        (mean, cov), _ = exact(model, data)
        assert draws.parameters == {}
        assert_moments(draws.states.flatten(1), mean, cov)

    def test_moments_given_each_draw_of_a_parameter(self):
        model, data = random_rate_model(), some_data((3,))
        rates = torch.tensor([0.1, 1.5], dtype=torch.float64)
        draws = posterior_draws(model, {"transition.rate": rates}, data, 20_000)
        assert draws.parameters["transition.rate"].shape == (20_000, 1)
        for value, part in zip(rates, draws.states.chunk(2), strict=True):
            for series in range(3):
                (mean, cov), _ = exact(model, data.series(series), value)
                assert_moments(part[:, series].flatten(1), mean, cov)

    def test_a_model_that_is_not_gaussian_is_told_what_works(self):
        model = ssm.StateSpaceModel(
            ssm.dynamics.NormalInitial(2), ssm.dynamics.GatedTransition(2, 4), ssm.emissions.LinearNormal(2, 2)
        )
        with pytest.raises(TypeError, match="infer.fit.*explicit path"):
            posterior_draws(model, None, some_data().to(dtype=torch.float32))


class TestDicts:
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
    def test_shared_parameter_gets_singleton_batch_dims(self, batch):
        draws = posterior_draws(random_rate_model(), {"transition.rate": torch.rand(7).double()}, some_data(batch))
        assert draws.parameters["transition.rate"].shape == (7,) + (1,) * len(batch)
        assert draws.states.shape == (7, *batch, 4, 2)

    def test_parameter_per_series_stays(self):
        rate = torch.tensor([[0.1, 3.0]], dtype=torch.float64).expand(20_000, 2)
        model, data = random_rate_model(), some_data((2,))
        draws = posterior_draws(model, {"transition.rate": rate}, data)
        assert draws.parameters["transition.rate"].shape == (20_000, 2)
        for series, value in enumerate((0.1, 3.0)):
            (mean, cov), _ = exact(model, data.series(series), value)
            assert_moments(draws.states[:, series].flatten(1), mean, cov)

    def test_event_dims_are_not_taken_for_plates(self):
        model = gaussian_model()  # two states, two series: shapes alone could not tell
        model.initial.loc = PyroSample(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        draws = posterior_draws(model, {"initial.loc": torch.randn(5, 2).double()}, some_data((2,)))
        assert draws.parameters["initial.loc"].shape == (5, 1, 2)

    def test_given_path_is_kept(self):
        states = torch.randn(6, 3, 4, 2).double()
        draws = posterior_draws(gaussian_model(), {"z": states}, some_data((3,)))
        assert torch.equal(draws.states, states)

    def test_thinned_evenly_and_used_again(self):
        rates = torch.arange(1.0, 7.0).double()
        model, data = random_rate_model(), some_data()
        few = posterior_draws(model, {"transition.rate": rates}, data, 3).parameters["transition.rate"]
        many = posterior_draws(model, {"transition.rate": rates}, data, 12)
        assert few.tolist() == [1.0, 3.0, 5.0]
        assert many.parameters["transition.rate"].tolist() == rates.repeat_interleave(2).tolist()
        assert (many.states[0] != many.states[1]).all()  # fresh paths

    def test_chunks_change_nothing_but_memory(self):
        rates, states = torch.rand(7).double(), torch.randn(7, 4, 2).double()
        draws = posterior_draws(random_rate_model(), {"transition.rate": rates, "z": states}, some_data(), 7, chunk=3)
        assert torch.equal(draws.parameters["transition.rate"], rates) and torch.equal(draws.states, states)

    def test_draws_by_chain_are_flattened(self):
        rates = torch.rand(2, 5).double()
        draws = posterior_draws(random_rate_model(), {"transition.rate": rates}, some_data((3,)))
        assert torch.equal(draws.parameters["transition.rate"], rates.reshape(10, 1))
        states = torch.randn(2, 5, 3, 4, 2).double()
        draws = posterior_draws(random_rate_model(), {"transition.rate": rates, "z": states}, some_data((3,)))
        assert torch.equal(draws.states, states.flatten(0, 1))

    def test_draws_can_be_given_again(self):
        model, data = random_rate_model(), some_data((3,))
        first = posterior_draws(model, {"transition.rate": torch.rand(5).double()}, data)
        again = posterior_draws(model, first, data)
        assert torch.equal(again.states, first.states) and isinstance(again, PosteriorDraws)

    def test_names_of_sites_inside_a_users_module(self):
        class Outer(PyroModule):
            def __init__(self):
                super().__init__()
                self.child = random_rate_model()

            def forward(self, data):
                return self.child(data)

        outer, data = Outer(), some_data()
        outer(data.without_values())
        draws = posterior_draws(outer.child, {"child.transition.rate": torch.rand(5).double()}, data)
        assert draws.parameters["transition.rate"].shape == (5,)


class TestPrograms:
    def test_guide_draws_are_its_own_law(self):
        """Without encoder weights the structured guide is a known law: compare with many single calls."""
        model, data = random_rate_model(), some_data((3,))
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        guide(data)  # sets the guide over parameters up
        draws = posterior_draws(model, guide, data, 4000, chunk=1500)
        assert draws.parameters["transition.rate"].shape == (4000, 1)
        assert draws.states.shape == (4000, 3, 4, 2)
        with torch.no_grad():
            single = torch.stack([guide(data) for _ in range(400)])
        z = (draws.states.mean(0) - single.mean(0)) / (single.var(0) * (1 / 4000 + 1 / 400)).sqrt()
        assert z.abs().max() < 5
        ratio = draws.states.var(0) / single.var(0)
        assert (ratio - 1).abs().max() < 5 * (2 / 400 + 2 / 4000) ** 0.5

    def test_path_follows_its_own_parameter(self):
        model, data = random_rate_model(), some_data((3,))
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        with torch.no_grad():
            guide(data)  # sets the guide over parameters up
            guide.encoder.parameter_map.weight.fill_(30.0)  # the path tells the rate
            guide.head.weight[:2], guide.head.weight[2:], guide.head.bias[2:] = 1.0, 0.0, -5.0
        draws = posterior_draws(model, guide, data, 300)
        both = torch.stack([draws.parameters["transition.rate"][:, 0], draws.states[:, 0, 0, 0]])
        assert torch.corrcoef(both)[0, 1] > 0.99

    def test_fit_result_and_default_number(self):
        model, data = gaussian_model(), some_data((3,))
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        fitted = ssm.infer.fit(model, guide, data, num_steps=2, progress=False)
        assert posterior_draws(model, fitted, data).states.shape == (DEFAULT_DRAWS, 3, 4, 2)

    def test_a_second_guide_does_not_read_the_first_ones_parameters(self):
        import pyro

        data, models = some_data(), [gaussian_model(), gaussian_model()]
        guides = [ssm.guides.Structured(model, hidden_dim=4).double() for model in models]
        with torch.no_grad():
            for guide, level in zip(guides, (0.0, 100.0), strict=True):
                guide.head.weight.zero_()
                guide.head.bias.copy_(torch.tensor([level, level, -5.0, -5.0]))
        guides[0](data)  # plain Pyro keeps the first guide's parameters under the second's names
        assert len(pyro.get_param_store()) > 0
        draws = posterior_draws(models[1], guides[1], data, 20)
        assert (draws.states.mean(0) - 100.0).abs().max() < 1.0

    def test_mcmc_over_the_explicit_path(self):
        model, data = random_rate_model(), some_data()
        mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=4, warmup_steps=2, num_chains=1, disable_progbar=True)
        mcmc.run(data)
        draws = posterior_draws(model, mcmc, data)
        samples = mcmc.get_samples()
        assert torch.equal(draws.parameters["transition.rate"], samples["transition.rate"])
        assert torch.equal(draws.states, samples["z"])

    def test_mcmc_with_states_integrated_out(self):
        """Each path is drawn exactly given the draw of the parameter beside it."""
        model, data = random_rate_model(), some_data((3,))
        exactly = ssm.infer.Marginal(model, filter=ssm.infer.kalman_filter)
        mcmc = MCMC(NUTS(exactly, max_tree_depth=3), num_samples=5, warmup_steps=3, disable_progbar=True)
        mcmc.run(data)
        rates = mcmc.get_samples()["transition.rate"]
        draws = posterior_draws(model, mcmc, data, 5 * 4000)
        assert torch.equal(draws.parameters["transition.rate"][::4000, 0], rates)
        (mean, cov), _ = exact(model, data.series(2), rates[3])
        assert_moments(draws.states[3 * 4000 : 4 * 4000, 2].flatten(1), mean, cov)

    def test_a_fit_with_states_integrated_out(self):
        from pyro.infer.autoguide import AutoNormal

        model, data = random_rate_model(), some_data((3,))
        exactly = ssm.infer.Marginal(model, filter=ssm.infer.kalman_filter)
        fitted = ssm.infer.fit(exactly, AutoNormal(exactly), data, num_steps=3, progress=False)
        draws = posterior_draws(model, fitted, data, 7)
        assert draws.parameters["transition.rate"].shape == (7, 1) and draws.states.shape == (7, 3, 4, 2)
        assert draws.parameters["transition.rate"].unique().numel() == 7

    def test_guide_over_parameters_alone(self):
        model, data = random_rate_model(), some_data((3,))

        def guide(data):
            import pyro

            pyro.sample("transition.rate", dist.Delta(torch.tensor(2.0).double()))

        draws = posterior_draws(model, guide, data, 10)
        assert draws.parameters["transition.rate"].tolist() == [[2.0]] * 10
        assert draws.states.shape == (10, 3, 4, 2)

    def test_no_gradients_and_no_sites(self):
        import pyro

        model, data = random_rate_model(), some_data()
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        with pyro.poutine.trace() as traced:
            draws = posterior_draws(model, guide, data, 3)
        assert not draws.states.requires_grad
        assert [name for name, site in traced.trace.nodes.items() if site["type"] == "sample"] == []


class TestErrors:
    def test_unknown_kind(self):
        with pytest.raises(TypeError, match="`posterior` is a int.*infer.fit"):
            posterior_draws(gaussian_model(), 3, some_data())
        with pytest.raises(TypeError, match="`posterior` is a StateSpaceModel"):
            posterior_draws(gaussian_model(), gaussian_model(), some_data())

    def test_parameters_left_out(self):
        with pytest.raises(ValueError, match="no draws of the random parameters.*transition.rate"):
            posterior_draws(random_rate_model(), None, some_data())

    def test_unknown_names(self):
        with pytest.raises(KeyError, match="transition.rat"):
            posterior_draws(random_rate_model(), {"transition.rat": torch.ones(3)}, some_data())

    def test_shapes(self):
        with pytest.raises(ValueError, match="transition.rate.*plates that broadcast"):
            posterior_draws(random_rate_model(), {"transition.rate": torch.ones(3, 5, 2)}, some_data((3,)))
        with pytest.raises(ValueError, match='draws of "z"'):
            posterior_draws(gaussian_model(), {"z": torch.ones(3, 5, 2)}, some_data((3,)))
        with pytest.raises(ValueError, match="numbers of draws differ"):
            posterior_draws(
                random_rate_model(), {"transition.rate": torch.ones(3), "z": torch.ones(4, 4, 2)}, some_data()
            )

    def test_guide_of_another_model(self):
        guide = ssm.guides.Structured(gaussian_model(), hidden_dim=4)
        with pytest.raises(ValueError, match="another model"):
            posterior_draws(gaussian_model(), guide, some_data())

    def test_numbers_and_data(self):
        with pytest.raises(ValueError, match="`num_samples` is 0"):
            posterior_draws(gaussian_model(), None, some_data(), 0)
        with pytest.raises(ValueError, match="`data.values` is None"):
            posterior_draws(gaussian_model(), None, some_data().without_values())
        with pytest.raises(TypeError, match="must be a TimeSeries"):
            posterior_draws(gaussian_model(), None, torch.zeros(4, 2))
