import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.dynamics import (
    DiffuseInitial,
    GatedTransition,
    KnownInitial,
    LinearNormal,
    Matern,
    NormalInitial,
    OrnsteinUhlenbeck,
    Stacked,
    StackedInitial,
    stack_initials,
)
from pyro_ssm.dynamics.structural import Level, Regression, Seasonal
from pyro_ssm.testing.affine import covariance
from tests.blocks.component_checks import TIMES, check_component, jitter


def make():
    return Stacked({"fast": OrnsteinUhlenbeck(1, rate=3.0), "walk": LinearNormal(1, input_dim=3)})


class Inputs(Stacked):
    """Its parts decide what inputs they need."""

    input_dim = 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: jitter(Inputs({"fast": OrnsteinUhlenbeck(1, rate=3.0), "walk": LinearNormal(1, input_dim=3)})),
        lambda: StackedInitial({"one": NormalInitial(1), "two": OrnsteinUhlenbeck(1).stationary()}),
    ],
)
def test_contract(make):
    check_component(make)


def test_is_its_parts_side_by_side():
    both, u = make(), torch.randn(5, 3)
    both.walk.input_matrix.data.normal_()
    z = torch.randn(4, 5, 2)
    law = both(z, TIMES[:-1], TIMES[1:], u)
    for name, part in both.parts.items():
        alone, where = part(z[..., both.slices[name]], TIMES[:-1], TIMES[1:], u), both.slices[name]
        torch.testing.assert_close(law.mean[..., where], alone.mean)
        torch.testing.assert_close(law.covariance_matrix[..., where, where], covariance(alone))
    assert (law.covariance_matrix[..., 0, 1] == 0).all()


def test_start_is_its_parts_side_by_side():
    start = stack_initials({"a": NormalInitial(2, covariance="full"), "b": OrnsteinUhlenbeck(1).stationary()})
    law = start(TIMES[:1], None)
    wanted = torch.block_diag(start.a(TIMES[:1], None).covariance_matrix[0], torch.tensor([[0.5]]))
    torch.testing.assert_close(law.covariance_matrix[0], wanted)


def test_diffuse_and_proper_parts_mix():
    start = stack_initials({"a": NormalInitial(1, scale=2.0), "b": DiffuseInitial(2), "c": KnownInitial(torch.ones(1))})
    mean, root, diffuse = start.moments(TIMES[:1], None)
    torch.testing.assert_close(mean, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(root, torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0]))[None])
    torch.testing.assert_close(diffuse, torch.eye(4)[None, :, 1:3])
    with pytest.raises(TypeError, match="infinite variance"):
        start(TIMES[:1], None)


def test_parameters_keep_their_parts_names_in_a_model():
    model = ssm.models.structural(Level() + Seasonal(4) + Matern(), noise=0.5)
    model.transition.level.scale = PyroSample(dist.HalfNormal(1.0))
    model.transition.matern.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    assert sorted(parameter_names(model)) == [
        "emission.scale",
        "transition.level.scale",
        "transition.matern.lengthscale",
        "transition.matern.variance",
        "transition.seasonal.scale",
    ]
    bound = bind(model, {"transition.level.scale": torch.ones(3), "transition.matern.lengthscale": torch.ones(3)})
    torch.testing.assert_close(bound.initial.matern.transition.lengthscale, torch.ones(3, 1, 1))
    data = ssm.TimeSeries(torch.arange(8.0), torch.randn(8, 1))
    assert ssm.infer.kalman_filter(bound, data).log_likelihood.shape == (3, 8)


def test_parts_add_up_under_their_names():
    total = Level() + (Seasonal(4) + Level()) + Regression(1).named("price")
    assert total.names == ("level", "seasonal", "level_2", "price")
    with pytest.raises(ValueError, match="two parts of the sum are called 'price'"):
        total + Level().named("price")
    level = Level()
    with pytest.raises(ValueError, match="stands twice"):
        level + level
    with pytest.raises(TypeError, match="unsupported operand"):
        Level() + Seasonal(4) + 3
    with pytest.raises(ValueError, match="must be an identifier"):
        Level().named("two words")
    with pytest.raises(ValueError, match="`start` has state_dim=2"):
        Level().named(None, start=NormalInitial(2))


def test_errors_name_the_part():
    with pytest.raises(TypeError, match=r"`parts\['deep'\]` must be AffineGaussian, got GatedTransition"):
        Stacked({"deep": GatedTransition(2, 4)})
    with pytest.raises(ValueError, match="called 'affine', which is not free"):
        Stacked({"affine": LinearNormal(1)})
    with pytest.raises(TypeError, match=r"`parts\['a'\]` is diffuse: use dynamics.stack_initials"):
        StackedInitial({"a": DiffuseInitial(1)})
    with pytest.raises(TypeError, match="must be a part, a sum of parts or a mapping"):
        ssm.models.structural(3)
