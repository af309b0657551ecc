import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian import kalman_filter
from pyro_ssm.infer.marginal import Marginal, MarginalLaw
from tests.infer.gaussian.linear import D, dense, dense_log_likelihood, random_data, random_model


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def scalar_model():
    """One state, one coordinate, a random observation scale (and a fixed everything else)."""
    model = random_model(1, 1)
    del model.emission.R
    model.emission.R = PyroSample(dist.LogNormal(torch.tensor(0.0, dtype=D), 0.7))
    return model


def scalar_data(batch=(), **options):
    return random_data(batch, p=1, **options)


def exact(model, data, scale):
    """Log-likelihood of each series at one value of the scale."""
    return kalman_filter(model.bind({"emission.R": scale}), data).log_likelihood.sum(-1)


def traced(program, *args):
    trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("batch", [(), (3,)])
def test_one_observed_site_with_the_filters_density(batch):
    model, data = scalar_model(), scalar_data(batch)
    trace = traced(Marginal(model), data)
    assert list(trace.stochastic_nodes) == ["emission.R"] + ["series"] * bool(batch)
    assert list(trace.observation_nodes) == ["y"]
    site = trace.nodes["y"]
    assert site["value"] is data.values
    assert site["fn"].batch_shape == batch and site["fn"].event_shape == (6, 1)
    torch.testing.assert_close(site["log_prob"], exact(model, data, trace.nodes["emission.R"]["value"]))


def test_density_is_that_of_the_dense_gaussian():
    model, data = random_model(), random_data()
    torch.testing.assert_close(traced(Marginal(model), data).nodes["y"]["log_prob"], dense_log_likelihood(model, data))


def test_site_names_are_those_of_the_model():
    class Study(PyroModule):
        def __init__(self):
            super().__init__()
            self.child = scalar_model()

    data = scalar_data((2,))
    assert {"child.y", "child.series", "child.emission.R"} <= set(traced(Marginal(Study().child), data).nodes)
    model = scalar_model()
    Marginal(model)
    assert {"z", "y", "series", "emission.R"} <= set(traced(model, data).nodes)


def test_a_minibatch_is_scaled_once():
    model, data = scalar_model(), scalar_data((6,))
    part = data.minibatch(torch.tensor([4, 1]))
    fixed = poutine.condition(Marginal(model), data={"emission.R": torch.tensor(0.8, dtype=D)})
    trace = traced(fixed, part)
    torch.testing.assert_close(trace.nodes["y"]["log_prob_sum"], 3 * exact(model, data, 0.8)[[4, 1]].sum())
    prior = dist.LogNormal(torch.tensor(0.0, dtype=D), 0.7).log_prob(torch.tensor(0.8, dtype=D))
    torch.testing.assert_close(trace.nodes["emission.R"]["log_prob_sum"], prior)


def test_inside_a_users_plate_parameters_are_per_series():
    model, data = scalar_model(), scalar_data((3,))

    def program(data):
        with pyro.plate("people", 3, dim=-1):
            return Marginal(model)(data)

    trace = traced(program, data)
    assert "series" not in trace.nodes
    scale = trace.nodes["emission.R"]["value"]
    assert scale.shape == (3,) and len(scale.unique()) == 3
    for i in range(3):
        alone = exact(model, data.series(i), scale[i])
        torch.testing.assert_close(trace.nodes["y"]["log_prob"][i], alone)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_vectorized_particles_are_a_loop(batch):
    model, data = scalar_model(), scalar_data(batch)
    program = Marginal(model)
    guide = AutoNormal(program)
    guide(data)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    (model_trace, _), *_ = elbo._get_traces(program, guide, (data,), {})
    scale, site = model_trace.nodes["emission.R"]["value"], model_trace.nodes["y"]
    assert scale.shape == (5, 1)
    expected = torch.stack([exact(model, data, value) for value in scale[:, 0]])
    torch.testing.assert_close(site["log_prob"], expected.reshape(5, -1))


def test_svi_finds_the_posterior_mode():
    """AutoDelta: the mode of a density on a grid."""
    model, data = scalar_model(), scalar_data((3,), num_times=5)
    program = Marginal(model)
    guide = AutoDelta(program, init_loc_fn=init_to_value(values={"emission.R": torch.tensor(1.0, dtype=D)}))
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(80):
        svi.step(data)
    grid = torch.linspace(0.05, 4, 800, dtype=D)
    prior = dist.LogNormal(torch.tensor(0.0, dtype=D), 0.7)
    curve = exact(model, data, grid.unsqueeze(-1)).sum(-1) + prior.log_prob(grid)
    assert abs(guide.median()["emission.R"] - grid[curve.argmax()]) < 0.02


def test_svi_trains_the_models_own_parameters():
    model, data = random_model(), random_data((3,))
    model.transition.b = torch.nn.Parameter(model.transition.b.clone())
    program = Marginal(model)
    assert [name for name, _ in program.named_parameters()] == ["model.transition.b"]
    svi = SVI(program, lambda data: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1
    (name,) = pyro.get_param_store().keys()
    assert name == "transition.b"
    torch.testing.assert_close(pyro.param(name).detach(), model.transition.b.detach())
    assert losses[0] == pytest.approx(-float(kalman_filter(random_model(), data).log_likelihood.sum().detach()))


def test_draws_have_the_moments_of_the_dense_gaussian():
    model, data = random_model(n=2), random_data(num_times=3, missing=0.0)
    law = MarginalLaw(model.bind(), data.without_values(), kalman_filter)
    _, _, mean, covariance, _ = dense(model, data)
    draws = law.sample((20_000,)).flatten(1)
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / 20_000**0.5).all()
    assert ((draws.T.cov() - covariance).abs() < 7 * deviation[:, None] * deviation / 20_000**0.5).all()


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_simulates_the_record(batch, parallel):
    model, data = scalar_model(), scalar_data(batch)
    program = Marginal(model)
    prior = Predictive(program, num_samples=4, parallel=parallel)(data.without_values())
    assert prior["y"].numel() == 4 * 6 * data.values[..., 0, 0].numel()
    assert (prior["y"].reshape(4, *batch, 6, 1).std(0) > 0).all()  # each entry is drawn anew in each
    # almost no noise in the observation: the spread of y is that of the draws of the scale
    posterior = {"emission.R": torch.tensor([1e-6, 1e6], dtype=D).repeat(20)}
    drawn = Predictive(program, posterior, parallel=parallel)(data.without_values())["y"].reshape(40, -1)
    assert drawn[::2].abs().max() < 1e3 < drawn[1::2].abs().min(0).values.max()
    assert drawn[1::2].std() == pytest.approx(1e6, rel=0.2)


def test_conditioning_the_site_equals_giving_the_values():
    model, data = scalar_model(), scalar_data((3,), missing=0.0)
    scale = torch.tensor(0.8, dtype=D)
    program = poutine.condition(Marginal(model), data={"emission.R": scale, "y": data.values})
    torch.testing.assert_close(traced(program, data.without_values()).nodes["y"]["log_prob"], exact(model, data, scale))


def test_padding_and_missing_stay_out_of_the_density_of_other_values():
    model, data = random_model(), random_data((3,), lengths=torch.tensor([6, 2, 4]))
    law = MarginalLaw(model.bind(), data, kalman_filter)
    other = torch.randn(5, *data.values.shape, dtype=D)
    total = law.log_prob(other)
    assert total.shape == (5, 3)
    for s in range(5):
        seen = data.replace(values=other[s], mask=data.mask)
        torch.testing.assert_close(total[s], kalman_filter(model, seen).log_likelihood.sum(-1))


def test_a_draw_has_the_shape_of_an_expanded_law():
    law = MarginalLaw(random_model().bind(), random_data((3,)).without_values(), kalman_filter).expand((4, 3))
    draw = law.sample((2,))
    assert draw.shape == (2, 4, 3, 6, 2) and law.log_prob(draw).shape == (2, 4, 3)


def test_pickles():
    model, data = scalar_model(), scalar_data()
    program = Marginal(model)
    again = pickle.loads(pickle.dumps(program))
    fixed = {"emission.R": torch.tensor(0.5, dtype=D)}
    one, two = (traced(poutine.condition(p, data=fixed), data).log_prob_sum() for p in (program, again))
    assert one == two


@pytest.mark.slow
def test_nuts_recovers_the_posterior_of_a_scale():
    """Against quadrature over the one parameter, ragged and with missing values."""
    model = scalar_model()
    data = scalar_data((3,), num_times=5, own_times=True, lengths=torch.tensor([5, 3, 4]))
    grid = torch.linspace(-6, 4, 2001, dtype=D)  # log scale
    prior = dist.Normal(torch.tensor(0.0, dtype=D), 0.7)
    density = (exact(model, data, grid.exp().unsqueeze(-1)).sum(-1) + prior.log_prob(grid)).softmax(0)
    mean = (density * grid).sum()
    deviation = (density * (grid - mean).square()).sum().sqrt()
    mcmc = MCMC(NUTS(Marginal(model)), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()["emission.R"].log()
    effective = float(mcmc.diagnostics()["emission.R"]["n_eff"])
    assert effective > 60
    assert abs(draws.mean() - mean) < 4 * deviation / effective**0.5
    assert abs(draws.std() / deviation - 1) < 4 / (2 * effective) ** 0.5


def test_wrong_arguments_are_refused():
    model, data = scalar_model(), scalar_data()
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got Drift"):
        Marginal(model.transition)
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got BoundStateSpaceModel"):
        Marginal(random_model().bind())
    with pytest.raises(TypeError, match="`filter` must be a function"):
        Marginal(model, filter="kalman")
    with pytest.raises(TypeError, match="needs a TimeSeries, got Tensor"):
        Marginal(model)(data.values)
    assert isinstance(data, TimeSeries)
