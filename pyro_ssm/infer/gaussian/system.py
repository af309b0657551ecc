"""A linear-Gaussian model as matrices: what the Kalman family reads off a bound model and its data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_moments

__all__ = ["System", "linear_gaussian_system"]

INSTEAD = "SVI with a guide (infer.fit)"


class System(NamedTuple):
    """The matrices of a linear-Gaussian model over one data set, leading dims and time broadcast.

    >>> from pyro_ssm.infer.gaussian.system import System
    >>> System._fields
    ('mean', 'scale_tril', 'transition', 'emission', 'values', 'mask', 'step_mask', 'observed_index', 'num_times')
    """

    mean: Tensor  # (..., state)  of the first state
    scale_tril: Tensor  # (..., state, state)
    transition: Affine  # time - 1 steps, or 1 for all
    emission: Affine  # observed times, or 1 for all
    values: Tensor  # (*batch, observed, obs)
    mask: Tensor  # bool, as values
    step_mask: Tensor | None  # bool (*batch, time), False on padding; None without padding
    observed_index: list[int] | None  # the times of the values; None where every time has them
    num_times: int


def linear_gaussian_system(model: Any, data: TimeSeries, method: str) -> tuple[Any, System]:
    """Bind the model, check what ``method`` needs, and evaluate its matrices at the times of ``data``.

    All floating tensors take the widest dtype among the matrices and the values.

    Returns:
        The bound model and its matrices.

    Raises:
        TypeError: a component lacks the capability, or the model has a memory.
        ValueError: the data has no values, or another width than the emission.

    >>> from pyro_ssm.infer.gaussian.system import linear_gaussian_system
    >>> linear_gaussian_system.__name__
    'linear_gaussian_system'
    """
    require(model.initial, Gaussian, method, INSTEAD)
    require(model.transition, AffineGaussian, method, INSTEAD)
    require(model.emission, AffineGaussian, method, INSTEAD)
    if model.memory is not None:
        raise TypeError(
            f"{method} integrates the states out, but this model's memory ({type(model.memory).__name__}) follows the "
            f"path that was drawn. Use {INSTEAD}"
        )
    if data.values is None or data.mask is None:
        raise ValueError(f"{method} needs observations, but `data` has no values. Give TimeSeries(times, values)")

    bound = model.bind()
    times, inputs, index = data.times, data.inputs, data.observed_index
    held = None if inputs is None else inputs[..., :1, :]
    mean, scale_tril = gaussian_moments(bound.initial(times[..., :1], held))
    if mean.dim() > 1:  # the law's batch ends in a time axis of one step
        mean, scale_tril = mean[..., 0, :], scale_tril[..., 0, :, :]
    emission = bound.emission.affine(
        times if index is None else times[..., index],
        inputs if inputs is None or index is None else inputs[..., index, :],
    )
    if emission.matrix.shape[-2] != data.values.shape[-1]:
        raise ValueError(
            f"`data.values` has {data.values.shape[-1]} columns, but the emission gives {emission.matrix.shape[-2]}"
        )
    if data.num_times > 1:
        transition = bound.transition.affine(
            times[..., :-1], times[..., 1:], None if inputs is None else inputs[..., :-1, :]
        )
    else:  # one time, no move
        n = mean.shape[-1]
        transition = Affine(mean.new_zeros(1, n, n), mean.new_zeros(1, n), mean.new_zeros(1, n, n))

    dtype = data.values.dtype
    for tensor in (mean, scale_tril, *transition, *emission):
        dtype = torch.promote_types(dtype, tensor.dtype)
    system = System(
        mean.to(dtype),
        scale_tril.to(dtype),
        _over_time(transition, dtype),
        _over_time(emission, dtype),
        data.values.to(dtype),
        data.mask,
        data.step_mask if data.is_ragged else None,
        None if index is None else index.tolist(),
        data.num_times,
    )
    return bound, system


def _over_time(law: Affine, dtype: torch.dtype) -> Affine:
    """The same law in one dtype, each part with a time axis (of 1 where it had none)."""
    parts = []
    for part, event in zip(law, (2, 1, 2), strict=True):
        parts.append((part if part.dim() > event else part.unsqueeze(0)).to(dtype))
    return Affine(*parts)
