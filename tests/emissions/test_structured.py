"""Emissions over the whole course of the state: in a model, under SVI, in forecasts, on refined and ragged grids."""

import pytest
import torch
from pyro import poutine

import pyro_ssm as ssm
from pyro_ssm import blocks, emissions
from pyro_ssm.guides import Structured
from pyro_ssm.infer import fit, guided, importance_log_likelihood, particle_filter
from pyro_ssm.models import MemoryNormal, MemoryNormalInitial, history, observation_law
from pyro_ssm.predict import forecast
from pyro_ssm.testing import MemoryContract

BLOCKS = {
    "S4D": lambda: blocks.S4D(4, 4),
    "S5": lambda: blocks.S5(4, 4),
    "LinOSS": lambda: blocks.LinOSS(4, 4),
    "Mamba": lambda: blocks.Mamba(4, 2),
    "Mamba2": lambda: blocks.Mamba2(4, 2, head_size=4),
}


def emission(block="S5", sees_state=False, **options):
    stack = blocks.ResidualStack([BLOCKS[block]()], in_features=2, out_features=3)
    if sees_state:
        return emissions.Structured(stack, emissions.Normal(2, 2, memory_dim=3), **options)
    return emissions.Structured(stack, emissions.Normal(3, 2, 4), **options)


def model(block="S5", **options):
    return ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), emission(block, **options))


def series(batch=(3,), num_times=6, missing=False, lengths=None):
    times = (0.3 + torch.rand(*batch, num_times)).double().cumsum(-1)
    values = torch.randn(*batch, num_times, 2)
    if missing:
        values[torch.rand(values.shape) < 0.3] = float("nan")
    return ssm.TimeSeries(times, values, lengths=lengths)


class TestMemory(MemoryContract):
    obs_dim = 2

    def make_component(self):
        return emission().memory


def log_prob_of_observations(bound, data, z):
    return observation_law(bound, data, z, history(bound, data)).log_prob(data.values)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sees_state", [False, True])
def test_the_law_is_the_head_after_the_block(block, sees_state):
    """log p(y | z) by hand: the block over states with the true gaps, and a law for each step."""
    bound, data = model(block, sees_state=sees_state).bind(), series()
    z = torch.randn(4, 3, 6, 2)
    gap = torch.cat([torch.ones(3, 1), data.times.diff(dim=-1).float()], -1)
    summary = bound.emission.memory.block(z, dt=gap)[0]
    head = bound.emission.head
    law = head(z, data.times, None, memory=summary) if sees_state else head(summary, data.times, None)
    torch.testing.assert_close(log_prob_of_observations(bound, data, z), law.log_prob(data.values).sum(-1))


def test_the_memory_is_the_models():
    one = model()
    assert one.memory is one.emission.memory
    with pytest.raises(ValueError, match="two memories"):
        ssm.StateSpaceModel(one.initial, one.transition, emission(), memory=blocks.BlockMemory(blocks.S5(2), 2))


def test_missing_and_padded_steps():
    """A missing entry adds 0; padding changes nothing; a ragged batch is a loop."""
    bound, data = model("Mamba").bind(), series(missing=True, lengths=[6, 4, 2])
    z = torch.randn(3, 6, 2)
    found = log_prob_of_observations(bound, data, z)
    dirty = z.clone()
    dirty[1, 4:], dirty[2, 2:] = 7.0, -7.0
    torch.testing.assert_close(log_prob_of_observations(bound, data, dirty), found)
    for i, n in enumerate((6, 4, 2)):
        alone = data.series(i)
        torch.testing.assert_close(log_prob_of_observations(bound, alone, z[i, :n]), found[i])


def test_a_refined_grid_changes_nothing_at_observation_times():
    bound, data = model("S4D").bind(), series()
    fine = data.refine(3)
    z = torch.randn(3, fine.num_times, 2)
    at = z.index_select(-2, fine.observed_index)
    torch.testing.assert_close(log_prob_of_observations(bound, fine, z), log_prob_of_observations(bound, data, at))


@pytest.mark.parametrize(("block", "cell"), [("S4D", "gru"), ("Mamba", blocks.S5), ("LinOSS", blocks.Mamba)])
def test_svi_trains_the_block_and_forecasts_go_on(block, cell):
    one, data = model(block), series(missing=True, lengths=[6, 5, 3])
    guide = Structured(one, 4, cell=cell)
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    fitted = fit(one, guide, data, lr=2e-2, num_steps=25, progress=False)
    assert fitted.losses[-5:].mean() < fitted.losses[:5].mean()
    assert all(not torch.equal(p, before[name]) for name, p in one.named_parameters())
    ahead = data.times.max() + torch.tensor([0.5, 1.0, 4.0])
    drawn = forecast(one, guide, data, ahead, num_samples=5)
    assert drawn.values.shape == (5, 3, 3, 2)
    assert importance_log_likelihood(one, guide, data, num_samples=8).log_likelihood.shape == (3,)


def test_a_guide_without_the_memory_is_that_of_the_bare_chain():
    """``reads_memory=False``: the same law of paths as for a model without memory, drawn at once, as a proposal too."""
    one, data = model("Mamba"), series(missing=True, lengths=[6, 5, 3])
    bare = ssm.StateSpaceModel(one.initial, one.transition, emissions.Normal(2, 2))
    torch.manual_seed(3)
    guide = Structured(one, 4, "past", reads_memory=False)
    twin = Structured(bare, 4, "past")
    twin.load_state_dict(guide.state_dict())
    path, same = (g.path(data, m.bind()) for g, m in ((guide, one), (twin, bare)))
    torch.manual_seed(4)
    z = path.rsample()
    torch.manual_seed(4)
    assert torch.equal(z, same.rsample())
    torch.testing.assert_close(path.log_prob(z), same.log_prob(z))
    torch.testing.assert_close(path.log_prob(z), path.log_prob(z.clone()))  # drawn at once, and by its steps
    fitted = fit(one, guide, data, lr=2e-2, num_steps=25, progress=False)
    assert fitted.losses[-5:].mean() < fitted.losses[:5].mean()
    found = particle_filter(guided(one, guide, data), 50)
    assert found.log_likelihood.shape == (3, 6)
    assert (found.log_likelihood[1, 5:] == 0).all()


def test_a_forecast_remembers_the_whole_path():
    """The law of y at the next time, given a path: that of the block run over the path and the next state."""
    one, data = model("S5"), series(batch=(), num_times=5)
    bound, z = one.bind(), torch.randn(1, 5, 2)
    from pyro_ssm.predict.remember import remember

    past = remember(bound, z, data)
    new, gap = torch.randn(1, 1, 2), torch.full((1, 1), 0.7)
    summary = past.see_state(new, gap, None)
    gaps = torch.cat([torch.ones(1), data.times.diff().float(), torch.tensor([0.7])])
    whole = bound.emission.memory.block(torch.cat([z, new], -2), dt=gaps.unsqueeze(0))[0]
    torch.testing.assert_close(summary, whole[..., -1:, :])


def test_simulation_and_conditioning_have_one_density():
    one, data = model("Mamba2"), series()
    trace = poutine.trace(one).get_trace(data.without_values())
    given = data.replace(values=trace.nodes["y"]["value"].detach())
    again = poutine.trace(poutine.condition(one, data={"z": trace.nodes["z"]["value"].detach()})).get_trace(given)
    torch.testing.assert_close(trace.log_prob_sum(), again.log_prob_sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [lambda n: blocks.S5(n, 4), lambda n: blocks.Mamba(n, 2)])
def test_deterministic_memory_in_transitions(block):
    """A VRNN whose recurrent network is a structured block: trained, and simulated step by step."""
    memory = blocks.BlockMemory(blocks.ResidualStack([block(4)], in_features=6), state_dim=2, obs_dim=2)
    net = blocks.MLP(4, 8, 4)
    one = ssm.StateSpaceModel(
        MemoryNormalInitial(2, net), MemoryNormal(2, net), emissions.Normal(2, 2, 4, memory_dim=4), memory
    )
    data = series(batch=(6,), missing=True)
    fitted = fit(one, Structured(one, 4, "past"), data, lr=2e-2, num_steps=25, progress=False)
    assert fitted.losses[-5:].mean() < fitted.losses[:5].mean()
    trace = poutine.trace(one).get_trace(data.without_values())
    given = data.without_values().replace(values=trace.nodes["y"]["value"].detach())
    again = poutine.trace(poutine.condition(one, data={"z": trace.nodes["z"]["value"].detach()})).get_trace(given)
    torch.testing.assert_close(trace.log_prob_sum(), again.log_prob_sum(), rtol=1e-4, atol=1e-4)


def test_inputs_reach_the_block():
    one = emissions.Structured(blocks.S5(3, 4), emissions.Bernoulli(3, 2), input_dim=1)
    assert one.state_dim == 2
    whole = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), one)
    data = ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 2), inputs=torch.randn(3, 4, 1))
    z, moved = torch.randn(3, 4, 2), data.replace(inputs=data.inputs + 1.0)
    bound = whole.bind()
    change = log_prob_of_observations(bound, moved, z) - log_prob_of_observations(bound, data, z)
    assert (change.abs() > 1e-3).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`head` has state_dim=2"):
        emissions.Structured(blocks.S5(3), emissions.Normal(2, 1))
    with pytest.raises(ValueError, match="`head` has memory_dim=5"):
        emissions.Structured(blocks.S5(3), emissions.Normal(3, 1, memory_dim=5))
    with pytest.raises(TypeError, match="`head` must be an emission"):
        emissions.Structured(blocks.S5(3), torch.nn.Linear(3, 1))
    with pytest.raises(TypeError, match="`block` must be a structured block"):
        emissions.Structured(torch.nn.Linear(3, 3), emissions.Normal(3, 1))
    with pytest.raises(ValueError, match="reads its memory"):
        emission()(torch.zeros(4, 2), torch.arange(4.0), None)
