"""IWAE and FreeBits against Trace_ELBO, closed forms and plain loops."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from pyro_ssm.infer import IWAE, FreeBits, evidence_lower_bound, kl_annealing, local_parameters

from .programs import Chain, ExactGuide, LinearGuide, PointGuide, evidence, simulate
from .test_importance import Level, level_posterior


def value_and_gradient(loss, model, guide, data, seed=0):
    torch.manual_seed(seed)
    with local_parameters():
        value = loss(model, guide)(data)
    parameters = [*model.parameters(), *guide.parameters()]
    return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)


@pytest.mark.parametrize("loss", [IWAE(1), FreeBits(0.0)], ids=["IWAE(1)", "FreeBits(0)"])
@pytest.mark.parametrize("part", [None, [2, 0]], ids=["all", "mini-batch"])
def test_equals_trace_elbo_with_the_same_noise(loss, part):
    data = simulate(4, 5, ragged=True, missing=0.2)
    data = data if part is None else data.minibatch(part)
    model, guide = Chain(), LinearGuide()
    expected, expected_gradient = value_and_gradient(Trace_ELBO(), model, guide, data)
    value, gradient = value_and_gradient(loss, model, guide, data)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("loss", [IWAE(4), FreeBits(0.3), FreeBits(0.3, num_particles=2)])
def test_annealing_weighs_the_path_only(loss):
    data = simulate(2, 3)
    model, guide = Chain(), LinearGuide()
    values = []
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        with kl_annealing(beta):
            values.append(loss.loss(model, guide, data))
    assert values[0] < values[1]  # beta = 0 leaves the reconstruction alone


# ------------------------------------------------------------------------------------------------------- IWAE


def test_iwae_of_the_exact_posterior_is_the_evidence():
    data = simulate(3, 6, ragged=True, missing=0.3)
    found = IWAE(5).loss(Chain(), ExactGuide(), data)
    assert found == pytest.approx(-evidence(data).sum().item(), abs=1e-9)
    half = IWAE(5).loss(Chain(), ExactGuide(), data.minibatch([0, 2]))
    assert half == pytest.approx(-1.5 * evidence(data)[[0, 2]].sum().item(), abs=1e-9)


def test_iwae_rises_with_particles_towards_the_evidence():
    data = simulate(5, 4)
    model, guide = Chain(), ExactGuide(shift=0.4)
    torch.manual_seed(0)
    bounds = []
    for particles in (1, 5, 50):
        loss = IWAE(particles)
        bounds.append(-sum(loss.loss(model, guide, data) for _ in range(100)) / 100)
    assert bounds[0] < bounds[1] < bounds[2] < evidence(data).sum() + 0.1
    assert evidence(data).sum() - bounds[2] < 0.2 * (evidence(data).sum() - bounds[0])


def test_iwae_weighs_each_series_by_itself():
    """The gradient with respect to the guide is that of the loop over series, with the same noise."""
    data = simulate(3, 4)
    model, guide = Chain(), LinearGuide()
    torch.manual_seed(3)
    noise = torch.randn(7, 3, 4, 1, dtype=torch.float64)
    loc, raw = guide.net(data.values).chunk(2, -1)
    z = loc + raw.exp() * noise
    log_q = dist.Normal(loc, raw.exp()).log_prob(z).sum((-2, -1))
    log_p = dist.Normal(0.0, 1.0).log_prob(z[..., 0, 0])
    log_p = log_p + dist.Normal(0.8 * z[..., :-1, :], 0.6).log_prob(z[..., 1:, :]).sum((-2, -1))
    log_p = log_p + dist.Normal(z, 0.5).log_prob(data.values).sum((-2, -1))
    expected = -((log_p - log_q).logsumexp(0) - math.log(7)).sum()
    expected_gradient = torch.autograd.grad(expected, list(guide.net.parameters()))

    def replayed(data, guide=guide):
        """The same guide with the noise above."""
        loc, raw = guide.net(data.values).chunk(2, -1)
        with pyro.plate("series", 3, dim=-1):
            pyro.sample("z", Fixed(loc, raw.exp(), noise))

    value = IWAE(7).differentiable_loss(model, replayed, data)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, list(guide.net.parameters())), expected_gradient)


class Fixed(dist.TorchDistribution):
    """Independent normals whose noise is given."""

    arg_constraints = {}
    has_rsample = True
    support = torch.distributions.constraints.independent(torch.distributions.constraints.real, 2)

    def __init__(self, loc, scale, noise, batch_shape=None):
        self.loc, self.scale, self.noise = loc, scale, noise
        super().__init__(loc.shape[:-2] if batch_shape is None else batch_shape, loc.shape[-2:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Fixed(self.loc, self.scale, self.noise, torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()):
        noise = self.noise if len(self.batch_shape) == 2 else self.noise[0]
        return self.loc + self.scale * noise

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value).sum((-2, -1))


def test_iwae_draws_shared_parameters_once():
    """E over theta of the sum over series: with the exact conditional posterior every theta gives its own evidence."""
    data = simulate(3, 1)
    y = data.values[:, 0, 0]
    torch.manual_seed(0)
    theta = torch.randn(1, dtype=torch.float64)[0]
    prior, posterior = dist.Normal(0.0, 1.0), dist.Normal(y.sum() / 5, math.sqrt(2 / 5))
    theta = posterior.loc + posterior.scale * theta
    expected = dist.Normal(theta, math.sqrt(2)).log_prob(y).sum() + prior.log_prob(theta) - posterior.log_prob(theta)
    joint = dist.MultivariateNormal(torch.zeros_like(y), 2 * torch.eye(3, dtype=y.dtype) + 1).log_prob(y)
    torch.testing.assert_close(expected, joint)
    torch.manual_seed(0)
    assert IWAE(6).loss(Level(), level_posterior, data) == pytest.approx(-joint.item(), abs=1e-9)


def test_iwae_without_plates_has_one_weight():
    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)).to_event(1))

    y = torch.tensor([0.5, -1.0, 2.0])
    assert IWAE(4).loss(model, guide, y) == pytest.approx(
        -dist.Normal(0, math.sqrt(2)).log_prob(y).sum().item(), abs=1e-5
    )


def test_iwae_trains_through_svi_too():
    pyro.clear_param_store()
    data, guide = simulate(5, 3), ExactGuide(shift=1.0)
    svi = SVI(Chain(), guide, pyro.optim.Adam({"lr": 0.05}), IWAE(5))
    torch.manual_seed(0)
    for _ in range(150):
        svi.step(data)
    assert abs(guide.shift.item()) < 0.2
    pyro.clear_param_store()


def test_draws_without_a_pathwise_gradient_are_refused():
    def guide(data):
        with pyro.plate("series", 2, dim=-1):
            pyro.sample("z", dist.Poisson(torch.ones(2, 1, dtype=torch.float64)).to_event(1))

    with pytest.raises(NotImplementedError, match="`z`.*Trace_ELBO"):
        IWAE(2).differentiable_loss(guide, guide, None)


def test_a_factor_outside_the_plate_is_refused():
    class Bad(PyroModule):
        def forward(self, data):
            with pyro.plate("series", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("bad", z.sum(-1))

    def guide(data):
        with pyro.plate("series", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site `bad`.*plate over series"):
        IWAE(4).differentiable_loss(Bad(), guide, None)


# -------------------------------------------------------------------------------------------------- FreeBits


def step_divergences(model, guide, data):
    """log q - log p of each step (series, time), by hand, for a draw with the present seed."""
    loc, raw = guide.net(data.values).chunk(2, -1)
    trace = pyro.poutine.trace(guide).get_trace(data)
    z = trace.nodes["z"]["value"]
    log_q = dist.Normal(loc, raw.exp()).log_prob(z)[..., 0]
    first = dist.Normal(0.0, 1.0).log_prob(z[:, :1, 0])
    rest = dist.Normal(model.transition.rate * z[:, :-1, 0], 0.6).log_prob(z[:, 1:, 0])
    real = data.step_mask
    reconstruction = (dist.Normal(z, model.noise).log_prob(data.values) * data.mask).sum()
    return torch.where(real, log_q - torch.cat([first, rest], 1), 0.0), real, reconstruction


@pytest.mark.parametrize("per_series", [False, True])
def test_floor_is_under_each_step(per_series):
    data = simulate(4, 5, ragged=True, missing=0.2)
    model, guide = Chain(), LinearGuide()
    torch.manual_seed(0)
    kl, real, reconstruction = step_divergences(model, guide, data)
    floor = kl.sum(0).div(real.sum(0)).median().item() + 1e-3
    if per_series:
        expected = torch.maximum(kl, torch.tensor(floor, dtype=kl.dtype))[real].sum() - reconstruction
    else:
        mean = kl.sum(0) / real.sum(0)
        assert (mean < floor).any() and (mean > floor).any()
        expected = (real.sum(0) * mean.clamp_min(floor)).sum() - reconstruction
    torch.manual_seed(0)
    loss = FreeBits(floor, per_series=per_series)
    value = loss.differentiable_loss(model, guide, data)
    torch.testing.assert_close(value, expected)
    parameters = [*guide.parameters(), model.transition.rate]
    torch.testing.assert_close(torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters))


def test_floor_scales_with_the_plate():
    data = simulate(4, 3)
    model, guide = Chain(), LinearGuide()
    part = data.minibatch([1, 3])
    torch.manual_seed(0)
    alone = FreeBits(0.7).loss(model, guide, part.replace(total=None, index=None))
    torch.manual_seed(0)
    assert FreeBits(0.7).loss(model, guide, part) == pytest.approx(2 * alone)


def test_a_step_below_its_floor_has_no_gradient_from_its_divergence():
    data = simulate(4, 3)
    model, guide = Chain(), LinearGuide()
    torch.manual_seed(0)
    loss = FreeBits(1e3)
    value = loss.differentiable_loss(model, guide, data)
    (gradient,) = torch.autograd.grad(value, [model.transition.rate], allow_unused=True)
    assert gradient is None or gradient == 0
    torch.manual_seed(0)
    *_, reconstruction = step_divergences(model, guide, data)
    torch.testing.assert_close(value, 12 * 1e3 - reconstruction)


def test_particles_are_averaged_inside_the_floor():
    data = simulate(2, 3)
    model, guide = Chain(), LinearGuide()
    torch.manual_seed(0)
    pairs = [step_divergences(model, guide, data) for _ in range(3)]
    mean = torch.stack([kl for kl, _, _ in pairs]).mean((0, 1))
    expected = 2 * mean.clamp_min(0.4).sum() - torch.stack([r for _, _, r in pairs]).mean()
    torch.manual_seed(0)
    torch.testing.assert_close(FreeBits(0.4, num_particles=3).differentiable_loss(model, guide, data), expected)


def test_paths_are_needed():
    data = simulate(2, 3)
    with pytest.raises(ValueError, match=r"no path site.*\['z'\]"):
        FreeBits(0.1, sites=["path"]).loss(Chain(), LinearGuide(), data)
    with pytest.raises(TypeError, match="site `z` is .*Use a MarkovPath"):
        FreeBits(0.1).loss(Chain(), PointGuide(), data)
    with pytest.raises(ValueError, match="`free_bits`.*-1"):
        FreeBits(-1.0)
    with pytest.raises(ValueError, match="`num_particles` must be at least 1"):
        IWAE(0)


def test_bound_of_a_free_bits_guide_is_not_floored():
    data = simulate(2, 3)
    assert evidence_lower_bound(Chain(), ExactGuide(), data).total == pytest.approx(evidence(data).sum().item())
