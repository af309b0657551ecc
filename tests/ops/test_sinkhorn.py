"""The transport plan: marginals, the plain iteration, and its gradient by the implicit function theorem."""

import pytest
import torch
from torch.autograd import gradcheck

from pyro_ssm.ops.sinkhorn import transport_plan, transport_plan_reference

D = torch.float64


def problem(batch=(), num=6, dtype=D, seed=0, epsilon=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, num, 2, dtype=D, generator=generator)
    log_weights = (1.5 * torch.randn(*batch, num, dtype=D, generator=generator)).log_softmax(-1)
    cost = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1) / epsilon
    return cost.to(dtype), log_weights.to(dtype)


@pytest.mark.parametrize("epsilon", [2.0, 0.1])
def test_equals_the_plain_iteration(epsilon):
    cost, log_weights = problem((3,), epsilon=epsilon)
    plan = transport_plan(cost, log_weights, 1e-12, 100_000)
    torch.testing.assert_close(plan, transport_plan_reference(cost, log_weights, 1000), rtol=0, atol=1e-8)
    for b in range(3):
        torch.testing.assert_close(transport_plan(cost[b], log_weights[b], 1e-12, 100_000), plan[b], rtol=0, atol=1e-8)


@pytest.mark.parametrize("tolerance", [0.1, 1e-4])
def test_columns_are_met_to_rounding_and_rows_to_the_tolerance(tolerance):
    cost, log_weights = problem((4,), num=30)
    plan = transport_plan(cost, log_weights, tolerance).exp()
    torch.testing.assert_close(plan.sum(-2), log_weights.exp(), rtol=1e-12, atol=0)
    assert (30 * plan.sum(-1) - 1).abs().max() < tolerance
    single = transport_plan(cost.float(), log_weights.float(), tolerance).exp()
    torch.testing.assert_close(single.sum(-2), log_weights.exp().float(), rtol=1e-5, atol=0)
    assert (30 * single.sum(-1) - 1).abs().max() < tolerance + 1e-5


def test_no_cost_is_independence_and_no_entropy_is_a_matching():
    _, log_weights = problem()
    plan = transport_plan(torch.zeros(6, 6, dtype=D), log_weights)
    torch.testing.assert_close(plan.exp(), log_weights.exp().expand(6, 6) / 6)
    x = torch.arange(4.0, dtype=D)
    equal = torch.full((4,), 0.25, dtype=D).log()
    plan = transport_plan((x[:, None] - x).square() / 0.02, equal).exp()
    torch.testing.assert_close(plan, 0.25 * torch.eye(4, dtype=D), rtol=0, atol=1e-9)


def test_gradient_of_the_plan():
    cost, log_weights = (x.requires_grad_() for x in problem((2,), num=4))

    def plan(cost, raw):
        return transport_plan(cost, raw.log_softmax(-1), 1e-13, 100_000).exp()

    assert gradcheck(plan, (cost, log_weights), atol=1e-6)
    weigh = torch.randn(2, 4, 4, dtype=D)
    mine = torch.autograd.grad((weigh * plan(cost, log_weights)).sum(), (cost, log_weights))
    through = transport_plan_reference(cost, log_weights.log_softmax(-1), 500).exp()
    unrolled = torch.autograd.grad((weigh * through).sum(), (cost, log_weights))
    torch.testing.assert_close(mine, unrolled, rtol=0, atol=1e-10)


def test_weights_of_zero_move_nothing_and_have_the_gradients_of_weights_that_vanish():
    cost, log_weights = problem()
    weigh = torch.arange(36.0, dtype=D).reshape(6, 6)

    def slopes(weight):
        raw = log_weights.clone()
        raw[2] = weight
        raw, given = raw.log_softmax(-1).requires_grad_(), cost.clone().requires_grad_()
        plan = transport_plan(given, raw, 1e-12, 100_000).exp()
        return plan, torch.autograd.grad((plan * weigh).sum(), (given, raw))

    plan, found = slopes(float("-inf"))
    near, wanted = slopes(-35.0)
    assert (plan[:, 2] == 0).all()
    torch.testing.assert_close(plan, near, rtol=0, atol=1e-9)
    for one, other in zip(found, wanted, strict=True):
        assert (one[..., 2] == 0).all()
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_one_particle_and_views_that_are_not_contiguous():
    assert transport_plan(torch.zeros(1, 1), torch.zeros(1)).exp() == 1
    cost, log_weights = problem((3,))
    plan = transport_plan(cost, log_weights, 1e-10)
    view = transport_plan(cost.mT.contiguous().mT, log_weights.T.contiguous().T, 1e-10)
    torch.testing.assert_close(view, plan)


def test_second_derivatives_are_those_of_the_plain_iteration():
    cost, log_weights = (x.requires_grad_() for x in problem(num=4))
    weigh = torch.randn(4, 4, dtype=D)
    found = []
    for plan in (transport_plan(cost, log_weights, 1e-14, 100_000), transport_plan_reference(cost, log_weights, 300)):
        first = torch.autograd.grad((weigh * plan.exp()).sum(), (cost, log_weights), create_graph=True)
        along = sum((g.square()).sum() for g in first)
        found.append(torch.autograd.grad(along, (cost, log_weights)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("epsilon", [2.0, 0.1])
def test_a_fixed_number_of_iterations(epsilon):
    """Enough of them reach the same plan and the same gradient; few leave their error in the rows alone."""
    cost, log_weights = problem((3,), epsilon=epsilon)
    wanted = transport_plan(cost, log_weights, 1e-12, 100_000)
    leaf = cost.clone().requires_grad_()
    found = transport_plan(leaf, log_weights, num_iterations=1000)
    torch.testing.assert_close(found.exp(), wanted.exp(), rtol=0, atol=1e-8)
    other = cost.clone().requires_grad_()
    weight = torch.linspace(-1, 1, cost.numel(), dtype=D).reshape(cost.shape)
    (found.exp() * weight).sum().backward()
    (transport_plan(other, log_weights, 1e-12, 100_000).exp() * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-6)
    few = transport_plan(cost, log_weights, num_iterations=2).exp()
    torch.testing.assert_close(few.sum(-2), log_weights.exp(), rtol=1e-12, atol=0)
    errors = [
        (6 * transport_plan(cost, log_weights, num_iterations=n).exp().sum(-1) - 1).abs().max() for n in (4, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2]
    for b in range(3):  # a batch is a loop, in spite of costs of other sizes beside it
        alone = transport_plan(cost[b], log_weights[b], num_iterations=7)
        together = transport_plan(torch.cat([cost, 50 * cost]), log_weights.repeat(2, 1), num_iterations=7)[b]
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
