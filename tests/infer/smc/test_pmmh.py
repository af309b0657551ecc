"""Particle marginal Metropolis-Hastings draws from a posterior that is known by quadrature."""

import math

import arviz as az
import pytest
import torch

from pyro_ssm.diagnostics import to_inference_data
from pyro_ssm.infer import bootstrap, kalman_filter, locally_optimal, particle_filter, pmmh
from pyro_ssm.infer.smc.correlated import CorrelatedNoise
from pyro_ssm.infer.smc.parameter_likelihood import ParameterLikelihood
from tests.infer.smc.known_posterior import D, assert_mean, judged, logs, make_data, make_model

CHAINS = 40


def rough_filter(bound, data):
    """A likelihood that is off: it sees two values in three."""
    where = torch.zeros_like(data.mask)
    where[..., ::3, :] = True
    return kalman_filter(bound, data.hide(where))


KINDS = {
    "bootstrap": {"num_particles": 30},
    "correlated": {"num_particles": 20, "correlation": 0.9},
    "exact filter": {"filter": kalman_filter},
    "delayed acceptance": {"num_particles": 30, "screen": rough_filter},
    "another proposal of states": {"num_particles": 10, "filter": locally_optimal},
}
SLOW = {"another proposal of states": pytest.mark.slow}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_draws_are_from_the_posterior(kind):
    """Chains are independent: their means give the standard error of what they find."""
    model, data, known = judged()
    found = pmmh(model, data, 60, num_chains=CHAINS, num_warmup=100, progress=False, **KINDS[kind])
    x = logs(found, model)
    assert_mean(x.mean(1), known.mean, known.std)
    assert_mean(((x - known.mean) ** 2).mean(1), known.std**2, known.std**2, precision=0.4)
    assert_mean(found.states.mean(1), known.states, torch.tensor(0.5), sigmas=4.5, precision=0.3)
    rate = float(found.acceptance.mean())
    assert 0.1 < rate < 0.45, rate
    assert found.states.shape == (CHAINS, 60, 2, 8, 1)


def test_arviz_sees_chains():
    model, data = make_model(one=True), make_data(4, (2,))
    found = pmmh(model, data, 150, 20, num_chains=6, num_warmup=60, thin=2, progress=False)
    idata = to_inference_data(found, model=model, data=data)
    assert dict(idata["posterior"]["z"].sizes) == {"chain": 6, "draw": 150, "series": 2, "time": 4, "state": 1}
    summary = az.summary(idata, var_names=["transition.rate"])
    assert float(summary["r_hat"].iloc[0]) < 1.1
    assert 20 < float(summary["ess_bulk"].iloc[0]) < 900  # the draws of a walk are worth less than their number
    kept = torch.tensor(idata["posterior"]["transition.rate"].values)
    assert torch.equal(kept, found.parameters["transition.rate"])


def test_likelihood_beside_a_draw_is_of_that_draw():
    """Draw, path and estimate move together: with an exact filter the estimate can be computed again."""
    model, data, _ = judged()
    found = pmmh(model, data, 10, filter=kalman_filter, num_chains=3, num_warmup=20, progress=False)
    values = {name: value.flatten().unsqueeze(-1) for name, value in found.parameters.items()}
    again = kalman_filter(model.bind(values), data).log_likelihood.sum((-1, -2)).unflatten(0, (3, 10))
    assert torch.allclose(found.log_likelihood, again, atol=1e-10)


def test_thinning_and_one_chain():
    model, data, _ = judged(one=True)
    torch.manual_seed(5)
    every = pmmh(model, data, 12, 20, num_chains=1, num_warmup=5, progress=False)
    torch.manual_seed(5)
    third = pmmh(model, data, 4, 20, num_chains=1, num_warmup=5, thin=3, progress=False)
    assert torch.equal(every.parameters["transition.rate"][:, 2::3], third.parameters["transition.rate"])
    assert torch.equal(every.states[:, 2::3], third.states)


def test_correlated_noise_makes_neighbours_alike():
    """Of two estimates at the same parameters the difference is far smaller with correlated noise."""
    model, data = make_model(one=True), make_data(30)
    likelihood = ParameterLikelihood(model, data, bootstrap, 50, "hilbert-systematic")
    vectors = torch.full((300, 1), -0.5, dtype=D)
    noise = CorrelatedNoise.draw((30, 50, 300), 1, 1, D, torch.device("cpu"))
    first, near, far = (likelihood(vectors, n.fixed()).log_likelihood for n in (noise, noise.near(0.99), noise.near(0)))
    assert (near - first).std() < 0.5 * (far - first).std()
    moved = noise.near(0.99)
    assert abs(float(moved.normals.std()) - 1) < 0.01  # the law stays as it is
    pairs = torch.stack([moved.normals.flatten(), noise.normals.flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1]) - 0.99) < 0.001


def test_start_values():
    model, data, _ = judged()
    one = {"transition.rate": torch.tensor(0.7, dtype=D), "emission.scale": torch.tensor(0.3, dtype=D)}
    each = {name: value.expand(3) for name, value in one.items()}
    drawn = []
    for start in (one, each):
        torch.manual_seed(0)
        drawn.append(pmmh(model, data, 2, 10, num_chains=3, num_warmup=0, start=start, progress=False))
    assert torch.equal(drawn[0].parameters["transition.rate"], drawn[1].parameters["transition.rate"])
    with pytest.raises(ValueError, match="one for each of the 4 chains"):
        pmmh(model, data, 2, 10, num_chains=4, start=each, progress=False)
    with pytest.raises(KeyError, match=r"emission\.scale"):
        pmmh(model, data, 2, 10, start={"transition.rate": one["transition.rate"]}, progress=False)


def test_impossible_parameters_are_rejected_not_raised():
    """A prior that reaches where the filter fails: the chain stays away, and other chains do not notice."""
    model, data = make_model(one=True), make_data(8)

    def fails(bound, data):
        fk = bootstrap(bound, data)
        impossible = (bound.transition.rate > 0.6).reshape(-1)  # (draws,)
        weigh = fk.log_potential

        def log_potential(k, previous, particles):
            return torch.where(impossible, math.nan, weigh(k, previous, particles))

        object.__setattr__(fk, "log_potential", log_potential)
        return fk

    found = pmmh(model, data, 100, 20, filter=fails, num_chains=4, num_warmup=50, progress=False)
    assert float(found.parameters["transition.rate"].max()) <= 0.6
    # what stands beside a draw is an estimate at that draw, off by no more than estimates are
    rate = found.parameters["transition.rate"].flatten()
    exact = kalman_filter(model.bind({"transition.rate": rate}), data).log_likelihood.sum(-1)
    fk = bootstrap(model.bind({"transition.rate": torch.full((400,), 0.4, dtype=D)}), data)
    with torch.no_grad():
        spread = particle_filter(fk, 20).total.std()
    assert ((found.log_likelihood.flatten() - exact).abs() < 6 * spread).all()
    with pytest.raises(ValueError, match="no likelihood at `start`"):
        pmmh(model, data, 2, 20, filter=fails, start={"transition.rate": torch.tensor(2.0, dtype=D)}, progress=False)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0"),
        ({"num_particles": 0}, ValueError, "`num_particles`"),
        ({"thin": 0}, ValueError, "`thin`"),
        ({"correlation": 1.0}, ValueError, r"`correlation` must be in \[0, 1\)"),
        ({"correlation": 0.9, "filter": kalman_filter}, TypeError, "leave it out"),
        ({"screen": bootstrap}, TypeError, "without particles"),
        ({"filter": "bootstrap"}, TypeError, "`filter` must be a function"),
        ({"ess_threshold": 2.0}, ValueError, "`ess_threshold`"),
    ],
)
def test_errors(wrong, error, match):
    model, data, _ = judged(one=True)
    with pytest.raises(error, match=match):
        pmmh(model, data, **{"num_samples": 2, "num_particles": 5, "progress": False, **wrong})


def test_model_without_priors_is_refused():
    model, data, _ = judged(one=True)
    with pytest.raises(TypeError, match="must be unbound"):
        pmmh(model.bind({"transition.rate": torch.tensor(1.0)}), data, 2)
