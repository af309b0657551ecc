"""What a guide reads of irregular data: gaps, masks and both directions, whatever the encoder."""

import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ssm import TimeSeries, blocks
from pyro_ssm.blocks import Bidirectional
from pyro_ssm.dynamics import ElementwiseDiffusion, LinearDrift, NeuralSDE, NormalInitial
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import GaussianMarkov, LinearGaussian, PosteriorSDE, Structured
from pyro_ssm.guides.encoder import DataEncoder
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.testing.checks import perturb
from tests.contracts.toys import toy
from tests.slopes import assert_slope

D = torch.float64
STEPS = {"step_range": (0.05, 0.5)}
CELLS = {
    "LSSL": lambda n: blocks.LSSL(n, 4, **STEPS),
    "S4": lambda n: blocks.S4(n, 4, **STEPS),
    "S4D": lambda n: blocks.S4D(n, 4, **STEPS),
    "DSS": lambda n: blocks.DSS(n, 4, horizon=16, **STEPS),
    "S5": lambda n: blocks.S5(n, 4, **STEPS),
    "LRU": lambda n: blocks.LRU(n, 4),
    "LinOSS": lambda n: blocks.LinOSS(n, 4),
    "H3": lambda n: blocks.H3(n, 4, head_size=2, **STEPS),
    "LiquidS4": lambda n: blocks.LiquidS4(n, 4, **STEPS),
    "Mamba": lambda n: blocks.Mamba(n, 2, **STEPS),
    "Mamba2": lambda n: blocks.Mamba2(n, 2, head_size=4, **STEPS),
    "two layers of ODE-RNN": lambda n: blocks.ResidualStack([blocks.ODERNN(n, n), blocks.ODERNN(n, n)]),
    **{name: name for name in ("gru_d", "gru_ode", "gru_ode_bayes", "neural_cde", "ode_rnn")},
}


def series(seed=0):
    torch.manual_seed(seed)
    times = torch.rand(3, 6, dtype=D).add(0.2).cumsum(-1)
    mask = torch.rand(3, 6, 2) < 0.6
    return TimeSeries(times, torch.randn(3, 6, 2, dtype=D), mask=mask, lengths=torch.tensor([6, 3, 5]))


def features(encoder, data, model):
    return encoder(data, model).features


@pytest.mark.parametrize("cell", CELLS)
def test_an_encoder_of_irregular_data(cell):
    torch.manual_seed(1)
    model, data = toy().bind(), series()
    encoder = DataEncoder(model, 4, "both", cell=CELLS[cell]).to(D)
    found = features(encoder, data, model)
    for i, n in enumerate([6, 3, 5]):  # own grids and lengths
        torch.testing.assert_close(found[i, :n], features(encoder, data.series(i), model))
        assert (found[i, n:] == 0).all()
    order = torch.tensor([1, 2, 0])
    moved = TimeSeries(data.times[order], data.values[order], mask=data.mask[order], lengths=data.lengths[order])
    torch.testing.assert_close(features(encoder, moved, model), found[order])
    hidden = data.replace(values=torch.where(data.mask, data.values, 1e3), mask=data.mask)
    assert torch.equal(features(encoder, hidden, model), found)
    # both directions: the first step knows the last value, the last step the first one
    data = TimeSeries(data.times[0], data.values[0])
    base = features(encoder, data, model)
    for k, other in ((0, -1), (-1, 0)):
        values = data.values.clone()
        values[k] += 1.0
        assert (features(encoder, data.replace(values=values), model)[other] - base[other]).abs().max() > 1e-9
    # a series that is run through at another speed is another series
    assert (features(encoder, data.replace(times=3.0 * data.times), model) - base).abs().max() > 1e-6


@pytest.mark.parametrize("cell", ["gru_d", "gru_ode", "gru_ode_bayes", "neural_cde", "ode_rnn"])
def test_every_guide_takes_an_encoder_in_continuous_time(cell):
    data = series()
    linear = StateSpaceModel(
        NormalInitial(2), NeuralSDE(LinearDrift(-torch.eye(2)), ElementwiseDiffusion(2)), LinearNormal(2, 2)
    ).to(D)
    made = [
        (toy(), lambda model: Structured(model, 4, cell=cell)),
        (toy(), lambda model: GaussianMarkov(model, 4, "future", cell=cell)),
        (toy(), lambda model: LinearGaussian(model, toy(), 4, cell=cell)),
        (linear, lambda model: PosteriorSDE(model, 4, cell=cell, drift_hidden=4)),
    ]
    for model, make in made:
        guide = make(model).to(D)
        perturb(guide)
        given = data.refine(2) if isinstance(guide, PosteriorSDE) else data

        def loss(model=model, guide=guide, given=given):
            torch.manual_seed(0)
            return Trace_ELBO().differentiable_loss(model, guide, given)

        assert_slope(loss, list(guide.encoder.recurrent.parameters()), rel=1e-4)


def test_an_encoder_may_be_given_whole():
    model, data = toy().bind(), series()
    halves = [blocks.ODERNN(5, 4, obs_dim=2, method="dopri5", rtol=1e-8) for _ in range(2)]
    exact = DataEncoder(model, 4, "both", cell=Bidirectional(*halves)).to(D)
    errors = []
    for steps in (1, 4):
        for half in halves:
            half.solver = half.solver._replace(method="dopri5")
        wanted = features(exact, data, model)
        for half in halves:
            half.solver = half.solver._replace(method="rk4", num_steps=steps)
        errors.append((features(exact, data, model) - wanted).abs().max())
    assert errors[1] < errors[0] / 50 and errors[1] < 1e-5
    with pytest.raises(ValueError, match="has one layer.*blocks.ODERNN"):
        DataEncoder(model, 4, "both", cell="ode_rnn", num_layers=2)
    with pytest.raises(ValueError, match="'gru_d'.*'ode_rnn'.*got 'grud'"):
        DataEncoder(model, 4, "both", cell="grud")


@pytest.mark.parametrize("cell", ["ode_rnn", "gru_ode", "gru_ode_bayes", "gru_d", "gru"])
def test_features_between_observations(cell):
    """On a refined grid the observed steps keep their features, and an equation carries them in between."""
    torch.manual_seed(1)
    model, data = toy().bind(), series()
    for direction in ("past", "future"):
        encoder = DataEncoder(model, 4, direction, cell=cell).to(D)
        coarse, fine = features(encoder, data, model), features(encoder, data.refine(3), model)
        torch.testing.assert_close(fine[:, ::3], coarse)
        inside = slice(1, None, 3) if direction == "past" else slice(2, None, 3)  # a third of the gap away
        third = data.times.diff().unsqueeze(-1) / 3
        known = coarse[:, :-1] if direction == "past" else coarse[:, 1:]
        if cell.startswith(("ode", "gru_ode")):
            moved = getattr(encoder.recurrent, direction).evolve(known, third)
            assert (moved - known)[0].abs().max() > 1e-4
        else:
            moved = known
        moved = moved + third.log1p() * encoder.distance.weight[:, 0 if direction == "past" else 1]
        for i, n in enumerate([6, 3, 5]):
            torch.testing.assert_close(fine[i, inside][: n - 1], moved[i, : n - 1])
