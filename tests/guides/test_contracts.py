"""The contract of guides over every family, with and without memory, inputs and random parameters."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ssm import blocks, dynamics, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import GaussianMarkov, LinearGaussian, Structured
from pyro_ssm.models import StateSpaceModel, dmm, srnn, vrnn
from pyro_ssm.testing import GuideContract
from tests.contracts.toys import remembering, toy

FAMILIES = [(Structured, d, {"structured": s}) for d in ("past", "future", "both") for s in (False, True)]
FAMILIES += [(GaussianMarkov, d, {}) for d in ("past", "future", "both")]


def family(guide_class, direction, options):
    class Family(GuideContract):
        def make_model(self):
            return toy(dtype=torch.float32)

        def make_guide(self, model, **more):
            return guide_class(model, hidden_dim=8, direction=direction, **options, **more)

    return Family


def names_in(contract):
    return [name for name in dir(contract) if name.startswith("test_")]


@pytest.mark.parametrize("test", names_in(GuideContract))
@pytest.mark.parametrize(("guide_class", "direction", "options"), FAMILIES)
def test_family(guide_class, direction, options, test):
    subject = family(guide_class, direction, options)()
    subject.setup_method()
    getattr(subject, test)()


class TestLSTM(GuideContract):
    def make_model(self):
        return toy(dtype=torch.float32)

    def make_guide(self, model, **options):
        return Structured(model, 8, cell="lstm", num_layers=2, **options)


class TestStructuredCells(GuideContract):
    def make_model(self):
        return toy(dtype=torch.float32)

    def make_guide(self, model, **options):
        return Structured(model, 8, cell=lambda size: blocks.Mamba(size, 2), num_layers=2, **options)


class TestBidirectionalEncoder(GuideContract):
    def make_model(self):
        return toy(dtype=torch.float32)

    def make_guide(self, model, **options):
        seen = 2 * model.emission.obs_dim + 1
        past, future = (blocks.ResidualStack([blocks.S4D(8, 4)], in_features=seen) for _ in range(2))
        return GaussianMarkov(model, 8, cell=blocks.Bidirectional(past, future), **options)


class TestOfABernoulliModelWithInputs(GuideContract):
    input_dim = 3

    def make_model(self):
        return StateSpaceModel(
            dynamics.NormalInitial(2, input_dim=3),
            dynamics.LinearNormal(2, input_dim=3),
            emissions.Bernoulli(2, 4, hidden=(5,)),
        )

    def make_guide(self, model, **options):
        return Structured(model, 8, input_dim=3, **options)

    def make_values(self, shape):
        return torch.rand(shape).round()


class TestWithRandomParameters(GuideContract):
    """The network reads the drawn parameters, and the densities are right for each draw."""

    def make_model(self):
        model = toy(dtype=torch.float32)
        model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
        model.emission.matrix = PyroSample(dist.Normal(torch.zeros(2, 2), 0.3).to_event(2))
        return model

    def make_guide(self, model, **options):
        return GaussianMarkov(model, 8, **options)


class TestLinearGaussian(GuideContract):
    def make_model(self):
        return toy(dtype=torch.float32)

    def make_guide(self, model, **options):
        return LinearGaussian(model, toy(dtype=torch.float32), 8, **options)


class TestLinearGaussianOfACorrectedModelWithInputs(GuideContract):
    input_dim = 3

    def core(self):
        return StateSpaceModel(
            dynamics.NormalInitial(2, input_dim=3, covariance="full"),
            dynamics.LinearNormal(2, input_dim=3, covariance="full"),
            emissions.LinearNormal(2, 1, input_dim=3),
        )

    def make_model(self):
        linear = self.core()
        motion = dynamics.CorrectedTransition(linear.transition, 5, input_dim=3)
        return StateSpaceModel(linear.initial, motion, linear.emission)

    def make_guide(self, model, **options):
        return LinearGaussian(model, self.core(), 8, input_dim=3, **options)


class TestLinearGaussianOfAMemory(GuideContract):
    def make_model(self):
        return remembering(dtype=torch.float32)

    def make_guide(self, model, **options):
        return LinearGaussian(model, toy(dtype=torch.float32), 8, **options)


class TestOfAMemory(GuideContract):
    def make_model(self):
        return remembering(dtype=torch.float32)

    def make_guide(self, model, **options):
        return Structured(model, 8, **options)


class TestOfVRNN(GuideContract):
    def make_model(self):
        return vrnn(2, 2, hidden_dim=4)

    def make_guide(self, model, **options):
        return Structured(model, 8, direction="past", structured=False, **options)


class TestOfSRNN(GuideContract):
    def make_model(self):
        return srnn(2, 2, hidden_dim=4)

    def make_guide(self, model, **options):
        return GaussianMarkov(model, 8, direction="future", **options)


class TestOfDMM(GuideContract):
    def make_model(self):
        return dmm(2, 2, transition_dim=8, emission_dim=8)

    def make_guide(self, model, **options):
        return Structured(model, 8, **options)


def test_the_direction_says_what_is_read():
    data = TimeSeries(torch.arange(4.0), torch.randn(4, 2))
    for guide_class in (Structured, GaussianMarkov):
        for direction, ahead in (("past", False), ("future", True), ("both", True)):
            guide = guide_class(toy(dtype=torch.float32), 8, direction=direction)
            assert guide.looks_ahead is ahead
            features = guide.encode(data, guide.model.bind()).features
            other = data.replace(values=torch.cat([data.values[:-1], data.values[-1:] + 1.0]))
            same = torch.equal(guide.encode(other, guide.model.bind()).features[:3], features[:3])
            assert same is not ahead
        with pytest.raises(ValueError, match="direction"):
            guide_class(toy(dtype=torch.float32), 8, direction="sideways")


@pytest.mark.parametrize("test", names_in(GuideContract))
@pytest.mark.parametrize("cell", ["gru_d", "gru_ode", "gru_ode_bayes", "neural_cde", "ode_rnn"])
def test_encoder_in_continuous_time(cell, test):
    class Family(GuideContract):
        lengths = (6, 4)

        def make_model(self):
            return toy(dtype=torch.float32)

        def make_guide(self, model, **more):
            return Structured(model, 4, "both" if cell == "gru_d" else "future", cell=cell, **more)

    subject = Family()
    subject.setup_method()
    getattr(subject, test)()
