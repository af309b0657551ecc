"""One filter in three forms: loop, scan, and one observation at a time."""

import pytest
import torch
from torch.autograd import gradcheck

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.infer.gaussian import online
from pyro_ssm.models import StateSpaceModel
from tests.infer.gaussian.linear import (
    D,
    Drift,
    Look,
    Start,
    dense_log_likelihood,
    dense_posterior,
    random_data,
    random_model,
)
from tests.infer.gaussian.test_diffuse import local_level, unknown_model
from tests.infer.gaussian.test_kalman import BATCHES, close, each


def laws(result):
    """Parts that do not depend on the sign or rank of a square root."""
    fields = result._asdict()
    return {name: x @ x.mT if name.endswith(("tril", "diffuse")) else x for name, x in fields.items()}


def same(one, other, tolerance=1e-9):
    for (name, a), b in zip(laws(one).items(), laws(other).values(), strict=True):
        assert a.shape == b.shape, name
        close(a, b, tolerance)


def cases():
    lengths = torch.tensor([6, 1, 4])
    return {
        "one": random_data(),
        "batch, own times": random_data((2, 3), own_times=True),
        "nothing missing": random_data((3,), missing=0.0, num_times=33),
        "ragged": random_data((3,), own_times=True, lengths=lengths),
        "refined": random_data((2,)).refine(3),
        "one time": random_data((2,), num_times=1),
        "two times": random_data(num_times=2),
        "all missing": random_data((2,)).hide(torch.tensor(True)),
        "without inputs": random_data(inputs=False, num_times=9),
    }


@pytest.mark.parametrize("make", [random_model, unknown_model])
@pytest.mark.parametrize("case", cases())
def test_parallel_is_sequential(case, make):
    model, data = make(seed=2), cases()[case]
    same(kalman_filter(model, data, method="parallel"), kalman_filter(model, data, method="sequential"))
    determined = case not in ("all missing", "ragged", "one time")
    if make is random_model or determined:
        sequential = kalman_smoother(model, data, method="sequential")
        parallel = kalman_smoother(model, data, method="parallel")
        same(parallel, sequential)
        close(parallel.lag_one_covariance, sequential.lag_one_covariance)
        draws = []
        for method in ("sequential", "parallel"):
            torch.manual_seed(3)
            draws.append(sample_posterior(model, data, (4,), method=method))
        close(*draws)


def test_parameters_with_sample_dims_go_through_the_scan():
    model, data = random_model(), random_data((2,))
    e, scales = model.emission, torch.tensor([0.5, 1.0, 2.0], dtype=D)[:, None, None, None, None]
    many = StateSpaceModel(model.initial, model.transition, Look(e.H, e.d, e.W, e.R * scales))
    same(kalman_filter(many, data, method="parallel"), kalman_filter(many, data))
    same(kalman_smoother(many, data, method="parallel"), kalman_smoother(many, data))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_of_the_scan(batch):
    model, data = random_model(n=2, u=1), random_data(batch, num_times=4, u=1)
    i, t, e = model.initial, model.transition, model.emission

    def f(mean, L, F, b, Q, H, d, R, y, method="parallel"):
        built = StateSpaceModel(Start(mean, L), Drift(F, t.E, b, t.U, Q), Look(H, d, e.W, R))
        smoothed = kalman_smoother(built, data._derive(values=y), method=method)
        return smoothed.log_likelihood.sum(), smoothed.mean, smoothed.scale_tril @ smoothed.scale_tril.mT

    arguments = [x.clone().requires_grad_() for x in (i.mean, i.root, t.F, t.b, t.Q, e.H, e.d, e.R, data.values)]
    assert gradcheck(f, arguments, fast_mode=True)
    totals = [f(*arguments, method=method)[0] for method in ("parallel", "sequential")]
    for one, other in zip(*(torch.autograd.grad(total, arguments) for total in totals), strict=True):
        close(one, other)


def test_scan_in_float32_is_right_where_variances_are_unequal():
    """Observation variance 1e-6 beside state noise 1."""
    torch.manual_seed(0)
    eye, zero, T = torch.eye(2, dtype=D), torch.zeros(2, dtype=D), 300
    y = torch.randn(T, 2).cumsum(0)

    def build(dtype):
        parts = [x.to(dtype) for x in (zero, eye, 0.95 * eye, 0 * eye, zero, eye, eye, 1e-3 * eye, zero)]
        m, L, F, E, b, Q, H, R, d = parts
        return StateSpaceModel(Start(m, L), Drift(F, E, b, E[:, :1], Q), Look(H, d, E[:, :1], R))

    data = TimeSeries(torch.arange(float(T)), y)
    exact = kalman_filter(build(D), data.to(dtype=D)).log_likelihood.sum()
    rough = kalman_filter(build(torch.float32), data, method="parallel").log_likelihood.double().sum()
    assert abs(rough - exact) < 1e-5 * abs(exact)


def test_scan_refuses_what_it_cannot_do_and_says_what_can():
    """Noise only in a direction that is not seen: the loop is right, a step alone has no density."""
    model, data = random_model(p=1), random_data(p=1, missing=0.0)
    e, t = model.emission, model.transition
    bare = StateSpaceModel(model.initial, Drift(t.F, t.E, t.b, t.U, 0 * t.Q), Look(e.H, e.d, e.W, 0 * e.R))
    three = data._derive(**{name: getattr(data, name)[:3] for name in ("times", "values", "mask", "inputs")})
    exact = dense_log_likelihood(bare, three)
    torch.testing.assert_close(kalman_filter(bare, three).log_likelihood.sum(), exact, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match='singular at some step.*Use method="sequential"'):
        kalman_filter(bare, three, method="parallel")
    with pytest.raises(
        ValueError, match="kalman_smoother: `method` must be one of 'auto', 'sequential', 'parallel', got 'fast'"
    ):
        kalman_smoother(model, data, method="fast")


# -------------------------------------------------------------------------------------------------------- on-line


def run_online(model, data):
    """The series ``data`` (all of one length) observation by observation; the state after each."""
    bound, inputs = model.bind(), data.inputs

    def held(k):
        return None if inputs is None else inputs[..., k, :]

    state, states = None, []
    for k in range(data.num_times):
        time = data.times[..., k]
        state = online.init(bound, time, held(k)) if state is None else online.predict(bound, state, time, held(k))
        state = online.update(bound, state, data.values[..., k, :], data.mask[..., k, :])
        states.append(state)
    return states


@pytest.mark.parametrize("make", [random_model, unknown_model])
@pytest.mark.parametrize("batch", BATCHES)
def test_online_is_the_filter(batch, make):
    model, data = make(seed=1), random_data(batch, own_times=True, num_times=8)
    whole = kalman_filter(model, data)
    totals = whole.log_likelihood.cumsum(-1)
    for k, state in enumerate(run_online(model, data)):
        assert state.mean.shape == (*batch, 3) and state.log_likelihood.shape == batch
        close(state.log_likelihood, totals[..., k])
        close(state.mean, whole.filtered_mean[..., k, :])
        close(
            state.scale_tril @ state.scale_tril.mT,
            (whole.filtered_scale_tril @ whole.filtered_scale_tril.mT)[..., k, :, :],
        )
    assert state.is_proper and torch.equal(state.time, data.times[..., -1])


def test_online_gradients_are_those_of_the_filter():
    model, data = unknown_model(), random_data()
    parameters = [
        p.requires_grad_() for p in (model.transition.F, model.transition.Q, model.emission.H, model.emission.R)
    ]
    totals = run_online(model, data)[-1].log_likelihood, kalman_filter(model, data).log_likelihood.sum()
    for one, other in zip(*(torch.autograd.grad(total, parameters) for total in totals), strict=True):
        close(one, other)


def test_online_errors_name_the_argument():
    model = random_model().bind()
    state = online.init(model, 1.0)
    with pytest.raises(ValueError, match=r"online.predict: `time` must be later.*state, 1\.0, got 1\.0"):
        online.predict(model, state, 1.0)
    with pytest.raises(ValueError, match=r"`values` has shape \(3,\), but the emission gives 2 values"):
        online.update(model, state, torch.zeros(3))
    with pytest.raises(TypeError, match="online.init needs a component that is AffineGaussian, got GatedTransition"):
        online.init(ssm.models.dmm(2, 1), 0.0)


# ------------------------------------------------------------------------------------------------------- forecast


@pytest.mark.parametrize("own_times", [False, True])
def test_forecast_is_the_filter_of_the_longer_series(own_times):
    """The laws at future times are those that observations there would be judged by."""
    torch.manual_seed(0)
    model, lengths = random_model(), torch.tensor([6, 3, 5]) if own_times else None
    data = random_data((3,), own_times=own_times, lengths=lengths)
    ends = data.times[torch.arange(3), lengths - 1] if own_times else data.times[-1:]
    times = (ends[:, None] if own_times else ends) + torch.tensor([0.4, 1.5], dtype=D)
    inputs, y = torch.randn(3, 2, 2, dtype=D), torch.randn(3, 2, dtype=D)
    law = ssm.infer.gaussian.forecast(model, data, times, inputs=inputs)
    assert law.exact and law.mean.shape == (3, 2, 2) and law.state_scale_tril.shape == (3, 2, 3, 3)
    close(law.times, times)
    for (i,), one in each(data):
        for h in range(2):
            longer = one.extend(times[i] if own_times else times, inputs[i])
            values = torch.cat([one.values, torch.zeros(2, 2, dtype=D)])
            values[one.num_times + h] = y[i]
            mask = torch.cat([one.mask, torch.zeros(2, 2, dtype=torch.bool)])
            mask[one.num_times + h] = True
            seen = kalman_filter(model, longer.replace(values=values, mask=mask))
            wanted = seen.log_likelihood[one.num_times + h]
            found = torch.distributions.MultivariateNormal(law.mean[i, h], scale_tril=law.scale_tril[i, h]).log_prob(
                y[i]
            )
            close(found, wanted)
            close(law.state_mean[i, h], seen.predicted_mean[one.num_times + h])


def test_forecast_has_the_moments_of_predictive_draws_and_a_gradient():
    model, data = random_model(), random_data((2,), inputs=False)
    law = ssm.infer.gaussian.forecast(model, data, [10.0, 12.0])
    drawn = ssm.predict.forecast(model, None, data, [10.0, 12.0], num_samples=4000)
    deviation = law.scale_tril.square().sum(-1).sqrt()
    assert ((drawn.values.mean(0) - law.mean).abs() < 5 * deviation / 4000**0.5).all()
    assert ((drawn.values.std(0) / deviation - 1).abs() < 5 / 8000**0.5).all()
    model.transition.F.requires_grad_()
    assert (
        torch.autograd.grad(ssm.infer.gaussian.forecast(model, data, [10.0]).mean.sum(), model.transition.F)[0]
        .abs()
        .min()
        > 0
    )
    with pytest.raises(ValueError, match="refined grid"):
        ssm.infer.gaussian.forecast(model, data.refine(2), [10.0])


# ----------------------------------------------------------------------------------------------------- robustness


def test_noiseless_observations_are_right_where_they_have_a_density():
    model, data = random_model(p=1), random_data(p=1, missing=0.3)
    e = model.emission
    bare = StateSpaceModel(model.initial, model.transition, Look(e.H, e.d, e.W, 0 * e.R))
    smoothed = kalman_smoother(bare, data)
    seen = (smoothed.mean @ e.H.T).squeeze(-1) + e.d + (data.inputs @ e.W.T).squeeze(-1)
    close(seen[data.mask[:, 0]], data.values[data.mask])
    close(smoothed.log_likelihood.sum(), dense_log_likelihood(bare, data))
    close(smoothed.mean, dense_posterior(bare, data)[0])
    same(kalman_filter(bare, data, method="parallel"), kalman_filter(bare, data))


def test_an_observation_without_density_is_refused_by_name():
    """The same noiseless value twice."""
    model, data = random_model(p=2), random_data((2,), missing=0.0)
    e = model.emission
    twice = StateSpaceModel(model.initial, model.transition, Look(e.H[:1].expand(2, 3), 0 * e.d, 0 * e.W, 0 * e.R))
    with pytest.raises(torch.linalg.LinAlgError, match=r"kalman_filter: .* of step 0 .*singular.*no density"):
        kalman_filter(twice, data)
    with pytest.raises(torch.linalg.LinAlgError, match="online.update: .*singular"):
        run_online(twice, data)
    t = model.transition
    broken = StateSpaceModel(model.initial, Drift(t.F / 0, t.E, t.b, t.U, t.Q), e)
    with pytest.raises(torch.linalg.LinAlgError, match="`matrix` of the transition is not finite"):
        kalman_smoother(broken, data)


def test_shapes_that_do_not_fit_are_refused_by_name():
    model, data = random_model(), random_data()
    t, e = model.transition, model.emission
    with pytest.raises(
        ValueError, match=r"`scale_tril` of the transition has shape .*3, 2\), but \(\.\.\., 3, 3\) is wanted"
    ):
        kalman_filter(StateSpaceModel(model.initial, Drift(t.F, t.E, t.b, t.U, t.Q[:, :2]), e), data)
    model = random_model()
    with pytest.raises(ValueError, match=r"`scale_tril` of the emission has shape \(1, 2, 1\)|\(2, 1\)"):
        kalman_filter(StateSpaceModel(model.initial, model.transition, Look(e.H, e.d, e.W, e.R[:, :1])), data)


def test_smoother_of_a_chain_that_forgets_without_noise():
    """F = 0 in one direction and Q = 0: the next state tells nothing of the last one there."""
    model, data = random_model(n=2, u=1), random_data(u=1, inputs=False, num_times=4)
    F = torch.tensor([[0.9, 0.3], [0.0, 0.0]], dtype=D)
    zero = torch.zeros(2, 2, dtype=D)
    built = StateSpaceModel(model.initial, Drift(F, zero, model.transition.b, model.transition.U, zero), model.emission)
    for method in ("sequential", "parallel"):
        smoothed = kalman_smoother(built, data, method=method)
        mean, covariance = dense_posterior(built, data)
        close(smoothed.mean, mean)
        for k in range(4):
            close((smoothed.scale_tril @ smoothed.scale_tril.mT)[k], covariance[k, :, k])
    torch.manual_seed(0)
    draws = sample_posterior(built, data, (20_000,))
    spread = covariance.reshape(8, 8).diagonal().reshape(4, 2).sqrt()
    assert ((draws.std(0) - spread).abs() < 5 * spread / 200 + 1e-9).all()


@pytest.mark.slow
def test_a_series_of_length_1e5():
    """The scan and the loop agree at the end of a long series, and with the steady state."""
    torch.manual_seed(0)
    T = 100_000
    volume = 900 + 100 * torch.randn(T, dtype=D)
    model, data = local_level(volume)
    scan = kalman_filter(model, data, method="parallel")
    loop = kalman_filter(model, data, method="sequential")
    close(scan.log_likelihood.sum(), loop.log_likelihood.sum())
    close(scan.filtered_mean, loop.filtered_mean)
    q, r = 1469.2, 15098.5
    steady = (-q + (q**2 + 4 * q * r) ** 0.5) / 2  # of the filtered variance
    close(scan.filtered_scale_tril[-1, 0, 0].square(), torch.tensor(steady, dtype=D))
    smoothed = kalman_smoother(model, data, method="parallel")
    close(smoothed.mean[-1], scan.filtered_mean[-1])
