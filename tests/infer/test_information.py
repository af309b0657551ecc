"""Standard errors against Fisher's own formulas, finite differences and statsmodels."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.data import load
from pyro_ssm.dynamics import LinearNormal, NormalInitial
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.infer import kalman_filter, observed_information, standard_errors

D = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def learn_only(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def independent_model():
    """The state is white noise that the emission does not see: y_k = d + r e_k."""
    model = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1, matrix=torch.zeros(1, 1)))
    return learn_only(model, "emission.offset", "emission.scale_unconstrained")


def test_exact_fisher_information_of_independent_values():
    """At the maximum: se(mean) = s / sqrt n, se(s) = s / sqrt(2 n), and they are uncorrelated."""
    model, values = independent_model(), 2.0 + 3.0 * torch.randn(5, 7, 1)
    values[torch.rand(values.shape) < 0.3] = torch.nan
    seen = values[~values.isnan()]
    n, deviation = len(seen), seen.std(correction=0)
    with torch.no_grad():
        model.emission.offset.fill_(seen.mean())
    model.emission.scale = deviation.expand(1)
    found = standard_errors(model, TimeSeries(torch.arange(7.0), values))
    assert list(found.estimate) == ["emission.offset", "emission.scale"]
    torch.testing.assert_close(found.standard_error["emission.offset"], (deviation / n**0.5).expand(1))
    torch.testing.assert_close(found.standard_error["emission.scale"], (deviation / (2 * n) ** 0.5).expand(1))
    assert found.covariance[0, 1].abs() < 1e-12
    assert found.information.score.abs().max() < 1e-9
    assert model.emission.offset.grad is None


def test_hessian_is_that_of_finite_differences():
    torch.manual_seed(0)
    model = StateSpaceModel(NormalInitial(2), LinearNormal(2, covariance="full"), LinearEmission(2, 2))
    values = torch.randn(3, 5, 2)
    values[0, 1:3] = torch.nan
    values[1, 2, 0] = torch.nan
    data = TimeSeries(torch.arange(5.0), values, lengths=torch.tensor([5, 4, 5]))
    found = observed_information(model, data)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def score(u):
        with torch.no_grad():
            for p, part in zip(parameters, u.split(sizes)):
                p.copy_(part.view_as(p))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total(), parameters, allow_unused=False)])

    def total():
        return kalman_filter(model, data).log_likelihood.sum()

    step = 1e-5
    for i in torch.randperm(len(flat))[:6].tolist():
        e = torch.zeros_like(flat)
        e[i] = step
        column = (score(flat - e) - score(flat + e)) / (2 * step)
        torch.testing.assert_close(found.matrix[i], column, rtol=1e-5, atol=1e-5)
    assert len(found.names) == len(flat) == len(set(found.names))


def nile_model(level=1469.1**0.5, noise=15098.6**0.5):
    model = StateSpaceModel(
        NormalInitial(1, loc=0.0, scale=1e5),
        LinearNormal(1, matrix=torch.eye(1), scale=level),
        LinearEmission(1, 1, matrix=torch.ones(1, 1), scale=noise),
    )
    return learn_only(model, "transition.scale_unconstrained", "emission.scale_unconstrained")


def test_nile_standard_errors_are_those_of_statsmodels():
    """Local level, variances, at statsmodels' maximum; its Hessian is by complex steps."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    data = load("nile", dtype=D)
    peer = UnobservedComponents(data.values[:, 0].numpy(), "llevel", use_exact_diffuse=True)
    result = peer.fit(disp=False, cov_type="approx", method="bfgs")
    noise, level = result.params
    model = nile_model(level**0.5, noise**0.5)
    quantities = {
        "noise": lambda bound: bound.emission.scale.square(),
        "level": lambda bound: bound.transition.scale.square(),
    }
    found = standard_errors(model, data, of=quantities)
    ours = [float(found.standard_error[name]) for name in ("noise", "level")]
    assert ours == pytest.approx(result.bse.tolist(), rel=1e-3)
    assert float(found.estimate["noise"]) == pytest.approx(noise, rel=1e-9)


def test_the_delta_method_of_a_parameter_is_its_own():
    model = nile_model()
    data = load("nile", dtype=D).split(20)[0]
    plain = standard_errors(model, data)
    same = standard_errors(model, data, of={"s": lambda bound: bound.emission.scale})
    torch.testing.assert_close(plain.standard_error["emission.scale"], same.standard_error["s"])


def test_single_precision_models_are_differentiated_in_double():
    values = (2.0 + torch.randn(5, 7, 1)).float()
    found = observed_information(independent_model().float(), TimeSeries(torch.arange(7.0), values))
    assert found.matrix.dtype == D
    assert observed_information(independent_model(), TimeSeries(torch.arange(7.0), values)).matrix == pytest.approx(
        found.matrix, rel=1e-5
    )


def test_what_is_not_identified_is_named():
    model, data = independent_model(), TimeSeries(torch.arange(7.0), torch.randn(5, 7, 1))
    model.transition.offset.requires_grad_(True)  # of a state that nobody sees
    with pytest.raises(ValueError, match=r"mostly along \['transition.offset\[0\]'"):
        standard_errors(model, data)


def test_refusals_say_what_to_do():
    model, data = independent_model(), TimeSeries(torch.arange(7.0), torch.randn(5, 7, 1))
    with pytest.raises(TypeError, match="unbound StateSpaceModel"):
        observed_information(model.bind(), data)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        observed_information(model.requires_grad_(False), data)
    model.emission.offset = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"\['emission.offset'\] have one"):
        observed_information(model, data)
