"""What the structured blocks are to learn: copying, induction, small ListOps; and MNIST-1D, moved about.

Each task gives batches ``(x, lengths or None, y)``: ``x (batch, time, features)``, ``y (batch, answers)`` classes.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import mnist1d
from torch import Tensor

Batch = tuple[Tensor, Tensor | None, Tensor]
LISTOPS = ("MIN", "MAX", "MED", "SM")  # of digits; SM is the sum modulo 10
PAD, CLOSE = 15, 14


class Task(NamedTuple):
    """Batches to train on, batches to be judged by, and what a guess would reach."""

    draw: Callable[[int], Batch]
    held_out: Callable[[], list[Batch]]
    features: int
    classes: int
    answers: int  # so many last steps are answers; 0: the whole series has one
    chance: float


def endless(make: Callable[[int], Batch], chance: float) -> Task:
    """A task that is drawn anew for each batch; the judges are 20 batches more."""
    x, _, y = make(1)
    return Task(make, lambda: [make(100) for _ in range(20)], x.shape[-1], x.shape[-1], y.shape[-1], chance)


def selective_copying(length: int = 64, tokens: int = 4, vocabulary: int = 8) -> Task:
    """Tokens scattered among blanks; the answers, at the end, are the tokens in their order."""

    def make(batch: int) -> Batch:
        x = torch.zeros(batch, length + tokens, dtype=torch.long)
        answers = torch.randint(1, vocabulary + 1, (batch, tokens))
        places = torch.rand(batch, length).argsort(-1)[:, :tokens].sort(-1).values
        x.scatter_(1, places, answers)
        x[:, length:] = vocabulary + 1  # now answer
        return F.one_hot(x, vocabulary + 2).float(), None, answers

    return endless(make, 1 / vocabulary)


def induction_heads(length: int = 64, vocabulary: int = 8) -> Task:
    """The answer is the token that followed the special one when it stood in the series before."""

    def make(batch: int) -> Batch:
        x = torch.randint(1, vocabulary + 1, (batch, length))
        place = torch.randint(0, length - 2, (batch, 1))
        x.scatter_(1, place, vocabulary + 1)
        x[:, -1] = vocabulary + 1
        return F.one_hot(x, vocabulary + 2).float(), None, x.gather(1, place + 1)

    return endless(make, 1 / vocabulary)


# ------------------------------------------------------------------------------------------------ MNIST-1D


def moved(x: Tensor) -> Tensor:
    """The series ``(batch, time, 1)`` as the generator of the data might have drawn them again.

    It turns every template about a circle, scales it by up to a fifth, tilts it, and adds white noise: so do we, by
    less. The smooth noise in its gaps is not drawn again.
    """
    batch, time = x.shape[:2]

    def uniform() -> Tensor:
        return 2 * torch.rand(batch, 1) - 1

    turned = (torch.arange(time) - torch.randint(0, time, (batch, 1))) % time
    y = x[..., 0].gather(1, turned)
    y = y * (1 + 0.2 * uniform()) + 0.2 * uniform() * torch.linspace(-1, 1, time)
    return (y + 0.02 * torch.randn(batch, time)).unsqueeze(-1)


def moved_mnist1d() -> Task:
    """The 4000 series, moved about anew for each batch; the judges are the 1000 of the test set as they are."""
    (x, y), (x_test, y_test) = mnist1d()

    def draw(batch: int) -> Batch:
        rows = torch.randint(len(x), (batch,))
        return moved(x[rows]), None, y[rows]

    return Task(draw, lambda: [(x_test, None, y_test)], 1, 10, 0, 0.1)


# ------------------------------------------------------------------------------------------------ ListOps


def expression(dice: random.Random, depth: int) -> tuple[list[int], int]:
    """Tokens of a nested operation on digits, and its value: 0 to 9 digits, 10 to 13 operators, 14 the end of one."""
    kind = dice.randrange(4)
    tokens, values = [10 + kind], []
    for _ in range(dice.randint(2, 4)):
        if depth > 1 and dice.random() < 0.35:
            inner, value = expression(dice, depth - 1)
        else:
            value = dice.randrange(10)
            inner = [value]
        tokens += inner
        values.append(value)
    value = (min(values), max(values), int(statistics.median(values)), sum(values) % 10)[kind]
    return [*tokens, CLOSE], value


def listops(
    depth: int = 3, longest: int = 40, train: int = 20_000, test: int = 2000, seed: int = 0, validate: bool = False
) -> Task:
    """Nested operations on lists of digits (Nangia & Bowman 2018), to this depth and length, all different.

    With ``validate`` the judges are the last of the training set, which is not learnt then.
    """
    dice, found = random.Random(seed), {}
    while len(found) < train + test:
        tokens, value = expression(dice, depth)
        if len(tokens) <= longest:
            found[tuple(tokens)] = value
    x = torch.full((train + test, longest), PAD)
    for row, tokens in zip(x, found):
        row[: len(tokens)] = torch.tensor(tokens)
    lengths, y = (x != PAD).sum(-1), torch.tensor(list(found.values())).unsqueeze(-1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, lengths, y = x[order], lengths[order], y[order]

    def batch(rows: Tensor) -> Batch:
        n = int(lengths[rows].max())
        return F.one_hot(x[rows, :n], PAD + 1).float(), lengths[rows], y[rows]

    train = train - test if validate else train
    judges = torch.arange(train, train + test)
    held_out = [batch(rows) for rows in judges.split(250)]
    chance = float(y[judges].flatten().bincount().max()) / test  # always the commonest answer
    return Task(lambda n: batch(torch.randint(train, (n,))), lambda: held_out, PAD + 1, 10, 0, chance)
