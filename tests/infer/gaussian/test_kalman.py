import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from pyro_ssm.components import Emission
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian import kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.models import StateSpaceModel
from tests.infer.gaussian.linear import (
    D,
    Decay,
    Drift,
    Look,
    Recall,
    Start,
    dense_log_likelihood,
    dense_posterior,
    random_data,
    random_model,
)

BATCHES = [(), (3,), (2, 3)]


def each(data):
    """Every series of a batch, by its position."""
    for position in itertools.product(*(range(size) for size in data.batch_shape)):
        own = data.times[position] if data.has_own_times else data.times
        inputs = None if data.inputs is None else data.inputs[position]
        length = data.num_times if data.lengths is None else int(data.lengths[position])
        yield (
            position,
            TimeSeries(
                own[:length],
                data.values[position][:length],
                mask=data.mask[position][:length],
                inputs=None if inputs is None else inputs[:length],
            ),
        )


def close(one, other, tolerance=1e-9):
    size = float(other.abs().sum()) / max(1, other.numel())
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * (1 + size))


# ------------------------------------------------------------------------------------- against the dense Gaussian


@pytest.mark.parametrize("own_times", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("seed", range(3))
def test_log_likelihood_is_that_of_the_dense_gaussian(seed, batch, own_times):
    model = random_model(seed=seed)
    data = random_data(batch, own_times=own_times, seed=seed)
    totals = kalman_filter(model, data).log_likelihood.sum(-1)
    assert totals.shape == batch
    for position, one in each(data):
        close(totals[position], dense_log_likelihood(model, one))


@pytest.mark.parametrize("n, p", [(1, 1), (1, 4), (5, 1), (2, 3)])
def test_log_likelihood_at_other_sizes_and_without_inputs(n, p):
    model, data = random_model(n, p), random_data(p=p, inputs=False, num_times=9)
    close(kalman_filter(model, data).log_likelihood.sum(-1), dense_log_likelihood(model, data))


@pytest.mark.parametrize("batch", BATCHES)
def test_smoother_is_the_dense_posterior(batch):
    model, data = random_model(seed=4), random_data(batch, own_times=True, seed=4)
    smoothed = kalman_smoother(model, data)
    for position, one in each(data):
        mean, covariance = dense_posterior(model, one)
        close(smoothed.mean[position], mean)
        for k in range(data.num_times):
            L = smoothed.scale_tril[position][k]
            close(L @ L.T, covariance[k, :, k])
            if k:
                close(smoothed.lag_one_covariance[position][k - 1], covariance[k - 1, :, k])


def test_filter_laws_are_the_dense_posteriors_of_what_is_seen_so_far():
    model, data = random_model(seed=5), random_data(seed=5)
    filtered = kalman_filter(model, data)
    for k in range(data.num_times):
        for laws, seen in ((filtered[1:3], k + 1), (filtered[3:5], k)):
            so_far = data.hide((torch.arange(data.num_times) >= seen)[:, None])
            mean, covariance = dense_posterior(model, so_far)
            close(laws[0][k], mean[k])
            close(laws[1][k] @ laws[1][k].T, covariance[k, :, k])
    steps = [dense_log_likelihood(model, data.hide((torch.arange(data.num_times) >= k)[:, None])) for k in range(1, 7)]
    close(filtered.log_likelihood.cumsum(-1), torch.stack(steps))


def test_sample_posterior_has_the_moments_of_the_dense_posterior():
    model, data = random_model(n=2, seed=6), random_data((2,), num_times=4, own_times=True, seed=6)
    draws, size = sample_posterior(model, data, (100, 200)), 20_000
    assert draws.shape == (100, 200, 2, 4, 2)
    for (i,), one in each(data):
        mean, covariance = dense_posterior(model, one)
        covariance = covariance.reshape(8, 8)
        flat = draws[:, :, i].reshape(size, 8)
        deviation = covariance.diagonal().sqrt()
        assert ((flat.mean(0) - mean.flatten()).abs() < 5 * deviation / size**0.5).all()
        error = (flat.T.cov() - covariance).abs()
        assert (error < 5 * 2**0.5 * deviation[:, None] * deviation / size**0.5).all()


def test_sample_posterior_is_differentiable_and_default_shape_is_one_draw():
    model, data = random_model(seed=6), random_data((2,))
    model.transition.F.requires_grad_()
    draw = sample_posterior(model, data)
    assert draw.shape == (2, 6, 3)
    (grad,) = torch.autograd.grad(draw.sum(), model.transition.F)
    assert grad.abs().min() > 0


# -------------------------------------------------------------------------------------------- missing and padded


def test_masked_entry_equals_the_model_without_that_entry():
    """Three correlated coordinates, the middle one never seen, against the model that has only the other two."""
    model, data = random_model(p=3, seed=7), random_data(p=3, missing=0.0, seed=7)
    keep = torch.tensor([0, 2])
    hidden = data.hide(torch.tensor([False, True, False]))
    R = model.emission.R
    without = StateSpaceModel(
        model.initial,
        model.transition,
        Look(
            model.emission.H[keep],
            model.emission.d[keep],
            model.emission.W[keep],
            torch.linalg.cholesky((R @ R.T)[keep][:, keep]),
        ),
    )
    smaller = TimeSeries(data.times, data.values[:, keep], inputs=data.inputs)
    for one, other in zip(kalman_filter(model, hidden)[:3:2], kalman_filter(without, smaller)[:3:2], strict=True):
        close(one @ one.mT if one.dim() > 2 else one, other @ other.mT if other.dim() > 2 else other, 1e-12)
    close(kalman_filter(model, hidden).filtered_mean, kalman_filter(without, smaller).filtered_mean, 1e-12)


def test_what_stands_at_a_masked_entry_is_never_read():
    model, data = random_model(), random_data()
    filler = torch.where(data.mask, data.values, torch.full_like(data.values, 1e30))
    other = data._derive(values=filler)
    for one, two in zip(kalman_filter(model, data), kalman_filter(model, other), strict=True):
        assert torch.equal(one, two)


def test_unseen_step_adds_exactly_zero_and_is_a_prediction():
    model, data = random_model(), random_data((3,))
    result = kalman_filter(model, data)
    assert (result.log_likelihood[:, 2] == 0).all()
    assert torch.equal(result.filtered_mean[:, 2], result.predicted_mean[:, 2])
    assert torch.equal(result.filtered_scale_tril[:, 2], result.predicted_scale_tril[:, 2])


def test_nothing_seen_leaves_the_prior():
    model, data = random_model(), random_data((2,))
    nothing = data.hide(torch.tensor(True))
    result, smoothed = kalman_filter(model, nothing), kalman_smoother(model, nothing)
    assert (result.log_likelihood == 0).all()
    for position, one in each(data):
        one = one.hide(torch.tensor(True))
        mean, covariance = dense_posterior(model, one)
        close(smoothed.mean[position], mean)
        close((smoothed.scale_tril @ smoothed.scale_tril.mT)[position][3], covariance[3, :, 3])


def test_padding_adds_exactly_zero_and_carries_the_law():
    lengths = torch.tensor([6, 1, 4])
    model, data = random_model(), random_data((3,), own_times=True, lengths=lengths)
    result, smoothed = kalman_filter(model, data), kalman_smoother(model, data)
    draws = sample_posterior(model, data, (5,))
    for i, n in enumerate(lengths.tolist()):
        assert (result.log_likelihood[i, n:] == 0).all()
        for part in result[1:]:
            assert torch.equal(part[i, n:], result[1 + (part.dim() == 4)][i, n - 1 : n].expand(part[i, n:].shape))
        assert (draws[:, i, n:] == draws[:, i, n - 1 : n]).all()
    for (i,), one in each(data):
        n = one.num_times
        for part, alone in zip(result, kalman_filter(model, one), strict=True):
            close(part[i, :n], alone, 1e-12)
        alone = kalman_smoother(model, one)
        close(smoothed.mean[i, :n], alone.mean, 1e-12)
        close((smoothed.scale_tril @ smoothed.scale_tril.mT)[i, :n], alone.scale_tril @ alone.scale_tril.mT, 1e-12)
        close(smoothed.lag_one_covariance[i, : n - 1], alone.lag_one_covariance, 1e-12)


def test_padding_changes_no_gradient():
    model, data = random_model(), random_data((3,), own_times=True, lengths=torch.tensor([6, 1, 4]))
    t, e = model.transition, model.emission
    parameters = [p.requires_grad_() for p in (t.F, t.Q, e.H, e.R)]

    def gradients(known):
        total = kalman_filter(model, known).log_likelihood.sum()
        return torch.autograd.grad(total, parameters, allow_unused=True)

    whole, parts = gradients(data), [gradients(one) for _, one in each(data)]
    for i, grad in enumerate(whole):
        close(grad, sum(part[i] for part in parts if part[i] is not None), 1e-11)


def test_refined_grid():
    """Latent times between the observations: those of the dense Gaussian on the fine grid."""
    model, coarse = random_model(), random_data((2,), own_times=True)
    fine = coarse.refine(3)
    result, smoothed = kalman_filter(model, fine), kalman_smoother(model, fine)
    assert result.log_likelihood.shape == (2, 16)
    between = torch.ones(16, dtype=torch.bool)
    between[fine.observed_index] = False
    assert (result.log_likelihood[:, between] == 0).all()
    for i in range(2):
        one = coarse.series(i).refine(3)
        close(result.log_likelihood[i].sum(), dense_log_likelihood(model, one))
        close(smoothed.mean[i], dense_posterior(model, one)[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_one_time(batch):
    model, data = random_model(), random_data(batch, num_times=1)
    result, smoothed = kalman_filter(model, data), kalman_smoother(model, data)
    assert smoothed.gain.shape == batch + (0, 3, 3)
    close(smoothed.mean, result.filtered_mean)
    assert sample_posterior(model, data, (7,)).shape == (7, *batch, 1, 3)
    for position, one in each(data):
        close(result.log_likelihood.sum(-1)[position], dense_log_likelihood(model, one))


# --------------------------------------------------------------------------------------------- batches and dtypes


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_a_batch_is_a_loop(missing):
    model, data = random_model(), random_data((2, 3), own_times=True, missing=missing)
    result = kalman_filter(model, data)
    for position, one in each(data):
        for part, alone in zip(result, kalman_filter(model, one), strict=True):
            close(part[position], alone, 1e-13)


def test_batched_parameters_are_a_loop():
    """Posterior draws are leftmost sample dims: (draws, plate) parameters against a batch of series."""
    model, data = random_model(), random_data((2,))
    F = torch.randn(4, 1, 3, 3, dtype=D) * 0.3
    R = model.emission.R * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=D)[:, None, None, None]
    many = kalman_filter(_with(model, F.unsqueeze(-3), R.unsqueeze(-3)), data)
    smooth = kalman_smoother(_with(model, F.unsqueeze(-3), R.unsqueeze(-3)), data)
    assert many.log_likelihood.shape == (4, 2, 6) and smooth.mean.shape == (4, 2, 6, 3)
    for s in range(4):
        alone = kalman_filter(_with(model, F[s], R[s]), data)
        for part, one in zip(many, alone, strict=True):
            close(part[s], one, 1e-12)


def _with(model, F, R):
    t, e = model.transition, model.emission
    return StateSpaceModel(model.initial, Drift(F, t.E, t.b, t.U, t.Q), Look(e.H, e.d, e.W, R))


def test_covariances_are_shared_where_no_value_is_missing():
    """Without gaps in the data the covariance recursion runs once, not once a series."""
    data = random_data((50,), missing=0.0)
    result = kalman_filter(random_model(), data)
    assert result.filtered_scale_tril.stride()[0] == 0


def test_float32_values_with_a_float64_model_take_the_wider_type():
    data = random_data()
    result = kalman_filter(random_model(), data.to(dtype=torch.float32))
    assert {part.dtype for part in result} == {D}


def stiff(name):
    """State noise 1 and observation variance 1e-6, or a constant velocity observed every 0.1."""
    if name == "constant velocity":
        dt, n = 0.1, 2
        F = torch.tensor([[1.0, dt], [0.0, 1.0]], dtype=D)
        Q = torch.linalg.cholesky(torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=D))
        H, r = torch.tensor([[1.0, 0.0]], dtype=D), 1e-3
    else:
        n = 4
        F = {"decay": 0.95, "walk": 1.0}[name] * torch.eye(n, dtype=D)
        Q, r = torch.eye(n, dtype=D), 1e-3
        H = torch.randn(2, n, dtype=D, generator=torch.Generator().manual_seed(3))
    return n, F, Q, H, r


def build(n, F, Q, H, r, dtype):
    def cast(*tensors):
        return [x.to(dtype) for x in tensors]

    zero, p = torch.zeros(n, n, dtype=D), H.shape[0]
    return StateSpaceModel(
        Start(*cast(torch.zeros(n, dtype=D), torch.eye(n, dtype=D))),
        Drift(*cast(F, zero, torch.zeros(n, dtype=D), torch.zeros(n, 1, dtype=D), Q)),
        Look(*cast(H, torch.zeros(p, dtype=D), torch.zeros(p, 1, dtype=D), r * torch.eye(p, dtype=D))),
    )


@pytest.mark.parametrize("name", ["constant velocity", "decay", "walk"])
def test_float32_is_right_on_stiff_models(name):
    n, F, Q, H, r = stiff(name)
    torch.manual_seed(8)
    T = 1000
    z, states = torch.randn(n, dtype=D), []
    for _ in range(T):
        states.append(z)
        z = F @ z + Q @ torch.randn(n, dtype=D)
    # the record is rounded to float32 first: both filters see the same numbers
    y = (torch.stack(states) @ H.T + r * torch.randn(T, H.shape[0], dtype=D)).float()
    totals, gradients = [], []
    for dtype in (D, torch.float32):
        model = build(n, F, Q, H, r, dtype)
        parameters = [p.requires_grad_() for p in (model.transition.F, model.transition.Q, model.emission.R)]
        data = TimeSeries(torch.arange(float(T)), y.to(dtype))
        total = kalman_filter(model, data).log_likelihood.to(D).sum()
        totals.append(total.item())
        gradients.append([g.to(D) for g in torch.autograd.grad(total, parameters)])
    assert abs(totals[1] - totals[0]) < 1e-5 * abs(totals[0])
    for exact, rough in zip(*gradients, strict=True):
        assert (rough - exact).norm() < 1e-3 * exact.norm()


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_of_log_likelihood_and_smoothed_laws(batch):
    model, data = random_model(n=2, u=1), random_data(batch, num_times=4, u=1)
    i, t, e = model.initial, model.transition, model.emission

    def f(mean, L, F, b, Q, H, d, R, y):
        built = StateSpaceModel(Start(mean, L), Drift(F, t.E, b, t.U, Q), Look(H, d, e.W, R))
        known = data._derive(values=y)
        smoothed = kalman_smoother(built, known)
        return smoothed.log_likelihood, smoothed.mean, smoothed.scale_tril @ smoothed.scale_tril.mT

    arguments = [x.clone().requires_grad_() for x in (i.mean, i.root, t.F, t.b, t.Q, e.H, e.d, e.R, data.values)]
    assert gradcheck(f, arguments)


def test_second_derivative_of_the_log_likelihood():
    model, data = random_model(n=2, u=1), random_data(num_times=4, u=1)
    t, e = model.transition, model.emission

    def f(theta):
        built = StateSpaceModel(
            model.initial, Drift(theta[0] * t.F, t.E, t.b, t.U, theta[1] * t.Q), Look(e.H, e.d, e.W, theta[2] * e.R)
        )
        return kalman_filter(built, data).log_likelihood.sum()

    theta = torch.ones(3, dtype=D, requires_grad=True)
    assert torch.autograd.gradgradcheck(f, theta)


def test_known_start_and_a_deterministic_coordinate_have_finite_right_gradients():
    """Singular covariances: a state that is known at first, one coordinate of which never gets noise."""
    model, data = random_model(n=2, u=1), random_data(num_times=4, u=1, inputs=False)
    t, e = model.transition, model.emission
    Q = torch.tensor([[0.8, 0.0], [0.0, 0.0]], dtype=D)
    zero = torch.zeros(2, 2, dtype=D)

    def f(F, b, H, R, scale):
        start, drift = Start(model.initial.mean, zero), Drift(F, 0 * t.E, b, t.U, scale * Q)
        built = StateSpaceModel(start, drift, Look(H, e.d, e.W, R))
        smoothed = kalman_smoother(built, data)
        return smoothed.log_likelihood.sum(), smoothed.mean, smoothed.scale_tril @ smoothed.scale_tril.mT

    one = torch.ones((), dtype=D)
    F = torch.tensor([[0.8, 0.5], [0.0, 0.9]], dtype=D)
    arguments = [x.clone().requires_grad_() for x in (F, t.b, e.H, e.R, one)]
    built = StateSpaceModel(Start(model.initial.mean, zero), Drift(F, 0 * t.E, t.b, t.U, Q), e)
    close(f(*arguments)[0], dense_log_likelihood(built, data))
    close(f(*arguments)[1], dense_posterior(built, data)[0])
    assert gradcheck(lambda F: f(F, *arguments[1:])[0], arguments[0])
    assert gradcheck(lambda *rest: f(F, *rest), arguments[1:])


# ----------------------------------------------------------------------------------------------- against statsmodels


def test_nile_local_level_equals_statsmodels():
    """Durbin and Koopman (2012), ch. 2: variances 15098.5 and 1469.2, the same finite start for both."""
    sm = pytest.importorskip("statsmodels.api")
    volume = torch.tensor(sm.datasets.nile.load_pandas().data["volume"].to_numpy(), dtype=D)
    reference = sm.tsa.UnobservedComponents(volume.numpy(), "local level")
    reference.ssm.initialize_approximate_diffuse(1e6)
    reference.loglikelihood_burn = 0
    results = reference.smooth([15098.5, 1469.2])

    def scalar(x):
        return torch.tensor([[x]], dtype=D)

    model = build(1, scalar(1.0), scalar(1469.2**0.5), scalar(1.0), 15098.5**0.5, D)
    model.initial.root = scalar(1e3)
    data = TimeSeries(torch.arange(100.0), volume[:, None])
    smoothed = kalman_smoother(model, data)
    close(smoothed.log_likelihood.sum(), torch.tensor(float(results.llf), dtype=D), 1e-8)
    close(smoothed.log_likelihood, torch.as_tensor(results.llf_obs), 1e-8)
    close(smoothed.mean[:, 0], torch.as_tensor(results.smoothed_state[0]), 1e-8)
    close(smoothed.scale_tril[:, 0, 0].square(), torch.as_tensor(results.smoothed_state_cov[0, 0]), 1e-8)


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_is_not_linear_gaussian_is_refused_with_the_way_out():
    class Count(Emission):
        state_dim, obs_dim = 3, 2

    model, data = random_model(), random_data()
    counted = StateSpaceModel(model.initial, model.transition, Count())
    with pytest.raises(TypeError, match="kalman_filter needs a component that is AffineGaussian, got Count.*SVI"):
        kalman_filter(counted, data)
    with pytest.raises(TypeError, match="kalman_smoother needs"):
        kalman_smoother(counted, data)
    remembering = SimpleNamespace(
        initial=model.initial, transition=model.transition, emission=model.emission, memory=Recall()
    )
    with pytest.raises(TypeError, match=r"memory \(Recall\) follows the path.*SVI with a guide"):
        kalman_filter(remembering, data)
    with pytest.raises(ValueError, match="`data` has no values"):
        kalman_filter(model, data.without_values())
    with pytest.raises(ValueError, match="1 columns, but the emission gives 2"):
        kalman_filter(model, random_data(p=1))


# --------------------------------------------------------------------------------------------- random parameters


def decaying_model():
    model = random_model()
    return StateSpaceModel(model.initial, Decay(3), model.emission)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_posterior_draws_of_a_random_rate_are_a_loop(batch):
    """Draws enter through bind as (draws, plates)."""
    model, data = decaying_model(), random_data(batch, own_times=True)
    rates = torch.tensor([0.3, 1.0, 2.5, 0.1], dtype=D)
    draws = {"transition.rate": rates.reshape(4, *[1] * len(batch))}
    many, smooth = kalman_filter(model.bind(draws), data), kalman_smoother(model.bind(draws), data)
    assert many.log_likelihood.shape == (4, *batch, 6)
    for s, rate in enumerate(rates):
        bound = model.bind({"transition.rate": rate})
        close(many.log_likelihood[s], kalman_filter(bound, data).log_likelihood, 1e-12)
        close(smooth.mean[s], kalman_smoother(bound, data).mean, 1e-12)


def test_a_parameter_per_series_is_a_loop():
    """As many series as states: without a time axis the rates would be mistaken for one a coordinate."""
    model, data = decaying_model(), random_data((3,), own_times=True)
    rates = torch.tensor([0.3, 1.0, 2.5], dtype=D)
    many = kalman_filter(model.bind({"transition.rate": rates}), data)
    for (i,), one in each(data):
        bound = model.bind({"transition.rate": rates[i]})
        close(many.log_likelihood[i], kalman_filter(bound, one).log_likelihood, 1e-12)


def test_a_random_parameter_without_a_value_is_refused():
    with pytest.raises(RuntimeError, match=r"`transition.rate` is random.*no value was given"):
        kalman_filter(decaying_model(), random_data())


def test_a_wholly_missing_step_leaves_the_evidence_of_the_model_without_it():
    """The Ornstein-Uhlenbeck law is closed under gaps."""
    model = decaying_model().bind({"transition.rate": torch.tensor(0.7, dtype=D)})
    data = random_data(missing=0.0)
    keep = torch.tensor([0, 1, 2, 4, 5])
    hidden = data.hide((torch.arange(6) == 3)[:, None])
    without = TimeSeries(data.times[keep], data.values[keep], inputs=data.inputs[keep])
    for one, other in zip(kalman_filter(model, hidden)[:2], kalman_filter(model, without)[:2], strict=True):
        close(one[keep], other, 1e-12)
