"""Constants of a user's own field, which declares no event dims, under the guides that read them."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

from pyro_ssm import StateSpaceModel, TimeSeries, guides, infer
from pyro_ssm.dynamics import ConstantDiffusion, GreyBox, MLPDrift, NeuralODE, NeuralSDE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.predict import forecast

D = torch.float64


class Decay(PyroModule):
    """A user's field, which declares no event dims."""

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(-1.0, 0.3))

    def forward(self, t, z, u):
        return -self.rate * z


@pytest.mark.parametrize("kind", ["InitialState", "PosteriorSDE", "SDEMatching"])
def test_constants_of_a_users_field_reach_the_encoder(kind):
    """Each guide runs, and its features at several draws are those at each of them."""
    torch.manual_seed(0)
    field = GreyBox(Decay(), MLPDrift(2, 4, scale=0.1))
    noisy = kind != "InitialState"
    transition = NeuralSDE(field, ConstantDiffusion(0.5, 2)) if noisy else NeuralODE(field)
    model = StateSpaceModel(NormalInitial(2), transition, LinearNormal(2, 1)).double()
    times = torch.linspace(0, 3, 5, dtype=D) * torch.linspace(0.5, 1, 3, dtype=D).unsqueeze(-1)  # own times
    data = TimeSeries(times, torch.randn(3, 5, 1, dtype=D), lengths=[5, 3, 4])
    guide = getattr(guides, kind)(model, 8).double()
    result = infer.fit(model, guide, data, num_steps=1, progress=False)
    assert forecast(model, result, data, times=[4.0], num_samples=4).values.shape == (4, 3, 1, 1)
    name = f"transition.{'drift' if noisy else 'field'}.mechanism.rate"
    rates = torch.tensor([0.2, 1.5], dtype=D)
    together = guide.encoder(data, model.bind({name: rates.reshape(2, 1)})).features
    alone = torch.stack([guide.encoder(data, model.bind({name: rate})).features for rate in rates])
    torch.testing.assert_close(together, alone)
    assert (together[0] - together[1]).abs().max() > 1e-3
