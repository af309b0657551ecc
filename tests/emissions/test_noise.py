"""Noise that is known and differs from step to step."""

import pytest
import torch
from torch import nn

import pyro_ssm as ssm
from pyro_ssm import emissions
from pyro_ssm.binding import bind
from pyro_ssm.infer import kalman_filter, kalman_smoother
from tests.blocks.component_checks import STEPS, TIMES
from tests.infer.gaussian.linear import D, dense_log_likelihood, random_data

factors = torch.randn(STEPS, 3, 3).tril(-1) + torch.diag_embed(0.5 + torch.rand(STEPS, 3))


def correlated(time, inputs):
    """A factor that depends on the time and on the inputs."""
    one = torch.ones_like(time)
    by = one if inputs is None else 1 + inputs[..., 0].square().to(time.dtype)
    first, cross = torch.stack([by, 0 * one], -1), torch.stack([0.8 * time.cos(), 1 + time / 10], -1)
    return torch.stack([first, cross], -2)


def model(noise, obs_dim=2, **options):
    built = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(3, covariance="full"),
        ssm.dynamics.OrnsteinUhlenbeck(3),
        emissions.LinearNormal(3, obs_dim, noise=noise, **options),
    )
    return built.double()


@pytest.mark.parametrize("plus_learned", [False, True])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("kind", ["errors", "function", "factors"])
def test_affine_is_the_law_and_the_equation(kind, covariance, plus_learned):
    u = 0.1 + torch.rand(4, STEPS, 3)
    noise = {
        "errors": lambda: emissions.StandardErrors([0, 1, 2], plus_learned),
        "function": lambda: emissions.NoiseFunction(lambda time, inputs: inputs, plus_learned=plus_learned),
        "factors": lambda: emissions.NoiseFunction(lambda time, inputs: factors, True, plus_learned),
    }[kind]()
    emission = bind(emissions.LinearNormal(2, 3, covariance=covariance, noise=noise, scale=0.7))
    z = torch.randn(4, STEPS, 2)
    law = emission(z, TIMES[:-1], u)
    matrix, offset, root = emission.affine(TIMES[:-1], u)
    known = factors @ factors.mT if kind == "factors" else torch.diag_embed(u.square())
    wanted = known + (0.49 * torch.eye(3) if plus_learned else 0)
    torch.testing.assert_close((root @ root.mT).expand(4, STEPS, 3, 3), wanted.expand(4, STEPS, 3, 3))
    spread = law.covariance_matrix if hasattr(law, "covariance_matrix") else torch.diag_embed(law.variance)
    torch.testing.assert_close(spread.expand(4, STEPS, 3, 3), wanted.expand(4, STEPS, 3, 3))
    torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, law.mean)
    names = {name for name, _ in emission.named_parameters()}
    assert any("scale" in name for name in names) == plus_learned


@pytest.mark.parametrize("noise", [correlated, "errors"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_filter_is_the_dense_gaussian_with_random_masks(noise, batch):
    """Rows of a correlated noise are hidden exactly: the judge restricts the dense covariance."""
    torch.manual_seed(0)
    data = random_data(batch, own_times=True)
    data = data.replace(inputs=data.inputs.abs() + 0.2, values=data.values, mask=data.mask)
    law = emissions.StandardErrors([1, 0]) if noise == "errors" else emissions.NoiseFunction(noise, correlated=True)
    built = model(law).bind()
    totals = kalman_filter(built, data).log_likelihood.sum(-1)
    for i in range(batch[0] if batch else 1):
        one = data.series(i) if batch else data
        total = totals[i] if batch else totals
        torch.testing.assert_close(total, dense_log_likelihood(built, one), rtol=1e-9, atol=1e-9)


def test_constant_standard_errors_are_a_scale():
    data = random_data()
    errors = torch.tensor([0.3, 0.8], dtype=D).expand(6, 2)
    data = data.replace(inputs=errors, values=data.values, mask=data.mask)
    known = model(emissions.StandardErrors([0, 1]))
    learned = model(None, scale=torch.tensor([0.3, 0.8]))
    learned.emission.load_state_dict(known.emission.state_dict(), strict=False)
    for one, other in zip(kalman_smoother(known, data), kalman_smoother(learned, data), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the learned scale is rounded to float32 at first


def test_columns_of_errors_do_not_drive_the_mean():
    u = torch.rand(5, 4) + 0.1
    emission = bind(
        emissions.LinearNormal(1, 1, input_dim=3, noise=emissions.StandardErrors([2]), matrix=torch.zeros(1, 1)),
        {"input_matrix": torch.tensor([[1.0, 10.0, 100.0]])},
    )
    law = emission(torch.zeros(5, 1), torch.arange(5.0), u)
    torch.testing.assert_close(law.mean[:, 0], u[:, 0] + 10 * u[:, 1] + 100 * u[:, 3])
    torch.testing.assert_close(law.variance[:, 0], u[:, 2].square())


def test_a_network_of_noise_is_learned_and_padding_changes_no_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, time, inputs):
            return self.layer(inputs).exp()

    torch.manual_seed(0)
    built = model(emissions.NoiseFunction(Net()))
    data = random_data((2,), own_times=True, lengths=torch.tensor([6, 3]))
    weight = built.emission.noise.function.layer.weight
    (whole,) = torch.autograd.grad(kalman_filter(built, data).log_likelihood.sum(), weight)
    parts = [
        torch.autograd.grad(kalman_filter(built, data.series(i)).log_likelihood.sum(), weight)[0] for i in range(2)
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_standard_errors_at_padding_leave_a_path_density_and_its_gradient_finite():
    """Padded inputs are 0; the density of a real step must not feel it."""
    built = model(emissions.StandardErrors([0, 1]))
    data = random_data((2,), own_times=True, lengths=torch.tensor([6, 3]))
    data = data.replace(inputs=data.inputs.abs() + 0.2, values=data.values, mask=data.mask)
    z = torch.randn(2, 6, 3, dtype=D)
    law = ssm.models.laws.observation_law(built.bind(), data, z)
    total = law.log_prob(data.values)
    one = data.series(1)
    alone = ssm.models.laws.observation_law(built.bind(), one, z[1, :3]).log_prob(one.values)
    torch.testing.assert_close(total[1], alone)
    grad = torch.autograd.grad(total[1], built.emission.matrix, retain_graph=True)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(alone, built.emission.matrix)[0])


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="`noise` must be emissions.StandardErrors.*got float"):
        emissions.LinearNormal(2, 1, noise=0.5)
    with pytest.raises(ValueError, match="`columns` must be different positions"):
        emissions.StandardErrors([0, 0])
    with pytest.raises(TypeError, match="`function` must be a function of time and inputs"):
        emissions.NoiseFunction(3.0)
    emission = emissions.LinearNormal(2, 1, noise=emissions.StandardErrors([1]))
    with pytest.raises(ValueError, match=r"reads columns \[1\] of the inputs, got no inputs"):
        emission.affine(TIMES[:-1], None)
    with pytest.raises(ValueError, match="standard errors must not be negative, got -1.0"):
        emission.affine(TIMES[:-1], -torch.ones(STEPS, 2))
    wrong = emissions.LinearNormal(2, 3, noise=emissions.StandardErrors([1]))
    with pytest.raises(ValueError, match=r"gives noise of shape .* but \(\.\.\., time, 3\) is wanted"):
        wrong.affine(TIMES[:-1], torch.ones(STEPS, 2))
