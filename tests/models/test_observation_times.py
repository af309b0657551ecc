"""The Poisson process of observation times, against closed forms and quadrature."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ssm import StateSpaceModel, infer, models, predict
from pyro_ssm.diagnostics.densities import densities
from pyro_ssm.distributions import PoissonTimes
from pyro_ssm.dynamics import KnownInitial, LinearDrift, LogIntensity, NeuralODE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import InitialState
from pyro_ssm.models.times import times_law
from pyro_ssm.testing.checks import perturb
from tests.models.records import series

D = torch.float64


def spans(data):
    last = data.times[..., -1:] if data.lengths is None else data.times.gather(-1, data.lengths.unsqueeze(-1) - 1)
    return (last - data.times[..., :1]).squeeze(-1)


def site(model, data, name):
    traced = poutine.trace(model).get_trace(data)
    traced.compute_log_prob()
    return traced.nodes[name]


def timed(log_intensity, field=None, state_dim=1, obs=2, **options):
    """A model whose start is known to be 1 in each coordinate."""
    field = (lambda t, z, u: -z) if field is None else field
    options = {"rtol": 1e-9, "atol": 1e-10} | options
    ode = NeuralODE(field, state_dim=state_dim, log_intensity=log_intensity, **options)
    return StateSpaceModel(KnownInitial(torch.ones(state_dim, dtype=D)), ode, LinearNormal(state_dim, obs)).double()


@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 2, 4])])
def test_a_constant_intensity_has_the_closed_form(lengths):
    rates = torch.tensor([0.7, 2.5], dtype=D)
    model, data = timed(lambda t, z, u: rates.log().expand(z.shape[:-1] + (2,))), series(lengths=lengths)
    counts = data.mask.sum(-2).to(D)
    wanted = (counts * rates.log()).sum(-1) - rates.sum() * spans(data)
    torch.testing.assert_close(site(model, data, "times")["log_prob"], wanted, rtol=1e-12, atol=1e-12)
    one = timed(lambda t, z, u: torch.full_like(z[..., :1], math.log(0.7)))  # one channel: whether anything was seen
    wanted = data.mask.any(-1).sum(-1).to(D) * math.log(0.7) - 0.7 * spans(data)
    torch.testing.assert_close(site(one, data, "times")["log_prob"], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "rk4", "step_size": 0.01},
        {"backend": "torchdiffeq"},
        {"method": "bosh3", "max_steps": 20000},
    ],
)
def test_an_intensity_of_the_path_is_integrated_by_the_solver(options):
    """z = e^{-(t - t_1)}, rate z^2: the integral is (1 - e^{-2 T}) / 2."""
    model, data = timed(lambda t, z, u: 2 * z.log(), obs=1, **options), series(obs=1)
    since = data.times - data.times[:, :1]
    wanted = (-2 * since * data.mask.squeeze(-1)).sum(-1) - (1 - (-2 * spans(data)).exp()) / 2
    torch.testing.assert_close(site(model, data, "times")["log_prob"], wanted, rtol=1e-7, atol=1e-7)
    path, integral = model.bind().transition.solve_with_intensity(torch.ones(3, 1, 1, dtype=D), data.times)
    torch.testing.assert_close(path.squeeze(-1), (-since).exp(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(integral.squeeze(-1), (1 - (-2 * since).exp()) / 2, rtol=1e-7, atol=1e-7)


def test_a_time_dependent_intensity_with_inputs_and_jumps():
    """Inputs are held within a gap, a jump moves the state and not the integral."""
    data = series().replace(inputs=torch.randn(3, 6, 2, dtype=D, generator=torch.Generator().manual_seed(5)))
    jump = lambda t, z, u: z + u[..., :1]  # noqa: E731
    model = timed(lambda t, z, u: u, field=lambda t, z, u: 0 * z, jump=jump)
    gaps = data.times.diff(dim=-1).unsqueeze(-1)
    wanted = (data.inputs[:, :-1].exp() * gaps).sum((-1, -2))
    events = torch.where(data.mask, data.inputs, 0.0).sum((-1, -2))
    torch.testing.assert_close(site(model, data, "times")["log_prob"], events - wanted, rtol=1e-9, atol=1e-9)
    bound, start = model.bind(), torch.ones(3, 1, 1, dtype=D)
    path, _ = bound.transition.solve_with_intensity(start, data.times, data.inputs)
    torch.testing.assert_close(path, bound.transition.solve(start, data.times, data.inputs))
    torch.testing.assert_close(path[:, -1], 1 + data.inputs[:, :-1, :1].sum(-2))


def test_gradients_of_the_times_and_by_the_adjoint():
    torch.manual_seed(0)
    data, first, found = series(num=4), LogIntensity(2, 2, 4).double(), {}
    for adjoint in (False, True):
        rates = copy.deepcopy(first)
        field = LinearDrift(torch.tensor([[-0.3, 1.0], [-1.0, -0.3]]))
        model = timed(rates, field, state_dim=2, adjoint=adjoint, rtol=1e-8, atol=1e-9)
        parameters = [model.transition.field.matrix, *rates.parameters()]
        found[adjoint] = torch.autograd.grad(site(model, data, "times")["log_prob"].sum(), parameters)
    for direct, adjoint in zip(found[False], found[True], strict=True):
        assert direct.abs().sum() > 0
        torch.testing.assert_close(direct, adjoint, rtol=1e-5, atol=1e-6)
    bound = timed(first, lambda t, z, u: torch.sin(z), state_dim=2, method="rk4", step_size=0.2).bind()
    start = torch.randn(3, 1, 2, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: times_law(bound, data, z)[1].log_prob(data.mask), (start,))


def test_what_is_not_seen_adds_exactly_nothing():
    torch.manual_seed(0)
    model = models.latent_ode(2, 2, hidden=4, poisson=True).double()
    perturb(model, 0.3)
    bound, start = model.bind(), torch.randn(3, 1, 2, dtype=D)
    data = series()
    _, law = times_law(bound, data, start)
    found = law.log_prob(data.mask)
    hidden = data.replace(values=torch.where(data.mask, data.values, 7e3), mask=data.mask)
    assert torch.equal(times_law(bound, hidden, start)[1].log_prob(hidden.mask), found)
    dropped = law.log_rate.clone()
    dropped[~data.mask] = torch.inf  # an entry that is not seen is never read
    assert torch.equal(PoissonTimes(dropped, law.total).log_prob(data.mask), found)
    none = data.mask.clone()
    none[..., 1] = False  # a channel that is never seen has its integral, and nothing else
    change = PoissonTimes(law.log_rate, law.total).log_prob(none) - found
    torch.testing.assert_close(change, -torch.where(data.mask, law.log_rate, 0.0)[..., 1].sum(-1))


def test_a_batch_is_a_loop_and_padding_changes_nothing():
    torch.manual_seed(0)
    options = {"method": "rk4", "step_size": 0.1}
    model = models.latent_ode(2, 2, hidden=4, poisson=True, **options).double()
    perturb(model, 0.3)
    bound, start = model.bind(), torch.randn(3, 1, 2, dtype=D)
    data = series(lengths=torch.tensor([6, 3, 4]))
    together = times_law(bound, data, start)[1].log_prob(data.mask)
    exact = models.latent_ode(2, 2, hidden=4, poisson=True, rtol=1e-10, atol=1e-11).double()
    exact.load_state_dict(model.state_dict())
    for i in range(3):
        one = data.series(i)
        alone = times_law(bound, one, start[i])[1].log_prob(one.mask)
        torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6)  # other steps, of order 4
        alone = times_law(exact.bind(), one, start[i])[1].log_prob(one.mask)
        torch.testing.assert_close(times_law(exact.bind(), data, start)[1].log_prob(data.mask)[i], alone)
    drawn = times_law(bound, data, start.expand(5, 3, 1, 2))[1].log_prob(data.mask)  # sample dims
    torch.testing.assert_close(drawn, together.expand(5, 3))


def test_refined_grids_read_the_mask_at_observations():
    model = timed(lambda t, z, u: 2 * z.log(), obs=1)
    data = series(obs=1)
    torch.testing.assert_close(
        site(model, data.refine(3), "times")["log_prob"], site(model, data, "times")["log_prob"], rtol=1e-7, atol=1e-7
    )


def constant_rate_model():
    """The start is a constant, and the logarithm of the rate."""
    ode = NeuralODE(lambda t, z, u: 0 * z, state_dim=1, log_intensity=lambda t, z, u: z, method="rk4", step_size=1.0)
    model = StateSpaceModel(NormalInitial(1), ode, LinearNormal(1, 1, scale=1.5)).double()
    model.emission.matrix.data.fill_(0.8)
    return model


def test_the_evidence_with_times_is_that_of_quadrature():
    torch.manual_seed(0)
    model, data = constant_rate_model(), series(obs=1)
    guide = InitialState(model, 4).double()
    for _, parameter in guide.head.named_parameters():
        torch.nn.init.zeros_(parameter)
    found = infer.importance_log_likelihood(model, guide, data, num_samples=4000)
    z = torch.linspace(-9, 9, 4001, dtype=D)
    offset = model.emission.offset.detach()
    for b in range(3):
        seen = data.values[b, data.mask[b, :, 0], 0]
        y = dist.Normal(0.8 * z.unsqueeze(-1) + offset, 1.5).log_prob(seen).sum(-1)
        times = len(seen) * z - spans(data)[b] * z.exp()
        wanted = (dist.Normal(0.0, 1.0).log_prob(z) + y + times).logsumexp(0) + math.log(float(z[1] - z[0]))
        assert abs(found.log_likelihood[b] - wanted) < 5 * found.standard_error[b] < 0.5


def test_times_enter_bounds_minibatches_and_reports():
    torch.manual_seed(0)
    model = models.latent_ode(2, 2, hidden=4, poisson=True, noise=0.5).double()
    guide, data = InitialState(model, 4, cell="ode_rnn").double(), series()
    assert "times" not in poutine.trace(model).get_trace(data.without_values())
    batch = data.minibatch(torch.tensor([0, 2]))
    assert float(site(model, batch, "times")["scale"]) == 1.5
    draws = predict.posterior_draws(model, guide, data, 4)
    joint = densities(model, draws, data).joint
    for s in range(4):
        fixed = poutine.condition(model, {"z_start": draws.states[s, :, :1]})
        traced = poutine.trace(fixed).get_trace(data)
        traced.compute_log_prob()
        wanted = sum(traced.nodes[name]["log_prob"] for name in ("z_start", "y", "times"))
        torch.testing.assert_close(joint[s], wanted, rtol=1e-3, atol=1e-3)  # the tolerance of the solver
    assert infer.fit(model, guide, data, loss=infer.IWAE(3), num_steps=3, batch_size=2, progress=False).num_steps == 3


def test_errors_of_the_poisson_process():
    with pytest.raises(ValueError, match="3 channels.*2 columns"):
        timed(lambda t, z, u: torch.zeros(z.shape[:-1] + (3,), dtype=D))(series())
    with pytest.raises(NotImplementedError, match="times of a record are given"):
        PoissonTimes(torch.zeros(4, 1), torch.ones(1)).sample()
    with pytest.raises(TypeError, match="log_intensity"):
        NeuralODE(lambda t, z, u: z, state_dim=1, log_intensity=3)
    with pytest.raises(TypeError, match="log_intensity=..."):
        NeuralODE(lambda t, z, u: z, state_dim=1).solve_with_intensity(torch.ones(1, 1), torch.arange(2.0))
    with pytest.raises(TypeError, match="adjoint"):
        NeuralODE(LinearDrift(torch.eye(1)), log_intensity=lambda t, z, u: z, adjoint=True)
