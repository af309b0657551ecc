"""The terms of ODE2VAE along the path, against the exact law of a linear equation."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ssm import StateSpaceModel, TimeSeries, models
from pyro_ssm.dynamics import LinearDrift, NeuralODE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import FirstFrames, InitialState, PositionVelocity, encoded_laws
from pyro_ssm.infer import PushForwardELBO
from pyro_ssm.infer.elbo_push_forward import push_forward
from tests.models.records import series

D = torch.float64


def linear_ode2vae():
    torch.manual_seed(0)
    A = torch.tensor([[-0.3, 1.0], [-1.0, 0.1]], dtype=D)
    ode = NeuralODE(LinearDrift(A), rtol=1e-9, atol=1e-10)
    model = StateSpaceModel(NormalInitial(2), ode, LinearNormal(2, 2, scale=0.5)).double()
    model.transition.field.matrix.data.copy_(A)
    return model, InitialState(model, 4).double(), A


def test_the_law_pushed_forward_is_that_of_a_linear_equation():
    """Along a linear field N(m, S) stays normal: mean e^{At} m, root e^{At} L."""
    model, guide, A = linear_ode2vae()
    data = series(lengths=torch.tensor([6, 3, 4]))
    law = guide.start(data, model.bind())._step(None, slice(0, 1), None).base_dist
    start = guide.start(data, model.bind()).sample().detach()
    path = model.bind().transition.solve(start, data.times)
    first = dist.Normal(law.loc, law.scale).log_prob(start).sum((-1, -2))
    found = push_forward(model.bind().transition, path, data, first)
    for b in range(3):
        for k in range(int(data.lengths[b])):
            flow = torch.linalg.matrix_exp(A * (data.times[b, k] - data.times[b, 0]))
            wanted = dist.MultivariateNormal(flow @ law.loc[b, 0], flow @ law.scale[b, 0].square().diag() @ flow.mT)
            torch.testing.assert_close(found[b, k], wanted.log_prob(path[b, k]), rtol=1e-6, atol=1e-6)


def test_the_loss_of_ode2vae_is_the_bound_and_the_distances():
    model, guide, A = linear_ode2vae()
    data = series(lengths=torch.tensor([6, 3, 4]))
    law = guide.start(data, model.bind())._step(None, slice(0, 1), None).base_dist
    torch.manual_seed(3)
    plain = PushForwardELBO(0.0, num_particles=2).loss(model, guide, data)
    torch.manual_seed(3)
    assert plain == pytest.approx(Trace_ELBO(num_particles=2).loss(model, guide, data), abs=1e-9)
    torch.manual_seed(3)
    losses = [PushForwardELBO(1.0).loss(model, guide, data)]
    torch.manual_seed(3)
    losses.append(PushForwardELBO(0.0).loss(model, guide, data))
    torch.manual_seed(3)
    path = model.bind().transition.solve(guide(data).detach(), data.times)
    wanted = 0.0
    for b in range(3):
        for k in range(1, int(data.lengths[b])):
            flow = torch.linalg.matrix_exp(A * (data.times[b, k] - data.times[b, 0]))
            moved = dist.MultivariateNormal(flow @ law.loc[b, 0], flow @ law.scale[b, 0].square().diag() @ flow.mT)
            wanted += float((moved.log_prob(path[b, k]) - dist.Normal(0.0, 1.0).log_prob(path[b, k]).sum()).detach())
    assert losses[0] - losses[1] == pytest.approx(wanted, rel=1e-6)


def test_gradients_of_the_terms_along_the_path():
    model, guide, _ = linear_ode2vae()
    data = series(num=3)
    parameters = [model.transition.field.matrix, guide.head.layers[-1].bias]

    def loss():
        torch.manual_seed(0)
        return PushForwardELBO().differentiable_loss(model, guide, data)

    for parameter, slope in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        for at in list(torch.cartesian_prod(*(torch.arange(n) for n in parameter.shape)))[:3]:
            at = tuple(at.reshape(-1).tolist())
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[at] += sign * 1e-5
                ends.append(float(loss().detach()))
                with torch.no_grad():
                    parameter[at] -= sign * 1e-5
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope[at]), rel=1e-4, abs=1e-4)


def test_a_minibatch_stands_for_all_series():
    """One series of three counts three times; without the scaling it is that series."""
    model, guide, _ = linear_ode2vae()
    data = series(lengths=torch.tensor([6, 3, 4]))
    batch = data.minibatch(torch.tensor([1]))
    found = []
    for some in (batch, batch.replace(total=None, index=None), data.series(1)):
        torch.manual_seed(0)
        found.append(PushForwardELBO().loss(model, guide, some))
    assert found[0] == pytest.approx(3 * found[1], rel=1e-9)
    assert found[1] == pytest.approx(found[2], rel=1e-9)


def test_what_it_cannot_do_is_refused():
    model, guide, _ = linear_ode2vae()
    data = series(num=3)
    with pytest.raises(TypeError, match="NeuralODE"):
        PushForwardELBO().loss(models.latent_sde(2, 2), guide, data)
    with pytest.raises(ValueError, match="weight"):
        PushForwardELBO(-1.0)


def encoded(lengths=None):
    """A linear ODE2VAE whose guide reads first frames, and data with one gap in what is seen."""
    model, _, A = linear_ode2vae()
    data = series(lengths=lengths)
    mask = data.mask.clone()
    mask[0, 2] = False
    mask[1:] = True
    guides = (PositionVelocity(model, 4, 2).double(), InitialState(model, 4, encoder=FirstFrames(model, 4, 3)).double())
    return model, guides, data.replace(values=data.values, mask=mask)


@pytest.mark.parametrize("which", [0, 1])
def test_a_window_is_the_start_of_the_series_from_there_on(which):
    model, guides, data = encoded(torch.tensor([6, 3, 4]))
    guide, frames = guides[which], (2, 3)[which]
    law, complete = encoded_laws(guide, data)
    assert law.batch_shape == (3, 7 - frames)
    for b in range(3):
        real = data.series(b)
        for k in range(7 - frames):
            inside = k + frames <= real.num_times
            assert complete[b, k] == (inside and bool(data.mask[b, k : k + frames].any(-1).all()))
            if inside:
                rest = TimeSeries(real.times[k:], real.values[k:], mask=real.mask[k:])
                alone = guide.start(rest, model.bind())._step(None, slice(0, 1), None)
                torch.testing.assert_close(law.mean[b, k], alone.mean[0])
                torch.testing.assert_close(law.stddev[b, k], alone.stddev[0])
    torch.testing.assert_close(encoded_laws(guide, data.refine(3))[0].mean, law.mean)
    short = TimeSeries(data.times[:, :1], data.values[:, :1], mask=data.mask[:, :1])
    assert encoded_laws(guide, short)[1].shape == (3, 0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("refine", [1, 3])
def test_the_penalty_of_the_encoder_is_its_definition(which, refine):
    """E[log q(z_k) - log q_enc(z_k)] with q(z_k) = N(e^{At} m, e^{At} S e^{At}^T), at observations only."""
    model, guides, data = encoded(torch.tensor([6, 3, 4]))
    guide, A = guides[which], model.transition.field.matrix.detach()
    start = guide.start(data, model.bind())._step(None, slice(0, 1), None)
    law, complete = encoded_laws(guide, data)
    grid = data.refine(refine)
    losses = []
    for gamma in (0.0, 0.7):
        torch.manual_seed(3)
        losses.append(PushForwardELBO(1.0, encoder_weight=gamma).loss(model, guide, grid))
    torch.manual_seed(3)
    path = model.bind().transition.solve(guide(data).detach(), data.times)
    wanted = 0.0
    for b in range(3):
        for k in range(1, complete.shape[1]):
            if complete[b, k]:
                flow = torch.linalg.matrix_exp(A * (data.times[b, k] - data.times[b, 0]))
                spread = flow @ start.variance[b, 0].diag() @ flow.mT
                moved = dist.MultivariateNormal(flow @ start.mean[b, 0], spread).log_prob(path[b, k])
                wanted += float((moved - dist.Normal(law.mean, law.stddev).log_prob(path[b, k])[b, k].sum()).detach())
    assert losses[1] - losses[0] == pytest.approx(0.7 * wanted, rel=1e-5)


def test_the_penalty_trains_the_encoder_and_refuses_others():
    model, guides, data = encoded()
    guide = guides[0]
    torch.manual_seed(0)
    found = PushForwardELBO(0.0, encoder_weight=1.0).differentiable_loss(model, guide, data)
    slope = torch.autograd.grad(found, guide.velocity_head.layers[-1].bias)[0]
    ends = []
    for sign in (1, -1):
        guide.velocity_head.layers[-1].bias.data[0] += sign * 1e-5
        torch.manual_seed(0)
        ends.append(PushForwardELBO(0.0, encoder_weight=1.0).loss(model, guide, data))
        guide.velocity_head.layers[-1].bias.data[0] -= sign * 1e-5
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope[0]), rel=1e-5)
    with pytest.raises(TypeError, match="reads a few frames"):
        PushForwardELBO(encoder_weight=1.0).loss(model, InitialState(model, 4).double(), data)
    with pytest.raises(ValueError, match="`encoder_weight`"):
        PushForwardELBO(encoder_weight=-1.0)
