"""A latent equation behind an unknown nonlinear view is found up to what no data can tell: sign and shift.

The setting of Hasan, Pereira, Farsiu and Tarokh (2021), "Identifying latent stochastic differential equations":
diffusion one, Euler transitions, a decoder that is learnt together with the drift.
"""

import pyro
import pytest
import torch

import pyro_ssm as ssm

STEP, NUM_TIMES, NUM_SERIES = 0.1, 100, 40


def drift(z):
    return 2 * z - z**3


def simulated():
    """Paths of a double well by ten Euler steps a gap, and three numbers seen of each state."""
    z, path = torch.randn(NUM_SERIES, 1), []
    for _ in range(NUM_TIMES):
        path.append(z)
        for _ in range(10):
            z = z + drift(z) * STEP / 10 + (STEP / 10) ** 0.5 * torch.randn(NUM_SERIES, 1)
    path = torch.stack(path, 1)
    view = torch.cat([torch.sinh(0.6 * path), path + 0.3 * torch.sin(2 * path), torch.tanh(path)], -1)
    return path, ssm.TimeSeries(torch.arange(NUM_TIMES) * STEP, view + 0.05 * torch.randn(view.shape))


@pytest.mark.slow
def test_the_drift_is_found_up_to_an_isometry():
    pyro.set_rng_seed(0)
    truth, data = simulated()
    diffusion = ssm.dynamics.ConstantDiffusion(1.0, 1).requires_grad_(False)
    sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(1, (32,)), diffusion)
    model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(1), sde, ssm.emissions.Normal(1, 3, (32,)))
    guide = ssm.guides.PosteriorSDE(model, 16, tilt=True, drift_hidden=(16,))
    ssm.infer.fit(model, guide, data, lr=1e-2, num_steps=600, progress=False)
    with torch.no_grad():
        found, z = guide(data).reshape(-1, 1), truth.reshape(-1, 1)
        slope, shift = torch.linalg.lstsq(torch.cat([found, torch.ones_like(found)], 1), z).solution.flatten()
        assert 1 - (z - slope * found - shift).var() / z.var() > 0.99
        assert 0.75 < slope.abs() < 1.25  # an isometry of the line; a step of 0.1 is coarse
        grid = torch.linspace(-1.8, 1.8, 37).unsqueeze(-1)
        learnt = slope.sign() * sde.drift(torch.zeros(37, 1), (grid - shift) / slope, None)
        error = (learnt - drift(grid)).square().mean().sqrt()
        assert error < 0.25 * drift(grid).square().mean().sqrt()
