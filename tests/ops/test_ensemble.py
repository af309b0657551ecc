import pytest
import torch
from torch.autograd import gradcheck

from pyro_ssm.ops import gaspari_cohn
from pyro_ssm.ops.ensemble import anomalies, ensemble_smoother_gain, ensemble_update, relax_spread
from pyro_ssm.ops.kalman import update
from pyro_ssm.ops.linalg import tria

D = torch.float64


def rand(*shape):
    return torch.randn(*shape, dtype=D)


def root(p):
    return tria(rand(p, p + 2)) + 0.1 * torch.eye(p, dtype=D)


def setup(N=12, n=4, p=3, batch=(2,)):
    torch.manual_seed(0)
    H = rand(p, n)
    x = rand(N, *batch, n) @ rand(n, n) + 1
    return x, H, rand(*batch, p), torch.ones(*batch, p, dtype=torch.bool), root(p)


@pytest.mark.parametrize("N", [3, 12])
def test_deterministic_update_has_kalmans_moments_exactly(N):
    """Also with fewer members than states, where the covariance is singular."""
    x, H, y, mask, R = setup(N)
    after, e, s = ensemble_update(x, x @ H.T, y, mask, R)
    m, X = anomalies(x)
    wanted = update(m, tria(X), y - m @ H.T, H.expand(2, 3, 4), R.expand(2, 3, 3))
    mean, A = anomalies(after)
    torch.testing.assert_close(mean, wanted[0])
    torch.testing.assert_close(A @ A.mT, wanted[1] @ wanted[1].mT)
    torch.testing.assert_close(e, wanted[2])
    torch.testing.assert_close(s, wanted[3].expand(s.shape))


def test_masked_rows_are_left_out():
    x, H, y, mask, R = setup()
    keep, mask = torch.tensor([0, 2]), torch.tensor([True, False, True]).expand(2, 3)
    h = x @ H.T
    h[..., 1], y[..., 1] = 1e9, float("nan")
    part = torch.linalg.cholesky((R @ R.T)[keep][:, keep])
    eta = rand(12, 2, 3)
    for noise in (None, eta):
        after = ensemble_update(x, h, y, mask, R, noise)[0]
        seen = None if noise is None else noise[..., keep]
        alone = ensemble_update(x, h[..., keep], y[..., keep], mask[..., keep], part, seen)[0]
        torch.testing.assert_close(after.mean(0), alone.mean(0))
        torch.testing.assert_close(*(anomalies(z)[1] @ anomalies(z)[1].mT for z in (after, alone)))


def test_perturbed_update_is_the_equation():
    x, H, y, mask, R = setup()
    h, eta = x @ H.T, rand(12, 2, 3)
    after = ensemble_update(x, h, y, mask, R, eta)[0]
    X, Y = anomalies(x)[1], anomalies(h)[1]
    K = X @ Y.mT @ torch.linalg.inv(Y @ Y.mT + R @ R.T)
    torch.testing.assert_close(after, x + ((y - h - eta).unsqueeze(-2) @ K.mT).squeeze(-2))


def test_tapers_of_ones_change_nothing_and_zeros_cut():
    x, H, y, mask, R = setup()
    args = x, x @ H.T, y, mask, R
    ones = torch.ones(4, 3, dtype=D), torch.ones(3, 3, dtype=D)
    for one, other in zip(ensemble_update(*args), ensemble_update(*args, tapers=ones), strict=True):
        torch.testing.assert_close(one, other)
    cut = ones[0].clone()
    cut[2] = 0  # the third state has nothing to do with any observation
    after = ensemble_update(*args, tapers=(cut, ones[1]))[0]
    torch.testing.assert_close(after[..., 2], x[..., 2])
    assert (after[..., 1] - x[..., 1]).abs().max() > 0.1


def test_gaspari_cohn_is_a_correlation_of_compact_support():
    r = torch.linspace(0, 3, 3001, dtype=D)
    rho = gaspari_cohn(r, 1.0)
    assert rho[0] == 1 and (rho[r >= 2] == 0).all() and (rho.diff()[r[1:] < 2] < 0).all()
    for edge in (1.0, 2.0):  # both pieces meet, with two derivatives
        near = torch.tensor([edge - 1e-5, edge + 1e-5], dtype=D, requires_grad=True)
        value = gaspari_cohn(near, 1.0)
        (slope,) = torch.autograd.grad(value.sum(), near)
        torch.testing.assert_close(value[0], value[1], rtol=0, atol=5e-5)
        torch.testing.assert_close(slope[0], slope[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(gaspari_cohn(2 * r, 2.0), rho)
    with pytest.raises(ValueError, match="`distance` must not be negative"):
        gaspari_cohn(-r, 1.0)
    with pytest.raises(ValueError, match="`radius` must be positive"):
        gaspari_cohn(r, 0.0)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_localised_covariances_are_positive_semidefinite(dim):
    torch.manual_seed(dim)
    places = 5 * torch.rand(40, dim, dtype=D)
    taper = gaspari_cohn(torch.cdist(places, places), 1.5)
    assert torch.linalg.eigvalsh(taper).min() > -1e-12
    X = anomalies(rand(5, 40))[1]  # rank 4
    assert torch.linalg.eigvalsh(taper * (X @ X.mT)).min() > -1e-12
    assert torch.linalg.matrix_rank(taper * (X @ X.mT)) == 40


def test_relaxation_restores_a_part_of_the_spread():
    before, after = 3 * rand(9, 2, 4) + 1, rand(9, 2, 4)
    for amount in (0.0, 0.3, 1.0):
        relaxed = relax_spread(before, after, amount)
        torch.testing.assert_close(relaxed.mean(0), after.mean(0))
        torch.testing.assert_close(relaxed.std(0), amount * before.std(0) + (1 - amount) * after.std(0))
    still = torch.ones(9, 1, dtype=D)
    assert torch.equal(relax_spread(still, still, 0.5), still)


@pytest.mark.parametrize("N", [4, 30])
def test_smoother_gain_is_the_least_squares_regression(N):
    torch.manual_seed(1)
    now, then = rand(N, 2, 6), rand(N, 2, 6) * torch.tensor([1e-6, 1.0, 1.0, 1.0, 1.0, 1e4], dtype=D)
    J = torch.eye(6, dtype=D)
    for factor in reversed(ensemble_smoother_gain(now, then)):
        J = factor @ J
    X, Z = anomalies(now)[1], anomalies(then)[1]
    if N > 6:
        torch.testing.assert_close(J @ Z @ Z.mT, X @ Z.mT)
    else:  # fewer members than states: the regression goes through every member
        torch.testing.assert_close(J @ Z, X)


def test_smoother_gain_of_a_coordinate_that_does_not_vary():
    torch.manual_seed(2)
    now = rand(10, 3)
    then = now.clone()
    then[:, 1] = 7.0
    (J,) = ensemble_smoother_gain(now, then)
    torch.testing.assert_close(J[[0, 2]], torch.eye(3, dtype=D)[[0, 2]])


@pytest.mark.parametrize("tapered", [False, True])
@pytest.mark.parametrize("perturbed", [False, True])
def test_gradients(tapered, perturbed):
    x, H, y, mask, R = setup(5, 3, 2, ())
    mask = torch.tensor([True, False])
    tapers = (0.5 * torch.ones(3, 2, dtype=D), torch.eye(2, dtype=D)) if tapered else None
    eta = rand(5, 2) if perturbed else None

    def f(x, H, y, R):
        return ensemble_update(x, x @ H.T, y, mask, R.tril(), eta, tapers)

    assert gradcheck(f, [t.clone().requires_grad_() for t in (x, H, y, R)])
