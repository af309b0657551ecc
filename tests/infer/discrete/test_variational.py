"""The structured mean field: a bound below the exact evidence that only rises, and EM that ascends it."""

import pytest
import torch
from pyro.distributions import MultivariateNormal, Normal

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    enumerate_regimes,
    kalman_filter,
    kalman_smoother,
    switching_em,
    switching_system,
    switching_variational,
)
from pyro_ssm.infer.discrete.mean_field import MeanField, curvature
from pyro_ssm.infer.discrete.switching_m_step import switching_m_step
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops.block_tridiagonal import block_tridiagonal_moments
from tests.infer.discrete.brute import D, each, joint, random_data
from tests.infer.discrete.test_switching import alone, close, switching_model


def diagonal_model(K=2, n=2, p=2, u=0, recurrent=False, seed=0):
    """Diagonal noises, so that every closed form applies to partly missing rows."""
    torch.manual_seed(seed)
    regimes = [ssm.dynamics.LinearNormal(n, u, matrix=0.8 * torch.eye(n) + 0.2 * torch.randn(n, n)) for _ in range(K)]
    chain = ssm.dynamics.MarkovChain(K, n if recurrent else 0)
    model = StateSpaceModel(
        ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(K), [ssm.dynamics.NormalInitial(n)] * K),
        ssm.dynamics.SwitchingLinear(chain, regimes, recurrent),
        ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(n, p, u)] * K),
    ).double()
    if recurrent:
        model.transition.chain.input_matrix.data.normal_()
    return model


def test_block_tridiagonal_moments_are_dense():
    torch.manual_seed(0)
    T, n = 4, 2
    root = torch.randn(3, T * n, T * n, dtype=D)
    dense = torch.linalg.inv(root @ root.mT + torch.eye(T * n))
    dense = torch.linalg.inv(dense)
    band = torch.zeros_like(dense)
    for k in range(T):
        for j in range(max(0, k - 1), min(T, k + 2)):
            block = (..., slice(k * n, k * n + n), slice(j * n, j * n + n))
            band[block] = dense[block]
    band = band + 20 * torch.eye(T * n)
    h = torch.randn(3, T, n, dtype=D)
    blocks = band.unflatten(-1, (T, n)).unflatten(-3, (T, n)).movedim(-2, -3)  # (3, T, T, n, n)
    J = torch.stack([blocks[:, k, k] for k in range(T)], 1)
    B = torch.stack([blocks[:, k, k + 1] for k in range(T - 1)], 1)
    moments = block_tridiagonal_moments(J, B, h)
    covariance = torch.linalg.inv(band)
    close(moments.mean.flatten(1), (covariance @ h.flatten(1).unsqueeze(-1)).squeeze(-1))
    close(moments.covariance[:, 2], covariance[:, 4:6, 4:6])
    close(moments.lag_one[:, 1], covariance[:, 2:4, 4:6])
    close(moments.entropy, MultivariateNormal(torch.zeros(T * n, dtype=D), covariance).entropy())


def test_one_regime_is_the_kalman_smoother_and_the_bound_is_tight():
    model, data = switching_model(K=1), random_data((3,), T=6, lengths=torch.tensor([6, 4, 1]))
    plain = StateSpaceModel(*alone(switching_model(K=1)))
    posterior, exact = switching_variational(model, data), kalman_smoother(plain, data)
    close(posterior.elbo, kalman_filter(plain, data).log_likelihood.sum(-1))
    for i, length in enumerate((6, 4, 1)):
        close(posterior.mean[i, :length], exact.mean[i, :length])
        close(posterior.lag_one_covariance[i, : length - 1], exact.lag_one_covariance[i, : length - 1])
    assert posterior.converged


@pytest.mark.parametrize("seed", range(3))
def test_bound_lies_below_the_evidence_and_rises(seed):
    model = switching_model(seed=seed)
    data = random_data((3,), T=5, own_times=True, lengths=torch.tensor([5, 3, 1]), seed=seed)
    posterior = switching_variational(model, data, tolerance=1e-12)
    exact = enumerate_regimes(model, data).log_likelihood.sum(-1)
    assert (posterior.elbo <= exact + 1e-9).all()
    assert (posterior.trace.diff() > -1e-9).all()
    close(posterior.probs.sum(-1), torch.ones(3, 5, dtype=D))
    for (i,), _, one in each(data):
        single = switching_variational(model, one, max_sweeps=len(posterior.trace), tolerance=0.0)
        torch.testing.assert_close(posterior.elbo[i], single.elbo, rtol=1e-6, atol=1e-6)


def test_refined_grid_is_the_kalman_smoother_s_too():
    model, data = switching_model(K=1), random_data((2,), T=4).refine(3)
    plain = StateSpaceModel(*alone(switching_model(K=1)))
    posterior, exact = switching_variational(model, data), kalman_smoother(plain, data)
    close(posterior.elbo, exact.log_likelihood.sum(-1))
    close(posterior.mean, exact.mean)


def drawn(posterior, num):
    """Draws ``(num, time, 1 + n)`` of one series from q(s) q(x), and their log density."""
    T, K = posterior.probs.shape
    s = [torch.multinomial(posterior.probs[0], num, replacement=True)]
    log_q = posterior.probs[0][s[0]].log()
    law = MultivariateNormal(posterior.mean[0], posterior.covariance[0])
    x = [law.sample((num,))]
    log_q = log_q + law.log_prob(x[0])
    for k in range(T - 1):
        rows = posterior.pairwise[k] / posterior.pairwise[k].sum(-1, keepdim=True)
        s.append(torch.multinomial(rows[s[-1]], 1)[:, 0])
        log_q = log_q + rows[s[-2], s[-1]].log()
        lag = posterior.lag_one_covariance[k]
        gain = torch.linalg.solve(posterior.covariance[k], lag).T
        mean = posterior.mean[k + 1] + (x[-1] - posterior.mean[k]) @ gain.T
        law = MultivariateNormal(mean, posterior.covariance[k + 1] - gain @ lag)
        x.append(law.sample())
        log_q = log_q + law.log_prob(x[-1])
    return torch.cat([torch.stack(s, 1).unsqueeze(-1).to(D), torch.stack(x, 1)], -1), log_q


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_bound_is_the_mean_of_log_p_minus_log_q(seed, recurrent):
    """By draws from q and the densities of the program itself; the quadratic bound of a recurrent model lies below."""
    model, data = switching_model(seed=seed, recurrent=recurrent), random_data(T=4, seed=seed)
    posterior, num = switching_variational(model, data), 20_000
    z, log_q = drawn(posterior, num)
    with torch.no_grad():
        gain = joint(model, data, z) - log_q
    error = 4.5 * gain.std() / num**0.5
    assert posterior.elbo < gain.mean() + error
    if not recurrent:
        assert posterior.elbo > gain.mean() - error


def test_known_regimes_make_the_bound_tight():
    """A chain that cannot move from a regime that is certain: q(x) is the Kalman smoother of that regime."""
    model = switching_model(K=2)
    model.transition.chain.matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=D)
    model.initial.chain.probs = torch.tensor([1.0, 0.0], dtype=D)
    data = random_data((2,), T=5)
    exact = enumerate_regimes(model, data)
    posterior = switching_variational(model, data)
    close(posterior.elbo, exact.log_likelihood.sum(-1))
    close(posterior.mean, exact.mean)


def test_recurrent_bound_lies_below_the_evidence_by_quadrature():
    """T = 2, one dimension: sum over both regimes, integral over x_1 on a grid."""
    for seed in range(4):
        model = switching_model(K=2, n=1, p=1, recurrent=True, seed=seed)
        data = random_data(T=2, p=1, missing=0.0, seed=seed)
        bound, grid = model.bind(), torch.linspace(-15, 15, 6001, dtype=D)
        t = data.times
        first = bound.initial.chain.log_weights(t[:1], None)[0]
        table = bound.transition.chain.log_matrix(t[:1], t[1:], grid[:, None])
        totals = []
        for i in range(2):
            start = bound.initial.regimes[i](t[:1], None).base_dist
            here = Normal(start.loc[0, 0], start.scale.reshape(-1)[0]).log_prob(grid) + first[i]
            here = here + bound.emission.regimes[i](grid[:, None], t[:1], None).log_prob(data.values[0])
            for j in range(2):
                F, b, Q = (p.reshape(()) for p in bound.transition.regimes[j].affine(t[:1], t[1:], None))
                H, d, R = (p.reshape(()) for p in bound.emission.regimes[j].affine(t[1:], None))
                spread = ((H * Q) ** 2 + R**2).sqrt()
                there = Normal(H * (F * grid + b) + d, spread).log_prob(data.values[1, 0])
                totals.append((here + table[:, i, j] + there).logsumexp(0) + (grid[1] - grid[0]).log())
        evidence = torch.stack(totals).logsumexp(0)
        posterior = switching_variational(model, data, tolerance=1e-12)
        assert posterior.elbo <= evidence + 1e-6
        assert (posterior.trace.diff() > -1e-9).all()


@pytest.mark.parametrize("recurrent, u", [(False, 0), (False, 1), (True, 0)])
def test_em_ascends_on_pooled_ragged_series_with_gaps(recurrent, u):
    model = diagonal_model(recurrent=recurrent, u=u)
    data = random_data((4,), T=12, u=u, lengths=torch.tensor([12, 9, 5, 1]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = switching_em(model, data, max_iterations=12, tolerance=0.0)
    assert (result.elbo.diff() > -1e-9 * result.elbo.abs().max()).all() and result.elbo[-1] > result.elbo[0] + 1
    assert result.num_iterations == 12 and all(torch.equal(before[n], p) for n, p in model.named_parameters())
    if not recurrent:
        short = TimeSeries(data.times[:5], data.values[2, :5], mask=data.mask[2, :5], inputs=None)
        if not u:
            exact = enumerate_regimes(result.model, short).log_likelihood.sum()
            assert switching_variational(result.model, short).elbo <= exact + 1e-9


def expected_log_joint(model, data, regimes, path, psi):
    """E_q log p(x, s, y); for a recurrent chain the quadratic bound of its logsumexp at ``psi``."""
    field = MeanField(switching_system(model, data))
    total = (regimes.probs * field.expected_terms(path)).sum() + (regimes.probs[:, 0] * field.system.log_initial).sum()
    if psi is None:
        return total + (regimes.pairwise * field.system.log_transition).sum()
    r, M = field.logits
    A = curvature(2, r)
    logits = torch.einsum("ijn,...n->...ij", M, path.mean[:, :-1]) + r
    away = logits - psi
    square = torch.einsum("...ij,jk,...ik->...i", away, A, away)
    square = square + torch.einsum("ijn,jk,ikm,...nm->...i", M, A, M, path.covariance[:, :-1])
    lse = psi.logsumexp(-1) + (away * psi.softmax(-1)).sum(-1) + 0.5 * square
    return total + (regimes.pairwise * (logits - lse.unsqueeze(-1))).sum()


@pytest.mark.parametrize("recurrent", [False, True])
def test_m_step_is_a_maximum_of_the_bound(recurrent):
    """After an M step the gradient of the bound, with q held, vanishes in every parameter."""
    model, data = diagonal_model(recurrent=recurrent), random_data((3,), T=9)
    posterior = switching_variational(model, data, max_sweeps=3)
    with torch.no_grad():
        field = MeanField(switching_system(model, data))
        regimes = field.start(posterior.probs, posterior.pairwise, posterior.mean)
        path = field.path(regimes)
        regimes, _ = field.regimes(path)
        before = expected_log_joint(model, data, regimes, path, field.psi)
        switching_m_step(model, field, regimes, path, ())
    total = expected_log_joint(model, data, regimes, path, field.psi)
    assert total.detach() > before + 1
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in grads if g is not None) < 1e-6


def test_em_finds_regimes_and_keeps_what_is_fixed():
    """Two scalar regimes, one that decays and one that grows slowly, seen with little noise."""
    moves = [ssm.dynamics.LinearNormal(1, matrix=torch.tensor([[a]]), scale=0.3) for a in (-0.8, 0.95)]
    look = ssm.emissions.LinearNormal(1, 1, matrix=torch.ones(1, 1), scale=0.1)
    chain = ssm.dynamics.MarkovChain(2, matrix=torch.tensor([[0.95, 0.05], [0.05, 0.95]]))
    start = [ssm.dynamics.NormalInitial(1)] * 2
    initial = ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), start)
    true = StateSpaceModel(
        initial, ssm.dynamics.SwitchingLinear(chain, moves), ssm.emissions.SwitchingLinear([look] * 2)
    ).double()
    z, y = true.bind()(TimeSeries(torch.arange(150.0).expand(6, 150).clone()))
    guess = [ssm.dynamics.LinearNormal(1, matrix=torch.tensor([[a]])) for a in (-0.3, 0.5)]
    look = ssm.emissions.LinearNormal(1, 1, matrix=torch.ones(1, 1), scale=0.2)
    initial = ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2)
    model = StateSpaceModel(
        initial,
        ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), guess),
        ssm.emissions.SwitchingLinear([look] * 2),
    ).double()
    fixed = ["emission.regimes.1.matrix", "emission.regimes.1.offset"]  # shared: named by the last
    data = TimeSeries(torch.arange(150.0), y.detach().double())
    result = switching_em(model, data, fixed=fixed, max_iterations=40)
    found = [float(regime.matrix.detach()) for regime in result.model.transition.regimes]
    assert abs(found[0] + 0.8) < 0.1 and abs(found[1] - 0.95) < 0.1
    assert result.model.emission.regimes[0].matrix == 1 and result.model.emission.regimes[0].offset == 0
    agree = (result.posterior.probs.argmax(-1) == z[..., 0].long()).double().mean()
    assert agree > 0.85


def test_errors_name_the_way_out():
    data = random_data((2,), T=4)
    with pytest.raises(TypeError, match="partly missing.*covariance='diagonal'"):
        switching_em(switching_model(), data)
    model = diagonal_model()
    with pytest.raises(ValueError, match="names"):
        switching_em(model, data, fixed=["nothing"])
    jump = ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovJump(2), [ssm.dynamics.LinearNormal(2) for _ in range(2)])
    other = StateSpaceModel(diagonal_model().initial, jump.double(), diagonal_model().emission)
    with pytest.raises(TypeError, match="no closed form for MarkovJump"):
        switching_em(other, data)
    assert switching_em(other, data, fixed=["transition.chain.rates"], max_iterations=2).num_iterations == 2
