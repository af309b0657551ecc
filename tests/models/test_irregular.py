"""Predictors of irregular series: exact likelihoods without a state, under every part of the library that they meet."""

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

from pyro_ssm import TimeSeries, emissions, infer, models, predict
from pyro_ssm.binding import parameter_names
from pyro_ssm.blocks import with_normal_priors
from pyro_ssm.dynamics import EmptyInitial, EmptyTransition, NormalInitial, OrnsteinUhlenbeck
from pyro_ssm.guides import Structured
from pyro_ssm.infer import (
    Marginal,
    PostJumpELBO,
    bootstrap,
    fit,
    kalman_filter,
    local_parameters,
    particle_filter,
    predictive_filter,
)
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.testing import InitialContract, TransitionContract
from pyro_ssm.testing.checks import perturb
from tests.slopes import assert_slope

D = torch.float64
MODELS = {
    "gru_d": lambda **k: models.gru_d(2, hidden_dim=4, **k),
    "ode_rnn": lambda **k: models.ode_rnn(2, hidden_dim=4, **k),
    "gru_ode_bayes": lambda **k: models.gru_ode_bayes(2, hidden_dim=4, prepared_dim=3, **k),
    "neural_cde": lambda **k: models.neural_cde(2, hidden_dim=4, **k),
}
named = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=D, **options):
    torch.manual_seed(0)
    model = MODELS[name](**options).to(dtype)
    perturb(model, 0.3)
    return model


def series(batch=(3,), num=5, lengths=None, dtype=D, input_dim=0):
    torch.manual_seed(1)
    times = torch.rand(*batch, num, dtype=D).add(0.1).cumsum(-1)
    mask = torch.rand(*batch, num, 2) < 0.7
    mask[..., 2, :] = False
    values = torch.randn(*batch, num, 2, dtype=dtype)
    inputs = torch.randn(*batch, num, input_dim, dtype=dtype) if input_dim else None
    return TimeSeries(times, values, mask=mask, inputs=inputs, lengths=lengths)


def total(model, data):
    traced = poutine.trace(model).get_trace(data)
    assert [n for n, site in traced.nodes.items() if site["type"] == "sample" and n != "series"] == ["y"]
    traced.compute_log_prob()
    return traced.nodes["y"]["log_prob"]


# -------------------------------------------------------------------------------------------------- the likelihood


@named
def test_the_likelihood_is_the_product_of_one_step_predictions(name):
    """Each factor comes from the record up to that time, by the block's own halves."""
    model, data = make(name, input_dim=1), series(input_dim=1)
    found = predictive_filter(model, data)
    block, emission = model.memory.block, model.emission
    held, previous = block.start((3,)), None
    for k in range(5):
        now = slice(k, k + 1)
        gap = torch.ones(3, 1, 1).double() if k == 0 else (data.times[:, now] - previous).unsqueeze(-1)
        held, previous = block.evolve(held, gap), data.times[:, now]
        y, m, u = data.values[:, now], data.mask[:, now], data.inputs[:, now]
        law = emission(torch.empty(3, 1, 0), previous, u, memory=block.read(held)).base_dist
        terms = torch.where(m, dist.Normal(law.loc, law.scale).log_prob(y), 0.0).sum(-1)
        torch.testing.assert_close(found.log_likelihood[:, now], terms)
        torch.testing.assert_close(found.predicted.mean[:, now], law.loc)
        short = data.replace(
            times=data.times[:, : k + 1],
            values=data.values[:, : k + 1],
            mask=data.mask[:, : k + 1],
            inputs=data.inputs[:, : k + 1],
        )
        torch.testing.assert_close(predictive_filter(model, short).log_likelihood[:, -1], terms.squeeze(-1))
        held = block.see(held, block.prepare(torch.cat([torch.where(m, y, 0.0), m.double(), u], -1)))
    torch.testing.assert_close(total(model, data), found.log_likelihood.sum(-1))
    assert found.exact and found.log_likelihood.shape == (3, 5)


@named
def test_what_is_not_seen_adds_exactly_nothing(name):
    model, data = make(name), series(lengths=torch.tensor([5, 3, 4]))
    found = predictive_filter(model, data)
    assert (found.log_likelihood[:, 2] == 0).all()  # a time at which nothing was seen
    assert (found.log_likelihood[1, 3:] == 0).all() and (found.log_likelihood[2, 4:] == 0).all()  # padding
    other = data.replace(values=torch.where(data.mask, data.values, 1e3), mask=data.mask)
    assert torch.equal(predictive_filter(model, other).log_likelihood, found.log_likelihood)
    grads = [torch.autograd.grad(total(model, d).sum(), list(model.parameters())) for d in (data, other)]
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))
    for i in range(3):  # a ragged batch on its own grids is a loop, in any order
        alone = predictive_filter(model, data.series(i)).log_likelihood
        torch.testing.assert_close(found.log_likelihood[i, : alone.shape[-1]], alone)
    order = torch.tensor([2, 0, 1])
    moved = predictive_filter(
        model, TimeSeries(data.times[order], data.values[order], mask=data.mask[order], lengths=data.lengths[order])
    )
    torch.testing.assert_close(moved.log_likelihood, found.log_likelihood[order])


@named
def test_float32_models_see_float64_times(name):
    single, double = make(name, torch.float32), make(name)
    double.load_state_dict(single.state_dict())
    data = series(dtype=torch.float32)
    found = predictive_filter(single, data).log_likelihood
    assert found.dtype == torch.float32
    wanted = predictive_filter(double, data.replace(values=data.values.double(), mask=data.mask)).log_likelihood
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@named
def test_filters_and_marginal_agree_with_the_model(name):
    model, data = make(name), series(lengths=torch.tensor([5, 3, 4]))
    exact = predictive_filter(model, data).log_likelihood
    cloud = particle_filter(bootstrap(model, data), num_particles=2)
    torch.testing.assert_close(cloud.log_likelihood, exact)
    torch.testing.assert_close(total(Marginal(model, filter=predictive_filter), data), exact.sum(-1))
    drawn = Marginal(model, filter=predictive_filter)(data.without_values())
    assert drawn.shape == (3, 5, 2)


# ------------------------------------------------------------------------------------------- draws, and what is drawn


@named
def test_a_simulated_record_has_the_density_with_which_it_was_drawn(name):
    model, data = make(name), series().without_values()
    traced = poutine.trace(model).get_trace(data)
    y = traced.nodes["y"]["value"].detach()
    given = data.replace(values=y)
    torch.testing.assert_close(total(model, given), predictive_filter(model, given).log_likelihood.sum(-1))
    traced.compute_log_prob()
    torch.testing.assert_close(traced.nodes["y"]["log_prob"], total(model, given))
    drawn = Predictive(model, num_samples=4, parallel=True)(data)
    assert drawn["y"].shape == (4, 3, 5, 2) and "z" not in drawn and drawn["y"].std(0).min() > 0


@named
def test_draws_have_the_predicted_moments(name):
    model, data = make(name), series()
    future = data.times[:, -1:] + torch.tensor([0.4, 1.5]).double()
    drawn = predict.forecast(model, None, data, future, num_samples=4000)
    assert drawn.states.shape == (4000, 3, 2, 0)
    longer = TimeSeries(
        torch.cat([data.times, future], -1),
        torch.cat([data.values, torch.zeros(3, 2, 2).double()], -2),
        mask=torch.cat([data.mask, torch.zeros(3, 2, 2, dtype=torch.bool)], -2),
    )
    law = predictive_filter(model, longer).predicted
    first, scale = law.mean[:, 5], law.variance[:, 5].sqrt()
    assert ((drawn.values[:, :, 0].mean(0) - first).abs() < 4.5 * scale / math.sqrt(4000)).all()
    # the second step has seen the first one's draw
    one = drawn.values[7, :, 0]
    seen = longer.replace(
        values=torch.cat([longer.values[:, :5], one.unsqueeze(-2), longer.values[:, 6:]], -2),
        mask=torch.cat([longer.mask[:, :5], torch.ones(3, 1, 2, dtype=torch.bool), longer.mask[:, 6:]], -2),
    )
    given = predictive_filter(model, seen).predicted
    with torch.no_grad():
        model.emission.network.layers[-1].bias[2:] = -30.0  # almost no noise: draws are means
        model.emission.floor = 1e-9
        if name == "gru_ode_bayes":
            model.memory.block.floor = 1e-9
    assert given.mean.shape == (3, 7, 2)
    if name != "gru_ode_bayes":  # whose jump sees the scale
        quiet = predict.forecast(model, None, data, future, num_samples=1).values[0]
        values = torch.cat([longer.values[:, :5], quiet[:, :1], longer.values[:, 6:]], -2)
        path = predictive_filter(model, seen.replace(values=values, mask=seen.mask)).predicted.mean
        torch.testing.assert_close(quiet, path[:, 5:], rtol=1e-6, atol=1e-6)


@named
def test_missing_values_are_drawn_step_by_step(name):
    model, data = make(name), series(lengths=torch.tensor([5, 3, 4]))
    drawn = predict.impute(model, None, data, num_samples=6)
    assert drawn.shape == (6, 3, 5, 2)
    assert (drawn[:, data.mask] == data.values[data.mask]).all()
    hidden = data.step_mask.unsqueeze(-1) & ~data.mask
    assert drawn.std(0)[hidden].min() > 0


@pytest.mark.parametrize("name", ["gru_d", "ode_rnn", "neural_cde"])
def test_a_ragged_batch_goes_on_from_each_end(name):
    model, data = make(name), series(lengths=torch.tensor([5, 3, 4]))
    with torch.no_grad():
        model.emission.network.layers[-1].bias[2:] = -30.0  # almost no noise: draws are means
        model.emission.floor = 1e-9
    last = data.times.gather(-1, (data.lengths - 1).unsqueeze(-1))
    future = last + torch.tensor([0.4, 1.5]).double()
    together = predict.forecast(model, None, data, future, num_samples=1).values
    for i in range(3):
        alone = predict.forecast(model, None, data.series(i), future[i], num_samples=1).values
        torch.testing.assert_close(together[:, i], alone, rtol=1e-6, atol=1e-6)


def test_counts_and_inputs():
    model = models.ode_rnn(1, hidden_dim=4, input_dim=2, emission=emissions.Poisson)
    data = TimeSeries(torch.rand(3, 4).cumsum(-1), torch.ones(3, 4, 1), inputs=torch.randn(3, 4, 2))
    assert total(model, data).shape == (3,)
    future = torch.tensor([5.0, 6.0])
    drawn = predict.forecast(model, None, data, future, num_samples=5, inputs=torch.randn(2, 2)).values
    assert drawn.shape == (5, 3, 2, 1) and (drawn == drawn.round()).all()
    with pytest.raises(ValueError, match="input"):
        predictive_filter(model, TimeSeries(torch.arange(4.0), torch.ones(4, 1)))


# ------------------------------------------------------------------------------------------------------ random weights


def test_a_shared_head_is_one_module_in_copies_and_under_priors():
    """The jump of GRU-ODE-Bayes reads the very network, drawn or not, with which the model predicts."""
    model, data = make("gru_ode_bayes"), series()
    assert model.memory.block.head is model.emission.network
    names = parameter_names(model)
    assert "memory.block.head.layers.0.weight" in names and not any("emission" in name for name in names)
    exact = predictive_filter(model, data).log_likelihood
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.memory.block.head is twin.emission.network
        assert torch.equal(predictive_filter(twin, data).log_likelihood, exact)
    weight = model.emission.network.layers[0].weight.detach().clone()
    with_normal_priors(model.emission)
    values = infer.sample_prior(model)
    values["memory.block.head.layers.0.weight"] = weight
    bound = model.bind(values)
    assert bound.memory.block.head is bound.emission.network
    torch.testing.assert_close(bound.emission.network.layers[0].weight.reshape(weight.shape), weight)
    guide = AutoNormal(model)
    loss = PostJumpELBO(0.5, 0.2)
    fitted = fit(model, guide, data, loss=loss, num_steps=2, progress=False)
    assert fitted.num_steps == 2

    def seeded():
        torch.manual_seed(3)
        return loss.differentiable_loss(model, guide, data)

    with local_parameters():
        assert_slope(seeded, [*model.parameters(), *guide.parameters()], rel=1e-4)


def test_weights_with_priors():
    model = models.ode_rnn(2, hidden_dim=3).double()
    with_normal_priors(model.emission, 0.5)
    data = series()
    guide = AutoNormal(model)
    fitted = fit(model, guide, data, num_steps=3, progress=False)
    assert fitted.losses.shape == (3,)
    drawn = Predictive(guide, num_samples=4)(data)
    drawn = {name: value for name, value in drawn.items() if not name.endswith("_unconstrained")}
    bound = model.bind({n: v.unsqueeze(1) for n, v in drawn.items()})  # beside the series
    found = predictive_filter(bound, data).log_likelihood
    assert found.shape == (4, 3, 5)
    for s in range(4):
        alone = predictive_filter(model.bind({n: v[s] for n, v in drawn.items()}), data).log_likelihood
        torch.testing.assert_close(found[s], alone)
    for posterior in (fitted, drawn):
        count = None if posterior is drawn else 4
        ahead = predict.forecast(model, posterior, data, data.times[:, -1:] + 1.0, num_samples=count)
        assert ahead.values.shape == (4, 3, 1, 2)
    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(data)
    assert set(mcmc.get_samples()) == set(drawn)


# --------------------------------------------------------------------------------------------------- the post-jump loss


def test_the_post_jump_loss_is_the_papers():
    model, data = make("gru_ode_bayes"), series(lengths=torch.tensor([5, 3, 4]))
    bound = Trace_ELBO().loss(model, infer.fit_gradient.EmptyGuide(), data)
    loss = [PostJumpELBO(w, 0.3).loss(model, infer.fit_gradient.EmptyGuide(), data) for w in (0.0, 1.0, 2.5)]
    assert loss[0] == pytest.approx(bound)
    wanted, block = 0.0, model.memory.block
    with torch.no_grad():
        for i in range(3):
            one = data.series(i)
            before = predictive_filter(model, one).predicted
            held, _ = model.memory.start(())
            for k in range(one.num_times):
                now = slice(k, k + 1)
                gap = torch.ones(1, 1).double() if k == 0 else one.times.diff()[k - 1].reshape(1, 1)
                held, _ = model.memory.see_state(held, torch.empty(1, 0), gap, None)
                held, summary = model.memory.see_observation(held, one.values[now], one.mask[now])
                loc, scale = block.predict(summary)
                for j in range(2):
                    if one.mask[k, j]:
                        v, w = before.variance[k, j], torch.tensor(0.09).double()
                        bayes = dist.Normal(
                            (before.mean[k, j] * w + one.values[k, j] * v) / (v + w), (v * w / (v + w)).sqrt()
                        )
                        wanted += kl_divergence(bayes, dist.Normal(loc[0, j], scale[0, j])).item()
    assert loss[1] - loss[0] == pytest.approx(wanted)
    assert loss[2] - loss[0] == pytest.approx(2.5 * wanted)
    other = data.replace(values=torch.where(data.mask, data.values, 7.0), mask=data.mask)
    assert PostJumpELBO(1.0, 0.3).loss(model, infer.fit_gradient.EmptyGuide(), other) == loss[1]


def test_the_post_jump_loss_scales_with_a_mini_batch_and_trains():
    model, data = make("gru_ode_bayes", torch.float32), series(batch=(4,), dtype=torch.float32)
    guide, loss = infer.fit_gradient.EmptyGuide(), PostJumpELBO(1.0, torch.tensor([0.2, 0.4]))
    parts = [loss.loss(model, guide, data.minibatch(torch.tensor(index))) for index in ([0, 1], [2, 3])]
    assert sum(parts) / 2 == pytest.approx(loss.loss(model, guide, data), rel=1e-5)
    fitted = fit(model, None, data, loss=loss, num_steps=30, lr=0.02, progress=False)
    assert fitted.losses[-3:].mean() < fitted.losses[:3].mean()
    for wrong in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="`weight`"):
            PostJumpELBO(wrong)
    with pytest.raises(ValueError, match="`obs_scale`"):
        PostJumpELBO(1.0, 0.0)
    with pytest.raises(ValueError, match="GRUODEBayes"):
        loss.loss(models.ode_rnn(2, hidden_dim=4), guide, data)


# ----------------------------------------------------------------------------------------------------------- what fails


def test_errors_name_the_way_out():
    model, data = make("ode_rnn"), series()
    with pytest.raises(TypeError, match="no state: fit it with guide=None"):
        Structured(model, 4)
    with pytest.raises(TypeError, match="state_dim=2.*kalman_filter"):
        predictive_filter(models.dmm(2, 2), data)
    with pytest.raises(ValueError, match="no values"):
        predictive_filter(model, data.without_values())
    with pytest.raises(ValueError, match="refined"):
        predictive_filter(model, data.refine(2))
    with pytest.raises(ValueError, match="`state_dim` must be at least 1"):
        emissions.Normal(0, 2)
    assert EmptyInitial().state_dim == EmptyTransition().state_dim == 0


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize(("name", "steps"), [("ode_rnn", 70), ("gru_ode_bayes", 70), ("neural_cde", 80)])
def test_a_trained_predictor_beats_the_mean_and_the_last_value(name, steps):
    """Sines of random phase at random times: the next value depends on the gap."""
    torch.manual_seed(0)
    times = torch.rand(96, 12).sort(-1).values.double() * 8 + torch.arange(12) * 1e-3
    phase = 6.3 * torch.rand(96, 1)
    values = torch.sin(1.5 * times + phase).float().unsqueeze(-1)
    values = values + 0.05 * torch.randn_like(values)
    data = TimeSeries(times, values)
    train, test = data.minibatch(torch.arange(64)), data.minibatch(torch.arange(64, 96))
    train, test = (TimeSeries(d.times, d.values) for d in (train, test))
    make_model = {"ode_rnn": models.ode_rnn, "gru_ode_bayes": models.gru_ode_bayes, "neural_cde": models.neural_cde}
    model = make_model[name](1, hidden_dim=16)
    fit(model, None, train, num_steps=steps, lr=0.02, progress=False)
    with torch.no_grad():
        predicted = predictive_filter(model, test).predicted.mean
    late = slice(4, None)
    error = (predicted - test.values)[:, late].square().mean()
    last = test.values.diff(dim=1)[:, late.start - 1 :].square().mean()
    constant = (test.values - train.values.mean())[:, late].square().mean()
    assert error < 0.5 * min(last, constant)


def test_a_trained_predictor_comes_close_to_the_exact_filter():
    """Of an Ornstein-Uhlenbeck process under noise no predictor has a higher likelihood than the Kalman filter."""
    torch.manual_seed(0)
    truth = StateSpaceModel(NormalInitial(1), OrnsteinUhlenbeck(1), emissions.LinearNormal(1, 1, scale=0.2)).double()
    with torch.no_grad():
        truth.emission.matrix.fill_(1.0)
        times = torch.rand(600, 12, dtype=D).mul(1.2).add(0.05).cumsum(-1)
        y = truth(TimeSeries(times))[1]
        test = TimeSeries(times[200:], y[200:])
        best = -infer.kalman_filter(truth, test).log_likelihood.mean()
        blind = 0.5 * (2 * math.pi * math.e * y[200:].var()).log()
    model = models.ode_rnn(1, hidden_dim=16)
    fit(model, None, TimeSeries(times[:200], y[:200].float()), lr=0.02, num_steps=50, progress=False)
    with torch.no_grad():
        found = -predictive_filter(model, test.replace(values=test.values.float())).log_likelihood.mean()
    assert -0.005 < found - best < 0.25 * (blind - best)


class TestEmptyInitial(InitialContract):
    test_draws_follow_the_density = None  # there is nothing to draw

    def make_component(self):
        return EmptyInitial()


class TestEmptyTransition(TransitionContract):
    test_draws_follow_the_density = None

    def make_component(self):
        return EmptyTransition()


def test_filters_of_states_name_the_one_of_predictions():
    data = TimeSeries(torch.arange(4.0), torch.zeros(2, 4, 1))
    with pytest.raises(TypeError, match="no state to filter.*infer.predictive_filter"):
        kalman_filter(models.gru_d(1, hidden_dim=4), data)
