"""The record of observations: terms, broadcasting, and its place beside a memory of y."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.distributions import History, Observations, masked
from pyro_ssm.models import history, observation_law, path_law
from tests.contracts.toys import Leak, remembering, series


def record(batch=(3,), mask=None):
    law = dist.Normal(torch.randn(*batch, 4, 2), 0.5).to_event(1)
    return Observations(masked(law, torch.ones(*batch, 4, 2, dtype=torch.bool) if mask is None else mask))


def test_shapes_and_terms():
    y = record()
    value = y.sample((5,))
    assert value.shape == (5, 3, 4, 2) and y.event_shape == (4, 2) and y.batch_shape == (3,)
    torch.testing.assert_close(y.log_prob(value), y.log_prob_steps(value).sum(-1))
    assert y.rsample().shape == (3, 4, 2) and y.has_rsample


def test_expand_keeps_the_density():
    y = record()
    wide = y.expand((7, 3))
    value = wide.sample()
    assert value.shape == (7, 3, 4, 2)
    torch.testing.assert_close(wide.log_prob(value), y.log_prob(value))
    assert wide.log_prob(y.sample()).shape == (7, 3)


def test_a_masked_entry_adds_exactly_zero():
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[1, 2] = False
    y = record(mask=mask)
    terms = y.log_prob_steps(torch.full((3, 4, 2), float("nan")).where(~mask, torch.zeros(())))
    assert terms[1, 2] == 0 and bool((terms[0] != 0).all())


def test_a_memory_of_y_takes_its_sample_dims_from_the_path():
    model = remembering().bind()
    data = series(batch=(3,)).without_values()
    run = history(model, data)
    z = path_law(model, data, run).sample((5,))
    y = observation_law(model, data, z, run)
    assert y.sample().shape == (5, 3, 4, 2) and not y.has_rsample
    with pytest.raises(ValueError, match="sample dims from the path"):
        y.sample((2,))


def test_the_y_drawn_with_z_is_returned_for_that_very_tensor():
    model = remembering().bind()
    data = series(batch=(3,)).without_values()
    run = history(model, data)
    z = path_law(model, data, run).sample()
    drawn = run.drawn_observations(z)
    assert drawn is not None and run.drawn_observations(z.clone()) is None
    assert observation_law(model, data, z, run).sample() is drawn
    assert bool((observation_law(model, data, z.clone(), run).sample() != drawn).any())


def test_density_of_a_path_before_any_y_raises():
    model = remembering().bind()
    data = series(batch=(3,)).without_values()
    run = history(model, data)
    with pytest.raises(ValueError, match="depends on observations"):
        path_law(model, data, run).log_prob(torch.zeros(3, 4, 2).double())


class Counting(Leak):
    """Counts its whole-sequence runs."""

    runs = 0

    def sequence(self, *args, **kwargs):
        type(self).runs += 1
        return super().sequence(*args, **kwargs)


def test_the_last_sequence_is_cached_by_identity():
    states, values, mask = torch.randn(3, 4, 2), torch.randn(3, 4, 1), torch.ones(3, 4, 1, dtype=torch.bool)
    Counting.runs = 0
    run = History(Counting(2, 1), torch.ones(4, 1), None, values, mask)
    first = run.summaries(states)
    assert run.summaries(states)[0] is first[0] and Counting.runs == 1
    run.summaries(states.clone())
    assert Counting.runs == 2
    run.values = values.clone()
    run.summaries(states)
    assert Counting.runs == 3
