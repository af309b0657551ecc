import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import affine_scan, associative_scan

D = torch.float64


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 31, 64, 65])
def test_all_prefixes_of_a_product_that_does_not_commute(size, reverse):
    torch.manual_seed(0)
    A = torch.randn(2, size, 3, 3, dtype=D) / 2
    (found,) = associative_scan(lambda one, two: (two[0] @ one[0],), (A,), (2,), reverse=reverse)
    for k in range(size):
        wanted = torch.eye(3, dtype=D)
        for j in range(k, size) if reverse else range(k + 1):
            wanted = A[:, j] @ wanted
        torch.testing.assert_close(found[:, k], wanted.expand(2, 3, 3))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("moves", [0, 1, 2, 7, 32])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_affine_scan_is_the_loop(moves, reverse, lead):
    """Matrices shared by the batch, offsets of their own."""
    torch.manual_seed(0)
    A, b, x = torch.randn(moves, 2, 2, dtype=D), torch.randn(*lead, moves, 2, dtype=D), torch.randn(*lead, 2, dtype=D)
    states = [x]
    for k in reversed(range(moves)) if reverse else range(moves):
        states.append(states[-1] @ A[k].T + b[..., k, :])
    wanted = torch.stack(states[::-1] if reverse else states, -2)
    for parallel in (None, False, True):
        torch.testing.assert_close(affine_scan(A, b, x, reverse=reverse, parallel=parallel), wanted)


def test_affine_scan_with_a_constant_matrix_and_its_gradients():
    torch.manual_seed(0)
    arguments = [torch.randn(*shape, dtype=D, requires_grad=True) for shape in ((1, 2, 2), (3, 4, 2), (3, 2))]
    assert torch.allclose(affine_scan(*arguments), affine_scan(*arguments, parallel=True))
    for parallel in (False, True):
        f = lambda *parts: affine_scan(*parts, parallel=parallel)  # noqa: B023, E731
        assert gradcheck(f, arguments) and gradgradcheck(f, arguments)
