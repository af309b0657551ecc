"""`fit` against closed forms, and what it does besides following the gradient."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    IWAE,
    FitError,
    FreeBits,
    evidence_lower_bound,
    fit,
    importance_log_likelihood,
    linear_annealing,
    local_parameters,
    warmup_cosine,
)
from pyro_ssm.infer.batches import Batches
from pyro_ssm.infer.fit_gradient import gradient_of

from .programs import Chain, ExactGuide, LinearGuide, PointGuide, evidence, series_plate, simulate

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


class Level(PyroModule):
    """z ~ N(level, 1), y ~ N(z, 1): the best level is the mean of y, and the posterior of z is linear in y."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, data):
        level = self.level
        with series_plate(data):
            z = pyro.sample("z", dist.Normal(level, 1.0).expand([1, 1]).to_event(2))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(2), obs=data.values)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("loss", [Trace_ELBO(), IWAE(3)], ids=lambda loss: type(loss).__name__)
def test_optimum_is_the_evidence_of_the_closed_form(batch_size, loss):
    data = simulate(20, 1)
    y = data.values[:, 0, 0]
    schedule = warmup_cosine(250)
    result = fit(
        Level(),
        LinearGuide(),
        data,
        loss=loss,
        lr=0.05,
        num_steps=250,
        batch_size=batch_size,
        schedule=schedule,
        **QUIET,
    )
    best = dist.Normal(y.mean(), math.sqrt(2)).log_prob(y)
    torch.testing.assert_close(result.model.level.detach(), y.mean(), atol=0.05, rtol=0)
    # of 34 nats; IWAE forgives a guide that is not quite the posterior
    reached = importance_log_likelihood if isinstance(loss, IWAE) else evidence_lower_bound
    found = reached(result.model, result.guide, data, num_samples=50)
    torch.testing.assert_close(found.total, best.sum(), atol=0.1, rtol=0)
    # at the exact posterior the bound has no noise, and its unit is one observation
    assert result.num_observations == 20
    torch.testing.assert_close(
        -result.losses.reshape(-1, 2)[-10:].mean(),
        best.mean().detach(),
        atol=0.03 if batch_size is None else 0.3,
        rtol=0,
    )


def test_two_models_in_a_row_both_move():
    data = simulate(5, 3)
    for _ in range(2):
        model, guide = Chain(), LinearGuide()
        before = [p.detach().clone() for p in [*model.parameters(), *guide.parameters()]]
        fit(model, guide, data, num_steps=3, **QUIET)
        after = [*model.parameters(), *guide.parameters()]
        assert all((a != b).all() for a, b in zip(after, before, strict=True))
    assert len(pyro.get_param_store()) == 0


def test_first_step_is_the_step_of_a_plain_loop():
    data = simulate(5, 3)
    model, guide = Chain(), LinearGuide()
    twin, twin_guide = Chain(), LinearGuide()
    twin_guide.load_state_dict(guide.state_dict())
    torch.manual_seed(0)
    fit(model, guide, data, optimizer=torch.optim.SGD, lr=0.1, num_steps=4, clip_norm=None, **QUIET)
    torch.manual_seed(0)
    torch.randint(2**62, (2,))
    with local_parameters():
        elbo = Trace_ELBO()(twin, twin_guide)
        elbo(data)
        sgd = torch.optim.SGD(elbo.parameters(), lr=0.1)
        for _ in range(4):
            sgd.zero_grad()
            (elbo(data) / 15).backward()
            sgd.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    torch.testing.assert_close(guide.state_dict(), twin_guide.state_dict())


def test_gradient_is_clipped_by_its_norm():
    data = simulate(5, 3)
    guide = PointGuide()
    guide.gain.data.fill_(30.0)
    model = Chain()
    for p in model.parameters():
        p.requires_grad_(False)
    fit(model, guide, data, optimizer=torch.optim.SGD, lr=1.0, num_steps=1, clip_norm=0.25, **QUIET)
    assert guide.gain.item() == pytest.approx(30.0 - 0.25, abs=1e-5)


# ------------------------------------------------------------------------------------------------ mini-batches


def test_mini_batch_gradients_average_to_the_full_gradient():
    """For a guide without noise, over all mini-batches of an epoch of equal sizes."""
    data = simulate(12, 4, ragged=True, missing=0.3)
    model, guide = Chain(), PointGuide()
    gradient = gradient_of(model, guide, Trace_ELBO())

    def gradients(batch):
        for p in gradient.parameters.values():
            p.grad = None
        loss = gradient.loss_and_grads(batch, 7)
        return loss, [p.grad.clone() for p in gradient.parameters.values()]

    with gradient.context():
        gradient.initialise(data)
        loss, full = gradients(data)
        batches = Batches(data, 4, seed=5)
        parts = [gradients(batches.at(step)) for step in range(batches.per_epoch)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), loss)
    for k, expected in enumerate(full):
        torch.testing.assert_close(torch.stack([part[1][k] for part in parts]).mean(0), expected)


def test_an_epoch_visits_every_series_once_in_a_new_order():
    data = simulate(10, 2)
    batches = Batches(data, 4, seed=3)
    epochs = [torch.cat([batches.at(3 * e + k).index for k in range(3)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(Batches(data, 4, seed=3).at(4).index, epochs[1][4:8])  # no need to walk there
    result = fit(Chain(), LinearGuide(), data, num_epochs=2, batch_size=4, **QUIET)
    assert result.num_steps == 6 == len(result.losses)


def test_by_length_each_series_is_seen_once_an_epoch_beside_series_of_like_length():
    lengths = torch.tensor([9, 2, 5, 3, 9, 4, 2, 7, 5, 3])
    values = torch.zeros(10, 9, 1)
    data = TimeSeries(torch.arange(9.0), values, lengths=lengths)
    batches = Batches(data, 4, seed=3, by_length=True)
    assert batches.per_epoch == 3
    smaller = set()
    for epoch in range(20):
        cut = [batches.at(3 * epoch + i) for i in range(3)]
        assert torch.equal(torch.cat([batch.index for batch in cut]).sort().values, torch.arange(10))
        ranges = sorted((int(batch.lengths.min()), int(batch.lengths.max())) for batch in cut)
        assert all(upper <= lower for (_, upper), (lower, _) in zip(ranges, ranges[1:]))
        assert all(batch.num_times == int(batch.lengths.max()) for batch in cut)
        smaller |= {int(batch.lengths.max()) for batch in cut if len(batch) == 2}
    assert len(smaller) > 1  # the smaller mini-batch, whose series weigh more, is not always that of the longest
    again = Batches(data, 4, seed=3, by_length=True).at(31)
    assert torch.equal(again.index, batches.at(31).index)  # a function of seed and step alone


# --------------------------------------------------------------------------------- what is not differentiable


@pytest.mark.parametrize(
    "loss",
    [RenyiELBO(num_particles=2), TraceGraph_ELBO(), ReweightedWakeSleep(num_particles=4)],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_without_differentiable_loss_train(loss):
    data = simulate(20, 1)
    model = Level()
    result = fit(model, LinearGuide(), data, loss=loss, lr=0.05, num_steps=200, **QUIET)
    assert abs(model.level - data.values.mean()) < 0.1
    assert result.losses[-50:].mean() < result.losses[:10].mean()
    with pytest.raises(RuntimeError, match=r"global parameter store.*'level'.*clear_param_store"):
        fit(Level(), LinearGuide(), data, loss=loss, num_steps=1, **QUIET)
    fit(model, result.guide, data, loss=loss, num_steps=1, **QUIET)  # the same objects may go on
    pyro.clear_param_store()
    fit(Level(), LinearGuide(), data, loss=loss, num_steps=1, **QUIET)


def test_store_step_is_that_of_svi():
    model, guide, twin, twin_guide = Level(), LinearGuide(), Level(), LinearGuide()
    twin_guide.load_state_dict(guide.state_dict())
    data = simulate(6, 1)
    loss = RenyiELBO(num_particles=3)
    torch.manual_seed(0)
    fit(model, guide, data, loss=loss, lr=0.1, num_steps=1, clip_norm=None, optimizer=torch.optim.SGD, **QUIET)
    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.randint(2**62, (2,))
    loss.loss(twin, twin_guide, data)
    pyro.infer.SVI(twin, twin_guide, pyro.optim.SGD({"lr": 0.1 / 6}), loss).step(data)
    torch.testing.assert_close(guide.state_dict(), twin_guide.state_dict())
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_model_and_guide_of_one_name_are_refused():
    class Nameless(LinearGuide):
        def __init__(self):
            super().__init__()
            self._pyro_name = ""
            self.level = nn.Parameter(torch.zeros((), dtype=torch.float64))

    with pytest.raises(RuntimeError, match='both call a parameter `level`.*name="guide"'):
        fit(Level(), Nameless(), simulate(3, 1), loss=RenyiELBO(num_particles=2), num_steps=1, **QUIET)


def test_plain_functions_train():
    def model(y):
        level = pyro.param("level", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(2.0), constraint=torch.distributions.constraints.positive)
        pyro.sample("y", dist.Normal(level, scale).expand(y.shape).to_event(1), obs=y)

    y = torch.tensor([1.0, 2.0, 6.0])
    fit(model, None, y, lr=0.1, num_steps=400, **QUIET)
    assert pyro.param("level").item() == pytest.approx(3.0, abs=1e-2)
    assert pyro.param("scale").item() == pytest.approx(y.std(correction=0).item(), abs=1e-2)


def test_wrapped_modules_and_lazy_guides_train():
    class Both(PyroModule):
        def forward(self, y):
            with pyro.plate("series", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 6.0])
    model = Both()
    guide = AutoNormal(model)
    assert not list(guide.parameters())
    fit(pyro.poutine.scale(model, scale=2.0), guide, y, lr=0.1, num_steps=250, schedule=warmup_cosine(250), **QUIET)
    torch.testing.assert_close(guide.locs.z.detach(), y / 2, atol=0.2, rtol=0)
    torch.testing.assert_close(
        guide.scales.z.detach(), torch.full((3,), 0.5), atol=0.05, rtol=0
    )  # both sites counted twice


# ------------------------------------------------------------------------------------------------- guide=None


def test_guide_none_is_maximum_likelihood():
    class Plain(PyroModule):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, data):
            pyro.sample("y", dist.Normal(self.level, 1.0).expand(data.values.shape).to_event(3), obs=data.values)

    data = simulate(4, 3)
    result = fit(Plain(), None, data, lr=0.05, num_steps=300, **QUIET)
    torch.testing.assert_close(result.model.level.detach(), data.values.mean(), atol=1e-3, rtol=0)
    assert result.losses[-1] == pytest.approx(-dist.Normal(data.values.mean(), 1.0).log_prob(data.values).mean().item())
    with pytest.raises(ValueError, match=r"guide=None.*\['z'\].*infer\.Marginal"):
        fit(Chain(), None, data, num_steps=1, **QUIET)


# ------------------------------------------------------------------------------- validation, early stopping ...


def test_early_stopping_puts_the_best_back():
    data, held_out = simulate(3, 4, seed=1), simulate(30, 4, seed=2)
    model, guide = Chain(), LinearGuide()
    states = {}

    def remember(step, bound):
        states[step] = {name: p.detach().clone() for name, p in [*model.named_parameters(), *guide.named_parameters()]}

    result = fit(
        model,
        guide,
        data,
        lr=0.1,
        num_steps=5000,
        validation=held_out,
        validate_every=10,
        patience=3,
        callback=remember,
        **QUIET,
    )
    assert result.stopped == "patience" and result.converged and result.num_steps < 5000
    bounds = dict(result.validation)
    best = max(bounds, key=bounds.get)
    assert list(bounds) == list(range(10, result.num_steps + 1, 10))
    assert result.num_steps == best + 30
    now = {name: p for name, p in [*model.named_parameters(), *guide.named_parameters()]}
    assert all(torch.equal(now[name], states[best][name]) for name in now)


def test_validation_neither_anneals_nor_moves_the_stream():
    data, held_out = simulate(4, 3), simulate(2, 3, ragged=True, missing=0.4)
    runs = []
    for validation in (None, held_out):
        torch.manual_seed(3)
        runs.append(fit(Chain(), ExactGuide(), data, num_steps=6, validation=validation, validate_every=2, **QUIET))
    assert torch.equal(runs[0].losses, runs[1].losses)
    model, guide = Chain(), ExactGuide()
    for p in [*model.parameters()]:
        p.requires_grad_(False)
    result = fit(
        model,
        guide,
        data,
        lr=1e-12,
        num_steps=1,
        validation=held_out,
        annealing=lambda step: 0.0,
        loss=FreeBits(9.0),
        **QUIET,
    )
    ((step, bound),) = result.validation
    assert step == 1
    assert bound == pytest.approx(evidence(held_out).sum().item() / int(held_out.mask.sum()))


def test_annealing_scales_the_training_loss():
    data = simulate(4, 3)
    losses = []
    for annealing in (None, linear_annealing(0.25, 2)):
        torch.manual_seed(1)
        losses.append(fit(Chain(), PointGuide(), data, lr=1e-12, num_steps=3, annealing=annealing, **QUIET).losses)
    model, gain = Chain(), 0.5
    z = gain * data.values[..., 0]
    log_prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(0.8 * z[:, :-1], 0.6).log_prob(z[:, 1:]).sum(1)
    saved = (1 - torch.tensor([0.25, 0.625, 1.0], dtype=torch.float64)) * -log_prior.sum() / 12
    torch.testing.assert_close(losses[0] - losses[1], saved)
    assert model.training


def test_schedules():
    data = simulate(2, 2)
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    for schedule in (
        lambda step: 0.5**step,
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    ):
        fit(Chain(), LinearGuide(), data, optimizer=Spy, lr=0.1, num_steps=3, schedule=schedule, **QUIET)
        assert rates == pytest.approx([0.1, 0.05, 0.025])
        rates.clear()
    with pytest.raises(TypeError, match="without a metric; got ReduceLROnPlateau"):
        fit(Chain(), LinearGuide(), data, num_steps=1, schedule=torch.optim.lr_scheduler.ReduceLROnPlateau, **QUIET)


def test_callback_stops_and_modes_are_kept():
    data = simulate(2, 2)
    model, guide = Chain().eval(), LinearGuide()
    result = fit(model, guide, data, num_steps=50, callback=lambda step, bound: step == 7, **QUIET)
    assert (result.stopped, result.num_steps) == ("callback", 7)
    assert not model.training and guide.training
    torch.testing.assert_close(result.bounds, -result.losses)


def test_progress_bar_shows_the_bound(capsys):
    fit(Chain(), LinearGuide(), simulate(2, 2), num_steps=3)
    shown = capsys.readouterr().err
    assert "bound/obs=-" in shown and "3/3" in shown


# ---------------------------------------------------------------------------------------------- what is wrong


class Breaks(Chain):
    """Its third run (the second step) meets an emission that is not finite at series 1, time 2."""

    def __init__(self, broken):
        super().__init__()
        self.runs, self.broken = 0, broken

    def forward(self, data):
        self.runs += 1
        z_scale = torch.zeros(len(data), 4, 1, dtype=torch.float64)
        if self.runs >= 3:
            z_scale[1, 2] = self.broken
        noise = self.noise
        with series_plate(data):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(z_scale), 1.0).to_event(2))
            law = dist.Normal(z + z_scale, noise, validate_args=False).to_event(2)
            pyro.sample("y", law, obs=data.values)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("loss", [Trace_ELBO(), IWAE(2)], ids=lambda loss: type(loss).__name__)
def test_a_loss_that_is_not_finite_names_step_and_site(broken, loss, tmp_path):
    data, path = simulate(3, 4), tmp_path / "fit.pt"
    model, guide = Breaks(broken), LinearGuide()
    if isinstance(loss, IWAE):
        model.runs = -1  # it looks at the plates first
    states = []

    def remember(step, bound):
        states.append({name: x.clone() for name, x in guide.state_dict().items()})

    with pytest.raises(
        FitError, match=r"step 1: .* site `y` of the model is -?(nan|inf) at .*step 1 is in .*fit\.pt"
    ) as caught:
        fit(model, guide, data, loss=loss, num_steps=5, checkpoint=path, checkpoint_every=1, callback=remember, **QUIET)
    assert caught.value.step == 1 and caught.value.sites == ("y",)
    assert "1, 2, 0)" in str(caught.value)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 1 == len(states)
    for name, x in guide.state_dict().items():
        assert torch.equal(x, states[0][name]) and torch.equal(x, saved["programs"]["guide"][name])


def test_a_path_that_is_not_finite_names_the_time():
    data = simulate(3, 4)
    model, guide = Chain(), LinearGuide()
    for p in model.parameters():
        p.requires_grad_(False)

    def spoil(step, bound):
        model.transition.rate.fill_(math.nan)

    with pytest.raises(FitError, match=r"step 1: the loss .*site `z` of the model.*") as caught:
        fit(model, guide, data, num_steps=5, callback=spoil, **QUIET)
    assert caught.value.sites == ("z",)


def test_a_gradient_that_is_not_finite_names_the_parameter():
    class Kink(PyroModule):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.0))

        def forward(self, y):
            pyro.sample("y", dist.Normal(self.level.abs().sqrt(), 1.0), obs=y)

    model = Kink()
    with pytest.raises(FitError, match=r"step 0: the loss is finite, but the gradient of \['model.level'\] is not"):
        fit(model, None, torch.tensor(1.0), num_steps=1, **QUIET)
    assert model.level == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`num_steps` or `num_epochs`"),
        ({"num_steps": 1, "num_epochs": 1}, "`num_steps` or `num_epochs`"),
        ({"num_steps": 0}, "at least 1, got 0"),
        ({"num_steps": 1, "lr": 0.0}, "`lr` must be greater than 0, got 0"),
        ({"num_steps": 1, "clip_norm": -1}, "`clip_norm` must be greater than 0, got -1"),
        ({"num_steps": 1, "batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"num_steps": 1, "patience": 2}, "`patience` needs held-out data"),
        ({"num_steps": 1, "loss": Trace_ELBO}, "`loss` must be a Pyro ELBO object"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(Chain(), LinearGuide(), simulate(2, 2), **arguments, **QUIET)


def test_nothing_to_fit():
    model, guide = Chain(), LinearGuide()
    for p in [*model.parameters(), *guide.parameters()]:
        p.requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing to fit"):
        fit(model, guide, simulate(2, 2), num_steps=1, **QUIET)
    with pytest.raises(TypeError, match="a TimeSeries of several series"):
        fit(model, guide, torch.zeros(3), num_steps=1, batch_size=2, **QUIET)
