"""Groups, dims, labels, and the numbers in them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.nn import PyroModule, PyroSample

import pyro_ssm as ssm
from pyro_ssm.diagnostics import to_datasets
from pyro_ssm.predict import forecast, impute, posterior_draws
from tests.predict.gaussian import exact, gaussian_model

TIMES = torch.tensor([0.0, 1.0, 3.0, 4.0])
DATES = np.array(["2020-01-01", "2020-01-02", "2020-01-04", "2020-01-05"], dtype="datetime64[ns]")
NAN = float("nan")


def some_data(batch=(), seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*batch, 4, 2, generator=generator, dtype=torch.float64)
    values[..., 1, 0] = NAN
    values[..., 2, :] = NAN
    return ssm.TimeSeries(fields.pop("times", TIMES), values, **fields)


def random_rate_model(**kind):
    model = gaussian_model(**kind)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
    return model


class Chains(AbstractMCMC):
    """Draws that a sampler might have left."""

    def __init__(self, samples, diverging=None):
        self.samples, self.diverging = samples, diverging
        self.num_chains = next(iter(samples.values())).shape[0]

    def run(self, *args, **kwargs):
        raise NotImplementedError

    def get_samples(self, num_samples=None, group_by_chain=False):
        return {k: v if group_by_chain else v.flatten(0, 1) for k, v in self.samples.items()}

    def diagnostics(self):
        return {
            "divergences": {f"chain {i}": at for i, at in enumerate(self.diverging)},
            "acceptance rate": {"chain 0": 0.9},
        }


class TestLabels:
    def test_dates_names_and_missing_cells(self):
        data = some_data((3,), coords={"time": DATES, "series": ["a", "b", "c"], "obs": ["level", "flow"]})
        groups = to_datasets(None, model=gaussian_model(), data=data, num_samples=5, coords={"state": ["x", "v"]})
        assert set(groups) == {
            "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data"
        }  # fmt: skip
        z = groups["posterior"]["z"]
        assert z.dims == ("chain", "draw", "series", "time", "state") and z.shape == (1, 5, 3, 4, 2)
        assert z["series"].values.tolist() == ["a", "b", "c"] and z["state"].values.tolist() == ["x", "v"]
        assert (z["time"].values == DATES).all()
        y = groups["observed_data"]["y"]
        assert (y.notnull().values == data.mask.numpy()).all()
        assert y.sel(series="b", time="2020-01-02", obs="flow") == data.values[1, 1, 1].item()
        assert groups["posterior_predictive"]["y"].dims == ("chain", "draw", "series", "time", "obs")
        constant = groups["constant_data"]
        assert (constant["mask"].values == data.mask.numpy()).all() and constant["times"].dims == ("time",)
        assert constant["lengths"].values.tolist() == [4, 4, 4]

    def test_one_series_has_no_series_dim(self):
        groups = to_datasets(None, model=gaussian_model(), data=some_data(), num_samples=5)
        assert groups["posterior"]["z"].dims == ("chain", "draw", "time", "state")
        assert groups["posterior"]["z"]["time"].values.tolist() == TIMES.tolist()
        assert groups["constant_data"]["lengths"].shape == ()

    def test_several_batch_dims(self):
        z = to_datasets(None, model=gaussian_model(), data=some_data((2, 3)), num_samples=5)["posterior"]["z"]
        assert z.dims == ("chain", "draw", "batch_0", "series", "time", "state")

    def test_own_grids_with_dates_and_padding(self):
        frame_dates = np.stack([DATES, DATES + np.timedelta64(10, "D")])
        data = some_data((2,), times=torch.stack([TIMES, TIMES + 10.0]), lengths=[4, 2], coords={"time": frame_dates})
        new = torch.stack([TIMES[:2] + 20.0, TIMES[:2] + 30.0])
        model = gaussian_model()
        drawn = forecast(model, None, data, new, 6)
        groups = to_datasets(None, model=model, data=data, num_samples=5, forecast=drawn)
        z, constant = groups["posterior"]["z"], groups["constant_data"]
        assert z["time"].values.tolist() == [0, 1, 2, 3]
        assert np.isnan(z.values[:, :, 1, 2:]).all() and np.isfinite(z.values[:, :, 1, :2]).all()
        assert constant["date"].dims == ("series", "time") and constant["lengths"].values.tolist() == [4, 2]
        assert constant["date"].values[1, 0] == np.datetime64("2020-01-11") and np.isnat(constant["date"].values[1, 3])
        future = groups["predictions_constant_data"]
        assert (future["times"].values == new.numpy()).all()
        assert future["date"].values[0, 1] == np.datetime64("2020-01-22")
        assert future["date"].values[1, 0] == np.datetime64("2020-01-31")

    def test_forecast_dates_inputs_and_imputed(self):
        data = some_data((2,), coords={"time": DATES}, inputs=torch.randn(2, 4, 1, dtype=torch.float64))
        model = gaussian_model(with_inputs=True)
        drawn = forecast(model, None, data, [5.0, 8.0], 7, inputs=torch.zeros(2, 1))
        filled = impute(model, None, data, 5)
        groups = to_datasets(None, model=model, data=data, num_samples=5, forecast=drawn, imputed=filled)
        y = groups["predictions"]["y"]
        assert y.dims == ("chain", "draw", "series", "time", "obs") and y.shape == (1, 7, 2, 2, 2)
        assert (y["time"].values == np.array(["2020-01-06", "2020-01-09"], dtype="datetime64[ns]")).all()
        assert (y.values[0] == drawn.values.numpy()).all()
        assert (groups["predictions"]["z"].values[0] == drawn.states.numpy()).all()
        assert groups["constant_data"]["inputs"].dims == ("series", "time", "input")
        assert (groups["posterior_predictive"]["y_imputed"].values[0] == filled.numpy()).all()
        with pytest.raises(ValueError, match="num_samples=5"):
            to_datasets(None, model=model, data=data, num_samples=5, imputed=filled[:3])

    def test_refined_grid_reports_observation_times(self):
        data = some_data((2,), coords={"time": DATES})
        groups = to_datasets(None, model=gaussian_model(), data=data.refine(3), num_samples=5)
        z = groups["posterior"]["z"]
        assert z.shape == (1, 5, 2, 4, 2) and (z["time"].values == DATES).all()
        assert groups["constant_data"]["times"].values.tolist() == TIMES.tolist()
        assert groups["constant_data"]["lengths"].values.tolist() == [4, 4]

    def test_labels_that_do_not_fit(self):
        with pytest.raises(ValueError, match="3 labels of `state`, but there are 2"):
            to_datasets(None, model=gaussian_model(), data=some_data(), num_samples=2, coords={"state": list("abc")})
        with pytest.raises(ValueError, match=r"\['stat'\], which is no dim"):
            to_datasets(None, model=gaussian_model(), data=some_data(), num_samples=2, coords={"stat": list("ab")})


class TestParameters:
    def test_dims_of_shared_and_of_own_parameters(self):
        model, data = gaussian_model(), some_data((3,))
        model.initial.loc = PyroSample(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        shared = to_datasets({"initial.loc": torch.randn(6, 2).double()}, model=model, data=data)["posterior"]
        assert shared["initial.loc"].dims == ("chain", "draw", "initial.loc_dim_0")
        own = to_datasets({"initial.loc": torch.randn(6, 3, 2).double()}, model=model, data=data)["posterior"]
        assert own["initial.loc"].dims == ("chain", "draw", "series", "initial.loc_dim_0")

    def test_chains_stay_apart(self):
        rates = torch.rand(3, 8).double() + 0.1
        others = torch.randn(3, 8, 2).double()
        mcmc = Chains({"transition.rate": rates, "hyper": others}, [[], [2, 5], []])
        model, data = random_rate_model(), some_data((2,))
        groups = to_datasets(mcmc, model=model, data=data)
        assert (groups["posterior"]["transition.rate"].values == rates.numpy()).all()
        assert (groups["posterior"]["hyper"].values == others.numpy()).all()
        assert groups["posterior"]["z"].shape == (3, 8, 2, 4, 2)
        diverging = groups["sample_stats"]["diverging"]
        assert diverging.dtype == bool and np.argwhere(diverging.values).tolist() == [[1, 2], [1, 5]]
        thin = to_datasets(mcmc, model=model, data=data, num_samples=12)
        assert (thin["posterior"]["transition.rate"].values == rates[:, ::2].numpy()).all()
        assert np.argwhere(thin["sample_stats"]["diverging"].values).tolist() == [[1, 1]]
        with pytest.raises(ValueError, match="multiple of the 3 chains"):
            to_datasets(mcmc, model=model, data=data, num_samples=10)

    def test_nuts_over_the_explicit_path(self):
        model, data = random_rate_model(), some_data()
        mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=6, warmup_steps=3, disable_progbar=True)
        mcmc.run(data)
        groups = to_datasets(mcmc, model=model, data=data)
        samples = mcmc.get_samples()
        assert (groups["posterior"]["z"].values[0] == samples["z"].numpy()).all()
        assert groups["sample_stats"]["diverging"].shape == (1, 6)
        for s in range(6):
            draw = {name: value[s] for name, value in samples.items()}
            trace = pyro.poutine.trace(pyro.poutine.condition(model, draw)).get_trace(data)
            assert np.isclose(groups["sample_stats"]["lp"].values[0, s], trace.log_prob_sum().item())


class TestDensities:
    @pytest.mark.parametrize("correlated", [False, True])
    def test_conditional_terms_are_those_of_observed_cells(self, correlated):
        model, data = gaussian_model(correlated=correlated), some_data((2,))
        draws = posterior_draws(model, None, data, 4)
        groups = to_datasets(draws, model=model, data=data)
        terms = groups["log_likelihood"]["y"]
        emission = model.emission
        with torch.no_grad():
            mean, noise = draws.states @ emission.matrix.mT, emission.root @ emission.root.mT
        if correlated:  # one term for each time with something observed; the marginal of what was
            assert terms.shape == (1, 4, 6) and "vector" in terms.attrs["density"]
            full = dist.MultivariateNormal(mean, noise).log_prob(data.values)
            part = dist.Normal(mean[..., 1], noise[1, 1].sqrt()).log_prob(data.values[..., 1])
            wanted = torch.stack([full[..., 0], part[..., 1], full[..., 3]], -1)
        else:
            assert terms.shape == (1, 4, 10) and "entry" in terms.attrs["density"]
            all_terms = dist.Normal(mean, noise.diagonal().sqrt()).log_prob(data.values)
            wanted = all_terms[:, data.mask]
            assert terms["obs_of"].values[:3].tolist() == [0, 1, 1]
        assert np.allclose(terms.values[0], wanted.reshape(4, -1).numpy())
        assert terms["time_of"].values[-1] == 4.0 and terms["series_of"].values.tolist() == sorted(
            [0, 1] * (terms.shape[-1] // 2)
        )

    def test_one_step_terms_sum_to_the_exact_evidence(self):
        model, data = random_rate_model(), some_data((2,))
        rates = torch.tensor([0.2, 0.9], dtype=torch.float64)
        groups = to_datasets({"transition.rate": rates}, model=model, data=data, log_likelihood="one_step")
        terms = groups["log_likelihood"]["y"]
        assert terms.shape == (1, 2, 6)
        for s, rate in enumerate(rates):
            evidence = 0.0
            for i in range(2):
                prior = data.series(i).hide(torch.ones(4, 2, dtype=torch.bool))
                _, (mean, cov) = exact(model, prior, rate)
                seen = data.mask[i].reshape(-1)
                law = torch.distributions.MultivariateNormal(mean[seen], cov[seen][:, seen])
                evidence += law.log_prob(data.values[i].reshape(-1)[seen]).item()
            assert np.isclose(terms.values[0, s].sum(), evidence)

    def test_log_weight_and_lp_are_those_of_the_programs(self):
        model, data = random_rate_model(), some_data((2,), lengths=[4, 2])
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        guide(data)
        torch.manual_seed(3)
        groups = to_datasets(guide, model=model, data=data, num_samples=5)
        rate, z = groups["posterior"]["transition.rate"].values[0], groups["posterior"]["z"].values[0]
        for s in range(5):
            draw = {"transition.rate": torch.tensor(rate[s]), "z": torch.tensor(np.nan_to_num(z[s]))}
            trace = pyro.poutine.trace(pyro.poutine.condition(model, draw)).get_trace(data)
            trace.compute_log_prob()
            assert np.isclose(groups["sample_stats"]["lp"].values[0, s], trace.log_prob_sum().item())
            joint = trace.nodes["z"]["log_prob"] + trace.nodes["y"]["log_prob"]
            with torch.no_grad():
                path = guide.path(data, model.bind({"transition.rate": draw["transition.rate"]}))
                wanted = joint - path.log_prob(draw["z"])
            assert np.allclose(groups["sample_stats"]["log_weight"].values[0, s], wanted.detach().numpy())
        assert "elbo" not in groups["sample_stats"].attrs

    def test_elbo_of_a_guide(self):
        model, data = gaussian_model(), some_data((2,))
        guide = ssm.guides.Structured(model, hidden_dim=4).double()
        stats = to_datasets(guide, model=model, data=data, num_samples=2000)["sample_stats"]
        total = stats["log_weight"].values.sum(-1)
        with torch.no_grad():
            losses = [pyro.infer.Trace_ELBO(num_particles=200, vectorize_particles=False).loss(model, guide, data)]
        assert np.isclose(stats.attrs["elbo"], total.mean())
        assert abs(stats.attrs["elbo"] + np.mean(losses)) < 5 * total.std() * (1 / 2000 + 1 / 200) ** 0.5

    def test_posterior_predictive_has_the_exact_moments(self):
        model, data = gaussian_model(), some_data()
        y = to_datasets(None, model=model, data=data, num_samples=20_000)["posterior_predictive"]["y"].values[0]
        (mean, cov), _ = exact(model, data)
        emission = torch.block_diag(*[model.emission.matrix.detach()] * 4)
        variance = (emission @ cov @ emission.mT).diagonal() + torch.tensor([0.16, 0.36]).double().repeat(4)
        error = torch.tensor(y).flatten(1).mean(0) - emission @ mean
        assert (error.abs() < 5 * (variance / 20_000).sqrt()).all()
        assert np.allclose(y.reshape(20_000, 8).var(0), variance, rtol=0.06)

    def test_a_memory_that_sees_observations(self):
        model = ssm.models.vrnn(obs_dim=2, state_dim=2, hidden_dim=3)
        data = some_data((2,)).to(dtype=torch.float32)
        guide = ssm.guides.Structured(model, hidden_dim=4)
        draws = posterior_draws(model, guide, data, 5)
        groups = to_datasets(draws, model=model, data=data, chunk=2)
        for s in range(5):
            trace = pyro.poutine.trace(pyro.poutine.condition(model, {"z": draws.states[s]})).get_trace(data)
            trace.compute_log_prob()
            terms = groups["log_likelihood"]["y"].values[0, s]
            assert np.isclose(terms.sum(), trace.nodes["y"]["log_prob"].sum().item(), rtol=1e-5)
            assert np.isclose(groups["sample_stats"]["lp"].values[0, s], trace.log_prob_sum().item(), rtol=1e-5)

    def test_chunks_change_nothing(self):
        model, data = random_rate_model(), some_data((2,))
        draws = posterior_draws(model, {"transition.rate": torch.rand(5).double() + 0.1}, data)
        torch.manual_seed(2)
        whole = to_datasets(draws, model=model, data=data)
        torch.manual_seed(2)
        parts = to_datasets(draws, model=model, data=data, chunk=2)
        for group, name in (("posterior", "z"), ("log_likelihood", "y"), ("sample_stats", "lp")):
            assert np.allclose(whole[group][name].values, parts[group][name].values, rtol=1e-12)

    def test_left_out_on_request(self):
        assert "log_likelihood" not in to_datasets(
            None, model=gaussian_model(), data=some_data(), num_samples=2, log_likelihood=False
        )
        with pytest.raises(ValueError, match="`log_likelihood` is 'loo'"):
            to_datasets(None, model=gaussian_model(), data=some_data(), num_samples=2, log_likelihood="loo")

    def test_inside_a_users_module(self):
        class Outer(PyroModule):
            def __init__(self):
                super().__init__()
                self.child = random_rate_model()

            def forward(self, data):
                return self.child(data)

        outer, data = Outer(), some_data()
        mcmc = MCMC(NUTS(outer, max_tree_depth=2), num_samples=4, warmup_steps=2, disable_progbar=True)
        mcmc.run(data)
        groups = to_datasets(mcmc, model=outer.child, data=data)
        assert set(groups["posterior"].data_vars) == {"transition.rate", "z"}
