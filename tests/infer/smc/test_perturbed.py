"""Iterated filtering climbs to the maximum of the Kalman likelihood."""

import pytest
import torch

from pyro_ssm.infer import iterated_filtering, kalman_filter
from tests.infer.smc.known_posterior import D, judged, make_data, make_model, priors
from tests.infer.smc.programs import assert_unbiased

FAR = {"transition.rate": torch.tensor(20.0, dtype=D), "emission.scale": torch.tensor(3.0, dtype=D)}


def exact_at(model, data, values):
    return float(kalman_filter(model.bind(values), data).log_likelihood.sum())


def test_reaches_the_maximum():
    """From afar, several times: what is left to the maximum is less than the estimates' own spread leaves."""
    model, data, known = judged(one=True, num_times=20, batch=(2,))
    start = {"transition.rate": FAR["transition.rate"]}
    runs = [
        iterated_filtering(model, data, 150, 12, perturbation=0.2, cooling=1e-4, start=start, progress=False)
        for _ in range(3)
    ]
    assert exact_at(model, data, start) < known.best_log_likelihood - 2
    found = torch.stack([run.parameters["transition.rate"].log() for run in runs])
    assert abs(float(found.mean() - known.best[0])) < 4 * float(found.std()) / 3**0.5 + 0.1, (found, known.best)
    for run in runs:
        at = exact_at(model, data, run.parameters)
        assert known.best_log_likelihood - 0.2 < at < known.best_log_likelihood + 0.01
        assert abs(float(run.log_likelihood) - at) < 4 * float(run.standard_error)
        assert abs(float(kalman_filter(run.model, data).log_likelihood.sum()) - at) < 1e-9
        assert run.trace["transition.rate"].shape == (13,)
        assert torch.allclose(run.trace["transition.rate"][-1], run.parameters["transition.rate"])


def test_without_perturbation_it_is_a_particle_filter():
    """The likelihood of the unperturbed model is unbiased, missing values and all."""
    model, data = make_model(), make_data(6)
    start = {"transition.rate": torch.tensor(0.5, dtype=D), "emission.scale": torch.tensor(0.8, dtype=D)}
    found = iterated_filtering(model, data, 80, 100, perturbation=0.0, start=start, progress=False)
    assert_unbiased(found.perturbed_log_likelihood, exact_at(model, data, start))
    for name, value in start.items():
        assert torch.allclose(found.trace[name], value)


def test_coordinates_move_as_they_are_told():
    model, data, _ = judged()
    still = iterated_filtering(model, data, 50, 3, perturbation=torch.tensor([0.1, 0.0]), start=FAR, progress=False)
    assert torch.allclose(still.trace["emission.scale"], FAR["emission.scale"])
    assert float(still.trace["transition.rate"].log().std()) > 0.01


def test_starts_from_the_prior():
    model, data, _ = judged()
    found = iterated_filtering(model, data, 60, 2, progress=False)
    assert list(found.parameters) == [name for name, _ in priors(model)]
    assert found.perturbed_log_likelihood.shape == (2,)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_particles": 1}, "`num_particles` must be at least 2, got 1"),
        ({"num_iterations": 0}, "`num_iterations`"),
        ({"cooling": 0.0}, r"`cooling` must be in \(0, 1\]"),
        ({"perturbation": -0.1}, "`perturbation`"),
        ({"perturbation": torch.ones(3)}, r"\(2,\)"),
    ],
)
def test_errors(wrong, match):
    model, data, _ = judged()
    with pytest.raises(ValueError, match=match):
        iterated_filtering(model, data, **{"num_particles": 10, "num_iterations": 1, "progress": False, **wrong})
