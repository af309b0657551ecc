"""Linear-Gaussian systems for the tests of the Kalman operators, and the engines that run them."""

import torch

D = torch.float64
NAMES = ("y", "m", "L", "F", "b", "Q", "H", "d", "R")


def rand(*shape):
    return torch.randn(*shape, dtype=D)


def system(n, p, times, batch=(), lead=(), varying=False, decay=0.9):
    """y, m, L, F, b, Q, H, d, R: a rotation that forgets, everything else random."""
    moves, seen = (max(times - 1, 1), times) if varying else (1, 1)
    F = decay * torch.linalg.qr(rand(*lead, moves, n, n))[0]
    L, Q = rand(*lead, n, n).tril(), rand(*lead, moves, n, n).tril()
    R = rand(*lead, seen, p, p).tril() + 1.5 * torch.eye(p, dtype=D)
    return [rand(*batch, times, p), rand(n), L, F, rand(moves, n), Q, rand(*lead, seen, p, n), rand(seen, p), R]


def everything(y):
    return torch.ones_like(y, dtype=torch.bool)


def holes(y, share=0.3):
    return torch.rand_like(y) > share


def ends(batch, times):
    """Step masks of series that end at random times, one of them at the first, one at the last."""
    lengths = torch.randint(1, times + 1, batch)
    lengths.view(-1)[0], lengths.view(-1)[-1] = 1, times
    return torch.arange(times) < lengths.unsqueeze(-1)
