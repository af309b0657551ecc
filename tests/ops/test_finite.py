"""The recursions over finite states: forms equal each other, gradients are right."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops.finite import (
    backward_kernels,
    best_path,
    finite_filter,
    finite_filter_reference,
    finite_smoother,
    sample_path,
)

D = torch.float64


def weights(T, K=3, lead=(), homogeneous=False, requires_grad=False):
    torch.manual_seed(T)
    made = (
        torch.randn(*lead, K, dtype=D).log_softmax(-1),
        torch.randn(*lead, 1 if homogeneous else max(T - 1, 1), K, K, dtype=D).log_softmax(-1),
        torch.randn(*lead, T, K, dtype=D),
    )
    return tuple(w.requires_grad_(requires_grad) for w in made)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 17, 64])
def test_all_forms_are_the_reference(T, homogeneous):
    given = weights(T, lead=(2,), homogeneous=homogeneous)
    wanted = finite_filter_reference(*given)
    kernels = backward_kernels(wanted.log_filtered, given[1])[..., : T - 1, :, :]
    smoothed = finite_smoother(wanted.log_filtered, kernels, parallel=False)
    torch.testing.assert_close(smoothed.sum(-1), torch.ones(2, T, dtype=D))
    torch.testing.assert_close(finite_smoother(wanted.log_filtered, kernels, parallel=True), smoothed)
    paths = [best_path(*given, parallel=form) for form in (False, True)]
    assert torch.equal(paths[0][0], paths[1][0])
    torch.testing.assert_close(paths[0][1], paths[1][1])
    for form in (False, True):
        for one, other in zip(finite_filter(*given, parallel=form), wanted):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("T, homogeneous", [(1, True), (4, False), (6, True)])
def test_gradients(T, homogeneous, parallel):
    given = weights(T, K=2, lead=(2,), homogeneous=homogeneous, requires_grad=True)

    def run(*args):
        return tuple(finite_filter(*args, parallel=parallel))

    assert gradcheck(run, given)
    assert gradgradcheck(run, given)


def test_gradient_of_the_total_is_the_smoother():
    given = weights(7, lead=(3,), requires_grad=True)
    steps = finite_filter(*given)
    probs = finite_smoother(steps.log_filtered, backward_kernels(steps.log_filtered, given[1]))
    grad = torch.autograd.grad(steps.log_likelihood.sum(), given)
    torch.testing.assert_close(grad[2], probs)
    torch.testing.assert_close(grad[0], probs[:, 0])
    torch.testing.assert_close(grad[1].sum(-1), probs[:, :-1])


def test_broadcast_and_non_contiguous_inputs():
    initial, matrix, emission = weights(5, lead=(4,))
    shared = finite_filter(initial[0], matrix[0], emission.transpose(0, 1).contiguous().transpose(0, 1))
    for i in range(4):
        one = finite_filter(initial[0], matrix[0], emission[i])
        torch.testing.assert_close(shared.log_filtered[i], one.log_filtered)


@pytest.mark.parametrize("parallel", [False, True])
def test_weights_beyond_the_range_of_float32(parallel):
    """Emission terms of -1e4 and a state that only later data favour."""
    emission = torch.zeros(100, 2)
    emission[0, 1], emission[1:, 0] = -300.0, -1e4
    matrix = torch.tensor([[[0.0, -200.0], [-torch.inf, 0.0]]])
    terms, filtered = finite_filter(torch.tensor([0.5, 0.5]).log(), matrix, emission, parallel=parallel)
    exact = finite_filter_reference(torch.tensor([0.5, 0.5], dtype=D).log(), matrix.double(), emission.double())
    torch.testing.assert_close(terms.double(), exact.log_likelihood, rtol=1e-6, atol=1e-4)
    assert filtered[-1].argmax() == 1


def test_draws_take_their_noise_from_torch():
    given = weights(4)
    steps = finite_filter(*given)
    kernels = backward_kernels(steps.log_filtered, given[1])
    torch.manual_seed(1)
    one = sample_path(steps.log_filtered, kernels, (5,))
    torch.manual_seed(1)
    assert torch.equal(one, sample_path(steps.log_filtered, kernels, (5,)))
