import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch.autograd.functional import jacobian

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.components import AffineGaussian
from pyro_ssm.dynamics import LinearNormal, OrnsteinUhlenbeck, StationaryInitial
from tests.blocks.component_checks import STEPS, TIMES, jitter, varied

GAPS = (TIMES[1:] - TIMES[:-1]).unsqueeze(-1)
RATE, MEAN, DIFFUSION = (torch.tensor(v, dtype=torch.float64) for v in ([0.7, 2.0], [1.0, -3.0], [0.5, 1.5]))


def process(**other):
    values = {"rate": RATE, "mean": MEAN, "diffusion": DIFFUSION} | other
    return bind(OrnsteinUhlenbeck(2).double(), values)


def at(*times):
    times = torch.tensor(times, dtype=torch.float64)
    return times[:-1], times[1:]


def test_is_the_exact_law():
    z = torch.randn(4, STEPS, 2, dtype=torch.float64)
    law = process()(z, TIMES[:-1], TIMES[1:], None)
    torch.testing.assert_close(law.mean, MEAN + torch.exp(-RATE * GAPS) * (z - MEAN))
    variance = DIFFUSION**2 / (2 * RATE) * (1 - torch.exp(-2 * RATE * GAPS))
    torch.testing.assert_close(law.variance, variance.expand(4, -1, -1))


def test_solves_its_equation():
    """Moments over a short gap have the drift and the diffusion as their rates of change."""
    z, h = torch.tensor([[0.3, 0.8]], dtype=torch.float64), 1e-7
    law = process()(z, *at(0.0, h), None)
    torch.testing.assert_close((law.mean - z) / h, -RATE * (z - MEAN), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(law.variance[0] / h, DIFFUSION**2, rtol=1e-5, atol=1e-5)


def test_two_gaps_are_one_long_gap():
    first, second, both = (process().affine(*at(*t), None) for t in ((0.0, 0.4), (0.4, 3.0), (0.0, 3.0)))
    torch.testing.assert_close(second.matrix @ first.matrix, both.matrix)
    pushed = (second.matrix @ first.offset.unsqueeze(-1)).squeeze(-1) + second.offset
    torch.testing.assert_close(pushed, both.offset)
    moved = second.matrix @ first.scale_tril
    spread = moved @ moved.mT + second.scale_tril @ second.scale_tril.mT
    torch.testing.assert_close(spread, both.scale_tril @ both.scale_tril.mT)


def test_stationary_law_does_not_move():
    """So a first time that nobody observed changes nothing."""
    law = bind(OrnsteinUhlenbeck(2).double().stationary(), values_for("transition."))(TIMES[:1], None)
    step = process().affine(*at(0.0, 0.9), None)
    torch.testing.assert_close((step.matrix @ law.mean.unsqueeze(-1)).squeeze(-1) + step.offset, law.mean)
    spread = step.matrix @ torch.diag_embed(law.variance) @ step.matrix.mT + step.scale_tril @ step.scale_tril.mT
    torch.testing.assert_close(spread, torch.diag_embed(law.variance))


def values_for(prefix):
    return {prefix + "rate": RATE, prefix + "mean": MEAN, prefix + "diffusion": DIFFUSION}


def test_is_forgotten_over_a_long_gap():
    stationary = bind(OrnsteinUhlenbeck(2).double().stationary(), values_for("transition."))(TIMES[:1], None)
    late = process()(torch.full((1, 2), 50.0, dtype=torch.float64), *at(0.0, 1e3), None)
    torch.testing.assert_close((late.mean, late.variance), (stationary.mean, stationary.variance))


def test_inputs_are_held_within_a_gap():
    drive = torch.randn(2, 3, dtype=torch.float64)
    driven = bind(OrnsteinUhlenbeck(2, input_dim=3).double(), values_for("") | {"input_matrix": drive})
    z, u = torch.randn(STEPS, 2).double(), torch.randn(STEPS, 3).double()
    law = driven(z, TIMES[:-1], TIMES[1:], u)
    for k in range(STEPS):
        alone = process(mean=MEAN + drive @ u[k])(z[k : k + 1], TIMES[k : k + 1], TIMES[k + 1 : k + 2], None)
        torch.testing.assert_close((law.mean[k], law.variance[k]), (alone.mean[0], alone.variance[0]))


@pytest.mark.parametrize("input_dim", [0, 3])
@pytest.mark.parametrize("lead", [(), (4,), (3, 4), (3, 1)])
def test_affine_is_the_law(input_dim, lead):
    component = jitter(OrnsteinUhlenbeck(2, input_dim=input_dim))
    transition = bind(component, varied(component, *lead)) if lead else bind(component)
    assert isinstance(transition, AffineGaussian)
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, input_dim) if input_dim else None
    law = transition(z, TIMES[:-1], TIMES[1:], u)
    matrix, offset, factor = transition.affine(TIMES[:-1], TIMES[1:], u)
    torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, law.mean)
    spread = (factor @ factor.mT).expand(law.mean.shape + (2,))
    torch.testing.assert_close(spread, torch.diag_embed(law.variance))


def test_a_scalar_prior_is_one_value_per_series():
    """Two series, two coordinates: the rate belongs to the series, not to the coordinate."""
    component = OrnsteinUhlenbeck(2)
    component.rate = PyroSample(dist.LogNormal(0.0, 0.7))
    rates = torch.tensor([0.2, 3.0])
    z = torch.randn(2, STEPS, 2)
    together = bind(component, {"rate": rates})
    law = together(z, TIMES[:-1], TIMES[1:], None)
    matrix, offset, factor = together.affine(TIMES[:-1], TIMES[1:], None)
    assert matrix.shape == factor.shape == (2, STEPS, 2, 2) and offset.shape == (2, STEPS, 2)
    for b in range(2):
        alone = bind(component, {"rate": rates[b]})(z[b], TIMES[:-1], TIMES[1:], None)
        torch.testing.assert_close((law.mean[b], law.variance[b]), (alone.mean, alone.variance))
        torch.testing.assert_close(factor[b].diagonal(dim1=-2, dim2=-1) ** 2, alone.variance)


def test_stationary_start_shares_its_parameters_in_a_model():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            transition = OrnsteinUhlenbeck(2)
            self.initial = transition.stationary()
            self.transition = transition

        def forward(self):
            bound = bind(self)
            assert torch.equal(bound.initial.transition.rate, bound.transition.rate)
            return bound.transition.rate

    model = Model()
    model.transition.rate = PyroSample(dist.LogNormal(0.0, 0.7))
    assert sorted(set(parameter_names(model))) == ["transition.diffusion", "transition.mean", "transition.rate"]
    trace = poutine.trace(model).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["transition.rate"]
    bound = bind(model, {"transition.rate": torch.tensor(2.0)})
    torch.testing.assert_close(bound.initial(TIMES[:1], None).variance, torch.full((1, 2), 0.25))
    pyro.clear_param_store()


def test_gradients_over_short_long_and_no_gaps():
    """At its mean the log density is -log s: s^2 is q^2 gap (short), q^2 / 2r (long), or constant (none)."""
    rate, level, diffusion = (torch.full((1,), x).requires_grad_() for x in (1.6, 0.0, 0.5))
    bound = bind(OrnsteinUhlenbeck(1), {"rate": rate, "mean": level, "diffusion": diffusion})
    law = bound(torch.zeros(3, 1), *at(0.0, 0.0, 1e-9, 1e9), None)
    torch.testing.assert_close(law.variance[1:, 0], torch.tensor([0.25e-9, 0.25 / 3.2]))
    terms = law.log_prob(torch.zeros(3, 1))
    wanted = {0: (0.0, 0.0, 0.0), 1: (0.0, 0.0, -1 / 0.5), 2: (0.5 / 1.6, 0.0, -1 / 0.5)}
    for k, slopes in wanted.items():
        found = torch.autograd.grad(terms[k], (rate, level, diffusion), retain_graph=True)
        torch.testing.assert_close(torch.cat(found), torch.tensor(slopes), rtol=1e-5, atol=1e-6)


def test_gradient_of_the_law():
    def mean_and_variance(rate):
        law = process(rate=rate)(torch.ones(STEPS, 2, dtype=torch.float64), TIMES[:-1], TIMES[1:], None)
        return torch.cat([law.mean, law.variance])

    exact = jacobian(mean_and_variance, RATE)
    h = 1e-6
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        slope = (mean_and_variance(RATE + step) - mean_and_variance(RATE - step)) / (2 * h)
        torch.testing.assert_close(exact[..., i], slope, rtol=1e-6, atol=1e-8)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`rate` must lie above its floor"):
        OrnsteinUhlenbeck(2, rate=-1.0)
    with pytest.raises(TypeError, match="must be a Transition with a stationary law .*, got LinearNormal"):
        StationaryInitial(LinearNormal(2))
