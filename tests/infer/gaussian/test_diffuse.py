"""Diffuse starts against the dense limit and against statsmodels."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from torch.autograd import gradcheck

import pyro_ssm as ssm
from pyro_ssm.components import Diffuse, Initial
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import Marginal, kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.models import StateSpaceModel
from tests.infer.gaussian.linear import D, Drift, Look, Start, dense, random_data, random_model, root
from tests.infer.gaussian.test_kalman import close, each

BATCHES = [(), (3,), (2, 3)]


class Unknown(Diffuse, Initial):
    """z_1 = mean + root e + columns delta."""

    def __init__(self, mean, root, columns):
        super().__init__()
        self.state_dim, self.mean, self.root, self.columns = mean.shape[-1], mean, root, columns

    def moments(self, time, inputs):
        return self.mean, self.root, self.columns


def unknown_model(q=2, n=3, p=2, u=2, seed=0):
    """Random directions are diffuse, beside a proper part of full rank."""
    model = random_model(n, p, u, seed=seed)
    columns = torch.randn(n, q, dtype=D)
    return StateSpaceModel(Unknown(model.initial.mean, model.initial.root, columns), model.transition, model.emission)


def limit(model, data):
    """Log-likelihood, smoothed mean and covariance for kappa -> infinity, from the dense law of one series."""
    start = model.initial

    def shifted(by):
        first = Start(start.mean + by, start.root)
        return dense(SimpleNamespace(initial=first, transition=model.transition, emission=model.emission), data)

    z, P, mean, V, cross = shifted(torch.zeros_like(start.mean))
    columns = [shifted(column) for column in start.columns.mT]
    A, X = torch.stack([c[0] - z for c in columns], -1), torch.stack([c[2] - mean for c in columns], -1)
    seen = data.mask.flatten()
    V, X, v, cross = V[seen][:, seen], X[seen], data.values.flatten()[seen] - mean[seen], cross[:, seen]
    information = X.mT @ torch.linalg.solve(V, X)
    values, vectors = torch.linalg.eigh(information)
    found = values > 1e-9 * values.max()
    inverse = (vectors[:, found] / values[found]) @ vectors[:, found].mT
    delta = inverse @ X.mT @ torch.linalg.solve(V, v)
    rest = torch.linalg.solve(V, v - X @ delta)
    total = -0.5 * (torch.logdet(V) + values[found].log().sum() + v @ rest + len(v) * math.log(2 * math.pi))
    left = A - cross @ torch.linalg.solve(V, X)
    T = data.num_times
    mean = z + A @ delta + cross @ rest
    covariance = P - cross @ torch.linalg.solve(V, cross.mT) + left @ inverse @ left.mT
    return total, mean.reshape(T, -1), covariance.reshape(T, len(z) // T, T, -1)


# ------------------------------------------------------------------------------------------- against the dense limit


@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("batch", BATCHES)
def test_log_likelihood_and_smoother_are_the_dense_limit(batch, q):
    model, data = unknown_model(q, seed=q), random_data(batch, own_times=True, seed=q)
    result, smoothed = kalman_filter(model, data), kalman_smoother(model, data)
    assert result.log_likelihood.shape == (*batch, 6) and result.filtered_diffuse.shape == (*batch, 6, 3, q)
    for position, one in each(data):
        total, mean, covariance = limit(model, one)
        close(result.log_likelihood[position].sum(), total)
        close(smoothed.mean[position], mean)
        for k in range(6):
            L = smoothed.scale_tril[position][k]
            close(L @ L.T, covariance[k, :, k])
            if k:
                close(smoothed.lag_one_covariance[position][k - 1], covariance[k - 1, :, k])


@pytest.mark.parametrize("p", [1, 4])
def test_every_step_of_the_filter_is_the_limit_of_what_was_seen_so_far(p):
    """More or fewer rows than diffuse directions; nothing at all at first, and then half a row."""
    model, data = unknown_model(3, p=p, seed=7), random_data(p=p, num_times=8, missing=0.3, seed=7)
    first = torch.arange(8)[:, None] < 2
    half = (torch.arange(8)[:, None] == 2) & (torch.arange(p) > 0)
    data = data.hide(first | half)
    result = kalman_filter(model, data)
    for k in range(2, 8):
        so_far = data.hide((torch.arange(8) > k)[:, None])
        total, mean, covariance = limit(model, so_far)
        close(result.log_likelihood[: k + 1].sum(), total)
        if not result.filtered_diffuse[k].any():
            close(result.filtered_mean[k], mean[k])
            close(result.filtered_scale_tril[k] @ result.filtered_scale_tril[k].T, covariance[k, :, k])
    assert result.filtered_diffuse[2].any() and not result.filtered_diffuse[-1].any()
    assert (result.log_likelihood[:2] == 0).all()


def test_a_batch_with_different_patterns_is_a_loop():
    """Series that become proper at different times; one of them padded before the others are."""
    model = unknown_model(3, p=1)
    data = random_data((4,), num_times=9, p=1, missing=0.0, own_times=True, lengths=torch.tensor([9, 3, 9, 9]))
    where = torch.zeros(4, 9, 1, dtype=torch.bool)
    where[0, 1:5], where[2, :4], where[3, 2] = True, True, True
    data = data.hide(where)
    result, smoothed = kalman_filter(model, data), kalman_smoother(model, data)
    draws = sample_posterior(model, data, (3,))
    assert draws.shape == (3, 4, 9, 3) and (draws[:, 1, 3:] == draws[:, 1, 2:3]).all()
    assert (result.log_likelihood[1, 3:] == 0).all()
    for (i,), one in each(data):
        alone, n = kalman_filter(model, one), one.num_times
        close(result.log_likelihood[i, :n], alone.log_likelihood, 1e-10)
        close(smoothed.mean[i, :n], kalman_smoother(model, one).mean, 1e-10)
        close(result.filtered_diffuse[i, :n], alone.filtered_diffuse, 1e-10)
        close(result.log_likelihood[i].sum(), limit(model, one)[0])


def test_sample_posterior_has_the_moments_of_the_limit():
    model, data = unknown_model(2, n=2), random_data(num_times=4)
    size = 20_000
    draws = sample_posterior(model, data, (size,)).reshape(size, 8)
    _, mean, covariance = limit(model, data)
    covariance = covariance.reshape(8, 8)
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean.flatten()).abs() < 5 * deviation / size**0.5).all()
    assert ((draws.T.cov() - covariance).abs() < 5 * 2**0.5 * deviation[:, None] * deviation / size**0.5).all()


def test_refined_grid_and_parameters_with_sample_dims():
    model, coarse = unknown_model(3), random_data((2,), own_times=True)
    fine = coarse.refine(2)
    result, smoothed = kalman_filter(model, fine), kalman_smoother(model, fine)
    for i in range(2):
        total, mean, _ = limit(model, coarse.series(i).refine(2))
        close(result.log_likelihood[i].sum(), total)
        close(smoothed.mean[i], mean)
    t, R = model.transition, model.emission.R
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=D)[:, None, None, None, None]
    e = model.emission
    many = StateSpaceModel(model.initial, t, Look(e.H, e.d, e.W, R * scales))
    one = StateSpaceModel(model.initial, t, Look(e.H, e.d, e.W, 2.0 * R))
    close(kalman_filter(many, coarse).log_likelihood[2], kalman_filter(one, coarse).log_likelihood, 1e-11)
    close(kalman_smoother(many, coarse).mean[2], kalman_smoother(one, coarse).mean, 1e-11)


def test_dependent_columns_and_noiseless_observations():
    """Two diffuse columns that are one, and R = 0: the first values are the state, exactly."""
    model, data = unknown_model(1, p=1), random_data(p=1, missing=0.0)
    columns = model.initial.columns
    twice = StateSpaceModel(
        Unknown(model.initial.mean, model.initial.root, torch.cat([columns, columns], -1) / 2**0.5),
        model.transition,
        model.emission,
    )
    close(kalman_smoother(twice, data).mean, kalman_smoother(model, data).mean)
    close(kalman_filter(twice, data).log_likelihood, kalman_filter(model, data).log_likelihood)
    e, n = model.emission, 3
    bare = StateSpaceModel(
        Unknown(torch.zeros(n, dtype=D), torch.zeros(n, n, dtype=D), torch.eye(n, dtype=D)),
        model.transition,
        Look(e.H, e.d, e.W, 0 * e.R),
    )
    smoothed = kalman_smoother(bare, data)
    # all of the state is diffuse, so its proper part does not matter, and makes the dense law regular
    proper = Unknown(torch.zeros(n, dtype=D), root(n), torch.eye(n, dtype=D))
    total, mean, _ = limit(SimpleNamespace(initial=proper, transition=bare.transition, emission=bare.emission), data)
    close(smoothed.log_likelihood.sum(), total)
    close(smoothed.mean, mean)
    seen = (smoothed.mean @ e.H.T).squeeze(-1) + e.d + (data.inputs @ e.W.T).squeeze(-1)
    close(seen, data.values.squeeze(-1), 1e-9)


def test_a_transition_that_loses_a_diffuse_direction():
    """What decays to nothing at the first move is never known again, and changes nothing later."""
    F = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)
    eye, zero = torch.eye(2, dtype=D), torch.zeros(2, dtype=D)
    start = Unknown(zero, 0 * eye, eye)
    look = Look(torch.tensor([[1.0, 1.0]], dtype=D), zero[:1], torch.zeros(1, 1, dtype=D), torch.ones(1, 1, dtype=D))
    model = StateSpaceModel(start, Drift(F, 0 * F, zero, torch.zeros(2, 1, dtype=D), 0.3 * eye), look)
    seen = TimeSeries(torch.arange(5.0), torch.randn(5, 1, dtype=D))
    assert not kalman_filter(model, seen).filtered_diffuse[1:].any()
    smoothed = kalman_smoother(model, seen)  # the first value tells it
    close(smoothed.mean[0].sum(), seen.values[0, 0])
    late = seen.hide((torch.arange(5) == 0)[:, None])
    assert not kalman_filter(model, late).predicted_diffuse[2:].any()
    with pytest.raises(ValueError, match="kalman_smoother: the observations do not determine the diffuse start"):
        kalman_smoother(model, late)


def test_float32_is_right():
    model, data = unknown_model(3), random_data((3,))
    small = kalman_filter(single(model), data.to(dtype=torch.float32))
    assert small.log_likelihood.dtype == torch.float32 and small.filtered_diffuse.dtype == torch.float32
    exact = kalman_filter(model, data)
    assert ((small.log_likelihood - exact.log_likelihood).abs() < 1e-4 * (1 + exact.log_likelihood.abs())).all()
    smoothed, wanted = (
        kalman_smoother(single(model), data.to(dtype=torch.float32)).mean,
        kalman_smoother(model, data).mean,
    )
    assert ((smoothed - wanted).abs() < 1e-4 * (1 + wanted.abs())).all()


def single(model):
    i, t, e = model.initial, model.transition, model.emission
    parts = [
        [x.float() for x in xs] for xs in ((i.mean, i.root, i.columns), (t.F, t.E, t.b, t.U, t.Q), (e.H, e.d, e.W, e.R))
    ]
    return StateSpaceModel(Unknown(*parts[0]), Drift(*parts[1]), Look(*parts[2]))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients(batch):
    model, data = unknown_model(2, n=2, p=2, u=1), random_data(batch, num_times=4, u=1)
    i, t, e = model.initial, model.transition, model.emission

    def f(mean, L, columns, F, b, Q, H, d, R, y):
        built = StateSpaceModel(Unknown(mean, L, columns), Drift(F, t.E, b, t.U, Q), Look(H, d, e.W, R))
        smoothed = kalman_smoother(built, data._derive(values=y))
        return smoothed.log_likelihood, smoothed.mean, smoothed.scale_tril @ smoothed.scale_tril.mT

    arguments = (i.mean, i.root, i.columns, t.F, t.b, t.Q, e.H, e.d, e.R, data.values)
    assert gradcheck(f, [x.clone().requires_grad_() for x in arguments], fast_mode=True)


# ----------------------------------------------------------------------------------------------- against statsmodels


def local_level(volume):
    scale = 1469.2**0.5, 15098.5**0.5
    eye, zero = torch.eye(1, dtype=D), torch.zeros(1, dtype=D)
    return StateSpaceModel(
        ssm.dynamics.DiffuseInitial(1),
        Drift(eye, 0 * eye, zero, eye, scale[0] * eye),
        Look(eye, zero, eye, scale[1] * eye),
    ), TimeSeries(torch.arange(float(len(volume))), volume[:, None])


def test_nile_local_level_equals_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    volume = torch.tensor(sm.datasets.nile.load_pandas().data["volume"].to_numpy(), dtype=D)
    reference = sm.tsa.UnobservedComponents(volume.numpy(), "local level", use_exact_diffuse=True)
    results = reference.smooth([15098.5, 1469.2])
    model, data = local_level(volume)
    smoothed = kalman_smoother(model, data)
    total = smoothed.log_likelihood.sum()
    close(total, torch.tensor(float(results.llf), dtype=D), 1e-10)
    assert abs(total + 633.464564) < 1e-6
    assert abs(total + 0.5 * math.log(2 * math.pi) + 632.545625) < 1e-6
    close(smoothed.mean[:, 0], torch.as_tensor(results.smoothed_state[0]), 1e-8)
    close(smoothed.scale_tril[:, 0, 0].square(), torch.as_tensor(results.smoothed_state_cov[0, 0]), 1e-8)


@pytest.mark.parametrize("irregular", [2.0, 0.0])
def test_local_linear_trend_with_missing_values_equals_statsmodels(irregular):
    """Missing at the very start, right after the first value, and later; also without observation noise."""
    sm = pytest.importorskip("statsmodels.api")
    torch.manual_seed(0)
    y = torch.randn(40, dtype=D).cumsum(0) + 0.3 * torch.arange(40)
    y[[0, 1, 3, 4, 5, 20, 21]] = float("nan")
    if irregular:
        reference = sm.tsa.UnobservedComponents(y.numpy(), "local linear trend", use_exact_diffuse=True)
        results = reference.smooth([irregular, 0.7, 0.1])
    else:
        reference = sm.tsa.UnobservedComponents(
            y.numpy(), level=True, stochastic_level=True, trend=True, stochastic_trend=True, use_exact_diffuse=True
        )
        results = reference.smooth([0.7, 0.1])
    F, eye = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=D), torch.eye(2, dtype=D)
    zero, one = torch.zeros(2, dtype=D), torch.ones(1, 1, dtype=D)
    noise = torch.tensor([0.7, 0.1], dtype=D).sqrt().diag()
    model = StateSpaceModel(
        ssm.dynamics.DiffuseInitial(2),
        Drift(F, 0 * F, zero, torch.zeros(2, 1, dtype=D), noise),
        Look(eye[:1], zero[:1], one, irregular**0.5 * one),
    )
    data = TimeSeries(torch.arange(40.0), y[:, None])
    smoothed = kalman_smoother(model, data)
    close(smoothed.log_likelihood, torch.as_tensor(results.llf_obs.copy()), 1e-8)
    close(smoothed.log_likelihood.sum(), torch.tensor(float(results.llf), dtype=D), 1e-8)
    close(smoothed.mean, torch.as_tensor(results.smoothed_state.T.copy()), 1e-7)
    covariance = torch.as_tensor(results.smoothed_state_cov.transpose(2, 0, 1).copy())
    close(smoothed.scale_tril @ smoothed.scale_tril.mT, covariance, 1e-7)


# ---------------------------------------------------------------------------------------------------------- component


def test_initial_law_of_some_coordinates():
    initial = ssm.dynamics.DiffuseInitial(3, [True, False, True], loc=2.0, scale=0.5)
    mean, scale_tril, columns = initial.moments(torch.zeros(1, dtype=D), None)
    assert mean.tolist() == [[0.0, 2.0, 0.0]] and torch.allclose(
        scale_tril[0].diagonal(), torch.tensor([0.0, 0.5, 0.0])
    )
    assert columns.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    assert not list(ssm.dynamics.DiffuseInitial(3).parameters())
    with pytest.raises(ValueError, match="`diffuse` must have 3 entries"):
        ssm.dynamics.DiffuseInitial(3, [True])
    with pytest.raises(TypeError, match="`diffuse` must be booleans"):
        ssm.dynamics.DiffuseInitial(2, [0.5, 1.0])


def part_diffuse(diffuse=(True, False)):
    return StateSpaceModel(
        ssm.dynamics.DiffuseInitial(2, list(diffuse)),
        ssm.dynamics.LinearNormal(2, matrix=torch.tensor([[1.0, 0.4], [0.0, 0.8]])),
        ssm.emissions.LinearNormal(2, 1, matrix=torch.tensor([[1.0, 0.3]])),
    ).double()


def test_nothing_diffuse_is_the_normal_start():
    model, data = part_diffuse((False, False)), random_data(p=1, inputs=False)
    proper = StateSpaceModel(ssm.dynamics.NormalInitial(2).double(), model.transition, model.emission)
    for one, other in zip(kalman_filter(model, data), kalman_filter(proper, data), strict=True):
        assert torch.equal(one, other)


def test_an_explicit_path_is_refused_with_the_way_out():
    model, data = part_diffuse(), random_data(p=1, inputs=False)
    for use in (lambda: model(data), lambda: Marginal(model)(data.without_values())):
        with pytest.raises(TypeError, match=r"infinite variance.*kalman_filter or infer.Marginal.*NormalInitial"):
            use()


def test_marginal_takes_a_prior_and_learns():
    model, data = part_diffuse(), random_data((2,), p=1, inputs=False, own_times=True)
    model.initial.loc = PyroSample(dist.Normal(torch.zeros(2, dtype=D), 1.0).to_event(1))
    trace = pyro.poutine.trace(Marginal(model)).get_trace(data)
    trace.compute_log_prob()
    drawn = trace.nodes["initial.loc"]["value"]
    wanted = kalman_filter(model.bind({"initial.loc": drawn}), data).log_likelihood.sum(-1)
    close(trace.nodes["y"]["log_prob"], wanted.detach())
    many = kalman_filter(model.bind({"initial.loc": torch.stack([drawn, drawn + 1])[:, None]}), data)
    assert many.log_likelihood.shape == (2, 2, 6)
    close(many.log_likelihood[0].sum(-1), wanted.detach())
    wanted.sum().backward()
    assert model.initial.scale_unconstrained.grad[1].abs() > 0 and model.initial.scale_unconstrained.grad[0] == 0


def test_predictive_forecast_goes_on_from_a_diffuse_start():
    model, data = part_diffuse((True, True)), random_data((2,), p=1, inputs=False)
    times = [100.0, 101.0]
    drawn = ssm.predict.forecast(model, None, data, times=times, num_samples=4000)
    exact = ssm.infer.gaussian.forecast(model, data, times)
    deviation = exact.scale_tril.squeeze(-1)
    assert ((drawn.values.mean(0) - exact.mean).abs() < 5 * deviation / 4000**0.5).all()
    assert ((drawn.values.std(0) / deviation - 1).abs() < 5 / 8000**0.5).all()


def test_what_the_data_does_not_determine_is_refused():
    """One value cannot tell level and slope; the likelihood of it is still right."""
    model, data = part_diffuse((True, True)), random_data((2,), p=1, inputs=False, missing=0.0)
    hidden = torch.zeros(2, 6, 1, dtype=torch.bool)
    hidden[1, 1:] = True
    data = data.hide(hidden)
    result = kalman_filter(model, data)
    h = model.emission.matrix.detach()
    close(result.log_likelihood[1, 0].detach(), -h.norm().log() - 0.5 * math.log(2 * math.pi), 1e-10)
    for ask in (kalman_smoother, sample_posterior):
        with pytest.raises(
            ValueError, match=rf"{ask.__name__}: the observations do not determine.*series 1,.*NormalInitial"
        ):
            ask(model, data)
    with pytest.raises(ValueError, match="forecast: the observations do not determine the diffuse start"):
        ssm.infer.gaussian.forecast(model, data, [50.0])


def test_all_missing_is_a_prediction():
    model, data = unknown_model(2), random_data((2,))
    result = kalman_filter(model, data.hide(torch.tensor(True)))
    assert (result.log_likelihood == 0).all()
    infinite = result.predicted_diffuse[1, -1]
    F = torch.eye(3, dtype=D)
    for k in range(5):
        F = model.transition.affine(data.times[k : k + 1], data.times[k + 1 : k + 2], None).matrix[0] @ F
    close(infinite @ infinite.T, F @ model.initial.columns @ model.initial.columns.T @ F.T)


def test_one_time():
    model, data = unknown_model(2, p=2), random_data(num_times=1, missing=0.0)
    total, mean, covariance = limit(model, data)
    smoothed = kalman_smoother(model, data)
    close(smoothed.log_likelihood.sum(), total)
    close(smoothed.mean, mean)
    close(smoothed.scale_tril[0] @ smoothed.scale_tril[0].T, covariance[0, :, 0])
    assert smoothed.gain.shape == (0, 3, 3)


def test_a_root_of_another_shape_is_refused():
    model, data = unknown_model(2), random_data()
    wrong = StateSpaceModel(
        Unknown(model.initial.mean, root(2), model.initial.columns), model.transition, model.emission
    )
    with pytest.raises(ValueError, match=r"`scale_tril` of the initial law has shape \(2, 2\), but \(\.\.\., 3, 3\)"):
        kalman_filter(wrong, data)
