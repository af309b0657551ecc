"""Linear-Gaussian paths and records as distributions, against one dense Gaussian."""

import pyro
import pytest
import torch
from pyro.distributions import MultivariateNormal
from pyro.distributions.testing.gof import auto_goodness_of_fit
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

from pyro_ssm.components import Affine
from pyro_ssm.distributions import LinearGaussianPath, LinearGaussianSSM
from tests.infer.gaussian.linear import D, root

T, N, P = 5, 2, 3


def rand(*shape):
    return torch.randn(*shape, dtype=D)


def roots(*lead, n=N, scale=1.0):
    return torch.stack([root(n, scale) for _ in range(max(1, torch.Size(lead).numel()))]).reshape(*lead, n, n)


def path_parts(seed=0, batch=(), varying=True):
    torch.manual_seed(seed)
    steps = (T - 1,) if varying else (1,)
    move = Affine(
        0.7 * torch.eye(N, dtype=D) + 0.2 * rand(*batch, *steps, N, N), rand(*steps, N), roots(*steps, scale=0.5)
    )
    return rand(*batch, N), roots(), move


def look_parts(varying=True):
    steps = (T,) if varying else (1,)
    return Affine(rand(*steps, P, N), rand(*steps, P), roots(*steps, n=P))


def dense(path):
    """The path as one normal law over the stacked states."""
    F, b, Q = (
        part.expand(part.shape[:-e] + (T - 1,) + part.shape[part.dim() - e + 1 :])
        for part, e in zip(path.transition, (3, 2, 3), strict=True)
    )
    means, noise = [path.initial_mean], torch.eye(T * N, dtype=D)
    rows = [path.initial_scale_tril @ noise[:N]]
    for k in range(T - 1):
        means.append(F[k] @ means[-1] + b[k])
        rows.append(F[k] @ rows[-1] + Q[k] @ noise[(k + 1) * N : (k + 2) * N])
    factor = torch.cat(rows)
    return MultivariateNormal(torch.cat(means), factor @ factor.T)


def dense_record(law):
    states = dense(law.path)
    H, d, R = (
        part.expand(part.shape[:-e] + (T,) + part.shape[part.dim() - e + 1 :])
        for part, e in zip(law.observation, (3, 2, 3), strict=True)
    )
    H, R = torch.block_diag(*H), torch.block_diag(*R)
    return states, H, MultivariateNormal(H @ states.mean + d.flatten(), H @ states.covariance_matrix @ H.T + R @ R.T)


@pytest.mark.parametrize("varying", [False, True])
def test_path_is_the_dense_law(varying):
    path = LinearGaussianPath(*path_parts(varying=varying), num_times=T)
    whole = dense(path)
    z = path.rsample((7,))
    torch.testing.assert_close(path.log_prob(z), whole.log_prob(z.flatten(-2)))
    torch.testing.assert_close(path.log_prob_steps(z).sum(-1), path.log_prob(z))
    torch.testing.assert_close(path.entropy(), whole.entropy())
    marginals, covariance = path.marginals, whole.covariance_matrix.reshape(T, N, T, N)
    torch.testing.assert_close(marginals.mean.flatten(), whole.mean)
    torch.testing.assert_close(path.variance.flatten(), whole.variance)
    for k in range(T):
        torch.testing.assert_close(marginals.scale_tril[k] @ marginals.scale_tril[k].T, covariance[k, :, k])
        if k:
            torch.testing.assert_close(marginals.lag_one_covariance[k - 1], covariance[k - 1, :, k])


def test_divergence_is_the_dense_one():
    p = LinearGaussianPath(*path_parts(1), num_times=T)
    q = LinearGaussianPath(*path_parts(2, varying=False), num_times=T)
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(dense(p), dense(q)))
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(dense(q), dense(p)))
    assert abs(kl_divergence(p, p)) < 1e-12
    with pytest.raises(ValueError, match="paths of different shapes"):
        kl_divergence(p, LinearGaussianPath(*path_parts(2, varying=False), num_times=T + 1))


def test_path_of_a_batch_expand_and_draws():
    mean, factor, move = path_parts(batch=(3,))
    path = LinearGaussianPath(mean, factor, move)
    assert path.batch_shape == (3,) and path.event_shape == (T, N) and path.entropy().shape == (3,)
    wide = path.expand((4, 3))
    z = wide.rsample((2,))
    assert z.shape == (2, 4, 3, T, N) and wide.log_prob(z).shape == (2, 4, 3) and wide.entropy().shape == (4, 3)
    assert wide.marginals.mean.shape == (4, 3, T, N) and kl_divergence(wide, path).shape == (4, 3)
    assert not torch.equal(z[0, 0], z[0, 1])
    for i in range(3):
        one = LinearGaussianPath(mean[i], factor, Affine(move.matrix[i], *move[1:]))
        torch.testing.assert_close(path.log_prob(z)[..., i], one.log_prob(z[..., i, :, :]))
    size = 40_000
    one = LinearGaussianPath(mean[0], factor, Affine(move.matrix[0], *move[1:]))
    draws, whole = one.sample((size,)).flatten(-2), dense(one)
    deviation = whole.variance.sqrt()
    assert ((draws.mean(0) - whole.mean).abs() < 5 * deviation / size**0.5).all()
    error = (draws.T.cov() - whole.covariance_matrix).abs()
    assert (error < 5 * 2**0.5 * deviation[:, None] * deviation / size**0.5).all()


def test_path_of_unequal_lengths_is_a_loop_and_its_gradient_too():
    mean, factor, move = path_parts(batch=(2,))
    mask = torch.arange(T) < torch.tensor([[T], [3]])
    factor.requires_grad_()
    Q = move.scale_tril.clone().requires_grad_()
    move = Affine(move.matrix, move.offset, Q)
    path = LinearGaussianPath(mean, factor, move, step_mask=mask)
    other = LinearGaussianPath(mean + 1, factor, move, step_mask=mask)
    z = path.rsample()
    assert (z[1, 3:] == z[1, 2]).all() and (path.log_prob_steps(z)[1, 3:] == 0).all()
    short = Affine(move.matrix[1, :2], move.offset[:2], Q[:2])
    alone, beside = (LinearGaussianPath(m, factor, short) for m in (mean[1], mean[1] + 1))
    pairs = [
        (path.log_prob(z.detach())[1], alone.log_prob(z.detach()[1, :3])),
        (path.entropy()[1], alone.entropy()),
        (kl_divergence(path, other)[1], kl_divergence(alone, beside)),
    ]
    for one, two in pairs:
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(*(torch.autograd.grad(x, Q, retain_graph=True)[0] for x in (one, two)))
    with pytest.raises(ValueError, match="unequal lengths"):
        _ = path.support


@pytest.mark.parametrize("varying", [False, True])
def test_record_is_the_dense_law(varying):
    law = LinearGaussianSSM(*path_parts(varying=varying), look_parts(varying), num_times=T)
    states, H, record = dense_record(law)
    y = law.rsample((6,))
    torch.testing.assert_close(law.log_prob(y), record.log_prob(y.flatten(-2)), rtol=1e-9, atol=1e-9)
    gain = torch.linalg.solve(record.covariance_matrix, H @ states.covariance_matrix).T
    smoothed = law.smooth(y)
    mean = states.mean + (y.flatten(-2) - record.mean) @ gain.T
    torch.testing.assert_close(smoothed.mean.flatten(-2), mean)
    covariance = (states.covariance_matrix - gain @ H @ states.covariance_matrix).reshape(T, N, T, N)
    for k in range(T):
        L = smoothed.scale_tril[0, k]
        torch.testing.assert_close(L @ L.T, covariance[k, :, k])
        if k:
            torch.testing.assert_close(smoothed.lag_one_covariance[0, k - 1], covariance[k - 1, :, k])
    torch.testing.assert_close(law.filter(y).filtered_mean[..., -1, :], smoothed.mean[..., -1, :])


def test_masked_entries_are_integrated_out_and_never_read():
    mask = torch.rand(4, T, P) > 0.4
    mask[0] = False
    parts, look = path_parts(3), look_parts()
    law = LinearGaussianSSM(*parts, look, num_times=T, mask=mask)
    whole = LinearGaussianSSM(*parts, look, num_times=T)
    y = whole.sample((4,))
    found = law.log_prob(y.masked_fill(~mask, float("nan")))
    _, _, record = dense_record(whole)
    assert law.batch_shape == (4,) and found[0] == 0
    for i in range(1, 4):
        seen = mask[i].flatten()
        wanted = MultivariateNormal(record.mean[seen], record.covariance_matrix[seen][:, seen]).log_prob(
            y[i].flatten()[seen]
        )
        torch.testing.assert_close(found[i], wanted, rtol=1e-9, atol=1e-9)


def test_record_expands_and_its_draws_follow_its_density():
    mean, factor, move = path_parts(batch=(3,))
    law = LinearGaussianSSM(mean, factor, move, look_parts())
    wide = law.expand((4, 3))
    y = wide.sample((2,))
    assert y.shape == (2, 4, 3, T, P) and wide.log_prob(y).shape == (2, 4, 3) and law.has_rsample
    small = LinearGaussianSSM(
        torch.zeros(1),
        torch.ones(1, 1),
        Affine(torch.full((1, 1), 0.8), torch.zeros(1), 0.5 * torch.ones(1, 1)),
        Affine(torch.ones(1, 1), torch.ones(1), 0.3 * torch.ones(1, 1)),
        num_times=2,
    )
    samples = small.sample((20_000,))
    assert auto_goodness_of_fit(samples.flatten(-2), small.log_prob(samples).exp(), dim=2) > 1e-3


def test_gradients():
    mean, factor, move = path_parts(4)
    look, y = look_parts(), rand(T, P)
    mask = torch.rand(T, P) > 0.3

    def f(m, L, F, b, Q, H, d, R, y):
        law = LinearGaussianSSM(m, L.tril(), Affine(F, b, Q.tril()), Affine(H, d, R.tril()), mask=mask)
        return law.log_prob(y), law.smooth(y).mean

    assert gradcheck(f, [x.clone().requires_grad_() for x in (mean, factor, *move, *look, y)], fast_mode=True)

    def g(m, L, F, b, Q):
        one = LinearGaussianPath(m, L.tril(), Affine(F, b, Q.tril()))
        two = LinearGaussianPath(mean, factor, move)
        return one.entropy(), kl_divergence(one, two), kl_divergence(two, one), one.log_prob(z)

    z = rand(T, N)
    assert gradcheck(g, [x.clone().requires_grad_() for x in (mean + 1, factor * 1.1, *move)], fast_mode=True)


def test_goes_into_a_pyro_program():
    law = LinearGaussianSSM(*path_parts(), look_parts())

    def model(y=None):
        with pyro.plate("series", 4):
            return pyro.sample("y", law, obs=y)

    trace = pyro.poutine.trace(model).get_trace(law.sample((4,)))
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (4,)
    assert model().shape == (4, T, P)


def test_one_time_and_singular_noise():
    """T = 1; a path that never moves, seen without noise of its first coordinate."""
    mean, factor, _ = path_parts()
    still = Affine(torch.eye(N, dtype=D), torch.zeros(N, dtype=D), torch.zeros(N, N, dtype=D))
    first = LinearGaussianPath(mean, factor, still, num_times=1)
    z = first.sample()
    torch.testing.assert_close(first.log_prob(z), MultivariateNormal(mean, scale_tril=factor).log_prob(z[0]))
    assert first.marginals.lag_one_covariance.shape == (0, N, N)
    torch.testing.assert_close(first.entropy(), MultivariateNormal(mean, scale_tril=factor).entropy())
    look = Affine(torch.eye(N, dtype=D)[:1], torch.zeros(1, dtype=D), torch.zeros(1, 1, dtype=D))
    law = LinearGaussianSSM(mean, factor, still, look, num_times=1)
    y = rand(1, 1)
    torch.testing.assert_close(law.log_prob(y), torch.distributions.Normal(mean[0], factor[0, 0]).log_prob(y[0, 0]))
    path = LinearGaussianPath(mean, factor, still, num_times=T).sample()
    assert (path == path[:1]).all()


def test_errors_name_the_argument():
    mean, factor, move = path_parts()
    look = look_parts()
    with pytest.raises(ValueError, match=r"`scale_tril` has shape \(2, 3\)"):
        LinearGaussianPath(mean, rand(N, 3), move)
    with pytest.raises(ValueError, match=r"`transition.scale_tril` must be lower triangular.*cholesky"):
        LinearGaussianPath(mean, factor, Affine(move.matrix, move.offset, move.scale_tril @ move.scale_tril.mT))
    with pytest.raises(ValueError, match=r"`observation.matrix` has shape \(5, 3, 3\)"):
        LinearGaussianSSM(mean, factor, move, Affine(rand(T, P, 3), look.offset, look.scale_tril))
    with pytest.raises(ValueError, match="time sizes of `transition` do not agree"):
        LinearGaussianPath(mean, factor, move, num_times=T + 2)
    with pytest.raises(ValueError, match="`mask` must be boolean"):
        LinearGaussianSSM(mean, factor, move, look, mask=torch.ones(T, P))
    with pytest.raises(ValueError, match=r"`value` has shape \(5, 2\), but \(\.\.\., 5, 3\) is wanted"):
        LinearGaussianSSM(mean, factor, move, look).log_prob(rand(T, 2))
