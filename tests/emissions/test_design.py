import pytest
import torch

from pyro_ssm.binding import bind
from pyro_ssm.dynamics.structural import Aggregate, Aggregation, Design
from pyro_ssm.emissions import DesignNormal
from tests.blocks.component_checks import STEPS, TIMES, check_component


def rows():
    return Design(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DesignNormal(rows(), 2, 3, scale=0.4),
        lambda: DesignNormal(rows(), 2, 2, factor_rows=torch.tensor([[2], [0]]), offset=0.3, scale=0.4),
    ],
)
def test_contract(make):
    check_component(make)


def test_is_its_equation():
    emission = DesignNormal(rows(), 2, 2, factor_rows=torch.tensor([[2], [0]]), offset=0.3, scale=0.4)
    emission = bind(emission, {"loadings": torch.tensor([[3.0], [-1.0]])})
    z = torch.randn(4, STEPS, 2)
    wanted = torch.stack([z[..., 0] + 3 * (z[..., 0] + z[..., 1]), 2 * z[..., 1] - z[..., 0]], -1) + 0.3
    law = emission(z, TIMES[:-1], None)
    torch.testing.assert_close(law.mean, wanted)
    matrix, offset, root = emission.affine(TIMES[:-1], None)
    torch.testing.assert_close((matrix @ z.unsqueeze(-1)).squeeze(-1) + offset, wanted)
    torch.testing.assert_close((root @ root.mT).expand(law.variance.shape + (2,)), torch.diag_embed(law.variance))


def test_rows_that_are_inputs():
    emission = bind(DesignNormal(Design(torch.tensor([[1.0, 0.0]]), [(0, 1, 1)]), 2, 1))
    z, u = torch.randn(3, STEPS, 2), torch.randn(3, STEPS, 2)
    torch.testing.assert_close(emission(z, TIMES[:-1], u).mean[..., 0], z[..., 0] + u[..., 1] * z[..., 1])
    with pytest.raises(ValueError, match="reads column.s. .1. of the inputs, but the data has no `inputs`"):
        emission(z, TIMES[:-1], None)


def test_without_noise_what_is_seen_is_exact():
    emission = bind(DesignNormal(rows(), 2, 2, scale=None))
    z = torch.randn(3, STEPS, 2)
    torch.testing.assert_close(emission(z, TIMES[:-1], None).sample(), z * torch.tensor([1.0, 2.0]))
    assert (emission.affine(TIMES[:-1], None).scale_tril == 0).all()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`factor_rows` must have shape \(2, factors\)"):
        DesignNormal(rows(), 2, 2, factor_rows=torch.tensor([[2]]))
    with pytest.raises(ValueError, match="`aggregates` must be one a signal, 3, got 1"):
        Aggregation(rows(), [Aggregate("sum")])
