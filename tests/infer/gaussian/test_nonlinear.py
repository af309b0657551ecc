import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from torch.autograd import gradcheck

from pyro_ssm import dynamics, emissions, infer
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import Marginal
from pyro_ssm.infer.gaussian.linearise import Regression, Taylor, expected_root
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import cubature_rule, gauss_hermite_rule, unscented_rule
from tests.infer.gaussian.linear import Recall, random_data, random_model
from tests.infer.gaussian.nonlinear import (
    FILTERS,
    ITERATED,
    SMOOTHERS,
    D,
    Noisy,
    drive,
    grid_filter,
    growth,
    lorenz,
    pendulum,
    simulate,
    sine,
)

ALL = {**SMOOTHERS, "iterated": functools.partial(ITERATED["cubature"], max_iterations=200)}


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def square(root):
    return root @ root.mT


# ---------------------------------------------------------------------------------------------------- linearisation


def cube(x):
    """Two coordinates of a cubic, with noise that depends on the state."""
    loc = torch.stack([x[..., 0] ** 3 - x[..., 1], x[..., 0] * x[..., 1]], -1)
    return dist.Normal(loc, 1.0 + x.square()).to_event(1)


def law(n=2, batch=(3, 4)):
    torch.manual_seed(0)
    L = torch.randn(*batch, n, n, dtype=D).tril(-1) + torch.eye(n, dtype=D)
    return torch.randn(*batch, n, dtype=D), L


def test_taylor_is_the_tangent():
    m, L = law()
    A, b, root = Taylor()(cube, m, L)
    x, y = m.unbind(-1)
    wanted = torch.stack([torch.stack([3 * x**2, -torch.ones_like(x)], -1), torch.stack([y, x], -1)], -2)
    close(A, wanted)
    close((A @ m.unsqueeze(-1)).squeeze(-1) + b, cube(m).mean)
    close(root, (1.0 + m.square()).diag_embed())


@pytest.mark.parametrize("rule", [gauss_hermite_rule(2, 5), gauss_hermite_rule(2, 8)])
def test_regression_is_the_best_affine_law(rule):
    """Against moments by a finer rule, in covariance form: A = C P^-1, residual + E[Q Q^T]."""
    m, L = law()
    A, b, root = Regression(rule)(cube, m, L)
    xi, w, _, _ = gauss_hermite_rule(2, 12)
    x = m + (L @ xi.T).movedim(-1, 0)
    f, s = cube(x).mean, cube(x).stddev
    w = w[:, None, None, None]
    mean = (w * f).sum(0)
    P = square(L)
    C = ((w * (f - mean)).unsqueeze(-1) * (x - m).unsqueeze(-2)).sum(0)
    cov = ((w * (f - mean)).unsqueeze(-1) * (f - mean).unsqueeze(-2)).sum(0)
    best = C @ torch.linalg.inv(P)
    close(A, best)
    close((A @ m.unsqueeze(-1)).squeeze(-1) + b, mean)
    close(square(root), cov - best @ P @ best.mT + (w * s.square()).sum(0).diag_embed(), 1e-8)


@pytest.mark.parametrize("rule", [cubature_rule(2), unscented_rule(2), unscented_rule(2, 1e-2, 2.0, 0.0)])
def test_expected_noise_is_the_weighted_sum_where_weights_are_positive(rule):
    torch.manual_seed(0)
    roots = torch.randn(len(rule.points), 3, 2, 2, dtype=D).tril()
    got = square(expected_root(roots, False, rule))
    diagonal = roots.diagonal(dim1=-2, dim2=-1)
    got_diagonal = square(expected_root(diagonal, True, rule))
    if (rule.mean_weights >= 0).all():
        w = rule.mean_weights[:, None, None, None]
        close(got, (w * square(roots)).sum(0))
        close(got_diagonal, (w * square(diagonal.diag_embed())).sum(0))
    else:  # and is never indefinite where they are not
        assert torch.linalg.eigvalsh(got).min() >= 0
    close(got_diagonal.diagonal(dim1=-2, dim2=-1), got_diagonal.sum(-1))


def test_constant_law_and_one_that_ignores_the_state():
    m, L = law()

    def constant(x):
        return dist.Normal(torch.ones(2, dtype=D), 2.0).to_event(1)

    for rule in (Taylor(), Regression(cubature_rule(2))):
        A, b, root = rule(constant, m, L)
        close(A, torch.zeros_like(L))
        close(b, torch.ones_like(m))
        close(square(root), 4 * torch.eye(2, dtype=D).expand_as(L))


def test_a_small_alpha_is_the_tangent_of_second_order():
    """As alpha falls the regression's matrix tends to the Jacobian."""
    m, L = law()
    tangent = Taylor()(cube, m, L).matrix
    errors = [
        (Regression(unscented_rule(2, a, 2.0, 0.0))(cube, m, L).matrix - tangent).abs().max() for a in (0.1, 0.01)
    ]
    assert errors[1] < 1.1e-2 * errors[0]


@pytest.mark.parametrize("rule", [Taylor(), Regression(unscented_rule(2)), Regression(gauss_hermite_rule(2, 3))])
def test_gradients_of_a_linearisation(rule):
    m, L = law(batch=(1,))

    def f(m, L, a):
        A, b, root = rule(lambda x: cube(a * x), m, L.tril())
        return A, b, square(root)

    assert gradcheck(f, [x.clone().requires_grad_() for x in (m, L, torch.tensor(0.7, dtype=D))])


def test_nothing_asks_for_a_gradient_unasked():
    m, L = law()
    assert not any(part.requires_grad for part in Taylor()(cube, m, L))
    with torch.no_grad():
        assert not any(part.requires_grad for part in Taylor()(cube, m.clone().requires_grad_(), L))


# -------------------------------------------------------------------------------------------------- against the truth


@pytest.mark.parametrize("scale, bound", [(0.3, 0.04), (0.1, 0.012), (0.03, 0.004)])
def test_gauss_hermite_tends_to_the_true_filter(scale, bound):
    """z' = z + 0.5 sin z: numerical integration of Bayes' rule; errors in posterior deviations, smaller as noise is."""
    model = sine(scale, scale, scale)
    path, data = simulate(model, (), 30, seed=1)
    wide = float(path.abs().max()) + 6 * scale
    mean, deviation, terms = grid_filter(scale, data.values[:, 0], wide)
    with torch.no_grad():
        result = infer.gauss_hermite_kalman_filter(model, data, order=20)
    assert ((result.filtered_mean[:, 0] - mean) / deviation).abs().max() < bound
    assert (result.filtered_scale_tril[:, 0, 0] / deviation - 1).abs().max() < bound
    assert abs(result.log_likelihood.sum() - terms.sum()) < 1.2 * bound


def test_sigma_points_beat_the_tangent_where_the_function_bends():
    model = sine(1.0, 1.0, 1.0)
    path, data = simulate(model, (), 30, seed=1)
    mean, deviation, _ = grid_filter(1.0, data.values[:, 0], 15.0)
    with torch.no_grad():
        error = {
            name: ((f(model, data).filtered_mean[:, 0] - mean) / deviation).square().mean().sqrt().item()
            for name, f in FILTERS.items()
        }
    assert error["unscented"] < 0.6 * error["extended"] and error["cubature"] < 0.7 * error["extended"]


def test_synthetic_of_krishnan_sigma_points_smooth_better_than_the_tangent():
    """z' ~ N(2 sin z + z, 5), y ~ N(0.5 z, 5): measured 3.62 (extended), 2.53 (unscented), 2.37 (order 10)."""
    model = StateSpaceModel(
        dynamics.NormalInitial(1, scale=0.1),
        dynamics.FunctionTransition(1, lambda z, u: 2 * torch.sin(z) + z, scale=5**0.5),
        emissions.LinearNormal(1, 1, matrix=torch.tensor([[0.5]]), scale=5**0.5),
    ).double()
    path, data = simulate(model, (100,), 25)
    with torch.no_grad():
        smoothers = {**SMOOTHERS, "order 10": functools.partial(infer.gauss_hermite_kalman_smoother, order=10)}
        rmse = {name: (f(model, data).mean - path).square().mean().sqrt().item() for name, f in smoothers.items()}
    assert rmse["unscented"] < 0.8 * rmse["extended"]
    assert rmse["cubature"] < 0.8 * rmse["extended"]
    assert rmse["order 10"] < 0.97 * rmse["unscented"]


def test_unscented_with_the_cubature_parameters_is_cubature_on_a_nonlinear_model():
    path, data = simulate(pendulum(), (2,), missing=0.2)
    one = infer.unscented_kalman_smoother(pendulum(), data, alpha=1.0, beta=0.0, kappa=0.0)
    other = infer.cubature_kalman_smoother(pendulum(), data)
    close(one.mean, other.mean)
    close(one.log_likelihood, other.log_likelihood)


@pytest.mark.parametrize("make", [pendulum, lorenz])
def test_known_systems_are_tracked(make):
    """The smoothed path is nearer than the filtered one; the iterated smoother's deviations say how near it is."""
    path, data = simulate(make(), (30,), 20)
    with torch.no_grad():
        for name in SMOOTHERS:
            smoothed, filtered = SMOOTHERS[name](make(), data), FILTERS[name](make(), data)
            assert (smoothed.mean - path).square().mean() < (filtered.filtered_mean - path).square().mean()
        for rule in ("taylor", "cubature"):
            smoothed = ITERATED[rule](make(), data)
            assert smoothed.converged.all()
            error = (smoothed.mean - path).unsqueeze(-1)
            whitened = torch.linalg.solve_triangular(smoothed.scale_tril, error, upper=False)
            each = whitened.square().flatten(1).mean(-1)  # one number a series: steps of one path are alike
            assert (each.mean() - 1).abs() < 3 * each.std() / len(each) ** 0.5 < 0.5, rule


def test_growth_model_takes_its_drive_as_an_input():
    """The first step by hand: exact moments of the transition by quadrature."""
    path, data = simulate(growth(), (3,), 5, inputs=drive(5))
    result = infer.gauss_hermite_kalman_filter(growth(), data, order=40)
    m, s = result.filtered_mean[:, 0], result.filtered_scale_tril[:, 0, 0]
    x = torch.linspace(-10, 10, 20_001, dtype=D)
    weight = dist.Normal(torch.zeros((), dtype=D), 1.0).log_prob(x).exp() * (x[1] - x[0])
    z = m + s * x
    moved = 0.5 * z + 25 * z / (1 + z.square()) + 8
    close(result.predicted_mean[:, 1, 0], (moved * weight).sum(-1), 2e-3)


# ---------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("smoother", ALL.values(), ids=ALL)
def test_a_batch_is_a_loop(smoother):
    """Missing entries, padding and inputs in one batch."""
    lengths = torch.tensor([[7, 1, 4], [6, 7, 2]])
    path, data = simulate(pendulum(), (2, 3), 7, missing=0.3, lengths=lengths)
    result = smoother(pendulum(), data)
    for i, j in itertools.product(range(2), range(3)):
        n = int(lengths[i, j])
        one = TimeSeries(data.times[:n], data.values[i, j, :n], mask=data.mask[i, j, :n])
        alone = smoother(pendulum(), one)
        tolerance = 1e-9 if alone.converged is not None else 1e-11
        close(result.mean[i, j, :n], alone.mean, tolerance)
        close(square(result.scale_tril)[i, j, :n], square(alone.scale_tril), tolerance)
        close(result.log_likelihood[i, j, :n], alone.log_likelihood, tolerance)
        assert (result.log_likelihood[i, j, n:] == 0).all()
        assert torch.equal(result.mean[i, j, n:], result.mean[i, j, n - 1].expand_as(result.mean[i, j, n:]))


@pytest.mark.parametrize("smoother", ALL.values(), ids=ALL)
def test_an_unseen_step_adds_exactly_zero_and_nothing_seen_is_a_prediction(smoother):
    path, data = simulate(pendulum(), (2,), 6)
    hidden = data.hide((torch.arange(6) == 3)[:, None])
    assert (smoother(pendulum(), hidden).log_likelihood[:, 3] == 0).all()
    nothing = smoother(pendulum(), data.hide(torch.tensor(True)))
    assert (nothing.log_likelihood == 0).all()
    angle, speed = 1.5, 0.0
    if smoother is SMOOTHERS["extended"]:  # the mean moves by the equation itself
        for k in range(6):
            close(nothing.mean[0, k], torch.tensor([angle, speed], dtype=D))
            angle, speed = angle + 0.1 * speed, speed - 0.98 * math.sin(angle)


def test_masked_values_are_never_read_and_a_masked_coordinate_is_the_model_without_it():
    path, data = simulate(lorenz(), (), 8)
    hidden = data.hide(torch.tensor([False, True]))
    other = hidden._derive(values=torch.where(hidden.mask, data.values, torch.full_like(data.values, 1e30)))
    model = lorenz()
    first = emissions.FunctionNormal(3, 1, lambda z, u: z[..., :1], scale=1.0).double()
    without = StateSpaceModel(model.initial, model.transition, first)
    smaller = TimeSeries(data.times, data.values[:, :1])
    for name in SMOOTHERS:
        result, alone = SMOOTHERS[name](model, hidden), SMOOTHERS[name](without, smaller)
        close(result.log_likelihood, alone.log_likelihood, 1e-10)
        close(result.mean, alone.mean, 1e-10)
        assert torch.equal(result.mean, SMOOTHERS[name](model, other).mean)


@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS)
def test_draws_of_parameters_are_a_loop(filter):
    """As many draws as sigma points, as series, as states, so that no dim is mistaken for another."""
    draws = 4
    model = sine()
    path, data = simulate(model, (4,), 6, missing=0.2)
    w = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=D)
    many = filter(model.bind({"transition.function.w": w.reshape(draws, 1)}), data)
    assert many.log_likelihood.shape == (4, 4, 6)
    for s in range(draws):
        alone = filter(model.bind({"transition.function.w": w[s]}), data)
        close(many.log_likelihood[s], alone.log_likelihood, 1e-12)
    own = filter(model.bind({"transition.function.w": w}), data)  # one a series
    close(own.log_likelihood, many.log_likelihood.diagonal().T, 1e-12)


@pytest.mark.parametrize("smoother", ALL.values(), ids=ALL)
def test_one_time_and_a_refined_grid(smoother):
    path, data = simulate(pendulum(), (2,), 1)
    one = smoother(pendulum(), data)
    assert one.mean.shape == (2, 1, 2) and one.gain.shape == (2, 0, 2, 2)
    path, data = simulate(pendulum(), (2,), 4)
    fine = smoother(pendulum(), data.refine(2))
    values = torch.zeros(2, 7, 1, dtype=D)  # the same as a record with every second time unseen
    values[:, ::2] = data.values
    mask = torch.zeros(2, 7, 1, dtype=torch.bool)
    mask[:, ::2] = True
    wanted = smoother(pendulum(), TimeSeries(data.refine(2).times, values, mask=mask))
    close(fine.mean, wanted.mean, 1e-7)
    close(fine.log_likelihood, wanted.log_likelihood, 1e-7)


@pytest.mark.parametrize("name", FILTERS)
def test_float32(name):
    path, data = simulate(pendulum(), (3,), 50)
    exact = FILTERS[name](pendulum(), data)
    rough = FILTERS[name](pendulum().float(), data.to(dtype=torch.float32))
    assert rough.filtered_mean.dtype == torch.float32
    close(rough.filtered_mean.to(D), exact.filtered_mean, 2e-4)
    close(rough.log_likelihood.sum(-1).to(D), exact.log_likelihood.sum(-1), 1e-4)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("filter", [*FILTERS.values(), ITERATED["taylor"], ITERATED["cubature"]])
def test_gradient_of_the_log_likelihood(filter):
    """Noise that depends on the state, missing entries and padding."""
    start, look = dynamics.NormalInitial(2).double(), emissions.LinearNormal(2, 2).double()
    lengths = torch.tensor([3, 2])

    def build(a):
        return StateSpaceModel(start, Noisy(2, a), look)

    path, data = simulate(build(1.0), (2,), 3, missing=0.3, lengths=lengths)

    def f(a, y):
        options = {"tolerance": 1e-10} if filter in ITERATED.values() else {}
        model = StateSpaceModel(start, Noisy(2), look)
        model.transition.a = a
        return filter(model, data._derive(values=y), **options).log_likelihood.sum()

    arguments = [torch.tensor(0.8, dtype=D, requires_grad=True), data.values.clone().requires_grad_()]
    assert gradcheck(f, arguments)


# ----------------------------------------------------------------------------------------------------------- marginal


@pytest.mark.parametrize("filter", [*FILTERS.values(), ITERATED["cubature"]])
def test_marginal_takes_every_filter(filter):
    pyro.clear_param_store()
    model = sine()
    model.transition.scale = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 0.5).to_event(1))
    path, data = simulate(sine(), (3,), 8, missing=0.2)
    trace = pyro.poutine.trace(Marginal(model, filter=filter)).get_trace(data)
    trace.compute_log_prob()
    scale = trace.nodes["transition.scale"]["value"]
    wanted = filter(model.bind({"transition.scale": scale}), data).log_likelihood.sum(-1)
    close(trace.nodes["y"]["log_prob"], wanted)


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_function_that_leaves_its_domain_names_the_time_and_the_series():
    def root(z, u):
        return torch.sqrt(z - 1.5)

    model = StateSpaceModel(
        dynamics.NormalInitial(1, loc=3.0, scale=0.01),
        dynamics.FunctionTransition(1, root, scale=0.01),
        emissions.FunctionNormal(1, 1, lambda z, u: z, scale=1.0),
    ).double()
    times = torch.arange(4.0) + 10
    values = torch.full((2, 4, 1), 3.0, dtype=D)
    data = TimeSeries(times, values, lengths=torch.tensor([1, 4]))
    for smoother in SMOOTHERS.values():
        with pytest.raises(ValueError, match=r"transition from time index 1 \(t = 11\) of series 1 has a mean.*near"):
            smoother(model, data)
    short = data.replace(lengths=torch.tensor([1, 2]))  # the same, where nobody goes there
    kept = 1e-4 / (1 + 1e-4)  # the variance of the first state, given the first value: which is as expected
    scale = torch.tensor([1 + 1e-4, 1 + 1e-4 + kept / (4 * 1.5)], dtype=D).sqrt()
    terms = dist.Normal(torch.tensor([3.0, 1.5**0.5], dtype=D), scale).log_prob(torch.tensor(3.0, dtype=D))
    wanted = torch.zeros(2, 4, dtype=D)
    wanted[:, 0], wanted[1, 1] = terms[0], terms[1]
    close(infer.extended_kalman_filter(model, short).log_likelihood, wanted, 1e-6)
    look = emissions.FunctionNormal(1, 1, lambda z, u: torch.log(z - 3.2), scale=1.0).double()
    blind = StateSpaceModel(model.initial, model.transition, look)
    with pytest.raises(ValueError, match=r"the emission at time index 0 \(t = 10\) of series 0"):
        infer.cubature_kalman_filter(blind, data)


def test_an_exact_observation_of_a_known_state_is_refused():
    """Neither the state nor the sensor has noise: the observation has no density."""

    class Exact(emissions.FunctionNormal):
        def forward(self, state, time, inputs, memory=None):
            return dist.Delta(state, event_dim=1)

    model = sine()
    model.initial.scale = torch.zeros(1, dtype=D)
    model = StateSpaceModel(dynamics.NormalInitial(1).double(), model.transition, Exact(1, 1, lambda z, u: z))
    path, data = simulate(sine(), (), 3)
    result = infer.extended_kalman_filter(model, data)  # fine: the state is uncertain
    close(result.filtered_mean, data.values)
    zero = model.bind({"initial.scale": torch.zeros(1, dtype=D)})
    with pytest.raises(ValueError, match="no longer finite at time index 0.*give the emission some noise"):
        infer.extended_kalman_filter(zero, data)


def test_what_is_not_gaussian_is_refused_with_the_way_out():
    model, data = sine(), random_data(p=1)
    counts = StateSpaceModel(model.initial, model.transition, emissions.Poisson(1, 1))
    linear = random_model()
    remembers = StateSpaceModel(linear.initial, linear.transition, linear.emission, Recall())
    methods = [*FILTERS.values(), *ALL.values(), infer.ensemble_kalman_filter, infer.ensemble_kalman_smoother]
    for method in methods:
        with pytest.raises(
            TypeError, match="_kalman_|posterior.* needs a component that is Gaussian, got Poisson.*SVI"
        ):
            method(counts, data)
        with pytest.raises(TypeError, match="memory \\(Recall\\) follows the path"):
            method(remembers, random_data())
        with pytest.raises(ValueError, match="`data` has no values"):
            method(model, data.without_values())
        with pytest.raises(ValueError, match="2 columns, but the emission gives 1"):
            method(model, random_data())
