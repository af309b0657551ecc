"""One model object in every way of inference; the evidence is known from the dense joint normal."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroSample

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import GaussianMarkov, Guide, Structured
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import Decay, See, Start, normal, posterior, remembering, series, toy


class Exact(Guide):
    """The exact posterior of each series, from the dense joint normal, in its sequential form."""

    looks_ahead = True

    def encode(self, data, model):
        rows = range(data.batch_shape[0]) if data.batch_shape else [None]
        laws = [posterior(self.model, data if i is None else data.series(i))[0] for i in rows]
        means = torch.stack([law.mean for law in laws]).reshape(data.batch_shape + (-1,))
        squares = torch.stack([law.covariance_matrix for law in laws])
        return means, squares.reshape(data.batch_shape + squares.shape[-2:]), model.initial.state_dim

    def step(self, state, k, context, memory=None):
        """z[k] given z[k - 1]: the posterior of a Markov model is Markov."""
        mean, square, d = context
        laws = []
        for j in range(k.start, k.stop):
            now, last = slice(j * d, (j + 1) * d), slice((j - 1) * d, j * d)
            loc, cover = mean[..., now], square[..., now, now]
            if j:
                gain = torch.linalg.solve(square[..., last, last], square[..., last, now]).mT
                before = state[..., j - k.start, :]
                loc = loc + (gain @ (before - mean[..., last]).unsqueeze(-1)).squeeze(-1)
                cover = cover - gain @ square[..., last, now]
            laws.append((loc, torch.linalg.cholesky(0.5 * (cover + cover.mT))))
        loc = torch.stack([law[0] for law in laws], -2)
        root = torch.stack([law[1] for law in laws], -3)
        return dist.MultivariateNormal(loc, scale_tril=root)


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def data():
    return series(num_times=4, batch=(3,), missing=True)


def evidence(model, data):
    return torch.stack([posterior(model, data.series(i))[1] for i in range(len(data))])


def test_every_weight_of_the_exact_posterior_is_the_evidence(model, data):
    guide = Exact(model)
    wanted = evidence(model, data)
    for _ in range(3):
        guided = poutine.trace(guide).get_trace(data)
        traced = poutine.trace(poutine.replay(model, trace=guided)).get_trace(data)
        guided.compute_log_prob(), traced.compute_log_prob()
        weight = traced.nodes["z"]["log_prob"] + traced.nodes["y"]["log_prob"] - guided.nodes["z"]["log_prob"]
        torch.testing.assert_close(weight.detach(), wanted)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        RenyiELBO(alpha=0, num_particles=4),
        RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        RenyiELBO(alpha=0.5, num_particles=4),
    ],
    ids=["Trace", "Trace, vectorised", "MeanField", "IWAE", "IWAE, vectorised", "Renyi 1/2"],
)
def test_with_the_exact_posterior_every_bound_is_the_evidence(model, data, elbo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TraceMeanField warns that a site is not mean field; the value is right
        loss = elbo.loss(model, Exact(model), data)
    assert -loss == pytest.approx(evidence(model, data).sum().item(), rel=1e-9)


def test_gradient_of_the_bound_at_the_exact_posterior_is_that_of_the_evidence(model):
    """d log p(y) / d theta, by differences of the dense formula, is the mean gradient of the bound."""
    data = series(num_times=3, batch=(1,))
    parameter = model.emission.offset
    guide, num = Exact(model), 4000
    loss = Trace_ELBO(num_particles=num, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(
        model, guide, data
    )
    (found,) = torch.autograd.grad(-loss, [parameter])
    wanted = []
    for j in range(2):
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter[j] += step
                values.append(evidence(model, data).sum())
                parameter[j] -= step
        wanted.append((values[0] - values[1]) / 2e-4)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0.1, atol=0.1)


def test_mini_batches_of_the_bound_add_up(model):
    data = series(num_times=4, batch=(6,))
    guide = Exact(model)
    bounds = [-Trace_ELBO().loss(model, guide, data.minibatch(index)) for index in ([0, 3], [5, 1], [2, 4])]
    assert sum(bounds) / 3 == pytest.approx(evidence(model, data).sum().item(), rel=1e-9)


def test_importance_sampling_with_the_exact_posterior(model):
    data = series(num_times=3)
    found = Importance(model, Exact(model), num_samples=3).run(data)
    weights = torch.tensor([float(w) for w in found.log_weights], dtype=torch.float64)
    torch.testing.assert_close(weights, posterior(model, data)[1].expand(3).detach())


@pytest.mark.parametrize("guide_of", [lambda m: Structured(m, 8), lambda m: GaussianMarkov(m, 8)])
@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO, TraceMeanField_ELBO, lambda: RenyiELBO(alpha=0, num_particles=2)],
    ids=["Trace", "MeanField", "Renyi"],
)
def test_plain_svi_trains_model_and_guide(guide_of, elbo):
    """Every parameter of both moves, and the bound rises."""
    model, data = toy(dtype=torch.float32), series(batch=(3,), dtype=torch.float32)
    guide = guide_of(model)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo())
        losses = [svi.step(data) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])
    moved = [
        bool((p.detach() != b).any()) for p, b in zip((*model.parameters(), *guide.parameters()), before, strict=True)
    ]
    still = [
        n for (n, _), m in zip((*model.named_parameters(), *guide.named_parameters()), moved, strict=True) if not m
    ]
    assert still == ["encoder.distance.weight"]  # read on refined grids only


def test_svi_with_random_parameters_shares_one_value(model):
    data = series(batch=(3,), dtype=torch.float32)
    model = toy(dtype=torch.float32)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    guide = Structured(model, 8)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    guide(data)  # the guide over the rate is made at its first call
    for _ in range(3):
        pyro.set_rng_seed(3)
        wanted = Trace_ELBO().loss(model, guide, data)
        pyro.set_rng_seed(3)
        assert svi.step(data) == pytest.approx(wanted, rel=1e-5)
    guided = poutine.trace(guide).get_trace(data)
    traced = poutine.trace(poutine.replay(model, trace=guided)).get_trace(data)
    assert traced.nodes["transition.rate"]["value"] is guided.nodes["transition.rate"]["value"]


def test_predictive_from_a_guide(model):
    """Means of the exact posterior, and of y given it."""
    data, num = series(num_times=3), 8000
    law, _ = posterior(model, data)
    draws = Predictive(model, guide=Exact(model), num_samples=num, parallel=True)(data)
    z = Predictive(Exact(model), num_samples=num, parallel=True)(data)["z"].reshape(num, -1)
    assert ((z.mean(0) - law.mean) / (law.variance / num).sqrt()).abs().max() < 4.5
    assert draws["y"].reshape(-1, 3, 2).shape[-2:] == (3, 2)
    new = Predictive(model, posterior_samples={"z": z.reshape(num, 3, 2)}, parallel=True)(data.without_values())["y"]
    with torch.no_grad():
        wanted = law.mean.reshape(3, 2) @ model.emission.matrix.T + model.emission.offset
    spread = new.reshape(num, 3, 2).var(0)
    assert ((new.reshape(num, 3, 2).mean(0) - wanted) / (spread / num).sqrt()).abs().max() < 4.5


def test_nuts_over_the_explicit_path_finds_the_exact_posterior():
    model, data = toy(state_dim=1, obs_dim=1), series(num_times=2, batch=(2,), obs_dim=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=300, warmup_steps=60, disable_progbar=True)
    mcmc.run(data)
    z = mcmc.get_samples()["z"]
    assert z.shape == (300, 2, 2, 1)
    for i in range(2):
        law, _ = posterior(model, data.series(i))
        error = (law.variance / 75).sqrt()  # at least one effective draw in four
        assert ((z[:, i, :, 0].mean(0) - law.mean) / error).abs().max() < 4.5
        assert (z[:, i, :, 0].var(0) / law.variance).log().abs().max() < 0.5


def test_nuts_with_random_parameters_moves_them():
    model, data = toy(state_dim=1, obs_dim=1), series(num_times=3, batch=(2,), obs_dim=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.emission.offset = PyroSample(dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()
    assert draws["emission.offset"].shape == (20, 1) and draws["emission.offset"].unique().numel() > 10
    bound = model.bind({"emission.offset": draws["emission.offset"].unsqueeze(1)})
    assert bound.emission.offset.shape == (20, 1, 1, 1)


def test_nuts_refuses_unequal_lengths_and_names_marginal():
    data = TimeSeries.from_sequences([torch.zeros(2, 2), torch.zeros(4, 2)])
    with pytest.raises(ValueError, match=r"unequal lengths[\s\S]*Marginal"):
        MCMC(NUTS(toy(dtype=torch.float32)), num_samples=2, warmup_steps=2, disable_progbar=True).run(data)


def test_memory_models_train_by_svi():
    model, data = remembering(dtype=torch.float32), series(batch=(3,), dtype=torch.float32, missing=True)
    guide = Structured(model, 8, direction="past", structured=False)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


# --------------------------------------------------------------------------- two models after one another


def fresh():
    return StateSpaceModel(Start(1), Decay(1), See(1, 1)), series(batch=(3,), obs_dim=1, dtype=torch.float32)


def test_two_models_fitted_in_a_row_both_move():
    from pyro_ssm.infer import fit

    for _ in range(2):
        model, data = fresh()
        guide = Structured(model, 8)
        before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
        fit(model, guide, data, num_steps=3, progress=False)
        named = (*model.named_parameters(), *guide.named_parameters())
        still = [n for (n, p), b in zip(named, before, strict=True) if not bool((p.detach() != b).any())]
        assert still == ["encoder.distance.weight"]


def test_a_second_model_in_the_parameter_store_raises_on_the_svi_path():
    from pyro_ssm.infer import fit

    elbo = RenyiELBO(alpha=0, num_particles=2)
    model, data = fresh()
    fit(model, Structured(model, 8), data, loss=elbo, num_steps=2, progress=False)
    second, _ = fresh()
    with pytest.raises(RuntimeError, match="clear_param_store"):
        fit(second, Structured(second, 8), data, loss=elbo, num_steps=2, progress=False)
    pyro.clear_param_store()
    before = second.transition.rate.detach().clone()
    fit(second, Structured(second, 8), data, loss=elbo, num_steps=2, progress=False)
    assert bool((second.transition.rate.detach() != before).any())


def test_plain_svi_after_fit_still_trains():
    from pyro_ssm.infer import fit

    model, data = fresh()
    guide = Structured(model, 8)
    fit(model, guide, data, num_steps=2, progress=False)
    before = model.transition.rate.detach().clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO()).step(data)
    assert bool((model.transition.rate.detach() != before).any())


def test_the_guides_names_never_clash_with_the_models():
    model, data = fresh()
    guide = Structured(model, 8)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO()).step(data)
    names = list(pyro.get_param_store().keys())
    assert any(n.startswith("guide") for n in names) and any(n.startswith("transition") for n in names)
    assert len(names) == len(set(names))


def test_normal_helper_has_one_event_dim():
    assert normal(torch.zeros(3, 2), torch.ones(2)).event_shape == (2,)
