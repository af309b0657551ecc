"""Posteriors given by their marginals: curves, the equation they imply, and the chain that is its path."""

import pytest
import torch

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.components import Memory
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    ElementwiseDiffusion,
    KnownInitial,
    LinearDrift,
    MLPDiffusion,
    MLPDrift,
    NeuralSDE,
    NormalInitial,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import ARCTA, SVISE, SDEMatching
from pyro_ssm.guides.bridge_steps import diffusion_and_slope, own_slope
from pyro_ssm.guides.marginals import FullMarginal
from pyro_ssm.testing import GuideContract
from pyro_ssm.testing.checks import perturb

D = torch.float64


def model_of(diffusion=None, state_dim=2, **how):
    sde = NeuralSDE(MLPDrift(state_dim, 8), diffusion or ConstantDiffusion(0.8, state_dim), **how)
    return StateSpaceModel(NormalInitial(state_dim), sde, LinearNormal(state_dim, 1)).double()


def series(batch=(3,), num=4, own=True, lengths=None):
    times = torch.tensor([0.0, 0.5, 1.3, 2.0, 2.2], dtype=D)[:num]
    if own:
        times = times * torch.linspace(0.5, 1, batch[0], dtype=D).unsqueeze(-1)
    return TimeSeries(times, torch.randn(*batch, num, 1, dtype=D), lengths=lengths)


GUIDES = {
    "svise": lambda model, data, **more: SVISE(model, data, scale=0.5, **more),
    "svise full": lambda model, data, **more: SVISE(model, data, covariance="full", scale=0.5, **more),
    "svise lines": lambda model, data, **more: SVISE(model, data, degree=1, scale=0.5, **more),
    "arcta": lambda model, data, **more: ARCTA(model, 1, 8, encoder_hidden=8, scale=0.5, **more),
    "sde matching": lambda model, data, **more: SDEMatching(model, 8, hidden=(8, 8), scale=0.5, **more),
    "sinh arcsinh": lambda model, data, **more: SDEMatching(model, 8, "sinh_arcsinh", hidden=8, scale=0.5, **more),
}
guides = pytest.mark.parametrize("name", GUIDES)


def made(name, data=None, diffusion=None, state_dim=2, **how):
    torch.manual_seed(0)
    data = series() if data is None else data
    model = model_of(diffusion, state_dim, **how)
    guide = GUIDES[name](model, data).double()
    perturb(guide, 0.3)
    return model, guide, data


def encoded(guide, model, data):
    with torch.no_grad():
        return guide.encode(data, model.bind())


@guides
def test_velocity_and_score_are_derivatives(name):
    """Of the map of noise in time, by central differences; of the law's density, by autograd."""
    model, guide, data = made(name)
    context = encoded(guide, model, data)
    times, h = torch.tensor([0.11, 0.2, 0.4, 0.9], dtype=D), 1e-5
    noise = torch.randn(5, 3, 4, 2, dtype=D)
    with torch.no_grad():
        marginal = guide.at(context, times)
        state, velocity, score = marginal.motion(noise)
        ahead, behind = (guide.at(context, times + s * h).motion(noise).state for s in (1, -1))
        found = (ahead - behind) / (2 * h)
        if isinstance(marginal, FullMarginal):  # the rotation turns beside
            turned = (marginal.scale_tril @ marginal.spin @ noise.unsqueeze(-1)).squeeze(-1)
            assert turned.abs().max() > 0.1
            found = found + turned
    torch.testing.assert_close(velocity, found, rtol=1e-6, atol=1e-6)
    z = state.clone().requires_grad_()
    wanted = torch.autograd.grad(marginal.law().log_prob(z).sum(), z)[0]
    torch.testing.assert_close(score, wanted)


@guides
def test_curves_are_continuous_and_bend_at_knots(name):
    model, guide, data = made(name, series(own=False))
    context = encoded(guide, model, data)
    noise = torch.randn(1, 2, dtype=D)

    def at(t):
        return guide.at(context, torch.tensor([t], dtype=D)).motion(noise)

    left, right = at(0.5 - 1e-10), at(0.5)
    torch.testing.assert_close(left.state, right.state, atol=1e-7, rtol=1e-7)
    assert (left.velocity - right.velocity).abs().max() > 0.05


def swelling(time, state, inputs):
    """A diffusion of time alone."""
    return (0.5 + 0.3 * time).expand(time.shape[:-1] + (2,))


swelling.state_free = True


@pytest.mark.parametrize("diffusion", [None, swelling], ids=["constant", "of time"])
@pytest.mark.parametrize("name", ["svise", "svise full", "arcta", "sde matching"])
def test_the_chain_has_the_marginals_on_any_grid(name, diffusion):
    model, guide, data = made(name, diffusion=diffusion)
    assert guide.is_exact
    for n in (1, 3):
        fine = data.refine(n)
        context = encoded(guide, model, fine)
        with torch.no_grad():
            means, roots = gaussian_moments(guide.at(context, fine.times).law())
            steps = slice(1, fine.num_times)
            shifted = [
                gaussian_moments(guide.step(means[..., :-1, :] + e, steps, context))[0]
                for e in torch.eye(3, 2, dtype=D).roll(1, 0)  # no shift, then a unit in each coordinate
            ]
            gain = torch.stack([s - shifted[0] for s in shifted[1:]], -1)
            _, rest = gaussian_moments(guide.step(means[..., :-1, :], steps, context))
        torch.testing.assert_close(shifted[0], means[..., 1:, :])
        moved = gain @ roots[..., :-1, :, :]
        wanted = roots[..., 1:, :, :]
        torch.testing.assert_close(moved @ moved.mT + rest @ rest.mT, wanted @ wanted.mT)


@pytest.mark.parametrize(("name", "refine"), [("svise", [1]), ("svise full", [8, 32]), ("arcta", [4])])
def test_the_chain_is_the_linear_equation(name, refine):
    """The gain over a gap is the solution of the equation that the training loss sees (fine midpoint steps)."""
    model, guide, data = made(name, series((), own=False))
    context = encoded(guide, model, data)
    sde, steps = context.sde, 2000
    grid = torch.linspace(0.5, 1.3, steps + 1, dtype=D)
    middle = (grid[1:] + grid[:-1]) / 2

    def posterior_drift(e):
        noise = e.expand(steps, 2)
        found = guide.control(context, guide.at(context, middle), noise, middle, None)
        return found.state, found.value * 0.8 + sde.drift_at(found.state, middle, None)

    with torch.no_grad():
        z0, f0 = posterior_drift(torch.zeros(2, dtype=D))
        pairs = [posterior_drift(e) for e in torch.eye(2, dtype=D)]
        dz, df = (torch.stack([pair[i] - base for pair in pairs], -1) for i, base in enumerate((z0, f0)))
        total = torch.eye(2, dtype=D)
        for slope in df @ torch.linalg.inv(dz):
            total = torch.linalg.matrix_exp(slope * (grid[1] - grid[0])) @ total
        errors = []
        for n in refine:
            context, gain = encoded(guide, model, data.refine(n)), torch.eye(2, dtype=D)
            for k in range(n, 2 * n):
                now = slice(k + 1, k + 2)
                base = gaussian_moments(guide.step(torch.zeros(1, 2, dtype=D), now, context))[0]
                unit = [
                    gaussian_moments(guide.step(e.unsqueeze(0), now, context))[0] - base for e in torch.eye(2, dtype=D)
                ]
                gain = torch.stack([u[0] for u in unit], -1) @ gain
            errors.append(float((gain - total).abs().max()))
    if len(errors) > 1:  # the first term of Magnus' series is of second order in the gap
        assert errors[1] < errors[0] / 10 and errors[0] < 0.01, errors
    else:  # the midpoint steps leave 1e-6
        assert errors[0] < 5e-6, errors


@pytest.mark.parametrize("name", ["sde matching", "sinh arcsinh"])
def test_the_implied_equation_has_the_marginals(name):
    """Euler steps with the implied drift, and a diffusion that depends on the state, end in the marginal's law."""
    model, guide, data = made(name, series((), 2, own=False), ElementwiseDiffusion(1, 8, init=0.9), state_dim=1)
    with torch.no_grad():
        model.transition.diffusion.weight.mul_(10)
    context = encoded(guide, model, data)
    sde, steps, n = context.sde, 150, 8000
    grid = torch.linspace(0, 0.5, steps + 1, dtype=D)
    with torch.no_grad():
        z = guide.at(context, grid[:1]).motion(torch.randn(n, 1, 1, dtype=D)).state
        for k in range(steps):
            now = grid[k : k + 1]
            marginal = guide.at(context, now)
            control = guide.control(context, marginal, marginal.noise_of(z), now, None)
            g = sde.diffusion_at(z, now, None)
            drift = sde.drift_at(z, now, None) + g * control.value
            z = z + drift * 0.5 / steps + g * (0.5 / steps) ** 0.5 * torch.randn_like(z)
        noise = guide.at(context, grid[-1:]).noise_of(z).flatten()
    assert g.std() > 0.02  # it does depend on the state
    for power, wanted, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(noise.pow(power).mean() - wanted) < 4.5 * (spread / n) ** 0.5 + 0.02 * power


@pytest.mark.parametrize("coupled", [False, True])
def test_the_chain_of_a_curved_guide_converges_to_the_marginals(coupled):
    """Skewed marginals and a diffusion of the state: an exponential Euler chain."""
    diffusion = ElementwiseDiffusion(2, 8, init=0.9)
    with torch.no_grad():
        diffusion.weight.mul_(10)
    given = (lambda t, z, u: 0.5 + 0.3 * torch.sigmoid(z.flip(-1))) if coupled else diffusion
    model, guide, data = made("sinh arcsinh", series((), 3, own=False), given)
    moments = []
    for refine in (1, 8):
        fine = data.refine(refine)
        with torch.no_grad():
            law = guide.path(fine, model.bind())
            z = law.sample((4000,))
            last = guide.at(encoded(guide, model, fine), fine.times[-1:]).noise_of(z[:, -1:, :])
        moments.append(torch.stack([last.mean((0, 1)).abs().max(), (last.var(0) - 1).abs().max()]))
    assert (moments[-1] < 0.12).all(), moments


def test_slopes_of_coupled_and_separate_fields():
    x = torch.randn(4, 3, dtype=D)
    for field, separate in ((torch.sin, True), (lambda z: z * z.roll(1, -1).cos(), False)):
        value, slope = own_slope(field, x, separate)
        jacobian = torch.autograd.functional.jacobian(lambda z, f=field: f(z), x)
        wanted = torch.stack([jacobian[i, :, i].diagonal() for i in range(4)])
        torch.testing.assert_close(value, field(x))
        torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(own_slope(torch.sin, x, True)[1], own_slope(torch.sin, x, False)[1])
    constant = own_slope(lambda z: torch.ones(3, dtype=D), x, True)
    assert (constant[1] == 0).all() and constant[0].shape == x.shape


def test_a_diffusion_without_the_state_has_no_slope():
    sde = NeuralSDE(LinearDrift(torch.eye(2)), ConstantDiffusion(0.5, 2))
    g, slope = diffusion_and_slope(sde, torch.zeros(3, 2), torch.zeros(3), None)
    assert slope == 0.0 and torch.equal(g, sde.diffusion.scale)


@pytest.mark.parametrize(
    ("words", "kind", "build"),
    [
        ("needs a model whose transition", TypeError, lambda: ARCTA(_discrete())),
        ("needs a diffusion that does not depend", TypeError, lambda: ARCTA(model_of(ElementwiseDiffusion(2)))),
        ("needs a start with a density", ValueError, lambda: ARCTA(_known())),
        ("needs diagonal noise", ValueError, lambda: SDEMatching(model_of(MLPDiffusion(2, 2, 4), noise="general"))),
        ("samples a path", TypeError, lambda: SDEMatching(model_of(site="noise"))),
        ("density of the Euler chain", ValueError, lambda: ARCTA(model_of(method="torchsde:euler"))),
        ("`marginals` must be one of", ValueError, lambda: SDEMatching(model_of(), marginals="flow")),
        ("`hidden` must have", ValueError, lambda: SDEMatching(model_of(), hidden=())),
        ("a memory reads the whole path", NotImplementedError, lambda: ARCTA(_remembering())),
    ],
)
def test_what_does_not_go_is_refused(words, kind, build):
    with pytest.raises(kind, match=words):
        build()


def _discrete():
    from pyro_ssm.dynamics import LinearNormal as Step

    return StateSpaceModel(NormalInitial(2), Step(2), LinearNormal(2, 1))


def _known():
    sde = NeuralSDE(MLPDrift(2, 8), ConstantDiffusion(0.8, 2))
    return StateSpaceModel(KnownInitial(torch.zeros(2)), sde, LinearNormal(2, 1))


def _remembering():
    memory = Memory()
    memory.features = 1
    sde = NeuralSDE(MLPDrift(2, 8), ConstantDiffusion(0.8, 2))
    return StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1), memory)


class _Contract(GuideContract):
    def make_model(self):
        return model_of().float()


class TestARCTA(_Contract):
    def make_guide(self, model, **options):
        return GUIDES["arcta"](model, None, **options)


class TestSDEMatching(_Contract):
    without_gradient = ("encoder.distance.weight",)  # knots are observations: nothing is away from them

    def make_guide(self, model, **options):
        return GUIDES["sde matching"](model, None, **options)


class TestSinhArcsinh(TestSDEMatching):
    def make_guide(self, model, **options):
        return GUIDES["sinh arcsinh"](model, None, **options)


class TestStateDependent(TestSDEMatching):
    def make_model(self):
        return model_of(ElementwiseDiffusion(2, 4)).float()


class TestSVISE(_Contract):
    """Built for the very data: amortised properties (other data, a series alone) are not its own."""

    covariance = "diagonal"
    test_a_ragged_batch_is_a_loop_over_series = None
    test_a_batch_is_drawn_as_its_series_are = None

    def make_data(self):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return super().make_data()

    def make_guide(self, model, **options):
        return SVISE(model, self.make_data(), scale=0.5, covariance=self.covariance, **options)

    def test_looks_ahead_is_true(self):
        """What it learnt is of the whole series, whatever it is called with."""
        assert self.make_guide(self.make_model()).looks_ahead


class TestFullSVISE(TestSVISE):
    covariance = "full"
