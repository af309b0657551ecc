"""Latent stochastic differential equations under Pyro's inferences; an exact likelihood is the judge."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    ElementwiseDiffusion,
    KnownInitial,
    LinearDrift,
    MLPDiffusion,
    MLPDrift,
    NeuralSDE,
    NormalInitial,
    discretize,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import PosteriorSDE, Structured
from pyro_ssm.infer import IWAE, FreeBits, evidence_lower_bound, importance_log_likelihood, kl_annealing
from pyro_ssm.models import path_law
from pyro_ssm.predict import posterior_draws

D = torch.float64
FORMS = {
    "path": {},
    "noise": {"site": "noise"},
    "milstein": {"method": "milstein"},
    "girsanov": {"method": "torchsde:euler"},
}
forms = pytest.mark.parametrize("form", FORMS)


def linear(state_dim=1, **how):
    F = torch.tensor([[-0.7, 0.3], [0.0, -1.1]])[:state_dim, :state_dim]
    sde = NeuralSDE(LinearDrift(F, 0.3), ConstantDiffusion(0.8, state_dim), **how)
    model = StateSpaceModel(NormalInitial(state_dim), sde, LinearNormal(state_dim, 1, scale=0.7)).double()
    with torch.no_grad():
        model.emission.matrix.fill_(0.8)
    return model


def series(batch=(3,), num=4, refine=4, own=False, lengths=None):
    torch.manual_seed(2)
    times = torch.linspace(0, 2, num, dtype=D)
    if own:
        times = times * torch.linspace(0.5, 1, batch[0], dtype=D).unsqueeze(-1)
    return TimeSeries(times, torch.randn(*batch, num, 1, dtype=D), lengths=lengths).refine(refine)


def exact(model, data):
    """log p(y) of each series under the Euler chain."""
    chain = StateSpaceModel(model.initial, discretize(model.transition, "euler_maruyama"), model.emission)
    with torch.no_grad():
        return infer.kalman_filter(chain.bind(), data).log_likelihood.sum(-1)


def built(site, state_dim=1, **guide):
    """Model and guide; the chain that is the judge is built first, before anything runs."""
    torch.manual_seed(0)
    model = linear(state_dim, **FORMS[site])
    return model, PosteriorSDE(model, hidden_dim=4, drift_hidden=(8,), **guide).double()


@pytest.mark.parametrize(
    ("form", "guide"),
    [
        ("path", {}),
        ("path", {"form": "control"}),
        ("path", {"tilt": True}),
        ("noise", {}),
        ("milstein", {}),
        ("girsanov", {}),
        ("girsanov", {"form": "control"}),
    ],
)
def test_importance_weights_of_every_form_agree_with_the_exact_likelihood(form, guide):
    """Own grids; the guide is untrained, so a wrong ratio would show (without its Itô term Girsanov's is off)."""
    data = series(own=True)
    F = torch.tensor([[-0.7, 0.3], [0.0, -1.1]], dtype=D)
    pull = 0.6 if form in ("noise", "milstein") or "form" in guide else 0.5

    def drift(t, z, c):
        """A control, or the prior's drift with one."""
        u = pull * torch.sin(3 * z)
        return u if pull == 0.6 else z @ F.mT + 0.3 + u

    model, guide = built(form, 2, drift=drift, **guide)
    with torch.no_grad():  # a wide start, so that all weights have a variance
        guide.first.weight.zero_()
        guide.first.bias.copy_(torch.tensor([0.0, 0.0, 0.8, 0.8]))
        if guide.tilt:
            guide.pseudo.bias[2:] -= 2.0
    wanted = exact(linear(2), data)
    found = importance_log_likelihood(model, guide, data, 4000, batch=4000)
    assert ((found.log_likelihood - wanted).abs() < 4.5 * found.standard_error).all(), found
    assert (found.standard_error < 0.06).all()
    assert (found.bound < wanted).all()


@forms
def test_losses_agree(form):
    """Trace, mean-field (registered KL), Renyi and IWAE have the same expectation for one draw; gradients too."""
    data = series(refine=2)
    model, guide = built(form)
    values = {}
    for name, elbo in {
        "trace": Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1),
        "kl": TraceMeanField_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1),
    }.items():
        torch.manual_seed(7)
        loss = elbo.differentiable_loss(model, guide, data)
        grads = torch.autograd.grad(loss, [model.transition.drift.matrix, guide.first.weight])
        values[name] = (loss.detach(), *grads)
    for a, b, tolerance in zip(values["trace"], values["kl"], (0.4, 1.5, 0.5), strict=True):
        assert (a - b).abs().max() < tolerance, (a, b)
    with torch.no_grad():
        renyi = RenyiELBO(alpha=0, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        several = sum(IWAE(50).loss(model, guide, data) for _ in range(20)) / 20
        tight = renyi.loss(model, guide, data)
    wanted = -float(exact(linear(), data).sum())
    assert wanted - 0.3 < tight < float(values["trace"][0]) and wanted < several < float(values["trace"][0])


@forms
def test_the_divergence_is_registered(form, monkeypatch):
    """TraceMeanField_ELBO takes the closed form, not the log-densities."""
    from pyro.infer import trace_mean_field_elbo as module

    calls = []
    original = module.kl_divergence

    def spy(q, p):
        value = original(q, p)  # raises where there is none
        calls.append(type(q).__name__)
        return value

    monkeypatch.setattr(module, "kl_divergence", spy)
    model, guide = built(form)
    TraceMeanField_ELBO().differentiable_loss(model, guide, series())
    assert calls in (["EulerPath"], ["MarkovPath", "DrivenNoise"], ["GirsanovPath"])


@pytest.mark.parametrize("guide", [{}, {"form": "control"}, {"tilt": True}])
def test_a_draw_shares_the_diffusion_and_nothing_changes(guide):
    """The density of a fresh draw uses the guide's scales; value and total gradient are those of the full density."""
    torch.manual_seed(0)
    sde = NeuralSDE(MLPDrift(2, 8), ElementwiseDiffusion(2, 4))
    model = StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1)).double()
    guide = PosteriorSDE(model, 4, drift_hidden=(8,), **guide).double()
    data = series(lengths=torch.tensor([4, 2, 3]))
    bound = model.bind()
    z = guide.path(data, bound).rsample()
    prior = path_law(bound, data)
    assert prior._shared(z) is not None and prior._shared(z.clone()) is None
    parameters = [*sde.parameters(), guide.first.weight]
    found, wanted = prior.log_prob(z), prior.log_prob(z.clone())
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        *(torch.autograd.grad(x.sum(), parameters, retain_graph=True) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b)
    other = StateSpaceModel(NormalInitial(2), NeuralSDE(MLPDrift(2, 8), ElementwiseDiffusion(2, 4)), model.emission)
    assert path_law(other.double().bind(), data)._shared(z) is None


@forms
def test_batch_is_a_loop_and_padding_changes_nothing(form):
    data = series(lengths=torch.tensor([4, 2, 3]), own=True)
    model, guide = built(form)
    traced = poutine.trace(guide).get_trace(data)
    run = poutine.trace(poutine.replay(model, traced)).get_trace(data)
    for trace in (traced, run):
        trace.compute_log_prob()
    latent = [n for n in traced.stochastic_nodes if n.startswith("z")]

    def per_series(trace):
        names = [*latent, "y"] if "y" in trace.nodes else latent
        return sum(trace.nodes[name]["log_prob"] for name in names)

    weights = per_series(run) - per_series(traced)
    if form == "girsanov":  # a path has no density but in its own draw: compare the prior's terms alone
        weights = per_series(run)
    for i in range(3):
        one = data.series(i).trim()
        n = one.num_times
        cut = {name: traced.nodes[name]["value"][i][..., : n - 1 if name == "z_noise" else n, :] for name in latent}
        for value in cut.values():
            value.drawn_by_girsanov = True
        alone = poutine.trace(poutine.condition(model, data=cut)).get_trace(one)
        alone.compute_log_prob()
        value = sum(alone.nodes[name]["log_prob"] for name in [*latent, "y"])
        if form != "girsanov":
            q = poutine.trace(poutine.condition(guide, data=cut)).get_trace(one)
            q.compute_log_prob()
            value = value - sum(q.nodes[name]["log_prob"] for name in latent)
        torch.testing.assert_close(value, weights[i])


@forms
def test_prior_predictive_has_the_moments_of_the_chain(form):
    model = linear(**FORMS[form])
    data = TimeSeries(torch.linspace(0, 1, 5, dtype=D), torch.zeros(5, 1, dtype=D)).without_values()
    draws = Predictive(model, num_samples=3000, parallel=True)(data)
    z = draws["z"][..., -1, 0].flatten()
    mean, variance = 0.0, 1.0
    for _ in range(4):
        a = 1 - 0.7 * 0.25
        mean, variance = a * mean + 0.3 * 0.25, a * a * variance + 0.64 * 0.25
    assert abs(z.mean() - mean) < 4.5 * (variance / 3000) ** 0.5
    assert abs(z.var() / variance - 1) < 4.5 * (2 / 3000) ** 0.5


@forms
def test_guides_give_paths_to_predictions(form):
    model, guide = built(form)
    states = posterior_draws(model, guide, series(), num_samples=5).states
    assert states.shape == (5, 3, 13, 1) and not torch.equal(states[0], states[1])


def test_what_would_be_wrong_is_refused():
    data = series()
    noise, girsanov = linear(site="noise"), linear(method="torchsde:euler")
    path = torch.zeros(3, 13, 1, dtype=D)
    with pytest.raises(ValueError, match='"z" was conditioned, but it is a function'):
        poutine.condition(noise, data={"z": path})(data)
    with pytest.raises(NotImplementedError, match="only the ratio that belongs to its own noise"):
        poutine.trace(poutine.condition(girsanov, data={"z": path})).get_trace(data).log_prob_sum()
    pyro.clear_param_store()  # MCMC refuses the parameters of the models above
    with pytest.raises(ValueError, match="NUTS and automatic guides cannot walk over the path"):
        MCMC(NUTS(girsanov), num_samples=1, warmup_steps=1, disable_progbar=True).run(data)
    with pytest.raises(TypeError, match="the random variable of this model is the noise"):
        Structured(noise, 4)
    guide = PosteriorSDE(linear(method="torchsde:euler"), 4).double()
    law = guide.path(data, guide.model.bind())
    with torch.no_grad():
        z = law.rsample()
    with pytest.raises(NotImplementedError, match="drawn without gradient"):
        law.log_prob(z)
    for words, arguments in [
        ("form='drift' needs diagonal noise", {"form": "drift"}),
        ("`tilt` needs diagonal noise and the density", {"tilt": True}),
    ]:
        with pytest.raises(ValueError, match=words):
            PosteriorSDE(linear(site="noise"), 4, **arguments)
    with pytest.raises(TypeError, match="PosteriorSDE needs a model whose transition"):
        from pyro_ssm.dynamics import LinearNormal as Step

        PosteriorSDE(StateSpaceModel(NormalInitial(1), Step(1), LinearNormal(1, 1)), 4)


def test_a_guide_that_blows_up_says_where():
    torch.manual_seed(0)
    model = linear()
    guide = PosteriorSDE(model, 4, drift=lambda t, z, c: torch.where(t > 1.0, torch.inf, z)).double()
    with pytest.raises(FloatingPointError, match=r"the path of the guide is not finite at step 8 \(time 1.33333\)"):
        guide(series())


@pytest.mark.parametrize(
    "sde",
    [
        lambda: NeuralSDE(MLPDrift(2, 8), MLPDiffusion(2, 1, 4), noise="scalar"),
        lambda: NeuralSDE(MLPDrift(2, 8), MLPDiffusion(2, 3, 4), noise="general"),
        lambda: NeuralSDE(
            MLPDrift(2, 8), MLPDiffusion(2, 3, 4), noise="general", interpretation="stratonovich", method="heun"
        ),
        lambda: NeuralSDE(
            lambda t, z, u: torch.stack([z[..., 1], -z[..., 0].sin()], -1),
            ConstantDiffusion(torch.tensor([[0.0], [0.5]])),
            noise="additive",
            method="heun",
            state_dim=2,
        ),
        lambda: NeuralSDE(MLPDrift(2, 8), MLPDiffusion(2, 3, 4), noise="general", method="torchsde:euler"),
    ],
    ids=["scalar", "general", "Heun", "second order", "torchsde"],
)
def test_every_kind_of_noise_trains_and_bounds_itself(sde):
    """Two independent estimates of log p(y): guided weights, and the bootstrap particle filter of the same scheme."""
    torch.manual_seed(0)
    sde = sde()
    model = StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1, scale=0.5)).double()
    guide = PosteriorSDE(model, 4, drift_hidden=(8,)).double()
    filtered = model
    if sde.backend:
        filtered = StateSpaceModel(model.initial, discretize(sde, "euler_maruyama"), model.emission).double()
    data = series((), num=3)
    result = infer.fit(model, guide, data, num_steps=3, progress=False)
    assert len(result.losses) == 3
    found = importance_log_likelihood(model, guide, data, 3000, batch=3000)
    with torch.no_grad():
        cloud = infer.particle_filter(infer.bootstrap(filtered.bind(), data), num_particles=4000)
    assert (found.log_likelihood - cloud.log_likelihood.sum()).abs() < 5 * found.standard_error + 0.1


@pytest.mark.parametrize("site", ["noise", "girsanov"])
def test_a_start_that_is_known(site):
    """No site for the start; weights agree with the exact likelihood."""
    how = {"site": "noise"} if site == "noise" else {"method": "torchsde:euler"}
    parts = LinearDrift(torch.tensor([[-0.7]])), ConstantDiffusion(0.8, 1)
    start, emission = KnownInitial(torch.tensor([0.5])).double(), LinearNormal(1, 1, scale=0.7).double()
    model = StateSpaceModel(start, NeuralSDE(*parts, **how), emission).double()
    chain = StateSpaceModel(start, discretize(NeuralSDE(*parts), "euler_maruyama"), emission).double()
    data = series()
    torch.manual_seed(0)
    guide = PosteriorSDE(model, 4, drift_hidden=(8,)).double()
    assert "z_start" not in poutine.trace(guide).get_trace(data).nodes
    wanted = infer.kalman_filter(chain.bind(), data).log_likelihood.sum(-1).detach()
    found = importance_log_likelihood(model, guide, data, 3000, batch=3000)
    assert ((found.log_likelihood - wanted).abs() < 4.5 * found.standard_error + 0.02).all()
    bound = -TraceMeanField_ELBO(num_particles=200, vectorize_particles=True).loss(model, guide, data)
    assert bound < float(wanted.sum()) + 0.1


def test_annealing_and_free_bits_know_the_noise_sites():
    data = series(lengths=torch.tensor([4, 2, 3]))
    model, guide = built("noise")

    def loss(elbo, beta=1.0):
        torch.manual_seed(0)
        with kl_annealing(beta):
            return float(elbo.differentiable_loss(model, guide, data).detach())

    plain = loss(Trace_ELBO())
    assert loss(FreeBits(0.0)) == pytest.approx(plain)
    half, none = loss(Trace_ELBO(), 0.5), loss(Trace_ELBO(), 0.0)
    assert plain - half == pytest.approx(half - none) and plain != half
    assert loss(FreeBits(100.0)) == pytest.approx(none + 100.0 * (3 + 12 + 4 + 8))


@pytest.mark.slow
def test_a_trained_guide_approaches_the_exact_likelihood_from_below():
    """A tilted guide contains the exact posterior of a linear equation."""
    data = series(num=5, refine=2)
    model, guide = built("path", tilt=True, form="control")
    wanted = exact(linear(), data)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = evidence_lower_bound(model, guide, data, 200)
    infer.fit(model, guide, data, num_steps=1000, lr=0.01, progress=False)
    after = evidence_lower_bound(model, guide, data, 400)
    assert (after.series < wanted + 4.5 * after.standard_error).all()
    assert float(wanted.sum() - after.total) < 0.25
    assert float(wanted.sum() - after.total) < 0.1 * float(wanted.sum() - before.total)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["path", "noise"])
def test_nuts_finds_the_exact_smoother(site):
    model = linear(site=site)
    chain = StateSpaceModel(model.initial, discretize(linear().transition, "euler_maruyama"), model.emission).double()
    data = series((), num=3)
    with torch.no_grad():
        smoothed = infer.kalman_smoother(chain.bind(), data)
    pyro.set_rng_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mcmc = MCMC(NUTS(model), num_samples=800, warmup_steps=300, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()
    z = draws["z"] if site == "path" else Predictive(model, draws)(data)["z"]
    error = (z.reshape(800, 9).mean(0) - smoothed.mean[..., 0]).abs()
    assert error.max() < 0.12


@pytest.mark.slow
def test_a_learned_diffusion_does_not_collapse():
    """Accurate observations of an Ornstein-Uhlenbeck process: with a tilted guide the diffusion is recovered within
    10 % of the truth, and within 5 % of the exact maximum-likelihood estimate; without it collapses.
    """

    def make(diffusion):
        sde = NeuralSDE(LinearDrift(torch.tensor([[-1.0]])).requires_grad_(False), ConstantDiffusion(diffusion, 1))
        start, emission = NormalInitial(1), LinearNormal(1, 1, scale=0.1)
        with torch.no_grad():
            emission.matrix.fill_(1.0)
        return StateSpaceModel(start.requires_grad_(False), sde, emission.requires_grad_(False))

    torch.manual_seed(3)
    empty = TimeSeries(torch.linspace(0, 4, 41, dtype=D), torch.zeros(16, 41, 1)).without_values()
    with torch.no_grad():
        data = empty.replace(values=make(1.0)(empty)[1])

    model = make(0.5)
    chain = StateSpaceModel(model.initial, discretize(model.transition, "euler_maruyama"), model.emission)
    optimizer = torch.optim.Adam(chain.parameters(), 0.05)
    for _ in range(120):
        optimizer.zero_grad()
        (-infer.kalman_filter(chain.bind(), data).log_likelihood.sum()).backward()
        optimizer.step()
    best = float(model.transition.diffusion.scale.detach())

    found = {}
    for tilt, steps in ((True, 480), (False, 240)):
        torch.manual_seed(0)
        model = make(0.5)
        guide = PosteriorSDE(model, 16, drift_hidden=(16,), tilt=tilt, form="control")
        infer.fit(model, guide, data, num_steps=steps, lr=0.02, progress=False)
        found[tilt] = float(model.transition.diffusion.scale.detach())
    assert abs(found[True] - 1.0) < 0.1 and abs(found[True] / best - 1) < 0.05, (found, best)
    assert found[False] < 0.6, found


def test_automatic_guides_over_the_noise():
    """An AutoNormal over the noise sites is a valid guide: its bound lies below the exact likelihood."""
    model, data = linear(site="noise"), series((), num=3, refine=2)
    guide = AutoNormal(model)
    guide(data)
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=0).loss(model, guide, data)
    assert -loss < float(exact(linear(), data))


def test_one_series_is_simulated_without_a_handler():
    """No trace, no plate: the program is a plain function, in every form of the site."""
    for site in ("path", "noise"):
        z, y = linear(site=site)(series((), num=3).without_values())
        assert z.shape == (9, 1) and y.shape == (3, 1)  # the grid is refined
