"""Transforms around and inside of compiled graphs of the Kalman filter: right, or refused; never wrong."""

import pytest
import torch
from torch.autograd import forward_ad

from pyro_ssm.ops import kalman_log_likelihood, kalman_problem
from tests.ops.kalman_systems import everything, system

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode


@pytest.fixture
def total():
    args = system(3, 2, 5)
    mask = everything(args[0])
    return lambda F: kalman_log_likelihood(args[0], mask, *args[1:3], F, *args[4:]).sum()


def test_transforms_inside_of_a_compiled_function_are_right(total):
    F = system(3, 2, 5)[3]
    direction = torch.randn_like(F)
    slope = (torch.func.grad(total)(F) * direction).sum()

    def forward(F):
        return torch.func.jvp(total, (F,), (direction,))[1]

    assert slope.abs() > 1e-3
    torch.testing.assert_close(torch.compile(forward, backend="aot_eager")(F), slope)
    several = torch.stack([F, 0.5 * F])
    found = torch.compile(lambda x: torch.func.vmap(total)(x), backend="aot_eager")(several)
    torch.testing.assert_close(found, torch.stack([total(x) for x in several]))


def test_operator_and_graph_refuse_a_tangent():
    args = system(3, 2, 5)
    mask = everything(args[0])
    graph = torch.compile(lambda F: kalman_log_likelihood(args[0], mask, *args[1:3], F, *args[4:]), backend="aot_eager")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[3], torch.ones_like(args[3]))
        problem = kalman_problem.problem(args[0], mask, *args[1:3], dual, *args[4:], 5, None, None)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.ops.pyro_ssm.kalman_forward(*problem.arguments, 0)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            graph(dual)
