import pickle

import pytest
import torch
from torch import nn

from pyro_ssm.blocks import RecurrentEncoder

LENGTHS = torch.tensor([6, 1, 4])
CHOICES = [("gru", 1, False), ("lstm", 2, True), ("rnn", 2, False), ("gru", 2, True), ("lstm", 1, False)]


def encoder(direction="both", cell="gru", num_layers=1, learn_start=False):
    made = RecurrentEncoder(3, 4, direction, cell=cell, num_layers=num_layers, learn_start=learn_start).double()
    if learn_start:
        with torch.no_grad():
            for name in ("past", "future"):
                if getattr(made, name) is not None:
                    getattr(made, name).start.normal_()
    return made


def by_hand(made, x):
    """Both directions over one unpadded series ``(time, in)`` with torch's own networks."""

    def run(direction, series):
        start = direction.start
        if start is not None:
            start = tuple(start[:, :, 0]) if direction.is_lstm else start[0, :, 0]
        return direction.recurrent(series, start)[0]

    past = None if made.past is None else run(made.past, x)
    future = None if made.future is None else run(made.future, x.flip(0)).flip(0)
    return past, future


@pytest.mark.parametrize(("cell", "num_layers", "learn_start"), CHOICES)
@pytest.mark.parametrize("as_mask", [False, True])
def test_ragged_batch_equals_a_loop(cell, num_layers, learn_start, as_mask):
    made = encoder("both", cell, num_layers, learn_start)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    lengths = torch.arange(6) < LENGTHS[:, None] if as_mask else LENGTHS
    together = made(x, lengths)
    for b, n in enumerate(LENGTHS):
        for all_steps, alone in zip(together, by_hand(made, x[b, :n]), strict=True):
            torch.testing.assert_close(all_steps[b, :n], alone)
            assert (all_steps[b, n:] == 0).all()


@pytest.mark.parametrize(("cell", "num_layers", "learn_start"), CHOICES)
def test_gradients_equal_those_of_a_loop(cell, num_layers, learn_start):
    made = encoder("both", cell, num_layers, learn_start)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    weight = torch.randn(3, 6, 4, dtype=torch.float64)
    parameters = list(made.parameters())
    past, future = made(x, LENGTHS)
    together = torch.autograd.grad((weight * (past + future**2)).sum(), parameters)
    total = 0
    for b, n in enumerate(LENGTHS):
        past, future = by_hand(made, x[b, :n])
        total = total + (weight[b, :n] * (past + future**2)).sum()
    torch.testing.assert_close(together, torch.autograd.grad(total, parameters))
    assert all((grad != 0).any() for grad in together)


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_what_stands_in_padding_changes_nothing(filler):
    made = encoder()
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    padding = (torch.arange(6) >= LENGTHS[:, None]).unsqueeze(-1)
    outcomes = []
    for value in (0.0, filler):
        padded = x.masked_fill(padding, value).requires_grad_()
        past, future = made(padded, LENGTHS)
        grads = torch.autograd.grad((past * future).sum(), [padded, *made.parameters()])
        outcomes.append((past, future, *grads))
    for plain, filled in zip(*outcomes, strict=True):
        assert torch.equal(plain, filled)
    assert (outcomes[1][2].masked_select(padding) == 0).all()


@pytest.mark.parametrize("direction", ["past", "future"])
def test_a_direction_sees_only_its_side(direction):
    made = encoder(direction)
    x = torch.randn(6, 3, dtype=torch.float64)
    past, future = made(x)
    assert (past is None) == (direction == "future") and (future is None) == (direction == "past")
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x)[direction == "future"], x).abs().sum((1, 3))
    seen = torch.ones(6, 6).tril() if direction == "past" else torch.ones(6, 6).triu()
    assert torch.equal(jacobian != 0, seen.bool())


def test_full_lengths_equal_no_lengths():
    made = encoder()
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(made(x), made(x, torch.tensor([6, 6, 6])))


def test_batch_dims_are_free_and_lengths_broadcast():
    made = encoder()
    x = torch.randn(2, 3, 6, 3, dtype=torch.float64)
    past, future = made(x, LENGTHS)
    for s in range(2):
        torch.testing.assert_close((past[s], future[s]), made(x[s], LENGTHS))
    torch.testing.assert_close(made(x[0, 2], LENGTHS[2])[1], future[0, 2])
    assert made(x[:0], LENGTHS)[0].shape == (0, 3, 6, 4)


def test_pickles_and_follows_its_seed():
    x = torch.randn(2, 6, 3)
    torch.manual_seed(3)
    one = RecurrentEncoder(3, 4)
    torch.manual_seed(3)
    two = RecurrentEncoder(3, 4)
    for other in (two, pickle.loads(pickle.dumps(one))):
        assert all(torch.equal(a, b) for a, b in zip(one(x), other(x), strict=True))
    assert isinstance(one.past.recurrent, nn.GRU) and "direction='both'" in repr(one)


def test_errors_say_what_is_wanted():
    with pytest.raises(ValueError, match="`direction` must be one of 'past', 'future', 'both'"):
        RecurrentEncoder(3, 4, "backward")
    with pytest.raises(ValueError, match="`cell` must be one of"):
        RecurrentEncoder(3, 4, cell="GRU")
    with pytest.raises(ValueError, match="with num_layers=1 it must be 0"):
        RecurrentEncoder(3, 4, dropout=0.1)
    made = RecurrentEncoder(3, 4)
    with pytest.raises(ValueError, match="in_features=3"):
        made(torch.zeros(2, 6, 2))
    with pytest.raises(ValueError, match=r"weights of torch.float32, got `features` of torch.float64.*guide.double"):
        made(torch.zeros(2, 6, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`lengths` of shape \(4,\) does not fit"):
        made(torch.zeros(2, 6, 3), torch.ones(4, dtype=torch.long))
    with pytest.raises(TypeError, match="must hold integers"):
        made(torch.zeros(2, 6, 3), torch.ones(2))
