"""Weights of particles, normalised: the sum, the logarithms, the weights and their effective number in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import transformed

__all__ = ["Normalised", "normalise", "normalise_reference"]

_LIBRARY = torch.library.Library("pyro_ssm", "FRAGMENT")
_LIBRARY.define("normalise(Tensor log_weights) -> (Tensor, Tensor, Tensor, Tensor)")
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


class Normalised(NamedTuple):
    """What :func:`normalise` returns.

    >>> from pyro_ssm.ops import Normalised
    >>> Normalised._fields
    ('log_total', 'log_weights', 'weights', 'ess')
    """

    log_total: Tensor  # (*batch)
    log_weights: Tensor  # (N, *batch), of total 1
    weights: Tensor  # (N, *batch)
    ess: Tensor  # (*batch), effective sample size, 1 to N


def normalise(log_weights: Tensor, log_factor: Tensor | None = None) -> Normalised:
    """Normalise weights over particles, after multiplying them by a factor.

    .. math:: \\log \\sum_n w_n, \\qquad \\log W_n, \\qquad W_n = w_n / \\textstyle\\sum_m w_m, \\qquad
        1 / \\textstyle\\sum_n W_n^2

    Where all weights are zero the total is -inf and the rest NaN; where one is NaN or infinite, so are they.

    Gradients: of all results with respect to both arguments, by the plain form. The compiled form serves where none are
    wanted; its sums are float64 over blocks, and it takes weights below the least normal number as 0.

    Args:
        log_weights: ``(N, *batch)``, of any total.
        log_factor: log of the factor, broadcastable to ``(N, *batch)``; None for 1.

    >>> import torch
    >>> from pyro_ssm.ops import normalise
    >>> total, _, weights, ess = normalise(torch.tensor([1.0, 1.0]).log())
    >>> round(total.exp().item(), 4), weights, ess
    (2.0, tensor([0.5000, 0.5000]), tensor(2.))
    """
    if torch.compiler.is_compiling():
        x = log_weights if log_factor is None else log_weights + log_factor
        return Normalised(*torch.ops.pyro_ssm.normalise(x)) if not x.requires_grad else normalise_reference(x)
    if log_factor is not None and not (
        log_factor.shape == log_weights.shape
        and log_factor.dtype is log_weights.dtype
        and log_factor.is_contiguous()
        and log_weights.is_contiguous()
    ):
        log_weights, log_factor = log_weights + log_factor, None
    suffix, functions = _SUFFIX.get(log_weights.dtype), library().functions
    if functions is None or suffix is None or not log_weights.is_cpu or not log_weights.numel():
        return normalise_reference(log_weights, log_factor)
    if not _plain(log_weights, log_factor):
        return normalise_reference(log_weights, log_factor)
    a, shape = log_weights.contiguous(), log_weights.shape
    new_log_weights, weights = torch.empty_like(a), torch.empty_like(a)
    log_total, ess = torch.empty((2, *shape[1:]) if len(shape) > 1 else 2, dtype=a.dtype).unbind(0)
    (functions.pyro_ssm_normalise_f32 if suffix == "f32" else functions.pyro_ssm_normalise_f64)(
        a.data_ptr(),
        0 if log_factor is None else log_factor.data_ptr(),
        shape[0],
        a.numel() // shape[0],
        new_log_weights.data_ptr(),
        weights.data_ptr(),
        log_total.data_ptr(),
        ess.data_ptr(),
    )
    return Normalised(log_total, new_log_weights, weights, ess)


def normalise_reference(log_weights: Tensor, log_factor: Tensor | None = None) -> Normalised:
    """:func:`normalise` in a few lines of torch.

    .. math:: \\log \\sum_n w_n, \\qquad \\log W_n, \\qquad W_n, \\qquad 1 / \\textstyle\\sum_n W_n^2

    >>> import torch
    >>> from pyro_ssm.ops import normalise_reference
    >>> normalise_reference(torch.tensor([1.0, 3.0]).log()).weights
    tensor([0.2500, 0.7500])
    """
    x = log_weights if log_factor is None else log_weights + log_factor
    if x.dim() == 1:  # one fused kernel; over several series it sums in sequence, which float32 does not bear
        normalised = x.log_softmax(0)
        weights = normalised.exp()
        # where all weights are zero the total is -inf, and not the NaN of the difference
        log_total = x.amax(0) - normalised.amax(0).nan_to_num(nan=-1e30)
        return Normalised(log_total, normalised, weights, torch.dot(weights, weights).reciprocal())
    top = x.detach().amax(0)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    centred = x - top  # before the sum: float32 would lose digits to a large total
    log_sum = centred.logsumexp(0)
    normalised = centred - log_sum
    weights = normalised.exp()
    return Normalised(top + log_sum, normalised, weights, weights.square().sum(0).reciprocal())


def _plain(*args: Tensor | None) -> bool:
    """Nothing wants a gradient or a tangent, and everything has memory."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args):
        return False
    return not any(x is not None and transformed(x) for x in args)


def _operator(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        total, new_log_weights, weights, ess = normalise(log_weights)
        return total, new_log_weights, weights, ess.clone()  # an operator returns no two views of one memory


def _fake(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(log_weights, memory_format=torch.contiguous_format)
    one = log_weights.new_empty(log_weights.shape[1:])
    return one, like, torch.empty_like(like), torch.empty_like(one)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("normalise", _operator, _device)
torch.library.register_fake("pyro_ssm::normalise", _fake, lib=_LIBRARY)
