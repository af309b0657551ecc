import functools

import pytest
import torch

from pyro_ssm import dynamics, emissions
from pyro_ssm.infer import (
    Localisation,
    Marginal,
    ensemble_kalman_filter,
    ensemble_kalman_smoother,
    extended_kalman_filter,
    kalman_filter,
    kalman_smoother,
)
from pyro_ssm.infer.gaussian import ensemble
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import gaspari_cohn
from tests.infer.gaussian.linear import random_data, random_model
from tests.infer.gaussian.nonlinear import D, lorenz, opaque, pendulum, simulate

METHODS = ["stochastic", "deterministic"]


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def square(root):
    return root @ root.mT


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_as_one_over_root_n(method):
    """Masks, correlated noise, inputs, own times: the slope of the median error, on doubled logarithms."""
    model, data = random_model(n=2), random_data((40,), own_times=True)
    wanted, smooth = kalman_filter(model, data), kalman_smoother(model, data)
    sizes = [50, 200, 800, 3200]
    errors = {"mean": [], "likelihood": [], "smoothed": []}
    with torch.no_grad():
        for N in sizes:
            result = ensemble_kalman_filter(model, data, N, method, seed=N)
            errors["mean"].append((result.filtered_mean - wanted.filtered_mean).abs().median())
            errors["likelihood"].append((result.log_likelihood - wanted.log_likelihood).abs().sum(-1).median())
            path = ensemble_kalman_smoother(model, data, N, method, seed=N)
            errors["smoothed"].append((path.mean - smooth.mean).abs().median())
    x = torch.tensor(sizes, dtype=D).log()
    for name, values in errors.items():
        y = torch.stack(values).log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        assert slope == pytest.approx(-0.5, abs=0.1), name


@pytest.mark.parametrize("method", METHODS)
def test_large_ensemble_has_kalmans_laws(method):
    model, data = random_model(n=2), random_data((2,), lengths=torch.tensor([6, 4]))
    wanted, smooth = kalman_filter(model, data), kalman_smoother(model, data)
    N = 40_000
    result = ensemble_kalman_filter(model, data, N, method, seed=1)
    path = ensemble_kalman_smoother(model, data, N, method, seed=1)
    for mean, L, exact_mean, exact_L in (
        (result.filtered_mean, result.filtered_scale_tril, wanted.filtered_mean, wanted.filtered_scale_tril),
        (result.predicted_mean, result.predicted_scale_tril, wanted.predicted_mean, wanted.predicted_scale_tril),
        (path.mean, path.scale_tril, smooth.mean, smooth.scale_tril),
    ):
        deviation = exact_L.norm(dim=-1)
        assert ((mean - exact_mean).abs() < 8 * deviation.amax() / N**0.5).all()
        assert ((square(L) - square(exact_L)).abs() < 12 * deviation.amax() ** 2 / N**0.5).all()
    size = smooth.scale_tril.norm(dim=-1).amax() ** 2
    assert ((path.lag_one_covariance - smooth.lag_one_covariance).abs() < 12 * size / N**0.5).all()


def test_deterministic_form_is_kalmans_update_of_the_ensembles_own_moments():
    """Exactly, at the first time; a partly missing row included."""
    model, data = random_model(), random_data((3,))
    result = ensemble_kalman_filter(model, data, 7, "deterministic", seed=0)
    m, L = result.predicted_mean[:, 0], result.predicted_scale_tril[:, 0]

    start = type(model.initial)(m.unsqueeze(-2), L.unsqueeze(-3))
    exact = kalman_filter(StateSpaceModel(start, model.transition, model.emission), data)
    close(result.filtered_mean[:, 0], exact.filtered_mean[:, 0])
    close(square(result.filtered_scale_tril)[:, 0], square(exact.filtered_scale_tril)[:, 0])
    close(result.log_likelihood[:, 0], exact.log_likelihood[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_noise_repeats_with_a_seed_and_follows_torchs_generator_without(method):
    path, data = simulate(pendulum(), (2,), 5)
    run = functools.partial(ensemble_kalman_filter, pendulum(), data, 20, method)
    state = torch.random.get_rng_state()
    one, two, other = run(seed=3), run(seed=3), run(seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)  # a seed touches no global state
    assert torch.equal(one.filtered_ensemble, two.filtered_ensemble)
    assert not torch.equal(one.filtered_ensemble, other.filtered_ensemble)
    torch.manual_seed(0)
    first = run()
    torch.manual_seed(0)
    assert torch.equal(first.filtered_ensemble, run().filtered_ensemble)
    assert not torch.equal(first.filtered_ensemble, run().filtered_ensemble)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_a_loop(method, monkeypatch):
    """With the same noise; ragged, with missing entries."""
    lengths = torch.tensor([6, 3])
    path, data = simulate(lorenz(), (2,), 6, missing=0.3, lengths=lengths)
    options = {"num_members": 5, "method": method, "inflation": 1.1, "relaxation": 0.3}
    drawn = []
    normal = torch.randn

    def record(shape, **kwargs):
        drawn.append(normal(shape, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(ensemble.torch, "randn", record)
    result = ensemble_kalman_smoother(lorenz(), data, **options)
    noise = list(drawn)
    for i, n in enumerate(lengths.tolist()):
        again = iter([x[:, i] for x in noise])
        monkeypatch.setattr(ensemble.torch, "randn", lambda shape, again=again, **kwargs: next(again))
        alone = ensemble_kalman_smoother(lorenz(), data.series(i), **options)
        close(result.ensemble[:, i, :n], alone.ensemble[:, :n], 1e-10)
        close(result.log_likelihood[i, :n], alone.log_likelihood[:n], 1e-10)
        assert (result.log_likelihood[i, n:] == 0).all()
        assert torch.equal(result.ensemble[:, i, n:], result.ensemble[:, i, n - 1 : n].expand(-1, 6 - n, -1))


@pytest.mark.parametrize("method", METHODS)
def test_missing_steps_and_entries(method):
    path, data = simulate(lorenz(), (2,), 5)
    run = functools.partial(ensemble_kalman_filter, lorenz(), num_members=30, method=method, seed=0)
    hidden = run(data.hide((torch.arange(5) == 3)[:, None]))
    assert (hidden.log_likelihood[:, 3] == 0).all()
    assert torch.equal(hidden.filtered_ensemble[..., 3, :], hidden.predicted_ensemble[..., 3, :])
    partly = data.hide(torch.tensor([False, True]))
    filler = partly._derive(values=torch.where(partly.mask, data.values, torch.full_like(data.values, 1e30)))
    assert torch.equal(run(partly).filtered_ensemble, run(filler).filtered_ensemble)
    one = run(data.hide((torch.arange(5) > 0)[:, None]))
    assert (one.log_likelihood[:, 1:] == 0).all() and (one.log_likelihood[:, 0] != 0).all()


def test_one_time_draws_of_parameters_and_a_refined_grid():
    model = opaque(random_model())
    result = ensemble_kalman_smoother(model, random_data((2,), num_times=1), 10)
    assert result.ensemble.shape == (10, 2, 1, 3) and result.lag_one_covariance.shape == (2, 0, 3, 3)
    path, data = simulate(lorenz(), (2,), 4)
    scale = torch.rand(5, 1, 3, dtype=D) + 0.1
    drawn = lorenz().bind({"transition.scale": scale})
    result = ensemble_kalman_filter(drawn, data.refine(2), 10, seed=0)
    assert result.filtered_ensemble.shape == (10, 5, 2, 7, 3)
    assert (result.log_likelihood[..., 1::2] == 0).all() and (result.log_likelihood[..., ::2] != 0).all()


# --------------------------------------------------------------------------------- inflation, relaxation, localisation


def test_inflation_multiplies_the_predicted_spread_and_relaxation_restores_the_filtered_one():
    path, data = simulate(lorenz(), (2,), 3)
    run = functools.partial(ensemble_kalman_filter, lorenz(), data, 40, "deterministic", seed=0)
    plain, inflated, relaxed = run(), run(inflation=1.3), run(relaxation=1.0)
    close(inflated.filtered_ensemble[..., 0, :], plain.filtered_ensemble[..., 0, :])
    close(inflated.predicted_ensemble[..., 1, :].std(0), 1.3 * plain.predicted_ensemble[..., 1, :].std(0))
    close(inflated.predicted_mean[..., 1, :], plain.predicted_mean[..., 1, :])
    close(relaxed.filtered_ensemble[..., 0, :].std(0), relaxed.predicted_ensemble[..., 0, :].std(0))
    close(relaxed.filtered_mean[..., 0, :], plain.filtered_mean[..., 0, :])


def field(n=24):
    """A chain of states, each coupled to its neighbour, every third observed; with its tapers."""
    place = torch.arange(float(n), dtype=D)
    distance = (place[:, None] - place).abs()
    seen = torch.arange(0, n, 3)
    move = 0.9 * torch.eye(n, dtype=D) + 0.05 * torch.diag(torch.ones(n - 1, dtype=D), 1)
    model = StateSpaceModel(
        dynamics.NormalInitial(n, scale=1.0),
        dynamics.LinearNormal(n, matrix=move, scale=0.4),
        emissions.LinearNormal(n, len(seen), matrix=torch.eye(n)[seen], scale=0.3),
    ).double()
    pieces = distance[:, seen], distance[seen][:, seen], distance
    return model, Localisation(*(gaspari_cohn(d, 3.0) for d in pieces))


@pytest.mark.parametrize("method", METHODS)
def test_localisation_helps_a_small_ensemble(method):
    model, tapers = field()
    path, data = simulate(model, (8,), 15)
    exact = kalman_smoother(model, data)
    filtered = kalman_filter(model, data).filtered_mean
    with torch.no_grad():
        run = functools.partial(ensemble_kalman_filter, model, data, 12, method, seed=0)
        plain, local = ((run(localisation=t).filtered_mean - filtered).square().mean().sqrt() for t in (None, tapers))
        assert local < 0.6 * plain
        run = functools.partial(ensemble_kalman_smoother, model, data, 12, method, seed=0)
        plain, local = ((run(localisation=t).mean - exact.mean).square().mean().sqrt() for t in (None, tapers))
        assert local < 0.6 * plain


def test_an_ensemble_smaller_than_the_state_never_forms_its_covariance():
    n = 2000
    model = StateSpaceModel(
        dynamics.NormalInitial(n),
        dynamics.FunctionTransition(n, lambda z, u: torch.tanh(z.roll(1, -1)), scale=0.1),
        emissions.FunctionNormal(n, 2, lambda z, u: z[..., :2], scale=0.1),
    )
    path, data = simulate(model, (), 3)
    result = ensemble_kalman_smoother(model, data.to(dtype=torch.float32), 10, seed=0)
    assert result.ensemble.shape == (10, 3, n)
    seen = extended_kalman_filter(*_corner(model, data))  # the first two see no others but through the roll
    assert (result.ensemble.mean(0)[0, :2] - seen.filtered_mean[0, :2]).abs().max() < 0.3


def _corner(model, data):
    small = StateSpaceModel(
        dynamics.NormalInitial(2),
        dynamics.FunctionTransition(2, lambda z, u: torch.tanh(z.roll(1, -1)), scale=0.1),
        emissions.FunctionNormal(2, 2, lambda z, u: z, scale=0.1),
    )
    return small, data


# ---------------------------------------------------------------------------------------- gradients, marginal, errors


@pytest.mark.parametrize("method", METHODS)
def test_gradient_with_fixed_noise_is_that_of_finite_differences(method):
    path, data = simulate(lorenz(), (2,), 4, missing=0.2, lengths=torch.tensor([4, 2]))
    tapers = Localisation(torch.full((3, 2), 0.9, dtype=D), torch.eye(2, dtype=D), torch.eye(3, dtype=D))
    for options in ({}, {"inflation": 1.1, "relaxation": 0.4, "localisation": tapers}):

        def f(scale, noise, options=options):
            bound = lorenz().bind({"transition.scale": scale, "emission.scale": noise})
            result = ensemble_kalman_smoother(bound, data, 6, method, seed=0, **options)
            return result.log_likelihood.sum(), result.mean

        arguments = torch.full((3,), 0.4, dtype=D), torch.full((2,), 0.8, dtype=D)
        assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in arguments])


def test_marginal_with_a_seed_is_a_function_of_parameters():
    path, data = simulate(pendulum(), (2,), 5)
    program = Marginal(pendulum(), filter=functools.partial(ensemble_kalman_filter, num_members=50, seed=1))
    law = program.filter(pendulum(), data)
    assert not law.exact and torch.equal(law.log_likelihood, program.filter(pendulum(), data).log_likelihood)


def test_options_are_checked():
    path, data = simulate(lorenz(), (), 3)
    run = functools.partial(ensemble_kalman_filter, lorenz(), data)
    with pytest.raises(ValueError, match="`num_members` must be at least 2, got 1"):
        run(1)
    with pytest.raises(ValueError, match="`method` must be one of 'stochastic', 'deterministic', got 'etkf'"):
        run(method="etkf")
    with pytest.raises(ValueError, match="`inflation` multiplies deviations and must be positive"):
        run(inflation=0.0)
    with pytest.raises(ValueError, match="`relaxation` must lie between 0 and 1, got 1.5"):
        run(relaxation=1.5)
    with pytest.raises(ValueError, match=r"`localisation.state_obs` must have shape \(3, 2\), got \(2, 3\)"):
        run(localisation=Localisation(torch.ones(2, 3), torch.ones(2, 2)))
    with pytest.raises(ValueError, match="`localisation` needs `state_state`"):
        ensemble_kalman_smoother(lorenz(), data, localisation=Localisation(torch.ones(3, 2), torch.eye(2)))


def test_a_function_that_leaves_its_domain_names_the_time_and_the_series():
    model = StateSpaceModel(
        dynamics.NormalInitial(1, loc=3.0, scale=0.01),
        dynamics.FunctionTransition(1, lambda z, u: torch.sqrt(z - 1.5), scale=0.01),
        emissions.FunctionNormal(1, 1, lambda z, u: z, scale=1.0),
    )
    path, data = simulate(pendulum(), (2,), 4)
    with pytest.raises(ValueError, match=r"transition from time index 1 \(t = 1\) of series 0 has a mean"):
        ensemble_kalman_filter(model, data, 10)
    short = data.replace(lengths=torch.tensor([1, 2]))  # nobody goes there
    found = ensemble_kalman_filter(model, short, 10, seed=0)
    start = ensemble_kalman_filter(model, short.trim(), 10, seed=0)
    close(found.log_likelihood[:, :2], start.log_likelihood)
    assert (found.log_likelihood[:, 2:] == 0).all() and (found.log_likelihood[0, 1:] == 0).all()
