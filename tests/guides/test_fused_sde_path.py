"""The draw of a posterior equation in one operator is the draw step by step: values, densities, gradients."""

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.dynamics import ConstantDiffusion, ElementwiseDiffusion, MLPDrift, NeuralSDE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import PosteriorSDE

D = torch.float64
DIFFUSIONS = {
    "constant": lambda: ConstantDiffusion(0.5, 2),
    "elementwise": lambda: ElementwiseDiffusion(2, 4),
    "bounded": lambda: ElementwiseDiffusion(2, 4, ceiling=1.0),
}


def parts(diffusion):
    torch.manual_seed(0)
    sde = NeuralSDE(MLPDrift(2, (6,)), DIFFUSIONS[diffusion]())
    model = StateSpaceModel(NormalInitial(2), sde, LinearNormal(2, 1)).double()
    return model, PosteriorSDE(model, 4, drift_hidden=(5, 6)).double()


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("grid", ["shared", "own", "ragged"])
def test_one_operator_is_the_loop(diffusion, grid, monkeypatch):
    model, guide = parts(diffusion)
    times = torch.linspace(0, 2, 5, dtype=D)
    if grid == "own":
        times = times * torch.tensor([[1.0], [0.5], [2.0]], dtype=D)
    lengths = [5, 2, 4] if grid == "ragged" else None
    data = TimeSeries(times, torch.randn(3, 5, 1, dtype=D), lengths=lengths).refine(3)
    bound = TraceMeanField_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    found = []
    assert guide._fused(model.bind().transition) is not None
    for _ in range(2):
        torch.manual_seed(1)
        loss = bound(data)
        found.append([loss, *torch.autograd.grad(loss, list(bound.parameters()), allow_unused=True)])
        monkeypatch.setattr(PosteriorSDE, "_fused", lambda self, sde: None)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_what_the_operator_does_not_know_goes_step_by_step():
    model, guide = parts("elementwise")
    sde = model.bind().transition
    assert PosteriorSDE(model, 4, tilt=True)._fused(sde) is None
    assert PosteriorSDE(model, 4, form="control")._fused(sde) is None
    assert PosteriorSDE(model, 4, activation="tanh")._fused(sde) is None

    class Other(ElementwiseDiffusion):
        def forward(self, time, state, inputs):
            return 2 * super().forward(time, state, inputs)

    other = StateSpaceModel(NormalInitial(2), NeuralSDE(MLPDrift(2), Other(2)), LinearNormal(2, 1))
    assert PosteriorSDE(other, 4)._fused(other.bind().transition) is None
