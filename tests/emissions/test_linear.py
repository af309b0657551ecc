import pytest
import torch

from pyro_ssm.binding import bind
from pyro_ssm.components import AffineGaussian
from pyro_ssm.emissions import LinearNormal
from tests.blocks.component_checks import STEPS, TIMES, jitter, varied


def test_is_the_equation():
    matrix, factor = torch.randn(3, 2), torch.tensor([[0.5, 0.0, 0.0], [0.3, 2.0, 0.0], [0.1, -0.4, 0.2]])
    drive, offset = torch.randn(3, 4), torch.randn(3)
    emission = bind(
        LinearNormal(2, 3, input_dim=4, covariance="full", matrix=matrix, scale=factor),
        {"input_matrix": drive, "offset": offset},
    )
    z, u = torch.randn(6, STEPS, 2), torch.randn(6, STEPS, 4)
    law = emission(z, TIMES[:-1], u)
    torch.testing.assert_close(law.mean, z @ matrix.T + u @ drive.T + offset)
    torch.testing.assert_close(law.covariance_matrix[1, 2], factor @ factor.T)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("input_dim", [0, 3])
@pytest.mark.parametrize("lead", [(), (4,), (3, 4), (3, 1)])
def test_affine_is_the_law(kind, input_dim, lead):
    component = jitter(LinearNormal(2, 3, input_dim=input_dim, covariance=kind))
    emission = bind(component, varied(component, *lead)) if lead else bind(component)
    assert isinstance(emission, AffineGaussian)
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, input_dim) if input_dim else None
    law = emission(z, TIMES[:-1], u)
    matrix, offset, factor = emission.affine(TIMES[:-1], u)
    torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, law.mean)
    spread = (factor @ factor.mT).expand(law.mean.shape + (3,))
    given = law.covariance_matrix if kind == "full" else torch.diag_embed(law.variance)
    torch.testing.assert_close(spread, given)


def test_start_of_the_matrix_has_unit_gain():
    matrix = LinearNormal(400, 50).matrix
    assert abs(matrix.var().item() * 400 - 1) < 0.05
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(3, 2\), got \(2, 3\)"):
        LinearNormal(2, 3, matrix=torch.zeros(2, 3))
