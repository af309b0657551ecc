"""Equations from noisy records: the right terms, by a parameter and by a prior with sites, and what is refused."""

import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_ssm import StateSpaceModel, infer
from pyro_ssm.dynamics import ConstantDiffusion, MLPDrift, NeuralSDE, NormalInitial, with_sparse_prior
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import SVISE
from pyro_ssm.infer import DiscoveredEquations, SolverFree, TermRegression, discover_equations
from pyro_ssm.infer.equation_discovery import COEFFICIENTS, _adam
from pyro_ssm.predict import forecast, posterior_draws
from tests.dynamics.test_term_library import oscillator

D = torch.float64


def test_few_terms_are_found_among_many():
    model, library, data, F = oscillator()
    guide = SVISE(model, data, scale=0.02)
    torch.manual_seed(0)
    found = discover_equations(model, guide, data, num_steps=400, lr=1e-2, progress=False)
    raw = found.coefficients
    torch.testing.assert_close(raw[:, 1:3], F, atol=0.05, rtol=0.05)
    assert torch.cat([raw[:, :1], raw[:, 3:]], -1).abs().max() < 0.01
    assert found.kept().nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert ((raw[:, 1:3] - F) / found.scale[:, 1:3]).abs().max() < 3
    torch.testing.assert_close(library.in_units().detach(), raw)
    assert library.coefficients.requires_grad and found.library is library
    first, second = found.equations(digits=2)
    assert first.startswith("dz1/dt = (-0.") and first.endswith(") z2") and " ± " in first
    assert second.count("±") == 2 and found.equations(deviations=1e9) == ["dz1/dt = 0", "dz2/dt = 0"]


@pytest.mark.parametrize("kind", ["horseshoe", "laplace"])
def test_the_posterior_of_random_coefficients_is_set(kind):
    model, library, data, _ = oscillator()
    with_sparse_prior(library, kind, 0.5)
    guide = SVISE(model, data, scale=0.02)
    found = discover_equations(model, guide, data, num_steps=5, every=2, progress=False)
    posterior = guide.parameter_guide
    torch.testing.assert_close(posterior.locs.transition.drift.coefficients.detach(), found.terms.coefficients)
    with infer.local_parameters():
        spread = posterior.scales.transition.drift.coefficients.detach()
    torch.testing.assert_close(spread, found.terms.mean_field_scale)
    assert (spread <= found.terms.scale * (1 + 1e-6)).all()
    assert forecast(model, found, data, [5.1, 5.2], num_samples=3).states.shape == (3, 2, 2)


def test_turns_are_taken():
    """No regression before twice ``every`` steps, none between; the callback sees the new coefficients and may stop."""
    model, library, data, _ = oscillator()
    seen = []

    def look(step, bound):
        seen.append(library.coefficients.detach().clone())
        return step == 7

    found = discover_equations(
        model, SVISE(model, data), data, num_steps=50, every=3, callback=look, loss=SolverFree(8), progress=False
    )
    changed = [bool((a != b).any()) for a, b in zip(seen, seen[1:], strict=False)]
    assert changed == [False, False, False, False, True, False]  # at step 6 alone
    assert found.fitted.stopped == "callback" and found.fitted.num_steps == 7


def test_the_diffusion_learns_faster():
    model, _, _, _ = oscillator()
    other = torch.nn.Parameter(torch.zeros(()))
    own = list(model.transition.diffusion.parameters())
    groups = _adam(model.transition.diffusion, 5.0)([other, *own], lr=0.1).param_groups
    assert [(group["params"], group["lr"]) for group in groups] == [([other], 0.1), (own, 0.5)]
    assert len(_adam(lambda t, z, u: z, 5.0)([other], lr=0.1).param_groups) == 1


def test_draws_have_the_joint_law():
    root = torch.tensor([[[1.0, 0, 0], [2.0, 0.1, 0], [0.0, 0.0, 1e-9]], [[0.5, 0, 0], [0, 2, 0], [1, 1, 0]]], dtype=D)
    mean = torch.arange(6, dtype=D).reshape(2, 3)
    terms = TermRegression(mean, root @ root.mT)  # of the second, the last is a function of the others
    torch.manual_seed(0)
    draws = terms.sample(100_000)
    for i in range(2):
        torch.testing.assert_close(draws[:, i].mean(0), mean[i], atol=0.03, rtol=0)
        torch.testing.assert_close(draws[:, i].T.cov(), terms.covariance[i], atol=0.05, rtol=0.02)
    assert (draws[:, 0, 2] - mean[0, 2]).std() < 2e-9
    both = (draws[:, 0] - mean[0]).T @ (draws[:, 1] - mean[1]) / len(draws)
    assert both.abs().max() < 0.05
    with pytest.raises(ValueError, match="`num_samples`"):
        DiscoveredEquations(None, terms, None).draws(0)


def test_it_is_a_posterior():
    model, library, data, _ = oscillator()
    guide = SVISE(model, data, scale=0.02)
    found = discover_equations(model, guide, data, num_steps=100, every=20, progress=False)
    draws = posterior_draws(model, found, data, 4000)
    values = draws.parameters[COEFFICIENTS]
    assert values.shape == (4000, 2, 10) and draws.states.shape == (4000, 101, 2)
    torch.testing.assert_close(values.mean(0), found.terms.coefficients, atol=5 * 4000**-0.5 * 0.1, rtol=0.01)
    torch.testing.assert_close(values.std(0), found.terms.scale, rtol=0.1, atol=1e-6)
    ahead = forecast(model, found, data, 5 + 0.01 * torch.arange(1, 21), num_samples=50).states
    F = library.in_units().detach()[:, 1:3]
    wanted = torch.linalg.matrix_exp(0.2 * F) @ draws.states[:, -1].mean(0)
    torch.testing.assert_close(ahead[:, -1].mean(0), wanted, atol=0.05, rtol=0)
    other = oscillator()[0]
    with pytest.raises(ValueError, match="belong to another model"):
        posterior_draws(other, found, data)


def test_what_is_refused():
    model, library, data, _ = oscillator()
    guide = SVISE(model, data)
    for options in ({"every": 0}, {"num_steps": 0}, {"diffusion_rate": 0.0}, {"prior": "ridge"}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            discover_equations(model, guide, data, **options)
    with pytest.raises(TypeError, match="patients"):
        discover_equations(model, guide, data, patients=3)
    assert library.coefficients.requires_grad
    net = StateSpaceModel(
        NormalInitial(2), NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2)), LinearNormal(2, 2)
    ).double()
    with pytest.raises(TypeError, match="must be a dynamics.TermLibrary, got MLPDrift"):
        discover_equations(net, SVISE(net, data), data)
    with_sparse_prior(library, "laplace")
    delta = AutoDelta(lambda data: model.bind())
    with pytest.raises(TypeError, match="AutoNormal; the guide over parameters is a AutoDelta"):
        discover_equations(model, SVISE(model, data, parameters=delta), data)
