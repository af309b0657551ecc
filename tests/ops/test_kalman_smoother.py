"""The fast smoother, its laws and its draws equal their references: values and gradients."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import (
    backward_conditionals,
    backward_conditionals_reference,
    backward_sample,
    backward_sample_reference,
    compiled,
    kalman_filter,
    kalman_filter_reference,
    kalman_smoother,
    kalman_smoother_kernel,
    kalman_smoother_reference,
)
from pyro_ssm.ops.kalman import FilterSteps, matvec, matvec_over_time
from pyro_ssm.ops.kalman_backward import Conditionals
from tests.ops.kalman_systems import D, everything, holes, rand, system
from tests.ops.test_kalman_filter import CASES, case, close, covariance

pytestmark = pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")


def both(args, mask, options, grad=False):
    """Leaves of the filter's results and of F, b, Q; then laws and smoothed laws, fast and by the reference."""
    steps = kalman_filter_reference(args[0], mask, *args[1:], **options)
    moves, found = steps.filtered_mean.shape[-2] - 1, []
    for laws_of, smooth in (
        (backward_conditionals, kalman_smoother),
        (backward_conditionals_reference, kalman_smoother_reference),
    ):
        leaves = [x.detach().clone().requires_grad_(grad) for x in (steps[1], steps[2], *args[3:6])]
        law = FilterSteps(steps[0], *leaves[:2], *steps[3:])
        F, b, Q = (x.narrow(-e, 0, min(moves, x.shape[-e])) for x, e in zip(leaves[2:], (3, 2, 3), strict=True))
        laws = laws_of(law, F, b, Q, step_mask=options.get("step_mask"))
        found.append((leaves, laws, smooth(law, laws)))
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name != "one step"])
def test_values_equal_the_reference(name):
    (_, laws, (mean, root)), (_, plain_laws, (plain_mean, plain_root)) = both(*case(name))
    assert laws.gain.shape == plain_laws.gain.shape and mean.shape == plain_mean.shape
    assert root.shape == plain_root.shape
    close(laws.gain, plain_laws.gain, 1e-9)
    close(laws.offset, plain_laws.offset, 1e-9)
    close(covariance(laws.scale_tril), covariance(plain_laws.scale_tril), 1e-11)
    close(mean, plain_mean, 1e-9)
    close(covariance(root), covariance(plain_root), 1e-11)
    assert (root[..., :-1, :, :].diagonal(dim1=-2, dim2=-1) >= 0).all() and (root.triu(1) == 0).all()


@pytest.mark.parametrize("name", ["two steps, one state", "own parameters", "settles after a gap", "refined, ragged"])
def test_gradients_equal_the_reference(name):
    args, mask, options = case(name)
    if name == "settles after a gap":
        args[0], mask = args[0][:, :20], mask[:, :20]
    found = []
    for leaves, laws, (mean, root) in both(args, mask, options, grad=True):
        torch.manual_seed(0)
        of = (mean, covariance(root), laws.gain @ covariance(root)[..., 1:, :, :])
        loss = sum((x * torch.randn(x.shape, dtype=D)).sum() for x in of)
        found.append(torch.autograd.grad(loss, leaves))
    for fast, plain in zip(*found, strict=True):
        assert plain.abs().max() > 1e-3
        close(fast, plain, 1e-9)


def laws_of_random(lead, steps, n, means=()):
    G = 0.8 * torch.linalg.qr(rand(*lead, steps, n, n))[0]
    return Conditionals(G, rand(*means, steps, n), rand(*lead, steps, n, n).tril())


@pytest.mark.parametrize(
    "lead, means, of_last", [((), (), ()), ((), (3,), ()), ((2, 1), (3,), (5, 1, 1)), ((3,), (), (3,))]
)
def test_draws_equal_the_reference_with_gradients(lead, means, of_last):
    torch.manual_seed(0)
    laws = [x.requires_grad_() for x in laws_of_random(lead, 4, 2, means)]
    last = rand(*of_last, 2).requires_grad_()
    shape = torch.broadcast_shapes(lead, means, of_last)
    noise = rand(*shape, 4, 2)
    weights, found = rand(*shape, 5, 2), []
    for sample in (backward_sample, backward_sample_reference):
        path = sample(Conditionals(*laws), last, noise)
        found.append((path, *torch.autograd.grad((path * weights).sum(), [*laws, last])))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives_by_differences():
    torch.manual_seed(0)
    laws, last = laws_of_random((), 3, 2), rand(2, 2)
    leaves = [x.requires_grad_() for x in (*laws, last, rand(2), torch.eye(2, dtype=D) + 0.1 * rand(2, 2))]

    def draws(G, c, D, last, m, L):
        return backward_sample(Conditionals(G, c, D), last, torch.ones(2, 3, 2, dtype=torch.float64))

    def smoothed(G, c, D, last, m, L):
        law = FilterSteps(m, m.unsqueeze(-2), L.unsqueeze(-3), m, L)
        mean, root = kalman_smoother(law, Conditionals(G, c, D))
        return mean, covariance(root)

    for function in (draws, smoothed):
        assert gradcheck(function, leaves) and gradgradcheck(function, leaves, atol=1e-4)


def test_one_step_has_no_moves():
    args = system(2, 1, 1, batch=(3,))
    (_, laws, (mean, root)), (_, _, (plain_mean, plain_root)) = both(args, everything(args[0]), {})
    assert laws.gain.shape[-3] == 0 and mean.shape == (3, 1, 2)
    assert torch.equal(mean, plain_mean) and torch.equal(root, plain_root)


def test_float32_is_computed_in_float64():
    args, mask, options = case("own parameters")
    single = [x.float() for x in args]
    (_, laws, (mean, root)), _ = both(single, mask, options)
    assert {x.dtype for x in (*laws, mean, root)} == {torch.float32}
    steps = kalman_filter_reference(single[0], mask, *single[1:], **options)
    exact = FilterSteps(*(x.double() for x in steps))
    wanted = kalman_smoother_reference(
        exact, backward_conditionals_reference(exact, *(x.double() for x in single[3:6]))
    )
    torch.testing.assert_close(mean.double(), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance(root.double()), covariance(wanted[1]), rtol=1e-4, atol=1e-5)


def test_other_layouts_in_memory_and_one_copy_for_all_series():
    args, mask, options = case("varying, shared mask")
    steps = kalman_filter_reference(args[0], mask, *args[1:], **options)
    laws = backward_conditionals(steps, *args[3:6])
    mean, root = kalman_smoother(steps, laws)
    turned = FilterSteps(*(x.mT.contiguous().mT if x.dim() > 2 else x for x in steps))
    again = backward_conditionals(turned, *(x.mT.contiguous().mT for x in args[3:6]))
    wide = kalman_smoother(turned, Conditionals(*(x.expand(9, *x.shape[-e:]) for x, e in zip(again, (3, 2, 3)))))
    torch.testing.assert_close(wide[0], mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(covariance(wide[1]), covariance(root).expand(wide[1].shape), rtol=1e-12, atol=1e-13)


def test_a_vague_coordinate_beside_a_precise_one_keeps_its_digits():
    torch.manual_seed(0)
    args = system(4, 2, 30)
    args[2], args[8] = 1e5 * torch.eye(4, dtype=D), 1e-4 * torch.eye(2, dtype=D).unsqueeze(0)
    (_, _, (mean, root)), (_, _, (plain_mean, plain_root)) = both(args, everything(args[0]), {})
    torch.testing.assert_close(mean, plain_mean, rtol=1e-8, atol=1e-8)
    variance, plain = (covariance(x).diagonal(dim1=-2, dim2=-1) for x in (root, plain_root))
    torch.testing.assert_close(variance, plain, rtol=1e-8, atol=0)


def test_a_singular_law_goes_to_the_reference():
    """A state that is known and does not move: S is singular, and what it tells is nothing."""
    args, mask, _ = case("settles, never forgets")
    steps = kalman_filter_reference(args[0], mask, *args[1:])
    moves = (args[3], args[5], steps.filtered_scale_tril[..., :-1, :, :])
    assert kalman_smoother_kernel.conditionals(*moves) is None
    laws, plain = (f(steps, *args[3:6]) for f in (backward_conditionals, backward_conditionals_reference))
    for fast, reference in zip(laws, plain, strict=True):
        assert torch.equal(fast, reference)


def test_the_number_of_threads_changes_nothing():
    args = system(4, 2, 60, batch=(9,))
    steps = kalman_filter(args[0], holes(args[0]), *args[1:])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kalman_smoother(steps, backward_conditionals(steps, *args[3:6])))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_under_torch_func_the_reference_runs():
    laws, last, noise = laws_of_random((), 4, 2), rand(6, 2), rand(6, 4, 2)
    mapped = torch.func.vmap(lambda z, e: backward_sample(laws, z, e))(last, noise)
    torch.testing.assert_close(mapped, backward_sample(laws, last, noise))


@pytest.mark.parametrize("of_matrix", [(1,), (4,), (1, 4), (3, 1), (3, 4), (1, 1, 1, 4)])
@pytest.mark.parametrize("of_vector", [(4,), (1,), (3, 4), (2, 3, 4), (2, 1, 1)])
def test_shared_matrices_times_vectors(of_matrix, of_vector):
    A, x = rand(*of_matrix, 2, 3), rand(*of_vector, 3)
    wanted = matvec(A, x)
    found = matvec_over_time(A, x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)
