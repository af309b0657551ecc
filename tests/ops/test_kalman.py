import torch

from pyro_ssm.ops import kalman_filter_reference, kalman_smoother_reference, tria
from pyro_ssm.ops.kalman import hide_rows, predict, update
from pyro_ssm.ops.kalman_backward import Conditionals, conditional, forward_conditionals

D = torch.float64


def rand(*shape):
    return torch.randn(*shape, dtype=D)


def setup(n=3, p=2, batch=(4,)):
    torch.manual_seed(0)
    m, L = rand(*batch, n), rand(*batch, n, n).tril()
    return m, L, rand(n, n), rand(n), rand(n, n).tril(), rand(p, n), rand(p, p).tril()


def test_predict_is_the_push_forward():
    m, L, F, b, Q, _, _ = setup()
    mean, root = predict(m, L, F, b, Q)
    torch.testing.assert_close(mean, m @ F.T + b)
    torch.testing.assert_close(root @ root.mT, F @ L @ L.mT @ F.T + Q @ Q.T)


def test_update_is_bayes_rule():
    """The textbook form: gain P H^T S^{-1}, covariance P - gain S gain^T."""
    m, L, _, _, _, H, R = setup()
    y = rand(4, 2)
    P = L @ L.mT
    S = H @ P @ H.T + R @ R.T
    gain = P @ H.T @ torch.linalg.inv(S)
    mean, root, e, s = update(m, L, y - m @ H.T, H, R)
    torch.testing.assert_close(mean, m + (gain @ (y - m @ H.T).unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(root @ root.mT, P - gain @ S @ gain.mT)
    law = torch.distributions.MultivariateNormal(m @ H.T, S)
    constant = torch.log(torch.tensor(2 * torch.pi, dtype=D))
    torch.testing.assert_close(-0.5 * e.square().sum(-1) - s.log().sum(-1) - constant, law.log_prob(y))


def test_hidden_rows_leave_the_joint_noise_of_the_others():
    *_, R = setup(p=4)
    mask = torch.tensor([True, False, True, False])
    y, H, d, root = hide_rows(mask, rand(4), rand(4, 3), rand(4), R)
    covariance = root @ root.T
    torch.testing.assert_close(covariance[mask][:, mask], (R @ R.T)[mask][:, mask])
    torch.testing.assert_close(covariance[~mask], torch.eye(4, dtype=D)[~mask])
    assert (y[~mask] == 0).all() and (H[~mask] == 0).all() and (d[~mask] == 0).all()


def test_identity_dynamics_with_nothing_seen_is_a_no_op():
    m, L, *_ = setup(batch=())
    eye, zero = torch.eye(3, dtype=D), torch.zeros(1, 3, dtype=D)
    y = torch.full((5, 3), torch.nan, dtype=D)
    steps = kalman_filter_reference(y, ~y.isnan(), m, L, eye[None], zero, 0 * eye[None], eye[None], zero, eye[None])
    assert (steps.log_likelihood == 0).all()
    torch.testing.assert_close(steps.filtered_mean, m.expand(5, 3))
    torch.testing.assert_close((steps.filtered_scale_tril @ steps.filtered_scale_tril.mT), (L @ L.T).expand(5, 3, 3))


def test_singular_transitions_leave_the_posterior_of_a_constant():
    """A constant state seen n times with unit noise: precision 1 / P + n, mean the shrunken average."""
    one, zero = torch.ones(1, 1, 1, dtype=D), torch.zeros(1, 1, dtype=D)
    y = rand(6, 1)
    steps = kalman_filter_reference(y, y == y, zero[0], 2 * one[0], one, zero, 0 * one, one, zero, one)
    torch.testing.assert_close(steps.filtered_scale_tril[:, 0, 0] ** -2, 0.25 + torch.arange(1.0, 7.0, dtype=D))
    torch.testing.assert_close(steps.filtered_mean[-1, 0], y.sum() / 6.25)


def test_conditional_of_a_singular_law():
    """What y does not tell of x stays in its covariance: the pseudo-inverse form of the dense law."""
    torch.manual_seed(0)
    A = rand(5, 2) @ rand(2, 7)  # y = A[:3] e, x = A[3:] e, of rank 2 only where y hides one of them
    A[:3] = rand(3, 1) * A[0]
    law = tria(A)
    S, K, D_ = law[:3, :3], law[3:, :3], law[3:, 3:]
    gain, root = conditional(S, K, D_)
    C = A @ A.T
    wanted = C[3:, :3] @ torch.linalg.pinv(C[:3, :3], rtol=1e-10, hermitian=True)
    torch.testing.assert_close(gain @ S @ S.T, C[3:, :3], atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(root @ root.T, C[3:, 3:] - wanted @ C[:3, 3:], atol=1e-10, rtol=1e-7)


def random_chain(times=4, n=3):
    """Smoothed laws and backward laws of a chain: any last law, any backward motion."""
    torch.manual_seed(1)
    gain, offset, root = rand(2, times - 1, n, n), rand(2, times - 1, n), rand(2, times - 1, n, n).tril()
    steps = kalman_filter_reference(  # only the last law is read
        rand(times, 1), torch.ones(times, 1, dtype=torch.bool), rand(2, n), rand(2, n, n).tril(),
        rand(1, n, n), rand(1, n), rand(1, n, n).tril(), rand(1, 1, n), rand(1, 1), rand(1, 1, 1).abs(),
    )  # fmt: skip
    return steps, Conditionals(gain, offset, root)


def test_forward_laws_are_the_backward_laws_turned_round():
    """Both factorise one joint law: Cov(z', z) = P' G'^T = G P, P' = G P G^T + D D^T, m' = G m + c."""
    steps, backwards = random_chain()
    mean, root = kalman_smoother_reference(steps, backwards)
    gain, offset, scale_tril = forward_conditionals(mean, root, backwards)
    P = root @ root.mT
    torch.testing.assert_close(gain @ P[:, :-1], P[:, 1:] @ backwards.gain.mT)
    torch.testing.assert_close(gain @ P[:, :-1] @ gain.mT + scale_tril @ scale_tril.mT, P[:, 1:])
    torch.testing.assert_close((gain @ mean[:, :-1].unsqueeze(-1)).squeeze(-1) + offset, mean[:, 1:])
    assert (scale_tril.triu(1) == 0).all()


def test_forward_laws_of_copies_are_copies():
    steps, (gain, offset, root) = random_chain()
    backwards = Conditionals(torch.eye(3, dtype=D).expand_as(gain), 0 * offset, 0 * root)
    mean, smoothed = kalman_smoother_reference(steps, backwards)
    forward = forward_conditionals(mean, smoothed, backwards)
    for found, wanted in zip(forward, backwards, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_of_forward_laws():
    steps, backwards = random_chain(times=3, n=2)

    def turned(mean, root, *parts):
        return tuple(forward_conditionals(mean, root, Conditionals(*parts)))

    mean, root = (part.detach().requires_grad_() for part in kalman_smoother_reference(steps, backwards))
    assert torch.autograd.gradcheck(turned, (mean, root, *(part.requires_grad_() for part in backwards)))
