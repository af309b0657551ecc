import pytest
import torch

from pyro_ssm.binding import bind
from pyro_ssm.components import AffineGaussian
from pyro_ssm.dynamics import LinearNormal
from tests.blocks.component_checks import STEPS, TIMES, jitter, varied


def covariance(law):
    return law.covariance_matrix if hasattr(law, "covariance_matrix") else torch.diag_embed(law.variance)


def test_is_the_equation():
    matrix, factor = torch.randn(2, 2), torch.tensor([[0.5, 0.0], [0.3, 2.0]])
    drive, offset = torch.randn(2, 3), torch.randn(2)
    transition = bind(
        LinearNormal(2, input_dim=3, covariance="full", matrix=matrix, scale=factor),
        {"input_matrix": drive, "offset": offset},
    )
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 3)
    law = transition(z, TIMES[:-1], TIMES[1:], u)
    torch.testing.assert_close(law.mean, z @ matrix.T + u @ drive.T + offset)
    torch.testing.assert_close(law.covariance_matrix[1, 2], factor @ factor.T)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("input_dim", [0, 3])
@pytest.mark.parametrize("lead", [(), (4,), (3, 4), (3, 1)])
def test_affine_is_the_law(kind, input_dim, lead):
    component = jitter(LinearNormal(2, input_dim=input_dim, covariance=kind))
    transition = bind(component, varied(component, *lead)) if lead else bind(component)
    assert isinstance(transition, AffineGaussian)
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, input_dim) if input_dim else None
    law = transition(z, TIMES[:-1], TIMES[1:], u)
    matrix, offset, factor = transition.affine(TIMES[:-1], TIMES[1:], u)
    assert matrix.shape[-3] == factor.shape[-3] == 1 and offset.shape[-2] in (1, STEPS)
    torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, law.mean)
    spread = factor @ factor.mT
    torch.testing.assert_close(spread.expand(law.mean.shape + (2,)), covariance(law))


def test_a_fixed_matrix_is_a_random_walk():
    walk = LinearNormal(2, matrix=torch.eye(2), scale=0.1)
    walk.matrix.requires_grad_(False)
    z = torch.randn(STEPS, 2)
    assert torch.equal(bind(walk)(z, TIMES[:-1], TIMES[1:], None).mean, z)
    assert [name for name, p in walk.named_parameters() if p.requires_grad] == ["offset", "scale_unconstrained"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(2, 2\), got \(3, 2\)"):
        LinearNormal(2, matrix=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="`input_dim` must be at least 0"):
        LinearNormal(2, input_dim=-1)
