"""Solvers of ordinary differential equations, against closed forms, references of high precision, and each other."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch.autograd import gradcheck

from pyro_ssm.ops import ode_flow, ode_path, torchdiffeq_path
from pyro_ssm.ops.runge_kutta import TABLEAUX, Tolerance

D = torch.float64
A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=D)
FIXED = [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]


def linear(t, z, u):
    return z @ A.to(z).mT


def tight(method):
    """A tolerance at which differences of solutions are smooth enough for gradcheck."""
    return Tolerance(1e-9, 1e-9) if method == "dopri5" else Tolerance(1e-7, 1e-7)


def grids(batch=3, num=9):
    torch.manual_seed(0)
    return torch.rand(batch, num, dtype=D).cumsum(-1) / 2 + torch.arange(batch, dtype=D).unsqueeze(-1)


def exact(start, times):
    return torch.stack(
        [
            torch.linalg.matrix_exp(A * (t - t[0])[:, None, None]) @ z[0]
            for z, t in zip(start, times.expand(len(start), -1), strict=True)
        ]
    )


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("own", [True, False])
def test_a_linear_field_is_the_matrix_exponential(method, own):
    times = grids() if own else grids()[0]
    start = torch.randn(3, 1, 2, dtype=D)
    for tolerance, bound in ((1e-4, 3e-3), (1e-7, 1e-5), (1e-10, 2e-8)):
        path = ode_path(linear, start, times, method=method, tolerance=Tolerance(tolerance, tolerance))
        assert (path - exact(start, times)).abs().max() < bound
    torch.testing.assert_close(path[:, :1], start, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "order"), FIXED)
@pytest.mark.parametrize("dense", [True, False])
def test_fixed_steps_have_their_order(method, order, dense):
    """On own grids, at times between the steps (dense, by step_size) and at their ends (one step a gap)."""
    start, times, errors = torch.randn(3, 1, 2, dtype=D), grids(), []
    for n in (8, 16, 32):
        if dense:
            path = ode_path(linear, start, times, method=method, step_size=1.0 / n)
        else:
            part = torch.arange(n, dtype=D) / n
            fine = torch.cat(
                [(times[:, :-1, None] + times.diff(dim=-1)[..., None] * part).flatten(-2), times[:, -1:]], -1
            )
            path = ode_path(linear, start, fine, method=method)[:, ::n]
        errors.append((path - exact(start, times)).abs().max().item())
    orders = torch.tensor(errors, dtype=D).log2().diff().neg()
    assert (orders > order - 0.25).all() and orders[-1] > order - 0.15 and (orders < order + 0.6).all(), orders


@pytest.mark.parametrize(("method", "order"), [("dopri5", 5), ("bosh3", 4), ("rk4", 4)])
def test_within_a_step_the_polynomial_is_as_good_as_the_step(method, order):
    """One step of length h: the error of the polynomial falls as h^order (Hermite's cubic: 4, the quartic: 5)."""
    errors, start = [], torch.tensor([[1.0, 0.5]], dtype=D)
    for h in (0.4, 0.2, 0.1):
        times = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0], dtype=D) * h
        loose = Tolerance(1e3, 1e3)
        path = ode_path(linear, start, times, method=method, tolerance=loose, step_size=1.0)
        errors.append((path - exact(start.unsqueeze(0), times.unsqueeze(0))[0]).abs().max().item())
    orders = torch.tensor(errors, dtype=D).log2().diff().neg()
    assert (orders > order - 0.2).all(), orders


def van_der_pol(t, z, u):
    x, v = z[..., :1], z[..., 1:]
    return torch.cat([v + 0 * t, 3.0 * (1 - x**2) * v - x + torch.cos(t)], -1)


def reference(start, times):
    def f(t, z):
        return van_der_pol(torch.full((1, 1), t, dtype=D), torch.from_numpy(z)[None], None)[0].numpy()

    return torch.stack(
        [
            torch.from_numpy(
                solve_ivp(f, (t[0], t[-1]), z[0].numpy(), "DOP853", t_eval=t.numpy(), rtol=1e-12, atol=1e-12).y.T
            )
            for z, t in zip(start, times, strict=True)
        ]
    )


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "torchdiffeq dopri8", "torchdiffeq dopri5", "torchdiffeq rk4"])
def test_a_nonlinear_field_in_time_matches_a_reference_of_high_precision(method):
    start, times = torch.randn(3, 1, 2, dtype=D), grids() * 2
    wanted = reference(start, times)
    backend, _, name = method.rpartition(" ")
    if backend:
        more = {"step_size": 4e-3} if name == "rk4" else {}
        path = torchdiffeq_path(van_der_pol, start, times, method=name, rtol=1e-9, atol=1e-9, **more)
    else:
        path = ode_path(van_der_pol, start, times, method=name, tolerance=Tolerance(1e-9, 1e-9))
    torch.testing.assert_close(path, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("solve", [ode_path, torchdiffeq_path])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_start_is_shared_by_series_with_own_times(solve, method):
    start, times = torch.randn(1, 2, dtype=D), grids()
    torch.testing.assert_close(
        solve(linear, start, times, method=method), solve(linear, start.expand(3, 1, 2), times, method=method)
    )


@pytest.mark.parametrize("solve", [ode_path, torchdiffeq_path])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_batch_is_a_loop(solve, method):
    start, times = torch.randn(2, 3, 1, 2, dtype=D), grids()
    more = {"tolerance": Tolerance(1e-8, 1e-8)} if solve is ode_path else {"rtol": 1e-8, "atol": 1e-8}
    path = solve(van_der_pol, start, times, method=method, **more)
    assert path.shape == (2, 3, 9, 2)
    for i in range(2):
        for b in range(3):
            alone = solve(van_der_pol, start[i, b], times[b], method=method, **more)
            torch.testing.assert_close(path[i, b], alone, atol=0 if method == "rk4" else 1e-6, rtol=1e-6)


def test_an_easy_series_does_not_hide_the_error_of_a_hard_one():
    """Each series meets the tolerance by itself, however many easy ones there are."""
    rate = torch.ones(200, 1, 1, dtype=D)
    rate[7] = 40.0

    def field(t, z, u):
        return rate * torch.cos(rate * t) + 0 * z

    times = torch.linspace(0, 3, 31, dtype=D)
    path = ode_path(field, torch.zeros(200, 1, 1, dtype=D), times, tolerance=Tolerance(1e-5, 1e-5))
    assert (path[7, :, 0] - torch.sin(40 * times)).abs().max() < 2e-3
    assert (path[0, :, 0] - torch.sin(times)).abs().max() < 1e-5


def test_many_observations_cost_no_more_evaluations_and_refining_changes_nothing():
    calls = []

    def counted(t, z, u):
        calls.append(1)
        return linear(t, z, u)

    start, times = torch.randn(3, 1, 2, dtype=D), grids()
    path = ode_path(counted, start, times)
    few = len(calls)
    part = torch.arange(20, dtype=D) / 20
    fine = torch.cat([(times[:, :-1, None] + times.diff(dim=-1)[..., None] * part).flatten(-2), times[:, -1:]], -1)
    again = ode_path(counted, start, fine)
    assert len(calls) == 2 * few
    torch.testing.assert_close(again[:, ::20], path)


@pytest.mark.parametrize("solve", [ode_path, torchdiffeq_path])
def test_backward_in_time_comes_back_and_repeated_times_stand_still(solve):
    start, times = torch.randn(3, 1, 2, dtype=D), grids()
    tight = {"tolerance": Tolerance(1e-9, 1e-9)} if solve is ode_path else {"rtol": 1e-9, "atol": 1e-9}
    path = solve(linear, start, times, method="dopri5", **tight)
    back = solve(linear, path[:, -1:], times.flip(-1), method="dopri5", **tight).flip(-2)
    torch.testing.assert_close(back, path, atol=1e-6, rtol=1e-6)
    stopped = torch.minimum(times, times[:, [8, 4, 0]].diagonal().unsqueeze(-1))
    held = solve(linear, start, stopped, method="dopri5", **tight)
    torch.testing.assert_close(held[0], path[0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(held[1, 4:], path[1, 4:5].expand(5, 2), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(held[2], start[2].expand(9, 2))


@pytest.mark.parametrize("method", list(TABLEAUX))
def test_gradients(method):
    """With respect to the start, constants of the field and inputs."""
    times, torch_rows = grids(2, 4), torch.randn(2, 4, 1, dtype=D)

    def path(start, rate, rows):
        def field(t, z, u):
            return torch.sin(rate * z) + u

        return ode_path(
            field,
            start,
            times,
            lambda k, since: rows[:, k : k + 1] * torch.exp(-since),
            lambda k, z: 0.9 * z,
            method=method,
            tolerance=tight(method),
        )

    start, rate = torch.randn(2, 1, 2, dtype=D), torch.tensor(0.7, dtype=D)
    gradcheck(path, (start.requires_grad_(), rate.requires_grad_(), torch_rows.requires_grad_()))


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("own", [True, False])
def test_gradients_through_the_polynomials(method, own):
    times = grids(2, 6) if own else grids(2, 6)[0]
    gradcheck(
        lambda z, a: ode_path(lambda t, z, u: torch.sin(a * z), z, times, method=method, tolerance=tight(method)),
        (torch.randn(2, 1, 2, dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D, requires_grad=True)),
    )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_adjoint_and_direct_gradients_agree(own, forced):
    """Sampled weights are passed to the adjoint; gradients through it equal those through our steps."""
    torch.manual_seed(1)
    times = grids(3, 5) if own else grids(3, 5)[0]
    start, W = torch.randn(3, 1, 2, dtype=D, requires_grad=True), torch.randn(2, 2, dtype=D, requires_grad=True)
    rows = torch.randn(5, 1, dtype=D, requires_grad=True)

    def field(t, z, u):
        value = torch.tanh(z @ W.mT)
        return value if u is None else value + u

    held = (lambda k, since: rows[k : k + 1]) if forced else None
    reads = [start, W, rows] if forced else [start, W]
    found = []
    for adjoint in (None, reads[1:]):
        path = torchdiffeq_path(
            field, start, times, held, method="dopri5", rtol=1e-10, atol=1e-10, adjoint_params=adjoint
        )
        found.append(torch.autograd.grad(path.square().sum(), reads))
    path = ode_path(field, start, times, held, tolerance=Tolerance(1e-10, 1e-10))
    found.append(torch.autograd.grad(path.square().sum(), reads))
    for direct, adjoint, ours in zip(*found, strict=True):
        torch.testing.assert_close(adjoint, direct, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours, direct, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solve", [ode_path, torchdiffeq_path])
def test_float32_states_on_times_far_from_zero(solve):
    """Differences are taken in float64: a shift of 30000 days, which float32 cannot resolve, changes nothing."""
    start, times = torch.randn(3, 1, 2), grids()
    path = solve(linear, start, times + 30000.0, method="dopri5")
    assert path.dtype == torch.float32
    torch.testing.assert_close(path.double(), exact(start.double(), times), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solve", [ode_path, torchdiffeq_path])
def test_what_cannot_be_solved_names_time_series_and_norm(solve):
    times = torch.linspace(0, 2, 5, dtype=D)
    start = torch.tensor([[[0.1]], [[1.0]], [[0.2]]], dtype=D)
    with pytest.raises(FloatingPointError, match=r"at time 1(.0000\d*)? of series 1, where the state has norm .*e\+"):
        solve(lambda t, z, u: z**2, start, times, method="dopri5")  # 1 / (1 - t)
    with pytest.raises(FloatingPointError, match=r"at time 0\.\d+ of series 1, where the state has norm 1\.\d"):
        solve(lambda t, z, u: torch.where(z > 1.5, torch.nan, z), start, times, method="dopri5")
    with pytest.raises(FloatingPointError, match="of series 2"):
        nan = torch.tensor([0.0, 0.0, torch.nan], dtype=D).reshape(3, 1, 1)
        solve(lambda t, z, u: z + nan, start, times, method="dopri5")


def test_a_stiff_field_runs_out_of_steps():
    with pytest.raises(FloatingPointError, match="50 steps are not enough at time"):
        ode_path(
            lambda t, z, u: -1e5 * (z - torch.cos(t)),
            torch.ones(1, 1, dtype=D),
            torch.linspace(0, 2, 3, dtype=D),
            tolerance=Tolerance(max_steps=50),
        )


def test_one_time_and_one_step():
    start = torch.randn(3, 1, 2, dtype=D)
    torch.testing.assert_close(ode_path(linear, start, torch.zeros(1, dtype=D)), start, rtol=0, atol=0)
    torch.testing.assert_close(torchdiffeq_path(linear, start, torch.zeros(1, dtype=D), method="rk4"), start)
    states, times = torch.randn(3, 4, 2, dtype=D), grids(3, 5)  # all steps of a path at once
    moved, _ = ode_flow(linear, states, times[:, :-1], times[:, 1:], tolerance=Tolerance(1e-10, 1e-10))
    for k in range(4):
        wanted = torch.linalg.matrix_exp(A * times.diff(dim=-1)[:, k, None, None]) @ states[:, k, :, None]
        torch.testing.assert_close(moved[:, k], wanted.squeeze(-1), rtol=1e-7, atol=1e-8)


def test_the_oscillator_comes_around():
    path = ode_path(
        lambda t, z, u: torch.stack([z[..., 1], -z[..., 0]], -1),
        torch.tensor([[1.0, 0.0]], dtype=D),
        torch.linspace(0, 20 * math.pi, 41, dtype=D),
        tolerance=Tolerance(1e-9, 1e-9),
    )
    torch.testing.assert_close(path[::4], torch.tensor([1.0, 0.0], dtype=D).expand(11, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(41, dtype=D), rtol=0, atol=1e-6)
