"""A linear-Gaussian model as matrices: what a Kalman filter reads off a bound model and its data."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine, Diffuse
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_moments

__all__ = ["System", "check_affine", "initial_moments", "over_time", "system_of"]


class System(NamedTuple):
    """The matrices of a linear-Gaussian model over one data set, leading dims and time broadcast.

    >>> from pyro_ssm.models.linear_gaussian import System
    >>> System._fields[:4]
    ('mean', 'scale_tril', 'transition', 'emission')
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
    diffuse: Tensor | None = None  # (..., state, q): directions of infinite variance at first; None: there are none

    def to(self, dtype: torch.dtype) -> System:
        """The same in another floating dtype."""
        return self._replace(
            mean=self.mean.to(dtype),
            scale_tril=self.scale_tril.to(dtype),
            transition=Affine(*(part.to(dtype) for part in self.transition)),
            emission=Affine(*(part.to(dtype) for part in self.emission)),
            values=self.values.to(dtype),
            diffuse=None if self.diffuse is None else self.diffuse.to(dtype),
        )


def system_of(bound: Any, data: TimeSeries) -> System:
    """The matrices of a bound linear-Gaussian model at the times of ``data``, which has values.

    All floating tensors take the widest dtype among the matrices and the values.

    Raises:
        ValueError: the data has another width than the emission, or the parts of a law do not fit each other.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.linear_gaussian import system_of
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> system_of(model.bind(), ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1))).emission.matrix.shape
    torch.Size([1, 1, 2])
    """
    times, inputs, index = data.times, data.inputs, data.observed_index
    held = None if inputs is None else inputs[..., :1, :]
    mean, scale_tril, diffuse = initial_moments(bound, times[..., :1], held)
    emission = bound.emission.affine(
        times if index is None else times[..., index],
        inputs if inputs is None or index is None else inputs[..., index, :],
    )
    n = mean.shape[-1]
    check_affine("emission", emission, n)
    if emission.matrix.shape[-2] != data.values.shape[-1]:
        raise ValueError(
            f"`data.values` has {data.values.shape[-1]} columns, but the emission gives {emission.matrix.shape[-2]}"
        )
    if data.num_times > 1:
        transition = bound.transition.affine(
            times[..., :-1], times[..., 1:], None if inputs is None else inputs[..., :-1, :]
        )
        check_affine("transition", transition, n, n)
    else:  # one time, no move
        transition = Affine(mean.new_zeros(1, n, n), mean.new_zeros(1, n), mean.new_zeros(1, n, n))

    dtypes = {x.dtype for x in (data.values, mean, scale_tril, *transition, *emission)}
    dtype = functools.reduce(torch.promote_types, dtypes)
    system = System(
        mean,
        scale_tril,
        over_time(transition, dtype),
        over_time(emission, dtype),
        data.values,
        data.mask,
        data.step_mask if data.is_ragged else None,
        None if index is None else index.tolist(),
        data.num_times,
        diffuse,
    )
    return system if dtypes == {dtype} and diffuse is None else system.to(dtype)


def initial_moments(bound: Any, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean ``(..., n)``, square root ``(..., n, n)`` and diffuse columns ``(..., n, q)`` of the first state.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.linear_gaussian import initial_moments
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.DiffuseInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> initial_moments(model.bind(), torch.zeros(1, dtype=torch.float64), None)[2]
    tensor([[1., 0.],
            [0., 1.]])
    """
    diffuse: Tensor | None = None
    if isinstance(bound.initial, Diffuse):
        mean, scale_tril, diffuse = bound.initial.moments(time, inputs)
    else:
        mean, scale_tril = gaussian_moments(bound.initial(time, inputs))
    n = mean.shape[-1]
    wanted = {"mean": (mean, (n,)), "scale_tril": (scale_tril, (n, n))}
    if diffuse is not None:
        wanted["diffuse"] = (diffuse, (n, diffuse.shape[-1]))
    for name, (part, shape) in wanted.items():
        if part.shape[-len(shape) :] != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"`{name}` of the initial law has shape {tuple(part.shape)}, but (..., {sizes}) is wanted")

    def at_once(part: Tensor, event: int) -> Tensor:
        return part.select(-event - 1, 0) if part.dim() > event else part  # the batch ends in a time axis of one step

    if diffuse is not None:
        diffuse = at_once(diffuse, 2) if diffuse.shape[-1] else None
    return at_once(mean, 1), at_once(scale_tril, 2), diffuse


def check_affine(name: str, law: Affine, columns: int, rows: int | None = None) -> None:
    """Raise a ``ValueError`` unless the parts of an affine law have shapes that fit each other.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.models.linear_gaussian import check_affine
    >>> check_affine("emission", Affine(torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 2, 3)), 3)
    Traceback (most recent call last):
    ...
    ValueError: `scale_tril` of the emission has shape (1, 2, 3), but (..., 2, 2) is wanted
    """
    rows = law.matrix.shape[-2] if rows is None else rows
    shapes = {"matrix": (rows, columns), "offset": (rows,), "scale_tril": (rows, rows)}
    for part, (field, shape) in zip(law, shapes.items(), strict=True):
        if part.shape[-len(shape) :] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"`{field}` of the {name} has shape {tuple(part.shape)}, but (..., {wanted}) is wanted")


def over_time(law: Affine, dtype: torch.dtype | None = None) -> Affine:
    """The same law in one dtype (None: as they are), each part with a time axis (of 1 where it had none).

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.models.linear_gaussian import over_time
    >>> over_time(Affine(torch.eye(2), torch.zeros(2), torch.eye(2)), torch.float64).offset
    tensor([[0., 0.]], dtype=torch.float64)
    """
    parts = []
    for part, event in zip(law, (2, 1, 2), strict=True):
        parts.append((part if part.dim() > event else part.unsqueeze(0)).to(dtype or part.dtype))
    return Affine(*parts)
