"""Squared extrapolation of EM steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Accelerator"]


class Accelerator:
    """SQUAREM: after every second EM step, a jump along the path that the two steps have taken.

    .. math:: r = \\theta_1 - \\theta_0, \\quad v = \\theta_2 - \\theta_1 - r, \\quad
        \\alpha = -\\|r\\| / \\|v\\|, \\quad \\theta' = \\theta_0 - 2 \\alpha r + \\alpha^2 v

    in the space of unconstrained parameters. A jump is kept only if the log-likelihood does not fall (``judge``); the
    longest jump grows with success and shrinks without.

    Source: Varadhan and Roland (2008), section 6, scheme S3.

    >>> import torch
    >>> from pyro_ssm.infer.expectation_maximisation.squarem import Accelerator
    >>> jump, theta = Accelerator(), torch.tensor([0.5])  # the map theta -> theta / 2 + 1 / 2, from 0
    >>> jump.extrapolate([torch.tensor([0.0])], [theta])
    False
    >>> before, theta = theta.clone(), torch.tensor([0.75])
    >>> jump.extrapolate([before], [theta]), theta  # its fixed point
    (True, tensor([1.]))
    """

    def __init__(self) -> None:
        self.longest = 4.0
        self._first: tuple[Tensor, Tensor] | None = None  # theta_0 and theta_1
        self._plain: Tensor | None = None
        self._at_limit = False

    def extrapolate(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
        """Take note of an EM step from ``before`` to ``after``; at every second one, write the jump into ``after``."""
        start, end = _flat(before), _flat(after)
        if self._first is None:
            self._first = start, end
            return False
        (zero, one), self._first = self._first, None
        r, v = one - zero, end - 2 * one + zero
        length = float(r.norm() / v.norm()) if bool(v.norm() > 0) else 1.0
        self._at_limit = length >= self.longest
        length = min(length, self.longest)
        if not length > 1:
            return False
        self._plain = end
        _write(after, zero + 2 * length * r + length**2 * v)
        return True

    def judge(self, kept: bool, parameters: Sequence[Tensor]) -> bool:
        """Keep the jump, or put the plain EM step back into ``parameters``; returns ``kept``."""
        if kept:
            self.longest *= 4 if self._at_limit else 1
        elif self._plain is not None:
            self.longest = max(self.longest / 4, 1.0 + 1e-3)
            _write(parameters, self._plain)
        return kept


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


@torch.no_grad()
def _write(parts: Sequence[Tensor], flat: Tensor) -> None:
    start = 0
    for part in parts:
        part.copy_(flat[start : start + part.numel()].view_as(part))
        start += part.numel()
