"""A linear-Gaussian model as matrices: what the Kalman family reads off a bound model and its data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_moments

__all__ = ["System", "check_request", "first_law", "linear_gaussian_system", "over_time"]

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


def check_request(model: Any, data: TimeSeries, method: str, capability: type, instead: str) -> None:
    """Raise unless ``method``, which needs transitions and emissions of ``capability``, can run on model and data.

    Raises:
        TypeError: a component lacks the capability, or the model has a memory.
        ValueError: the data has no values.

    >>> from pyro_ssm.infer.gaussian.system import check_request
    >>> check_request.__name__
    'check_request'
    """
    require(model.initial, Gaussian, method, instead)
    require(model.transition, capability, method, instead)
    require(model.emission, capability, method, instead)
    if model.memory is not None:
        raise TypeError(
            f"{method} integrates the states out, but this model's memory ({type(model.memory).__name__}) follows the "
            f"path that was drawn. Use {INSTEAD}"
        )
    if data.values is None or data.mask is None:
        raise ValueError(f"{method} needs observations, but `data` has no values. Give TimeSeries(times, values)")


def first_law(bound: Any, data: TimeSeries) -> tuple[Tensor, Tensor]:
    """Mean ``(..., n)`` and square root ``(..., n, n)`` of the first state of a bound model.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian.system import first_law
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> first_law(model.bind(), ssm.TimeSeries(torch.arange(4.0)))[0].shape
    torch.Size([2])
    """
    held = None if data.inputs is None else data.inputs[..., :1, :]
    mean, scale_tril = gaussian_moments(bound.initial(data.times[..., :1], held))
    if mean.dim() > 1:  # the law's batch ends in a time axis of one step
        mean, scale_tril = mean[..., 0, :], scale_tril[..., 0, :, :]
    return mean, scale_tril


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
    check_request(model, data, method, AffineGaussian, INSTEAD)
    bound = model.bind()
    times, inputs, index = data.times, data.inputs, data.observed_index
    mean, scale_tril = first_law(bound, data)
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
        over_time(transition, dtype),
        over_time(emission, dtype),
        data.values.to(dtype),
        data.mask,
        data.step_mask if data.is_ragged else None,
        None if index is None else index.tolist(),
        data.num_times,
    )
    return bound, system


def over_time(law: Affine, dtype: torch.dtype) -> Affine:
    """The same law in one dtype, each part with a time axis (of 1 where it had none).

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.infer.gaussian.system import over_time
    >>> over_time(Affine(torch.eye(2), torch.zeros(2), torch.eye(2)), torch.float64).offset
    tensor([[0., 0.]], dtype=torch.float64)
    """
    parts = []
    for part, event in zip(law, (2, 1, 2), strict=True):
        parts.append((part if part.dim() > event else part.unsqueeze(0)).to(dtype))
    return Affine(*parts)
