"""Latent ordinary differential equations under Pyro's inferences; a linear one has an exact likelihood."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ssm import StateSpaceModel, TimeSeries, infer, to_inference_data
from pyro_ssm.blocks import with_normal_priors
from pyro_ssm.dynamics import (
    FieldPenalty,
    KnownInitial,
    LinearDrift,
    LinearNormal,
    MLPDrift,
    NeuralODE,
    NormalInitial,
    SecondOrder,
    discretize,
    interpolate_inputs,
)
from pyro_ssm.emissions import Coordinates, Normal
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.guides import Context, InitialState, PosteriorSDE, Structured
from pyro_ssm.infer import IWAE, FreeBits, evidence_lower_bound, importance_log_likelihood, kl_annealing
from pyro_ssm.models import path_law
from pyro_ssm.ops import SolverError
from pyro_ssm.predict import counterfactual, forecast, impute, posterior_draws
from tests.slopes import assert_slope

D = torch.float64
A = torch.tensor([[-0.3, 1.0], [-1.0, -0.3]])
NOISE = 0.5


def linear(initial=None, **how):
    torch.manual_seed(0)
    ode = NeuralODE(LinearDrift(A), **({"rtol": 1e-8, "atol": 1e-9} | how))
    return StateSpaceModel(initial or NormalInitial(2), ode, LinearEmission(2, 1, scale=NOISE)).double()


def series(batch=(3,), num=5, own=True, lengths=None):
    torch.manual_seed(2)
    times = torch.linspace(0, 3, num, dtype=D)
    if own:
        times = times * torch.linspace(0.5, 1, batch[0], dtype=D).unsqueeze(-1) + 10.0
    values = torch.randn(*batch, num, 1, dtype=D)
    values[..., 1, :] = torch.nan
    return TimeSeries(times, values, lengths=lengths)


def exact(model, data):
    """log p(y), and mean and covariance of the start given y, of each series: one Gaussian vector."""
    H = model.emission.matrix.detach()
    evidence, means, roots = [], [], []
    for b in range(data.batch_shape[0]):
        seen = data.mask[b, :, 0]
        times = (data.times if data.times.dim() == 1 else data.times[b])[seen]
        first = data.times[..., 0] if data.times.dim() == 1 else data.times[b, 0]
        rows = (H @ torch.linalg.matrix_exp(A.double() * (times - first)[:, None, None])).squeeze(-2)
        y = data.values[b, seen, 0] - model.emission.offset.detach()
        law = torch.distributions.MultivariateNormal(
            torch.zeros(len(y), dtype=D), rows @ rows.mT + NOISE**2 * torch.eye(len(y), dtype=D)
        )
        evidence.append(law.log_prob(y))
        covariance = torch.linalg.inv(torch.eye(2, dtype=D) + rows.mT @ rows / NOISE**2)
        means.append(covariance @ rows.mT @ y / NOISE**2)
        roots.append(torch.linalg.cholesky(covariance))
    return torch.stack(evidence), torch.stack(means), torch.stack(roots)


class Exact(nn.Module):
    """Features from which a full-covariance affine head makes the exact posterior: a user's own encoder."""

    def __init__(self, features):
        super().__init__()
        self.given = features

    def forward(self, data, model):
        return Context(self.given.unsqueeze(-2))


def exact_guide(model, data, **how):
    """The guide with the exact posterior, through its head."""
    _, mean, root = exact(model, data)
    raw = lambda scale: (scale - 1e-4).expm1().log()  # noqa: E731
    features = torch.cat([mean, raw(root.diagonal(dim1=-2, dim2=-1)), root[:, 1:, 0]], -1)
    guide = InitialState(model, 5, encoder=Exact(features), covariance="full", **how).double()
    with torch.no_grad():
        guide.head.layers[0].weight.copy_(torch.eye(5))
        guide.head.layers[0].bias.zero_()
    return guide


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2, 3])])
def test_the_exact_posterior_has_the_exact_evidence(lengths):
    """Every draw has the weight log p(y): values of model and guide are densities of the same variable."""
    model, data = linear(), series(lengths=lengths)
    guide = exact_guide(model, data)
    wanted = exact(model, data)[0]
    found = importance_log_likelihood(model, guide, data, 50, batch=50)
    torch.testing.assert_close(found.log_likelihood, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.bound, wanted, rtol=1e-6, atol=1e-6)
    for elbo in (Trace_ELBO(), IWAE(3), RenyiELBO(alpha=0, num_particles=2)):
        assert elbo.loss(model, guide, data) == pytest.approx(-float(wanted.sum()), abs=1e-5)
    mean_field = TraceMeanField_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    assert mean_field.loss(model, guide, data) == pytest.approx(-float(wanted.sum()), abs=0.15)


def test_an_untrained_guide_weighs_right_and_bounds_from_below():
    model, data = linear(), series()
    guide = InitialState(model, 4).double()
    with torch.no_grad():
        guide.head.layers[0].weight.mul_(0.1)
        guide.head.layers[0].bias.copy_(torch.tensor([0.2, -0.2, 0.8, 0.8]))
    wanted = exact(model, data)[0]
    found = importance_log_likelihood(model, guide, data, 4000, batch=4000)
    assert ((found.log_likelihood - wanted).abs() < 4.5 * found.standard_error).all() and (found.bound < wanted).all()
    several = sum(IWAE(500).loss(model, guide, data) for _ in range(20)) / 20
    assert -float(wanted.sum()) - 0.05 < several < -float(found.bound.sum())


def test_the_divergence_is_registered_and_losses_agree():
    model, data = linear(), series()
    guide = InitialState(model, 4).double()
    losses = []
    for kind in (Trace_ELBO, TraceMeanField_ELBO):
        torch.manual_seed(1)
        elbo = kind(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model, guide, data)
        losses.append(
            (loss.detach(), *torch.autograd.grad(loss, [model.transition.field.matrix, guide.head.layers[0].bias]))
        )
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.3)


def test_masks_padding_plates_and_minibatches():
    """A batch is a loop over its series without their padding; what is missing or padded adds exactly 0."""
    lengths = torch.tensor([5, 2, 4])
    model, data = linear(), series(lengths=lengths)
    guide = InitialState(model, 4).double()
    traced = poutine.trace(guide).get_trace(data)
    start = traced.nodes["z_start"]["value"]
    replayed = poutine.trace(poutine.condition(model, data={"z_start": start})).get_trace(data)
    replayed.compute_log_prob()
    traced.compute_log_prob()
    assert replayed.nodes["z"]["value"].shape == (3, 5, 2)
    torch.testing.assert_close(replayed.nodes["z"]["value"][1, 1], replayed.nodes["z"]["value"][1, 4])
    for b in range(3):
        n = int(lengths[b])
        one = TimeSeries(data.times[b, :n], torch.where(data.mask, data.values, torch.nan)[b, :n])
        alone = poutine.trace(poutine.condition(model, data={"z_start": start[b]})).get_trace(one)
        q = poutine.trace(poutine.condition(guide, data={"z_start": start[b]})).get_trace(one)
        alone.compute_log_prob()
        q.compute_log_prob()
        for name in ("z_start", "y"):
            torch.testing.assert_close(alone.nodes[name]["log_prob"], replayed.nodes[name]["log_prob"][b])
        torch.testing.assert_close(q.nodes["z_start"]["log_prob"], traced.nodes["z_start"]["log_prob"][b])
    small = data.minibatch(torch.tensor([2, 0]))
    part = poutine.trace(poutine.condition(model, data={"z_start": start[[2, 0]]})).get_trace(small)
    part.compute_log_prob()
    for name in ("z_start", "y"):
        torch.testing.assert_close(
            part.nodes[name]["log_prob_sum"], 1.5 * replayed.nodes[name]["log_prob"][[2, 0]].sum()
        )
    refined = poutine.trace(poutine.condition(model, data={"z_start": start})).get_trace(data.refine(3))
    refined.compute_log_prob()
    torch.testing.assert_close(
        refined.nodes["y"]["log_prob"], replayed.nodes["y"]["log_prob"], rtol=1e-6, atol=1e-6
    )  # refining changes nothing


def test_what_would_happen_after_the_end_of_a_series_does_not_matter():
    """A path that blows up at time 1 is no error for a series that ends before; with a later end it is, by name."""
    ode = NeuralODE(lambda t, z, u: z**2, state_dim=1)
    model = StateSpaceModel(NormalInitial(1), ode, LinearEmission(1, 1)).double()
    times, start = torch.tensor([0.0, 0.4, 0.8, 1.2], dtype=D), torch.tensor([1.0, 0.5], dtype=D).reshape(2, 1, 1)
    run = poutine.condition(model, data={"z_start": start})
    z, _ = run(TimeSeries(times, torch.zeros(2, 4, 1, dtype=D), lengths=[3, 4]))
    torch.testing.assert_close(z[0, :, 0], 1 / (1 - times.clamp(max=0.8)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[1, :, 0], 1 / (2 - times), rtol=1e-4, atol=1e-5)
    with pytest.raises(SolverError, match=r"at time 1(.0000\d*)? of series 0, where the state has norm"):
        run(TimeSeries(times, torch.zeros(2, 4, 1, dtype=D)))


def test_fields_with_priors_train_and_predict():
    """Bayesian weights of second-order dynamics (ODE2VAE), positions seen only, by every gradient ELBO."""
    torch.manual_seed(0)
    field = with_normal_priors(SecondOrder(2, hidden=6).double())
    emission = Coordinates(Normal(2, 3, 8), state_dim=4)
    model = StateSpaceModel(NormalInitial(4), NeuralODE(field, method="rk4"), emission).double()
    data = TimeSeries(torch.rand(6, 7, dtype=D).cumsum(-1), torch.randn(6, 7, 3, dtype=D))
    guide = InitialState(model, 8, head=8).double()
    plain = Trace_ELBO()
    for loss in (None, TraceMeanField_ELBO(), IWAE(2), FreeBits(0.1)):
        assert infer.fit(model, guide, data, num_steps=3, batch_size=4, loss=loss, progress=False).num_steps == 3

        def seeded(loss=loss or plain):
            torch.manual_seed(5)
            return loss.differentiable_loss(model, guide, data)

        with infer.local_parameters():
            assert_slope(seeded, [*model.parameters(), *guide.parameters()], rel=1e-4)
    draws = posterior_draws(model, guide, data, num_samples=4)
    assert draws.states.shape == (4, 6, 7, 4)
    for i in range(4):  # each path solves the equation with its own weights, from its own start
        bound = model.bind({name: value[i] for name, value in draws.parameters.items()})
        path = bound.transition.solve(draws.states[i, :, :1], data.times)
        torch.testing.assert_close(path, draws.states[i], rtol=1e-2, atol=1e-2)
    future = forecast(model, guide, data, times=data.times[:, -1:] + torch.tensor([0.5, 1.0], dtype=D), num_samples=4)
    assert future.values.shape == (4, 6, 2, 3)
    missing = data.hide(torch.rand(6, 7, 3) > 0.7)
    filled = impute(model, guide, missing, num_samples=4)
    assert torch.equal(filled[0][missing.mask], missing.values[missing.mask]) and filled.std(0)[~missing.mask].min() > 0
    tree = to_inference_data(guide, model=model, data=data, num_samples=4)
    assert tree["posterior"]["z"].shape == (1, 4, 6, 7, 4)


def test_forecasts_continue_the_path():
    model, data = linear(), series()
    guide = exact_guide(model, data)
    times = data.times[:, -1:] + torch.tensor([0.4, 2.0], dtype=D)
    torch.manual_seed(0)
    future = forecast(model, guide, data, times=times, num_samples=2000)
    _, mean, root = exact(model, data)
    for b in range(3):
        E = torch.linalg.matrix_exp(A.double() * (times[b] - data.times[b, 0])[:, None, None])
        torch.testing.assert_close(future.states[:, b].mean(0), E @ mean[b], rtol=0, atol=0.06)
        wanted = (E @ root[b]).square().sum(-1).sqrt()
        torch.testing.assert_close(future.states[:, b].std(0), wanted, rtol=0.08, atol=0)


def held_still(**how):
    model = linear(**how)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def test_counterfactuals_move_along_the_flow():
    """Setting the state at a time changes a linear path by the matrix exponential from there on."""
    model, data = linear(), series(own=False)
    there = data.times[2].item()
    found = counterfactual(model, exact_guide(model, data), data, time=there, state=lambda z: z + 1.0, num_samples=3)
    effect = (found.states - found.factual_states).detach()
    E = torch.linalg.matrix_exp(A.double() * (data.times[2:] - there)[:, None, None])
    torch.testing.assert_close(effect[..., 2:, :], E.sum(-1).expand(3, 3, 3, 2), rtol=0, atol=1e-4)
    assert (effect[..., :2, :] == 0).all()


@pytest.mark.parametrize("engine", ["NUTS", "AutoNormal"])
def test_pyros_own_engines_give_paths_to_predictions(engine):
    model, data = held_still(method="rk4", step_size=0.3), series((2,))
    pyro.set_rng_seed(0)
    if engine == "NUTS":
        posterior = MCMC(NUTS(model, max_tree_depth=3), num_samples=10, warmup_steps=10, disable_progbar=True)
        posterior.run(data)
    else:
        posterior = AutoNormal(model)
        posterior(data)
        loss = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss(model, posterior, data)
        assert -loss < float(exact(model, data)[0].sum())
    draws = posterior_draws(model, posterior, data, num_samples=10)
    assert draws.states.shape == (10, 2, 5, 2) and not torch.equal(draws.states[0], draws.states[5])
    torch.testing.assert_close(model.bind().transition.solve(draws.states[:, :, :1], data.times), draws.states)
    assert forecast(model, posterior, data, times=[20.0], num_samples=10).values.shape == (10, 2, 1, 1)
    if engine == "NUTS":
        tree = to_inference_data(posterior, model=model, data=data, num_samples=10)
        assert tree["posterior"]["z"].shape == (1, 10, 2, 5, 2)
        start = posterior.get_samples()["z_start"]
        states = posterior_draws(model, {"z_start": start}, data).states
        torch.testing.assert_close(states[:, :, :1], start)
        grouped = {"z_start": start.unsqueeze(0).expand(2, *start.shape)}
        assert posterior_draws(model, grouped, data).states.shape == (20, 2, 5, 2)


@pytest.mark.slow
def test_nuts_finds_the_exact_posterior_of_the_start():
    model, data = held_still(method="rk4", step_size=0.1), series((2,))
    _, mean, root = exact(model, data)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(data)
    start, deviation = mcmc.get_samples()["z_start"].squeeze(-2), root.square().sum(-1).sqrt()
    assert ((start.mean(0) - mean).abs() < 0.25 * deviation).all()
    assert ((start.std(0) / deviation - 1).abs() < 0.2).all()


def test_marginalised_by_a_filter_it_simulates_and_scores():
    """Marginal over the extended filter, exact for a linear field; it draws records by whole solves."""
    model, data = linear(), series()
    marginal = infer.Marginal(model, filter=infer.extended_kalman_filter)
    traced = poutine.trace(marginal).get_trace(data)
    traced.compute_log_prob()
    torch.testing.assert_close(traced.nodes["y"]["log_prob"].detach(), exact(model, data)[0], rtol=1e-5, atol=1e-5)
    assert marginal(data.without_values()).shape == (3, 5, 1)


def test_prior_predictive_has_the_moments_of_the_model():
    model, data = linear(), series(own=False).without_values()
    draws = Predictive(model, num_samples=3000, parallel=True)(data)
    E = torch.linalg.matrix_exp(A.double() * 3.0)
    z = draws["z"][..., -1, :].reshape(-1, 2)
    torch.testing.assert_close(z.mT.cov(), E @ E.mT, rtol=0, atol=0.03)
    assert draws["y"].shape == (3000, 3, 5, 1)


class Rate(PyroModule):
    event_dims = {"rate": 1}
    state_dim = 1

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(0.0, 0.5))

    def forward(self, t, z, u):
        return -self.rate * z


@pytest.mark.parametrize("num_samples", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_start_that_is_known_leaves_the_constants(num_samples):
    """A mechanism with a prior and a known start: NUTS over its rate, against the posterior on a grid.

    On its way the sampler meets rates that make the equation too stiff for its steps: divergences, not errors.
    """
    emission = LinearEmission(1, 1, scale=0.2).requires_grad_(False)
    with torch.no_grad():
        emission.matrix.fill_(1.0)
    model = StateSpaceModel(KnownInitial(torch.tensor([2.0])), NeuralODE(Rate(), rtol=1e-4, max_steps=100), emission)
    times = torch.linspace(0, 2, 6, dtype=D)
    torch.manual_seed(0)
    data = TimeSeries(times, (2 * torch.exp(-0.7 * times) + 0.2 * torch.randn(6, dtype=D)).float().unsqueeze(-1))
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=num_samples, disable_progbar=True)
    mcmc.run(data)
    rate = mcmc.get_samples()["transition.field.rate"].flatten()
    grid = torch.linspace(0.01, 3, 1000)
    fit = -0.5 * ((data.values.mT - 2 * torch.exp(-grid[:, None] * times.float())) / 0.2).square().sum(-1)
    log = fit + dist.LogNormal(0.0, 0.5).log_prob(grid)
    weight = (log - log.max()).exp()
    mean = (weight * grid).sum() / weight.sum()
    sd = ((weight * (grid - mean) ** 2).sum() / weight.sum()).sqrt()
    assert abs(rate.mean() - mean) < (1.5 if num_samples == 10 else 0.35) * sd
    assert num_samples == 10 or 0.75 < rate.std() / sd < 1.3
    states = posterior_draws(model, mcmc, data).states
    torch.testing.assert_close(states[..., 0], 2 * torch.exp(-rate[:, None] * times.float()), rtol=1e-3, atol=1e-3)
    guide = InitialState(model, 4)
    assert "z_start" not in poutine.trace(guide).get_trace(data).nodes
    assert posterior_draws(model, guide, data, num_samples=5).states.shape == (5, 6, 1)


def test_mcmc_refuses_a_penalty_and_takes_the_evaluated_model():
    model, data = linear(penalty=FieldPenalty(kinetic=0.3)), series(lengths=torch.tensor([5, 2, 3]))

    def run():
        MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run(data)

    with pytest.raises(ValueError, match=r"no part of the model.*model.eval\(\)"):
        run()
    model.eval()
    run()


def test_a_penalty_is_a_term_in_training_only():
    model, data = linear(penalty=FieldPenalty(kinetic=0.3)), series(lengths=torch.tensor([5, 2, 3]))
    plain = linear()
    start = torch.randn(3, 1, 2, dtype=D)

    def total(program):
        return poutine.trace(poutine.condition(program, data={"z_start": start})).get_trace(data)

    trained, base = total(model), total(plain)
    trained.compute_log_prob()
    wanted = []
    for b, n in enumerate((5, 2, 3)):
        path = base.nodes["z"]["value"][b, :n]
        energy = 0.3 * (path @ A.double().mT).square().sum(-1)
        wanted.append(torch.trapezoid(energy, data.times[b, :n]))
    torch.testing.assert_close(trained.nodes["penalty"]["log_prob"].detach(), -torch.stack(wanted))
    model.eval()
    assert "penalty" not in total(model).nodes
    model.train()
    guide = InitialState(model, 4).double()
    bounds = []
    for one in (model, plain):  # a bound for a report evaluates: no penalty
        torch.manual_seed(0)
        bounds.append(float(evidence_lower_bound(one, guide, data, 10).total))
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)
    losses = []
    for one in (model, plain):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(one, guide, data))
    torch.manual_seed(0)
    start = guide(data).detach()
    priced = total(model)
    priced.compute_log_prob()
    assert losses[0] - losses[1] == pytest.approx(-float(priced.nodes["penalty"]["log_prob"].sum().detach()), rel=1e-9)
    for loss in (None, IWAE(2)):
        infer.fit(model, guide, data, num_steps=2, batch_size=2, loss=loss, progress=False)


class Elimination(PyroModule):
    """One compartment, with doses as jumps."""

    event_dims = {"rate": 1}
    state_dim = 1

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(-0.5, 0.3))

    def forward(self, t, z, u):
        return -self.rate * z


@pytest.mark.parametrize("refine", [1, 3])
def test_doses_are_inputs_in_the_past_and_in_the_future(refine):
    """Posterior draws and forecasts of a compartment follow the closed form of each draw of its rate."""
    torch.manual_seed(0)
    times = torch.tensor([0.0, 0.5, 1.5, 2.0, 3.0, 4.5], dtype=D)
    doses = torch.zeros(2, 6, 1, dtype=D)
    doses[0, 1], doses[1, 2], doses[0, 4] = 2.0, 1.0, 3.0
    whole = interpolate_inputs(TimeSeries(times, torch.rand(2, 6, 1, dtype=D), inputs=doses), "held")
    past, future = whole.split(4)
    past = past.refine(refine)
    ode = NeuralODE(Elimination(), jump=lambda t, z, u: z + u, interpolation="held", rtol=1e-8, atol=1e-9)
    model = StateSpaceModel(NormalInitial(1), ode, LinearEmission(1, 1)).double()
    guide = InitialState(model, 4).double()
    infer.fit(model, guide, past, num_steps=2, progress=False)
    torch.manual_seed(1)
    draws = posterior_draws(model, guide, past, num_samples=5)
    torch.manual_seed(1)
    ahead = forecast(model, guide, past, times=future.times, inputs=future.inputs, num_samples=5)
    rate = draws.parameters["transition.field.rate"].reshape(5, 1, 1)

    def amount(t):  # (draws, series, times)
        given = (times < t.unsqueeze(-1)).to(D) * doses[:, None, :, 0]
        late = (given * torch.exp(-rate.unsqueeze(-1) * (t.unsqueeze(-1) - times).clamp(min=0))).sum(-1)
        return draws.states[:, :, 0] * torch.exp(-rate * t) + late

    torch.testing.assert_close(draws.states[..., 0], amount(past.times), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ahead.states[..., 0], amount(future.times), rtol=1e-6, atol=1e-7)


def test_annealing_reaches_the_start():
    model, data = linear(), series()
    guide = InitialState(model, 4).double()

    def loss(beta):
        torch.manual_seed(0)
        with kl_annealing(beta):
            return float(Trace_ELBO().differentiable_loss(model, guide, data).detach())

    assert loss(1.0) - loss(0.5) == pytest.approx(loss(0.5) - loss(0.0)) and loss(1.0) != loss(0.0)


def test_inside_a_users_module_and_plate():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.child = linear()

        def forward(self, data):
            with pyro.plate("mine", 3, dim=-1):
                return self.child(data)

    traced = poutine.trace(Outer()).get_trace(series())
    assert {"child.z_start", "child.z", "child.y"} <= set(traced.nodes) and "series" not in traced.nodes


def test_what_would_be_wrong_is_refused():
    model, data = linear(), series()
    with pytest.raises(ValueError, match='site "z" was conditioned, but the path of an ordinary'):
        poutine.condition(model, data={"z": torch.zeros(3, 5, 2, dtype=D)})(data)
    with pytest.raises(TypeError, match="the path of this model is a function of its start"):
        Structured(model, 4)
    with pytest.raises(TypeError, match="InitialState needs a model whose transition is a dynamics.NeuralODE"):
        InitialState(StateSpaceModel(NormalInitial(2), LinearNormal(2), LinearEmission(2, 1)))
    with pytest.raises(TypeError, match="PosteriorSDE needs|the path of this model"):
        PosteriorSDE(model, 4)
    with pytest.raises(ValueError, match="`direction` must be 'future' or 'both'"):
        InitialState(model, 4, "past")
    with pytest.raises(TypeError, match="`encoder` must be callable"):
        InitialState(model, 4, encoder=3)
    with pytest.raises(TypeError, match="kalman_filter needs"):
        infer.kalman_filter(model.bind(), data)
    law = path_law(model.bind(), data)
    path = law.sample()
    with pytest.raises(NotImplementedError, match="has no density: it is a function of its start"):
        law.log_prob(path)
    with torch.no_grad():
        torch.testing.assert_close(
            law.log_prob(path), NormalInitial(2).double()(data.times[:, :1], None).log_prob(path[:, :1]).squeeze(-1)
        )
        assert (law.log_prob(path + 1.0) == -torch.inf).all()
    with pytest.raises(ValueError, match="NUTS and automatic guides cannot walk over the path"):
        _ = law.support
    guide = InitialState(model, 4).double()
    with pytest.raises(NotImplementedError, match="no law to propose from"):
        guide.step(path, slice(1, 5), guide.encode(data, model.bind()))
    with pytest.raises(ValueError, match="a guide needs observations"):
        guide(data.without_values())


def test_particle_filters_take_the_equation_with_a_floor_of_noise():
    model, data = linear(), series()
    noisy = StateSpaceModel(
        NormalInitial(2),
        discretize(NeuralODE(LinearDrift(A)), "flow", noise_floor=0.05),
        LinearEmission(2, 1, scale=NOISE),
    ).double()
    with torch.no_grad():
        noisy.emission.matrix.copy_(model.emission.matrix)
        torch.manual_seed(0)
        cloud = infer.particle_filter(infer.bootstrap(noisy.bind(), data), num_particles=4000)
        degenerate = infer.particle_filter(infer.bootstrap(model.bind(), data), num_particles=4000)
    wanted = infer.extended_kalman_filter(noisy.bind(), data).log_likelihood.sum(-1).detach()
    assert (cloud.log_likelihood.sum(-1) - wanted).abs().max() < 0.12
    assert (degenerate.log_likelihood.sum(-1) - exact(model, data)[0]).abs().max() < 0.15
    guide = Structured(noisy, 4).double()
    torch.manual_seed(0)
    loss = Trace_ELBO().loss(noisy, guide, data)
    torch.manual_seed(0)
    z = guide(data)
    seen = torch.distributions.Normal(noisy.bind().emission(z, data.times, None).mean, NOISE).log_prob(data.values)
    joint = path_law(noisy.bind(), data).log_prob(z).sum() + torch.where(data.mask, seen, 0.0).sum()
    bound = joint - guide.path(data, noisy.bind()).log_prob(z).sum()
    assert loss == pytest.approx(-float(bound.detach()), rel=1e-9)


@pytest.mark.slow
def test_a_trained_guide_approaches_the_exact_likelihood_from_below():
    model = held_still(method="rk4", step_size=0.2)
    torch.manual_seed(1)
    times = torch.linspace(0, 3, 6, dtype=D)
    data = model(TimeSeries(times, torch.zeros(256, 6, 1, dtype=D)).without_values())[1].detach()
    data = TimeSeries(times, data)
    guide = InitialState(model, 16, covariance="full", cell="relu").double()
    infer.fit(model, guide, data, num_steps=700, lr=0.01, batch_size=64, progress=False)
    infer.fit(model, guide, data, num_steps=500, lr=0.001, batch_size=64, progress=False)
    after = evidence_lower_bound(model, guide, data, 200)
    gap = exact(model, data)[0].sum() - after.total
    assert 0 < gap / 256 < 0.05, gap / 256


@pytest.mark.slow
def test_a_latent_ode_learns_an_oscillation():
    """Neural field, own irregular times: the bound rises, and extrapolation beats the mean."""
    torch.manual_seed(0)
    times = torch.rand(24, 15, dtype=D).sort(-1).values * 6
    phase = 6.28 * torch.rand(24, 1, dtype=D)
    data = TimeSeries(times, (torch.sin(times + phase) + 0.05 * torch.randn(24, 15)).float().unsqueeze(-1))
    ode = NeuralODE(MLPDrift(2, 16, activation="tanh"), rtol=1e-3, atol=1e-4)
    model = StateSpaceModel(NormalInitial(2), ode, Normal(2, 1, scale=0.3))
    guide = InitialState(model, 16, direction="future")
    result = infer.fit(model, guide, data, num_steps=200, lr=0.02, progress=False)
    assert result.losses[-20:].mean() < result.losses[:20].mean() - 0.5
    later = torch.tensor([6.5, 7.0, 7.5], dtype=D)
    future = forecast(model, guide, data, times=later, num_samples=30).values.mean(0).squeeze(-1)
    error = (future - torch.sin(later + phase)).square().mean()
    assert error < 0.25  # the mean has 0.5


class Decay(PyroModule):
    """A field of the user's: no component, and no `event_dims`."""

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(0.0, 0.5))

    def forward(self, t, z, u):
        return -self.rate * z


def test_the_encoder_sees_the_constants_of_a_user_s_field():
    """The start depends on them, in every one of a batch of draws."""
    torch.manual_seed(0)
    model = StateSpaceModel(NormalInitial(1), NeuralODE(Decay(), state_dim=1), LinearEmission(1, 1)).double()
    guide, data = InitialState(model, 4).double(), series()
    rates = torch.tensor([0.3, 0.9], dtype=D)
    together = guide.encode(data, model.bind({"transition.field.rate": rates.unsqueeze(-1)})).features
    apart = [guide.encode(data, model.bind({"transition.field.rate": rate})).features for rate in rates]
    torch.testing.assert_close(together, torch.stack(apart))
    assert not torch.allclose(*apart)
    assert infer.fit(model, guide, data, num_steps=2, progress=False).num_steps == 2
    assert posterior_draws(model, guide, data, num_samples=3).parameters["transition.field.rate"].shape[0] == 3


def test_one_series_is_simulated_without_a_handler():
    """No trace, no plate: the program is a plain function."""
    model, data = linear(), TimeSeries(torch.linspace(0, 3, 5, dtype=D))
    z, y = model(data)
    assert z.shape == (5, 2) and y.shape == (5, 1)
    torch.testing.assert_close(z, model.transition.solve(z[:1], data.times))
