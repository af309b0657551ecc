"""Libraries of terms: what they evaluate, in which units, and that few terms are found among many."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.binding import bind, random_parameters
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    LinearDrift,
    MLPDrift,
    NeuralSDE,
    NormalInitial,
    TermLibrary,
    with_sparse_prior,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import ARCTA, SVISE
from pyro_ssm.infer import SolverFree, term_regression

D = torch.float64


def test_terms_are_the_monomials_and_the_functions():
    library = TermLibrary(
        3, 3, scale=torch.tensor([2.0, 0.5, 4.0]), time_scale=0.1,
        functions={"t u sin(z1)": lambda t, z, u: t.squeeze(-1) * u[..., 0] * z[..., 0].sin()},
    ).double()  # fmt: skip
    assert len(library.names) == 20 + 1 and len(set(library.names)) == 21
    time, z, u = torch.randn(5, 1, dtype=D), torch.randn(4, 5, 3, dtype=D), torch.randn(5, 2, dtype=D)
    found = library.terms(time, z, u)
    scaled = z / torch.tensor([2.0, 0.5, 4.0], dtype=D)
    for name, value in zip(library.names[:-1], found.unbind(-1), strict=False):
        wanted = torch.ones(4, 5, dtype=D)
        for factor in name.split() if name != "1" else []:
            coordinate, _, power = factor.removeprefix("z").partition("^")
            wanted = wanted * scaled[..., int(coordinate) - 1] ** int(power or 1)
        torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(found[..., -1], (time.squeeze(-1) * u[:, 0] * z[..., 0].sin()))
    with torch.no_grad():
        library.coefficients.normal_()
    raw = TermLibrary(3, 3, functions=library.functions).double()
    with torch.no_grad():
        raw.coefficients.copy_(library.in_units())
    torch.testing.assert_close(library(time, z, u), raw(time, z, u))


def test_equations_in_words():
    library = TermLibrary(2, 2, scale=torch.tensor([10.0, 2.0]), time_scale=0.5)
    with torch.no_grad():
        library.coefficients[0, 1], library.coefficients[0, 4] = -1.0, 0.5
        library.coefficients[1, 0] = 0.01
    assert library.equations() == ["dz1/dt = -2 z1 + 0.5 z1 z2", "dz2/dt = 0.04"]
    assert library.equations(threshold=0.1)[1] == "dz2/dt = 0"
    assert TermLibrary(1, 0).names == ("1",)
    for words, arguments in [
        ("`degree`", {"degree": -1}),
        ("`scale`", {"scale": -1.0}),
        ("`time_scale`", {"time_scale": 0}),
    ]:
        with pytest.raises(ValueError, match=words):
            TermLibrary(2, **arguments)


def test_drawn_coefficients_broadcast():
    library = TermLibrary(2, 2, scale=3.0).double()
    draws, z = torch.randn(7, 2, 6, dtype=D), torch.randn(4, 5, 2, dtype=D)
    found = bind(library, {"coefficients": draws.unsqueeze(1)})(torch.zeros(5, 1), z, None)
    for i in range(7):
        with torch.no_grad():
            library.coefficients.copy_(draws[i])
        torch.testing.assert_close(found[i], library(torch.zeros(5, 1), z, None))


@pytest.mark.parametrize("kind", ["laplace", "spike", "horseshoe"])
def test_priors_have_their_densities(kind):
    library = with_sparse_prior(TermLibrary(2, 1).double(), kind, 0.7)
    value = torch.tensor([[0.01, -0.5, 1.2], [0.0, 3.0, -0.2]], dtype=D)
    given = {"coefficients": value}
    if kind == "horseshoe":
        assert len(random_parameters(library)) == 3
        given |= {"local_scale": value.abs() + 0.3, "overall_scale": torch.tensor([[0.5], [2.0]], dtype=D)}
        wide = given["local_scale"] * given["overall_scale"]
        wanted = dist.Normal(0, wide).log_prob(value).sum()
        wanted = wanted + dist.HalfCauchy(torch.tensor(0.7, dtype=D)).log_prob(given["overall_scale"]).sum()
        wanted = wanted + dist.HalfCauchy(torch.tensor(1.0, dtype=D)).log_prob(given["local_scale"]).sum()
    elif kind == "laplace":
        wanted = dist.Laplace(0, 0.7).log_prob(value).sum()
    else:
        parts = [dist.Normal(0, s).log_prob(value) for s in (0.7, 0.007)]
        wanted = (torch.stack(parts).logsumexp(0) - torch.tensor(2.0, dtype=D).log()).sum()
    trace = poutine.trace(poutine.condition(lambda: bind(library), data=given)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), wanted)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        with_sparse_prior(TermLibrary(1), "ridge")


def oscillator(prior=None):
    """A damped oscillator, seen in both coordinates; the states' posterior is near the data."""
    F = torch.tensor([[-0.3, 2.0], [-2.0, -0.3]], dtype=D)
    times = torch.linspace(0, 5, 101, dtype=D)
    states = torch.linalg.matrix_exp(times[:, None, None] * F) @ torch.tensor([2.0, 0.0], dtype=D)
    torch.manual_seed(0)
    data = TimeSeries(times, states + 0.01 * torch.randn_like(states))
    library = TermLibrary(2, 3, time_scale=0.5).double()
    model = StateSpaceModel(
        NormalInitial(2, loc=torch.tensor([2.0, 0.0])),
        NeuralSDE(library, ConstantDiffusion(0.05, 2)),
        LinearNormal(2, 2, scale=0.01),
    ).double()
    with torch.no_grad():
        model.emission.matrix.copy_(torch.eye(2))
    model.emission.requires_grad_(False)
    model.initial.requires_grad_(False)
    return model, library, data, F


def test_regression_maximises_the_bound():
    """With a flat prior, its gradient at the result is 0; equations with the least squares of the same draws."""
    model, library, data, _ = oscillator()
    guide = SVISE(model, data, scale=0.02)
    with infer.local_parameters():
        torch.manual_seed(3)
        found = term_regression(model, guide, data, prior="normal", scale=1e6, num_times=500, num_particles=3)
        with torch.no_grad():
            library.coefficients.copy_(found.coefficients)
        torch.manual_seed(3)
        bound = guide.bind_model({})
        context, loss = guide.encode(data, bound), SolverFree(500, 3)
        drawn = loss.draw(guide, context, data)
        control = guide.control(context, drawn.marginal, drawn.noise, drawn.times, None)
        path = 0.5 * (control.value.square().sum(-1) * drawn.weight).sum(-1).mean()
        slope = torch.autograd.grad(path, library.coefficients, create_graph=True)[0]
        curvature = torch.autograd.grad(slope[0, 1], library.coefficients)[0]
    precision = torch.linalg.inv(found.covariance)
    torch.testing.assert_close(curvature[0], precision[0, 1], rtol=1e-5, atol=1e-5)
    assert slope.abs().max() < 1e-5 * precision.abs().max()


@pytest.mark.parametrize("prior", ["relevance", "laplace"])
def test_sparse_priors_are_mixtures_of_normals(prior):
    """The precision that is added to each coefficient's is what its second moment asks for."""
    model, _, data, _ = oscillator()
    guide, found = SVISE(model, data, scale=0.02), {}
    for kind, scale in ((prior, 0.3), ("normal", 1e6)):
        torch.manual_seed(0)
        found[kind] = term_regression(model, guide, data, prior=kind, scale=scale, num_times=300, iterations=3000)
    precision, gram = (torch.linalg.inv(found[kind].covariance) for kind in (prior, "normal"))
    square = found[prior].coefficients.square() + found[prior].scale.square()
    wanted = 1 / square if prior == "relevance" else square.rsqrt() / 0.3
    added = (precision - gram).diagonal(dim1=-2, dim2=-1)
    kept = wanted < 1e4  # the others are on their way to infinity
    assert kept.sum() >= 4 and kept.all() == (prior == "laplace")
    torch.testing.assert_close(added[kept], wanted[kept], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[prior].mean_field_scale, precision.diagonal(dim1=-2, dim2=-1).rsqrt())


def test_few_terms_are_found_among_many():
    model, library, data, F = oscillator()
    library.coefficients.requires_grad_(False)
    guide = SVISE(model, data, scale=0.02)

    def regress(step, bound):
        if step % 50 == 0:
            found = term_regression(model, guide, data, num_times=500, num_particles=2)
            with torch.no_grad():
                library.coefficients.copy_(found.coefficients)

    torch.manual_seed(0)
    schedule = infer.warmup_cosine(400, 20, final=0.05)
    infer.fit(
        model, guide, data, loss=SolverFree(64), num_steps=400, lr=1e-2, schedule=schedule, callback=regress,
        progress=False,
    )  # fmt: skip
    raw = library.in_units().detach()
    torch.testing.assert_close(raw[:, 1:3], F, atol=0.05, rtol=0.05)
    assert torch.cat([raw[:, :1], raw[:, 3:]], -1).abs().max() < 0.01
    assert (library.coefficients.abs() > 0.02).sum() == 4


@pytest.mark.parametrize("kind", ["laplace", "spike", "horseshoe"])
def test_sparse_priors_train_with_the_default_posterior(kind):
    model, library, data, _ = oscillator()
    with_sparse_prior(library, kind, 0.5)
    guide = SVISE(model, data)
    infer.fit(model, guide, data, loss=SolverFree(16), num_steps=3, lr=1e-2, progress=False)
    fitted = dict(guide.parameter_guide.named_parameters())
    assert len(fitted) == 2 * len(random_parameters(library))
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in fitted.values())


def test_what_cannot_be_regressed_is_refused():
    data = TimeSeries(torch.arange(3.0), torch.zeros(3, 1))
    for drift, words in (
        (MLPDrift(1, 4), "must be a dynamics.TermLibrary"),
        (LinearDrift(torch.eye(1)), "TermLibrary"),
    ):
        model = StateSpaceModel(NormalInitial(1), NeuralSDE(drift, ConstantDiffusion(0.5, 1)), LinearNormal(1, 1))
        with pytest.raises(TypeError, match=words):
            term_regression(model, ARCTA(model, 1, 4), data)
    noise = ConstantDiffusion(torch.tensor([[0.5]]))
    model = StateSpaceModel(NormalInitial(1), NeuralSDE(TermLibrary(1), noise, noise="additive"), LinearNormal(1, 1))
    with pytest.raises(ValueError, match="the noise must be diagonal"):
        term_regression(model, SVISE(model, data, covariance="full"), data)
