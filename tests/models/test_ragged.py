"""Padding adds exactly nothing; a ragged batch is a loop over series; a masked step is no step where the law allows."""

import pytest
import torch
from pyro import poutine

from pyro_ssm.data import TimeSeries
from pyro_ssm.models import batch_shape, history, observation_law, path_law, vrnn
from tests.contracts.toys import posterior, remembering, series, toy

LENGTHS = (4, 2, 3, 1)


def ragged(extra=0, dtype=torch.float64, obs_dim=2, own=True):
    """Series of unequal lengths; ``extra`` more padding."""
    gen = torch.Generator().manual_seed(3)
    longest = max(LENGTHS)
    shape = (len(LENGTHS), longest) if own else (longest,)
    times = torch.rand(shape, generator=gen, dtype=torch.float64).add(0.2).cumsum(-1)
    values = torch.randn(len(LENGTHS), longest, obs_dim, generator=gen, dtype=torch.float64).to(dtype)
    mask = torch.rand(values.shape, generator=gen) < 0.7
    mask[:, 0] = True
    times = torch.cat([times, times[..., -1:] + torch.arange(1.0, extra + 1).double()], -1)
    pad = values.new_zeros(len(LENGTHS), extra, obs_dim)
    return TimeSeries(times, torch.cat([values, pad], 1), torch.cat([mask, pad.bool()], 1), lengths=LENGTHS)


def terms(model, data, z):
    run = history(model, data)
    path = path_law(model, data, run).log_prob_steps(z)
    return path, observation_law(model, data, z, run).log_prob_steps(data.values)


MODELS = {"markov": toy, "memory": remembering, "vrnn": lambda: vrnn(2, 2, hidden_dim=4).double()}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch_is_a_loop_over_series(name, own):
    model, data = MODELS[name]().bind(), ragged(own=own)
    z = torch.randn(4, 4, 2).double()
    path, y = terms(model, data, z)
    for i, length in enumerate(LENGTHS):
        one = data.series(i)
        assert one.num_times == length
        wanted = terms(model, one, z[i, :length])
        torch.testing.assert_close(path[i, :length], wanted[0])
        torch.testing.assert_close(y[i, :length], wanted[1])
        assert path[i, length:].tolist() == [0.0] * (4 - length) and y[i, length:].tolist() == [0.0] * (4 - length)


@pytest.mark.parametrize("name", MODELS)
def test_more_padding_changes_no_density_and_no_gradient(name):
    z = torch.randn(4, 7, 2).double()
    found = []
    for extra in (0, 3):
        torch.manual_seed(0)
        model, data = MODELS[name](), ragged(extra)
        path = z[:, : 4 + extra].clone().requires_grad_()
        total = poutine.trace(poutine.condition(model, data={"z": path})).get_trace(data).log_prob_sum()
        named = sorted(model.named_parameters())
        grads = torch.autograd.grad(total, [path] + [p for _, p in named], allow_unused=True)
        found.append((total, grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found[0][1][0], found[1][1][0][:, :4], rtol=1e-10, atol=1e-12)
    padded = torch.arange(7) >= torch.tensor(LENGTHS).unsqueeze(-1)
    assert bool((found[1][1][0][padded] == 0).all())  # exactly
    for a, b in zip(found[0][1][1:], found[1][1][1:], strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_state_may_be_anything(name):
    model, data = MODELS[name]().bind(), ragged()
    z = torch.randn(4, 4, 2).double()
    other = torch.where(data.step_mask.unsqueeze(-1), z, 1e3 * torch.ones(()).double())
    for a, b in zip(terms(model, data, z), terms(model, data, other), strict=True):
        assert torch.equal(a, b)


def test_a_missing_entry_leaves_the_states_law_alone():
    model, data = toy().bind(), series(num_times=4)
    z = torch.randn(4, 2).double()
    hidden = data.hide(torch.tensor([False, True, False, False]).unsqueeze(-1))
    path, y = terms(model, data, z)
    path_hidden, y_hidden = terms(model, hidden, z)
    assert torch.equal(path, path_hidden) and y_hidden[1] == 0
    torch.testing.assert_close(y_hidden[[0, 2, 3]], y[[0, 2, 3]])


def test_a_wholly_masked_step_leaves_the_evidence_of_a_law_that_is_exact_in_gaps():
    """The Ornstein-Uhlenbeck law is closed under gaps: nothing seen at a time is as if there were no such time."""
    from pyro_ssm.infer import kalman_filter

    model, data = toy(), series(num_times=5)
    hidden = data.hide(torch.tensor([False, False, True, False, True]).unsqueeze(-1))
    keep = torch.tensor([0, 1, 3])
    without = TimeSeries(data.times[keep], data.values[keep])
    found = kalman_filter(model.bind(), hidden).log_likelihood
    wanted = kalman_filter(model.bind(), without).log_likelihood
    torch.testing.assert_close(found.sum(), wanted.sum())
    torch.testing.assert_close(found.sum(), posterior(model, without)[1])
    assert found[2] == 0 and found[4] == 0
    found, wanted = (
        torch.autograd.grad(
            kalman_filter(model.bind(), d).log_likelihood.sum(), list(model.parameters()), retain_graph=True
        )
        for d in (hidden, without)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_shape_joins_draws_and_series():
    model = toy().bind({"transition.rate": torch.ones(5, 1, 2).double()})
    assert batch_shape(model, ragged()) == (5, 4)
