"""An emission of some coordinates: the law of the held one, and its capabilities."""

import pickle

import pytest
import torch

from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.emissions import Coordinates, LinearNormal, Normal, Poisson
from pyro_ssm.testing import EmissionContract


class TestLeadingContract(EmissionContract):
    input_dim = 2

    def make_component(self):
        return Coordinates(Normal(2, 3, 8, input_dim=2), state_dim=2)


class TestAffineContract(EmissionContract):
    def make_component(self):
        return Coordinates(LinearNormal(2, 3), state_dim=2, coordinates=[1, 0])


def test_it_is_the_held_law_at_the_chosen_coordinates():
    torch.manual_seed(0)
    z, times = torch.randn(3, 5, 4), torch.arange(5.0)
    for chosen in (None, [0, 1], [3, 1], [2, 3]):
        held = Normal(2, 3, 8)
        law = Coordinates(held, 4, chosen)(z, times, None)
        wanted = held(z[..., chosen or [0, 1]], times, None)
        torch.testing.assert_close(law.mean, wanted.mean)
        held = LinearNormal(2, 3)
        matrix, offset, root = Coordinates(held, 4, chosen).affine(times, None)
        wanted = held(z[..., chosen or [0, 1]], times, None)
        torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, wanted.mean)


def test_capabilities_are_those_of_the_held_emission():
    affine, normal = Coordinates(LinearNormal(2, 1), 4), Coordinates(Normal(2, 1, 8), state_dim=4)
    counts = Coordinates(emission=Poisson(2, 1, 8), state_dim=4)
    assert isinstance(affine, AffineGaussian)
    assert isinstance(normal, Gaussian) and not isinstance(normal, AffineGaussian)
    assert not isinstance(counts, Gaussian)
    assert isinstance(pickle.loads(pickle.dumps(affine)), AffineGaussian)


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="`emission` must be a components.Emission"):
        Coordinates(3, 4)
    for chosen in ([0], [0, 0], [0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="`coordinates` must be 2 different ones of 0 to 3"):
            Coordinates(LinearNormal(2, 1), 4, chosen)
    with pytest.raises(ValueError, match="state_dim=4, got a state"):
        Coordinates(LinearNormal(2, 1), 4)(torch.zeros(5, 2), torch.arange(5.0), None)
