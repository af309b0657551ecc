import pickle

import pytest
import torch
from torch.distributions import biject_to, transform_to

from pyro_ssm.blocks import (
    CholeskyAbove,
    SoftplusAbove,
    cholesky_parameter,
    positive_parameter,
    softplus_above,
    vector_parameter,
)
from pyro_ssm.components import Component


def test_softplus_above_is_its_formula_and_inverts():
    u = torch.linspace(-20, 20, 9, dtype=torch.float64)
    transform = transform_to(SoftplusAbove(0.3))
    torch.testing.assert_close(transform(u), 0.3 + torch.log1p(torch.exp(u)))
    torch.testing.assert_close(transform.inv(transform(u)), u, rtol=1e-6, atol=1e-6)
    assert torch.equal(softplus_above(u, 0.3), transform(u))


def test_jacobian_of_the_bijection():
    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    transform = biject_to(SoftplusAbove(0.3))
    x = transform(u)
    slope = torch.autograd.functional.jacobian(transform, u).diagonal()
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, x), slope.log())


def test_a_scale_never_reaches_zero_and_its_gradient_fades_out():
    component = Component()
    component.scale = positive_parameter("scale", 0.5, 2, floor=1e-4)
    with torch.no_grad():
        component.scale_unconstrained.fill_(-1e4)
    value = component.scale.log().sum()
    value.backward()
    torch.testing.assert_close(value.detach(), 2 * torch.tensor(1e-4).log())
    assert (component.scale_unconstrained.grad == 0).all()  # the slope of softplus at -1e4


def test_cholesky_has_its_floor_on_the_diagonal_and_inverts():
    u = torch.randn(5, 3, 3, dtype=torch.float64)
    transform = transform_to(CholeskyAbove(0.2))
    factor = transform(u)
    assert CholeskyAbove(0.2).check(factor).all() and not CholeskyAbove(10.0).check(factor).any()
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.tril(-1), u.tril(-1))
    torch.testing.assert_close(factor.diagonal(dim1=-2, dim2=-1), softplus_above(u.diagonal(dim1=-2, dim2=-1), 0.2))
    torch.testing.assert_close(transform(transform.inv(factor)), factor)


@pytest.mark.parametrize("init", [0.7, torch.tensor([0.2, 0.7]), torch.tensor([[0.5, 0.0], [-3.0, 0.2]])])
def test_parameters_start_where_they_are_told(init):
    component = Component()
    component.factor = cholesky_parameter("scale", init, 2, floor=1e-4)
    init = torch.as_tensor(init)
    wanted = init if init.dim() == 2 else torch.diag(init.expand(2))
    torch.testing.assert_close(component.factor.detach(), wanted)
    if init.dim() < 2:
        component.scale = positive_parameter("scale", init, 2, floor=1e-4)
        component.loc = vector_parameter("loc", init, 2)
        torch.testing.assert_close(component.scale.detach(), init.expand(2))
        torch.testing.assert_close(component.loc.detach(), init.expand(2))
    again = pickle.loads(pickle.dumps(component))
    torch.testing.assert_close(again.factor.detach(), wanted)


def test_a_known_value_may_be_assigned():
    component = Component()
    component.scale = positive_parameter("scale", 0.5, 2, floor=1e-4)
    component.scale = torch.tensor([2.0, 3.0])
    torch.testing.assert_close(component.scale.detach(), torch.tensor([2.0, 3.0]))


def test_errors_name_the_parameter():
    with pytest.raises(ValueError, match="`rate` must lie above its floor"):
        positive_parameter("rate", 0.0, 2, floor=1e-4)
    with pytest.raises(ValueError, match=r"`rate` must be a number or have shape \(2,\), got shape \(3,\)"):
        positive_parameter("rate", torch.ones(3), 2, floor=1e-4)
    with pytest.raises(ValueError, match="`floor` must be positive"):
        positive_parameter("rate", 1.0, 2, floor=0.0)
    with pytest.raises(ValueError, match="`scale` must be lower triangular"):
        cholesky_parameter("scale", torch.ones(2, 2), 2, floor=1e-4)
    with pytest.raises(ValueError, match=r"got shape \(3, 2\)"):
        cholesky_parameter("scale", torch.ones(3, 2), 2, floor=1e-4)
    with pytest.raises(ValueError, match=r"`mean` must be a number or have shape \(2,\)"):
        vector_parameter("mean", torch.ones(3), 2)
