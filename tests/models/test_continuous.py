"""Named models in continuous time, against what is known of them."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.integrate import solve_ivp
from torch.distributions import kl_divergence

from pyro_ssm import StateSpaceModel, TimeSeries, emissions, infer, models, predict, to_inference_data
from pyro_ssm.binding import random_parameters
from pyro_ssm.dynamics import LinearDrift, NeuralODE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import InitialState, PositionVelocity, PosteriorSDE
from tests.models.records import series

D = torch.float64


def test_fixed_noise_stays_and_other_emissions_bring_theirs():
    torch.manual_seed(0)
    data = series()
    model = models.latent_ode(2, 2, hidden=4, noise=0.3).double()
    infer.fit(model, InitialState(model, 4).double(), data, num_steps=3, lr=0.1, progress=False)
    torch.testing.assert_close(model.emission.scale, torch.full((2,), 0.3, dtype=D))
    assert not model.emission.scale_unconstrained.requires_grad
    learnt = models.latent_ode(2, 2, hidden=4, noise=None).double()
    before = learnt.emission.scale.detach().clone()
    infer.fit(learnt, InitialState(learnt, 4).double(), data, num_steps=3, lr=0.1, progress=False)
    assert (learnt.emission.scale - before).abs().min() > 1e-3
    counts = models.latent_ode(2, 3, hidden=4, emission=emissions.Poisson, emission_dim=4, noise=None)
    _, y = counts(TimeSeries(torch.arange(4.0)))
    assert (y == y.round()).all() and (y >= 0).all()


@pytest.fixture
def double():
    """Priors are of the dtype in which they are made."""
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_the_path_of_ode2vae_solves_its_second_order_equation():
    torch.manual_seed(0)
    model = models.ode2vae(2, 3, hidden=5, emission_dim=4, rtol=1e-9, atol=1e-10).double()
    names = random_parameters(model)
    assert names and all(name.startswith("transition.field.network.layers") for name in names)
    values = infer.sample_prior(model)
    bound, start = model.bind(values), torch.randn(1, 4, dtype=D)
    times = torch.linspace(0, 2, 9, dtype=D)
    path = bound.transition.solve(start, times).detach()
    weights = [
        values[f"transition.field.network.layers.{i}.{kind}"].squeeze() for i in (0, 1) for kind in ("weight", "bias")
    ]
    W0, b0, W1, b1 = (w.numpy() for w in weights)

    def second_order(t, s):
        return [*s[2:], *(W1 @ _tanh(W0 @ s + b0) + b1)]

    wanted = solve_ivp(second_order, (0, 2), start[0].numpy(), t_eval=times.numpy(), rtol=1e-10, atol=1e-11).y.T
    torch.testing.assert_close(path.reshape(9, 4), torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)
    law = bound.emission(path, times, None)
    other = path + torch.tensor([0.0, 0.0, 5.0, -5.0], dtype=D)  # velocities are not seen
    assert torch.equal(bound.emission(other, times, None).mean, law.mean)


def _tanh(x):
    return torch.tanh(torch.from_numpy(x)).numpy()


@pytest.mark.usefixtures("double")
def test_the_bound_of_ode2vae_counts_the_weights_once():
    torch.manual_seed(0)
    model = models.ode2vae(1, 2, hidden=3, emission_dim=3, method="rk4", step_size=0.2).double()
    guide, data = PositionVelocity(model, 4, num_frames=3).double(), series()
    guide(data)
    bound = infer.evidence_lower_bound(model, guide, data, num_samples=4000)
    normal = {name.rpartition(".")[2]: law for name, law in _parameter_laws(guide, data).items()}
    wanted = -float(sum(term.detach() for term in normal.values()))
    assert abs(float(bound.shared) - wanted) < 0.05 * abs(wanted)


def _parameter_laws(guide, data):
    """KL of the mean-field posterior of each weight to its prior."""
    model, found = guide.model, {}
    with poutine.trace() as traced:
        guide.parameters_given(data)
    for i, name in enumerate(random_parameters(model)):
        path, _, attribute = name.rpartition(".")
        prior = model.get_submodule(path)._pyro_samples[attribute].base_dist
        loc, scale = guide.parameter_guide._get_loc_and_scale(name)
        found[f"{name}.{i}"] = kl_divergence(dist.Normal(loc, scale), prior.expand(loc.shape)).sum()
    assert traced.trace.nodes
    return found


def named(kind):
    if kind == "latent_ode":
        model = models.latent_ode(2, 2, hidden=4, noise=0.3, poisson=True)
        return model, InitialState(model, 4, cell="ode_rnn")
    if kind == "ode2vae":
        model = models.ode2vae(1, 2, hidden=3, emission_dim=3)
        return model, PositionVelocity(model, 4)
    model = models.latent_sde(2, 2, hidden=4, noise=0.3)
    return model, PosteriorSDE(model, 4)


@pytest.mark.parametrize("kind", ["latent_ode", "ode2vae", "latent_sde"])
def test_forecast_impute_counterfactual_and_report(kind):
    torch.manual_seed(0)
    model, guide = named(kind)
    data = series(dtype=torch.float32, lengths=torch.tensor([6, 4, 5]))
    fitted = infer.fit(model, guide, data, num_steps=2, progress=False)
    ahead = predict.forecast(model, fitted, data, times=[12.0, 14.0], num_samples=5)
    assert ahead.values.shape == (5, 3, 2, 2) and ahead.values.std(0).min() > 0
    full = predict.impute(model, fitted, data, num_samples=5)
    assert torch.equal(full[:, data.mask], data.values[data.mask].expand(5, -1))
    same = TimeSeries(torch.arange(6.0), data.values, mask=data.mask)
    when = 3.0
    other = predict.counterfactual(model, fitted, same, when, state=lambda z: z + 1.0, num_samples=5)
    effect = other.states - other.factual_states
    assert torch.equal(effect[..., :3, :], torch.zeros(5, 3, 3, effect.shape[-1]))
    torch.testing.assert_close(effect[..., 3, :], torch.ones(5, 3, effect.shape[-1]))
    torch.testing.assert_close(other.factual_values[:, same.mask], same.values[same.mask].expand(5, -1))
    idata = to_inference_data(fitted, model=model, data=data, forecast=ahead, imputed=full, num_samples=5)
    assert {"posterior", "posterior_predictive", "log_likelihood", "predictions"} <= set(idata.groups())


def test_the_counterfactual_of_a_linear_equation_is_its_flow():
    """The effect of a push is e^{A (t - t_0)} times the push, the same for every draw."""
    torch.manual_seed(0)
    A = torch.tensor([[-0.3, 1.0], [-1.0, -0.3]], dtype=D)
    ode = NeuralODE(LinearDrift(A), rtol=1e-9, atol=1e-10)
    model = StateSpaceModel(NormalInitial(2), ode, LinearNormal(2, 1, scale=0.5)).double()
    model.transition.field.matrix.data.copy_(A)
    data = TimeSeries(torch.linspace(0, 3, 7), torch.randn(3, 7, 1, dtype=D))
    push = torch.tensor([1.0, -0.5], dtype=D)
    guide = InitialState(model, 4).double()
    other = predict.counterfactual(model, guide, data, 1.0, state=lambda z: z + push, num_samples=4)
    since = (data.times[2:] - 1.0)[:, None, None]
    wanted = (torch.linalg.matrix_exp(A * since) @ push).expand(4, 3, 5, 2)
    torch.testing.assert_close((other.states - other.factual_states)[..., 2:, :], wanted, rtol=1e-7, atol=1e-7)
    seen = wanted @ model.emission.matrix.detach().mT
    torch.testing.assert_close((other.values - other.factual_values)[..., 2:, :], seen, rtol=1e-6, atol=1e-7)
    weaker = NeuralODE(LinearDrift(torch.zeros(2, 2)), method="rk4").double()  # another field from 1.0 on: it stands
    stopped = predict.counterfactual(model, guide, data, 1.0, transition=weaker, num_samples=4).states
    torch.testing.assert_close(stopped[..., 2:, :], stopped[..., 2:3, :].expand(4, 3, 5, 2))
