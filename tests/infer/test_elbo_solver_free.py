"""The bound without a solver: the exact likelihood of linear equations is the judge."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroSample
from pyro.poutine import block

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    ElementwiseDiffusion,
    LinearDrift,
    MLPDrift,
    NeuralSDE,
    NormalInitial,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import ARCTA, SVISE, PosteriorSDE, SDEMatching
from pyro_ssm.infer import importance_log_likelihood, kl_annealing
from pyro_ssm.infer.elbo import SolverFree
from tests.infer.solver_free import EXACT, GUIDES, D, bound, linear, log_likelihood, made, series, trained

guides = pytest.mark.parametrize("name", GUIDES)
amortised = pytest.mark.parametrize("name", ["arcta", "sde matching", "sinh arcsinh"])


@pytest.fixture(autouse=True)
def own_parameters():
    with infer.local_parameters():
        yield


# ------------------------------------------------------------------------------------------- the exact likelihood


@pytest.mark.slow
@amortised
def test_amortised_bounds_approach_the_exact_likelihood_from_below(name):
    torch.manual_seed(0)
    times = torch.linspace(0, 2, 6, dtype=D)
    empty = TimeSeries(times, torch.zeros(64, 6, 1, dtype=D)).without_values()
    with torch.no_grad(), block():
        data = TimeSeries(times, linear(exact=True)(empty)[1])
    model, wanted = linear(), log_likelihood(data).mean()
    guide = {
        "arcta": lambda: ARCTA(model, 5, 32),
        "sde matching": lambda: SDEMatching(model, 32, hidden=32),
        "sinh arcsinh": lambda: SDEMatching(model, 32, "sinh_arcsinh", hidden=32),
    }[name]().double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    schedule = infer.warmup_cosine(800, 20)
    infer.fit(model, guide, data, loss=SolverFree(10, 2), num_steps=800, lr=3e-3, schedule=schedule, progress=False)
    gap = wanted - bound(model, guide, data).mean()
    assert 0 < gap < 0.05, gap


@guides
def test_no_bound_exceeds_the_exact_likelihood(name):
    data = series(lengths=torch.tensor([4, 2, 3]))
    model, guide = made(name, data)
    assert (bound(model, guide, data) < log_likelihood(data)).all()


# --------------------------------------------------------------------------------------- what the loss estimates


@amortised
@pytest.mark.parametrize("times", ["stratified", "uniform"])
def test_random_times_and_draws_are_unbiased(name, times):
    """Many copies of one series give as many independent estimates of each term; quadrature gives its value."""
    one = series((), 4)
    model, guide = made(name, one)
    many = TimeSeries(one.times, one.values.expand(3000, 4, 1))
    exact = SolverFree(12, times="quadrature", order=12).terms(model, guide, one)
    with torch.no_grad():
        drawn = SolverFree(3, times=times, num_observations=2).terms(model, guide, many)
    for found, wanted in zip(drawn, exact, strict=True):
        error = found.std() / 3000**0.5
        assert abs(found.mean() - wanted) < 4.5 * error + 1e-9, (found.mean(), wanted, error)
    assert drawn.path.std() > 0 and drawn.likelihood.std() > 0


@guides
def test_the_solver_s_bound_tends_to_it(name):
    """The same pair by paths on a refined grid, with the density of the Euler chain: constants and all."""
    data = series((), 3)
    model, guide = made(name, data)
    wanted, apart = bound(model, guide, data), []
    for n in (4, 64):
        found = importance_log_likelihood(model, guide, data.refine(n), 1500, batch=1500)
        apart.append((found.bound - wanted, found))
    assert abs(apart[1][0]) < 0.15 and abs(apart[1][0]) < abs(apart[0][0]) / 2, apart
    assert found.log_likelihood - log_likelihood(data) < 4.5 * found.standard_error + 0.02


@guides
def test_gradients_are_those_of_finite_differences(name):
    data = series(num=3, lengths=torch.tensor([3, 2, 3]))
    sde = NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.7, 2))
    if "s" in name[:1] and name != "svise":
        sde = NeuralSDE(MLPDrift(2, 4), ElementwiseDiffusion(2, 4))
    model = StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1, scale=0.4)).double()
    model, guide = made(name, data, model)
    loss = SolverFree(2, times="quadrature", order=3)
    parameters = [*guide.parameters(), *model.parameters()]
    value = loss.differentiable_loss(model, guide, data)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    torch.manual_seed(3)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)

    def at(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
            found = loss.differentiable_loss(model, guide, data)
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(step * d)
        return found

    h = 1e-5
    torch.testing.assert_close((at(h) - at(-h)) / (2 * h), slope.detach(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- series


@amortised
def test_a_batch_is_a_loop_and_hidden_values_do_not_matter(name):
    data = series(lengths=torch.tensor([4, 2, 3]))
    data = data.hide(torch.rand(data.values.shape) < 0.3)
    model, guide = made(name, data)
    found = bound(model, guide, data)
    for i in range(3):
        torch.testing.assert_close(bound(model, guide, data.series(i).trim()), found[i])
    garbage = data.replace(values=torch.where(data.mask, data.values, 9.0), mask=data.mask)
    assert torch.equal(bound(model, guide, garbage), found)
    torch.testing.assert_close(bound(model, guide, data.refine(3)), found)  # the grid of the path does not matter


@guides
def test_mini_batches_scale_and_annealing_weighs(name):
    data = series()
    model, guide = made(name, data)
    with torch.no_grad():
        whole = EXACT.differentiable_loss(model, guide, data)
        parts = sum(EXACT.differentiable_loss(model, guide, data.minibatch([i])) for i in range(3)) / 3
        terms = EXACT.terms(model, guide, data)
        with kl_annealing(0.25):
            annealed = EXACT.differentiable_loss(model, guide, data)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(annealed, (0.25 * (terms.start + terms.path) - terms.likelihood).sum())


@guides
def test_a_single_time_and_float32(name):
    data = series(num=1)
    model, guide = made(name, data)
    terms = EXACT.terms(model, guide, data)
    assert (terms.path == 0).all() and guide(data.refine(3)).shape == (3, 1, 1)
    assert (bound(model, guide, data) <= log_likelihood(data) + 1e-12).all()
    data = series()
    model, guide = made(name, data)
    wanted = bound(model, guide, data)
    found = bound(model.float(), guide.float(), data.to(dtype=torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ parameters


@guides
def test_random_parameters_are_drawn_once(name):
    """Their prior and posterior enter the loss as in every ELBO."""
    data, prior = series(), dist.Normal(torch.zeros(1, 1, dtype=D), 1.0).to_event(2)
    model = linear()
    model.transition.drift.matrix = PyroSample(prior)
    model, guide = made(name, data, model)
    guide(data)  # makes the parameters of the guide over parameters
    torch.manual_seed(1)
    loss = EXACT.differentiable_loss(model, guide, data)
    torch.manual_seed(1)
    drawn = guide.parameters_given(data)["transition.drift.matrix"]
    fixed = linear()
    with torch.no_grad():
        fixed.transition.drift.matrix.copy_(drawn)
    loc, scale = guide.parameter_guide.locs, guide.parameter_guide.scales
    q = dist.Normal(loc.transition.drift.matrix, scale.transition.drift.matrix).to_event(2)
    if name in ("svise", "arcta"):  # the others read the parameter
        twin = made(name, data, fixed)[1]
        twin.load_state_dict({k: v for k, v in guide.state_dict().items() if "parameter_guide" not in k}, strict=False)
        path = EXACT.differentiable_loss(fixed, twin, data)
        torch.testing.assert_close(loss, path + q.log_prob(drawn) - prior.log_prob(drawn))
    for gradient in torch.autograd.grad(loss, list(guide.parameter_guide.parameters())):
        assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------------ one model, and counts


class Counted(torch.nn.Module):
    """A drift that counts its calls and its states."""

    def __init__(self, drift):
        super().__init__()
        self.drift, self.state_dim, self.calls, self.states = drift, drift.state_dim, 0, 0

    def forward(self, time, state, inputs):
        self.calls, self.states = self.calls + 1, self.states + state.shape[:-1].numel()
        return self.drift(time, state, inputs)


@guides
def test_the_drift_is_evaluated_at_the_random_times_and_nowhere_else(name):
    data = series((5,), 4).refine(50)
    drift = Counted(LinearDrift(torch.tensor([[-0.7]])))
    model = StateSpaceModel(NormalInitial(1), NeuralSDE(drift, ConstantDiffusion(0.8, 1)), LinearNormal(1, 1)).double()
    guide = GUIDES[name](model, data).double()
    SolverFree(10, 2).differentiable_loss(model, guide, data).backward()
    assert (drift.calls, drift.states) == (1, 2 * 5 * 10)
    solved = PosteriorSDE(model, 4, drift_hidden=(8,)).double()
    drift.states = 0
    Trace_ELBO().differentiable_loss(model, solved, data)
    assert drift.states == 5 * 150  # and as many of the posterior's drift, one after another


def test_one_model_object_is_trained_by_a_solver_and_without():
    data = series()
    torch.manual_seed(0)
    sde = NeuralSDE(MLPDrift(2, 8), ConstantDiffusion(0.7, 2))
    model = StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1, scale=0.4)).double()
    before = [p.detach().clone() for p in sde.parameters()]
    infer.fit(model, PosteriorSDE(model, 4, drift_hidden=8).double(), data.refine(4), num_steps=2, progress=False)
    for make in GUIDES.values():
        guide = make(model, data).double()
        result = infer.fit(
            model, guide, data, loss=SolverFree(8), num_steps=3, batch_size=2, validation=data.minibatch([0, 1, 2]),
            validate_every=3, progress=False,
        )  # fmt: skip
        assert len(result.validation) >= 1 and guide(data.refine(2)).shape == (3, 7, 2)
    assert all((p != b).any() for p, b in zip(sde.parameters(), before, strict=True))


@guides
def test_pyro_s_own_svi_trains_model_and_guide(name):
    data, model = series(), linear()
    guide = GUIDES[name](model, data).double()
    before = [p.detach().clone() for p in (*guide.parameters(), *model.parameters())]
    with pyro.settings.context(module_local_params=False):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=SolverFree(8))
        losses = [svi.step(data) for _ in range(2)]
        pyro.clear_param_store()
    moved = [bool((p != b).any()) for p, b in zip((*guide.parameters(), *model.parameters()), before, strict=True)]
    without = [n for n, m in zip(dict(guide.named_parameters()), moved, strict=False) if not m]
    assert all(moved) or without == ["encoder.distance.weight"], without
    assert losses[0] != losses[1]


def test_particle_filters_take_the_guide_as_proposal():
    data = series((), 4)
    model = linear()
    guide = SVISE(model, data)
    trained(model, guide, data, 60, SolverFree(6, times="quadrature", order=2))
    fine = data.refine(16)
    torch.manual_seed(0)
    with torch.no_grad():
        bound_model = model.bind()
        cloud = infer.particle_filter(infer.guided(bound_model, guide, fine), num_particles=500, ess_threshold=0.0)
    assert abs(cloud.log_likelihood.sum() - log_likelihood(data)) < 0.1  # the Euler chain's is 0.02 away


# --------------------------------------------------------------------------------------------------- errors


def test_what_would_be_wrong_is_refused():
    data, model = series(), linear()
    svise = SVISE(model, data)
    loss = SolverFree(4).differentiable_loss
    with pytest.raises(TypeError, match="needs a guide that knows its marginals"):
        loss(model, PosteriorSDE(model, 4).double(), data)
    with pytest.raises(TypeError, match="needs an unbound StateSpaceModel"):
        loss(model.bind(), svise, data)
    with pytest.raises(TypeError, match="to take one TimeSeries"):
        loss(model, svise, data.values)
    with pytest.raises(ValueError, match="`data.values` is None"):
        loss(model, ARCTA(model, 1, 4).double(), data.without_values())
    for words, arguments in [
        ("`num_times` must be at least 1", {"num_times": 0}),
        ("`times` must be one of", {"times": "grid"}),
        ("`order` must be at least 1", {"order": 0}),
        ("`num_observations` must be at least 1", {"num_observations": 0}),
    ]:
        with pytest.raises(ValueError, match=words):
            SolverFree(**arguments)
    with pytest.raises(ValueError, match="was built for series of batch shape"):
        loss(model, svise, series((2,)))
    with pytest.raises(ValueError, match="beyond the knots of this SVISE"):
        loss(model, svise, series(num=5))
    with pytest.raises(ValueError, match="`knots` must increase and reach"):
        SVISE(model, data, knots=torch.tensor([0.0, 0.1]))
    with pytest.raises(ValueError, match="`states` must have shape"):
        SVISE(model, data, states=torch.zeros(4, 1))
    wild = StateSpaceModel(
        NormalInitial(1),
        NeuralSDE(lambda t, z, u: torch.where(t > 0.5, torch.nan, z), ConstantDiffusion(0.8, 1), state_dim=1),
        LinearNormal(1, 1),
    ).double()
    with pytest.raises(FloatingPointError, match=r"the drift is not finite at step \d+ \(time .*\) of series"):
        SolverFree(200).differentiable_loss(wild, ARCTA(wild, 1, 4).double(), data)
