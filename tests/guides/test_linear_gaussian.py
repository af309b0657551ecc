"""The guide that starts as the posterior of a linear-Gaussian model."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroSample

from pyro_ssm import dynamics, emissions, infer
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import LinearGaussian
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.testing.checks import perturb
from tests.contracts.toys import remembering, toy


def data(num_times=5, lengths=None, dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    times = torch.rand(3, num_times, generator=gen, dtype=torch.float64).add(0.2).cumsum(-1)
    values = torch.randn(3, num_times, 2, generator=gen, dtype=dtype)
    mask = torch.rand(3, num_times, 2, generator=gen) < 0.6
    mask[:, 0, 0] = True
    return TimeSeries(times, values, mask, lengths=None if lengths is None else torch.tensor(lengths))


CASES = {
    "missing": data(),
    "odd": data(7),
    "one time": data(1),
    "ragged": data(lengths=(5, 1, 3)),
    "refined": data(4).refine(3),
    "ragged and refined": data(4, lengths=(4, 2, 3)).refine(2),
    "single series": data().series(0),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def pair(dtype=torch.float64):
    model = toy(dtype=dtype)
    return model, LinearGaussian(model, toy(dtype=dtype), 8).to(dtype)


def weights(model, guide, data):
    """log p(y, z) - log q(z | y) for one draw, by series."""
    drawn = poutine.trace(guide).get_trace(data)
    joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(data)
    for trace in (drawn, joint):
        trace.compute_log_prob()
    return sum(joint.nodes[name]["log_prob"] for name in "zy") - drawn.nodes["z"]["log_prob"]


def test_of_its_own_core_every_weight_is_the_likelihood(case):
    """The posterior is exact: log p(y, z) - log q(z | y) is log p(y) for every draw, to rounding."""
    model, guide = pair()
    exact = infer.kalman_filter(model, case).log_likelihood.sum(-1)
    for _ in range(3):
        torch.testing.assert_close(weights(model, guide, case), exact, rtol=1e-10, atol=1e-10)


def test_in_float32_the_bound_is_the_likelihood_too():
    model, guide = pair(torch.float32)
    few = data(dtype=torch.float32)
    exact = infer.kalman_filter(model, few).log_likelihood.sum(-1)
    torch.testing.assert_close(weights(model, guide, few), exact, rtol=1e-5, atol=1e-4)


def test_its_steps_are_the_exact_chain(case):
    """The mean and the covariance of its draws are those of the smoother, whatever the encoder is told to add: 0."""
    model, guide = pair()
    smoothed = infer.kalman_smoother(model, case)
    path = guide.path(case, model.bind())
    draws = path.rsample((4000,)).detach()
    real = case.step_mask.expand(draws.shape[1:-1])
    scale = smoothed.scale_tril.square().sum(-1).sqrt()
    error = ((draws.mean(0) - smoothed.mean) / scale)[real]
    assert error.abs().max() < 5 / 4000**0.5
    ratio = (draws.std(0) / scale)[real]
    assert (ratio - 1).abs().max() < 5 / 8000**0.5


def test_corrections_are_in_units_of_the_posterior():
    """Shift and factor act on the noise of the exact chain."""
    model, guide = pair()
    few = data()
    bound = model.bind()
    state = torch.randn(3, 1, 2, dtype=torch.float64)
    before = guide.step(state, slice(2, 3), guide.encode(few, bound))
    with torch.no_grad():
        guide.head.bias.copy_(torch.tensor([2.0, -1.0, 0.7, -0.4]))
    after = guide.step(state, slice(2, 3), guide.encode(few, bound))
    root = before.scale_tril
    factor = 1e-3 + (1 - 1e-3) * torch.log1p((torch.e - 1) * torch.tensor([0.7, -0.4], dtype=torch.float64).exp())
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(after.mean, before.mean + root @ shift)
    torch.testing.assert_close(after.scale_tril, root * factor)


def test_training_closes_the_gap_of_a_corrected_model():
    torch.manual_seed(0)
    linear = toy(dtype=torch.float32)
    motion = dynamics.CorrectedTransition(linear.transition, 8)
    perturb(motion.network, 0.3)
    model = StateSpaceModel(linear.initial, motion, linear.emission).requires_grad_(False)
    guide, few = LinearGaussian(model, toy(dtype=torch.float32), 8), data(dtype=torch.float32)

    def gap():
        estimate = infer.importance_log_likelihood(model, guide, few, num_samples=2000)
        return (estimate.log_likelihood - estimate.bound).sum()

    before = gap()
    infer.fit(model, guide, few, lr=4e-2, num_steps=80, progress=False)
    assert 0 < gap() < 0.25 * before


def test_gradient_of_the_bound_is_that_of_the_likelihood():
    """With the exact posterior the mean gradient of the bound over draws is the score."""
    model, guide = pair()
    few, names = data(), [name for name, _ in model.named_parameters()]
    exact = torch.autograd.grad(infer.kalman_filter(model, few).log_likelihood.sum(), list(model.parameters()))
    loss = Trace_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    found = torch.autograd.grad(-loss.differentiable_loss(model, guide, few), list(model.parameters()))
    for name, a, b in zip(names, found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.15, msg=lambda text, name=name: f"{name}: {text}")


def test_errors_name_the_way_out():
    model = toy(dtype=torch.float32)
    with pytest.raises(ValueError, match="shares parameters with the model"):
        LinearGaussian(model, model, 8)
    with pytest.raises(TypeError, match="`core` must be a StateSpaceModel, got Linear"):
        LinearGaussian(model, torch.nn.Linear(1, 1), 8)
    with pytest.raises(TypeError, match="the core of guides.LinearGaussian needs .* AffineGaussian, got MLP"):
        LinearGaussian(
            model,
            StateSpaceModel(dynamics.NormalInitial(2), dynamics.MLPTransition(2, 4), emissions.LinearNormal(2, 2)),
        )
    with pytest.raises(TypeError, match="`core` starts diffuse"):
        LinearGaussian(
            model,
            StateSpaceModel(dynamics.DiffuseInitial(2), dynamics.LinearNormal(2), emissions.LinearNormal(2, 2)),
        )
    with pytest.raises(TypeError, match="no memory"):
        LinearGaussian(model, remembering(dtype=torch.float32))
    random = toy(dtype=torch.float32)
    random.emission.offset = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(TypeError, match="no parameters with a prior"):
        LinearGaussian(model, random)
    with pytest.raises(ValueError, match=r"\(state_dim, obs_dim\) = \(3, 2\), the model has \(2, 2\)"):
        LinearGaussian(
            model,
            StateSpaceModel(dynamics.NormalInitial(3), dynamics.LinearNormal(3), emissions.LinearNormal(3, 2)),
        )
    with pytest.raises(ValueError, match="`data.values` is None"):
        LinearGaussian(model, toy(dtype=torch.float32))(data(dtype=torch.float32).without_values())
