"""HiPPO matrices, kernels of diagonal, low-rank and dense systems, and short convolutions."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import (
    NormalPlusLowRank,
    cauchy,
    causal_conv1d,
    causal_conv1d_reference,
    dense_lti,
    dense_lti_reference,
    dplr_kernel,
    dplr_scan,
    dplr_scan_reference,
    fft_conv,
    hippo,
    hippo_low_rank,
    ssm_kernel,
    ssm_kernel_reference,
)
from pyro_ssm.ops.dplr_step import dplr_matrices
from tests.ops.test_structured_scans import assert_same, bank, gradients, rand


@pytest.fixture(params=["kept", "recomputed"])
def states(request, monkeypatch):
    if request.param == "recomputed":
        monkeypatch.setattr(import_module("pyro_ssm.ops.recompute"), "_KEPT_ELEMENTS", 0)
        monkeypatch.setattr(import_module("pyro_ssm.ops.recompute"), "_CHUNK_ELEMENTS", 1)


MEASURES = ["legs", "legt", "lagt", "fourier"]


def low_rank(L=7, D=2, N=3, r=1, lead=(2,)):
    return {
        "u": rand(*lead, L, D),
        "step": rand(*lead, L, D).exp() / 4,
        "eigenvalues": torch.complex(-rand(D, N).exp(), rand(D, N)),
        "P": rand(D, N, r, dtype=torch.complex128) / 2,
        "B": rand(D, N, dtype=torch.complex128),
        "C": rand(D, N, dtype=torch.complex128),
        "initial": rand(*lead, D, N, dtype=torch.complex128),
    }


# ------------------------------------------------------------------------------------------------ HiPPO


@pytest.mark.parametrize("measure", ["legs", "lagt"])
def test_impulse_responses_are_the_basis(measure):
    size, s = 8, torch.linspace(0, 3, 13, dtype=torch.float64)
    A, B = hippo(measure, size)
    found = torch.linalg.matrix_exp(s[:, None, None] * A) @ B
    for n in range(size):
        if measure == "legs":
            series = np.polynomial.legendre.Legendre.basis(n)(2 * np.exp(-s.numpy()) - 1)
            wanted = (2 * n + 1) ** 0.5 * np.exp(-s.numpy()) * series
        else:
            wanted = np.exp(-s.numpy() / 2) * np.polynomial.laguerre.Laguerre.basis(n)(s.numpy())
        np.testing.assert_allclose(found[:, n], wanted, atol=1e-10)


def window(n, size, s):
    """Basis functions of the last unit of time at age ``s``."""
    return (2 * n + 1) ** 0.5 * np.polynomial.legendre.Legendre.basis(n)(1 - 2 * s)


def test_legt_keeps_polynomials_of_the_last_unit_of_time():
    """c_n(t) = int_0^1 f(t - s) phi_n(s) ds is a fixed course of the system for every polynomial below degree N."""
    size, degree = 6, 4
    A, B = hippo("legt", size)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s, w = (nodes + 1) / 2, weights / 2

    def f(t):
        return (t - 0.3) ** degree

    def state(t):
        return torch.tensor([np.sum(w * f(t - s) * window(n, size, s)) for n in range(size)])

    t, h = 0.9, 1e-5
    slope = (state(t + h) - state(t - h)) / (2 * h)
    torch.testing.assert_close(slope, A @ state(t) + B * f(t), rtol=1e-8, atol=1e-8)


def test_fourier_keeps_trigonometric_functions_of_the_last_unit_of_time():
    size, t = 8, 0.37
    A, B = hippo("fourier", size)
    s = np.arange(200) / 200

    def f(t):
        return 0.3 + np.cos(2 * np.pi * t) - 0.7 * np.sin(4 * np.pi * t)

    def state(t):
        columns = [np.ones_like(s), np.zeros_like(s)]
        for n in range(1, size // 2):
            columns += [2**0.5 * np.cos(2 * np.pi * n * s), 2**0.5 * np.sin(2 * np.pi * n * s)]
        return torch.tensor([np.mean(f(t - s) * column) for column in columns])

    h = 1e-5
    slope = (state(t + h) - state(t - h)) / (2 * h)
    torch.testing.assert_close(slope, A @ state(t) + B * f(t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank_is_the_matrix(measure):
    size = 10
    A, B = hippo(measure, size)
    P = hippo_low_rank(measure, size)
    normal = A + P @ P.mT
    shift = normal.diagonal().mean() * torch.eye(size)
    torch.testing.assert_close(normal - shift, -(normal - shift).mT, rtol=0, atol=1e-10)
    form = NormalPlusLowRank.of(measure, size)
    V = torch.cat([form.V, form.V.conj()], -1)
    torch.testing.assert_close(V.mH @ V, torch.eye(size, dtype=V.dtype), rtol=0, atol=1e-9)
    eigenvalues, low = torch.cat([form.eigenvalues, form.eigenvalues.conj()]), torch.cat([form.P, form.P.conj()])
    rebuilt = V @ (torch.diag(eigenvalues) - low @ low.mH) @ V.mH
    torch.testing.assert_close(rebuilt, A.to(V.dtype), rtol=0, atol=1e-8)
    torch.testing.assert_close(2 * (form.V @ form.B).real, B, rtol=0, atol=1e-9)


def test_unknown_measures_and_sizes_are_refused():
    with pytest.raises(ValueError, match="`measure` must be one of"):
        hippo("leg", 4)
    with pytest.raises(ValueError, match="even for 'fourier'"):
        hippo("fourier", 5)
    with pytest.raises(ValueError, match="even and at least 2"):
        NormalPlusLowRank.of("legs", 3)


# ---------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("method", ["zoh", "bilinear", "euler"])
def test_kernel_of_a_diagonal_system(length, method):
    args = bank(regular=True)
    args = {"A": args["A"], "B": args["B"], "C": args["C"], "step": args["step"].squeeze(0)}
    args = {k: x.requires_grad_() for k, x in args.items()}
    found, wanted = (f(**args, length=length, method=method) for f in (ssm_kernel, ssm_kernel_reference))
    assert found.shape == (length, 3)
    assert_same(found, wanted)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_kernel_of_many_turns_is_right_in_float32():
    """65 536 taps of modes that turn up to half a turn a tap: a phase in float32 would be wrong by 1e-2."""
    A = torch.complex(torch.full((1, 32), -0.5), torch.pi * torch.arange(32.0) / 32)
    A.real[:] = -1e-5
    C = torch.ones(1, 32, dtype=torch.complex64)
    single = ssm_kernel(A, C, C, torch.ones(1), 65536)
    exact = ssm_kernel(
        A.to(torch.complex128), C.to(torch.complex128), C.to(torch.complex128), torch.ones(1).double(), 65536
    )
    assert (single - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.parametrize("length", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("rank", [1, 2])
def test_s4_kernel_is_the_dense_recurrence(length, rank, states):
    args = low_rank(r=rank)
    parts = {k: args[k].requires_grad_() for k in ("eigenvalues", "P", "B", "C")}
    step = args["step"][0, 0].requires_grad_()
    found = dplr_kernel(**parts, step=step, length=length)
    A, h = dplr_matrices(parts["eigenvalues"], parts["P"], parts["B"], step)
    taps = []
    for _ in range(length):
        taps.append(2 * (parts["C"] * h[..., :3]).sum(-1).real)
        h = (A @ h.unsqueeze(-1)).squeeze(-1)
    wanted = torch.stack(taps)
    assert_same(found, wanted, 1e-10)
    inputs = [*parts.values(), step]
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("L", [1, 2, 9, 40])
@pytest.mark.parametrize("rank", [1, 2])
def test_s4_recurrence_is_the_dense_one(L, rank, states):
    args = {k: x.requires_grad_() for k, x in low_rank(L, r=rank).items()}
    for reset in (None, torch.rand(2, L) < 0.3):
        found, wanted = (f(**args, reset=reset) for f in (dplr_scan, dplr_scan_reference))
        assert_same(found, wanted, 1e-10)
        for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_derivatives_of_s4(states):
    args = low_rank(L=2, D=1, N=2, lead=())
    names, values = list(args), [x.requires_grad_() for x in args.values()]
    assert gradcheck(lambda *x: dplr_scan(**dict(zip(names, x, strict=True))), values)
    assert gradgradcheck(lambda *x: dplr_scan(**dict(zip(names, x, strict=True))), values)


def test_cauchy_sums(states):
    v, poles, nodes = (rand(2, n, dtype=torch.complex128).requires_grad_() for n in (5, 5, 7))
    wanted = (v.unsqueeze(-2) / (nodes.unsqueeze(-1) - poles.unsqueeze(-2))).sum(-1)
    assert_same(cauchy(v, nodes, poles), wanted)
    for one, other in zip(
        gradients(cauchy(v, nodes, poles), (v, nodes, poles)), gradients(wanted, (v, nodes, poles)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("L", [0, 1, 2, 16, 23])
@pytest.mark.parametrize("start", [False, True])
def test_dense_systems_by_blocks(L, start):
    A, B, C = 0.4 * rand(3, 4, 4), rand(3, 4), rand(3, 4)
    u, initial = rand(2, L, 3), rand(2, 3, 4) if start else None
    if L == 0:
        assert dense_lti(u, A, B, C, initial)[0].shape == (2, 0, 3)
        return
    wanted = dense_lti_reference(u, A, B, C, initial)
    assert_same(dense_lti(u, A, B, C, initial), wanted)
    h, taps = B, []
    for _ in range(L):
        taps.append((C * h).sum(-1))
        h = (A @ h.unsqueeze(-1)).squeeze(-1)
    assert_same(dense_lti(u, A, B, C, initial, kernel=torch.stack(taps)), wanted)


@pytest.mark.parametrize("L", [0, 1, 2, 5, 8])
def test_fft_convolution(L):
    u, kernel = rand(2, L, 3), rand(L + 2, 3)
    wanted = torch.zeros(2, L, 3).double()
    for t in range(L):
        wanted[:, t] = sum(kernel[lag] * u[:, t - lag] for lag in range(t + 1))
    assert_same(fft_conv(u, kernel), wanted)


# ------------------------------------------------------------------------------------ short convolutions


def convolution(L=7, D=3, K=4, lead=(2,)):
    return {"x": rand(*lead, L, D), "weight": rand(D, K), "bias": rand(D), "initial": rand(*lead, K - 1, D)}


@pytest.mark.parametrize("L", [1, 2, 7, 12])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_short_convolution_is_its_loop(L, K, masked, resets):
    args = {k: x.requires_grad_() for k, x in convolution(L, K=K).items()}
    steps = {}
    if masked:
        steps["mask"] = torch.rand(2, L) < 0.6
    if resets:
        steps["reset"] = torch.rand(2, L) < 0.3
    found, wanted = (f(**args, **steps) for f in (causal_conv1d, causal_conv1d_reference))
    assert_same(found, wanted)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_short_convolution_in_pieces_and_its_derivatives():
    args = convolution(9)
    whole = causal_conv1d(**args)
    y1, state = causal_conv1d(**args | {"x": args["x"][:, :2]})
    y2, state = causal_conv1d(**args | {"x": args["x"][:, 2:], "initial": state})
    assert_same((torch.cat([y1, y2], 1), state), whole)
    names, values = list(args), [x.requires_grad_() for x in convolution(3, 2, 2, ()).values()]
    assert gradcheck(lambda *x: causal_conv1d(**dict(zip(names, x, strict=True))), values)
    assert gradgradcheck(lambda *x: causal_conv1d(**dict(zip(names, x, strict=True))), values)
    with pytest.raises(ValueError, match="`initial` must be"):
        causal_conv1d(**args | {"initial": rand(2, 2, 3)})
