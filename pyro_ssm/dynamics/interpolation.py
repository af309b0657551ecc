"""Inputs that move within a gap: a series whose inputs are the coefficients of each interval's polynomial."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.components import gap
from pyro_ssm.data import TimeSeries
from pyro_ssm.ops.interpolation import (
    NUM_COEFFICIENTS,
    interpolate,
    interpolation_coefficients,
    interpolation_slope,
)

__all__ = ["InputPath", "interpolate_inputs"]


def interpolate_inputs(data: TimeSeries, kind: str = "cubic") -> TimeSeries:
    """The series with inputs that are interpolated: ``inputs[k]`` holds the polynomial of the gap after ``times[k]``.

    .. math:: u(t) = \\sum_j c_{kj} (t - t_k)^j, \\qquad
        \\text{inputs}_k = (c_{k0}, c_{k1}, \\dots, t_k)

    so that whatever is done to the series afterwards (``refine``, ``split``, mini-batches, a forecast in parts) leaves
    the path of the inputs as it is. Each row ends in its own time :math:`t_k`, in two columns that together have more
    digits than float32. :class:`InputPath` reads such rows (``NeuralODE(..., interpolation=kind)`` does so for its
    field). The first columns are the inputs at :math:`t_k` themselves.

    After the last (real) time the last value is held. To go on beyond it with known inputs, interpolate the whole
    horizon, ``split`` it at the end of what was observed, and give the second part's ``times`` and ``inputs`` to
    ``predict.forecast``.

    Args:
        data: with inputs, not refined.
        kind: ``"held"``, ``"linear"``, ``"cubic"`` (Hermite, backward differences) or ``"rectilinear"``
            (:func:`~pyro_ssm.ops.interpolation_coefficients`).

    Returns:
        A series with ``(degree + 1) * input + 2`` columns of inputs.

    Raises:
        ValueError: there are no inputs, an unknown kind, or the series is refined.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries([0.0, 1.0, 3.0], torch.zeros(3, 1), inputs=torch.tensor([[0.0], [2.0], [4.0]]))
    >>> fine = ssm.dynamics.interpolate_inputs(data, "linear").refine(2)
    >>> ssm.dynamics.InputPath("linear").at(fine.inputs, fine.times).squeeze(-1)
    tensor([0., 1., 2., 3., 4.])
    """
    if data.inputs is None:
        raise ValueError("`data` has no inputs to interpolate: TimeSeries(times, values, inputs=...)")
    if data.observed_index is not None:
        raise ValueError("`data` is refined, so its inputs are held already: interpolate first, refine afterwards")
    coefficients = interpolation_coefficients(data.times, data.inputs, kind)
    width = data.inputs.shape[-1]
    if data.lengths is not None:  # beyond the last real time there is nothing to move to
        inside = torch.arange(data.num_times, device=data.device) + 1 < data.lengths.unsqueeze(-1)
        steps = torch.where(inside.unsqueeze(-1), coefficients, torch.zeros_like(coefficients))
        coefficients = torch.cat([coefficients[..., :width], steps[..., width:]], -1)
    start = data.times.expand(coefficients.shape[:-1]).unsqueeze(-1)
    coarse = start.to(coefficients.dtype)
    rest = (start - coarse.to(start.dtype)).to(coefficients.dtype)
    coords = {name: labels for name, labels in data.coords.items() if name != "input"}
    return data.replace(inputs=torch.cat([coefficients, coarse, rest], -1), coords=coords)


class InputPath:
    """Reads rows of :func:`interpolate_inputs`: the value and the slope of the inputs at any time of a gap.

    Args:
        kind: that of ``interpolate_inputs``.

    Raises:
        ValueError: an unknown kind; or, when called, rows of another width.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries([0.0, 2.0], torch.zeros(2, 1), inputs=torch.tensor([[0.0], [4.0]]))
    >>> rows, path = ssm.dynamics.interpolate_inputs(data, "linear").inputs, ssm.dynamics.InputPath("linear")
    >>> path.at(rows[:1], torch.tensor([0.5]).double()), path.slope(rows[:1], torch.tensor([0.5]).double())
    (tensor([[1.]]), tensor([[2.]]))
    """

    def __init__(self, kind: str) -> None:
        if kind not in NUM_COEFFICIENTS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, NUM_COEFFICIENTS))}, got {kind!r}")
        self.kind = kind

    def width(self, inputs: Tensor) -> int:
        """The width of a value, for rows ``(..., (degree + 1) * width + 2)``."""
        size = NUM_COEFFICIENTS[self.kind]
        columns = inputs.shape[-1] - 2
        if columns <= 0 or columns % size:
            raise ValueError(
                f"`inputs` of a {self.kind} interpolation have {size} coefficient(s) a column and 2 columns for their "
                f"time, got {inputs.shape[-1]} columns. Prepare the data: dynamics.interpolate_inputs(data, "
                f"{self.kind!r})"
            )
        return columns // size

    def elapsed(self, inputs: Tensor, time: Tensor) -> Tensor:
        """The time since the interval of the inputs began, ``(..., time, 1)``, subtracted in float64; no gradient."""
        self.width(inputs)  # raises for rows that were not prepared
        coarse, rest = inputs[..., -2].detach().double(), inputs[..., -1].detach().double()
        return gap(coarse + rest, time, inputs)

    def after(self, inputs: Tensor, elapsed: Tensor) -> Tensor:
        """The value ``elapsed`` ``(..., time, 1)`` after the interval began, ``(..., time, width)``."""
        return interpolate(inputs[..., :-2], elapsed, self.width(inputs))

    def at(self, inputs: Tensor, time: Tensor) -> Tensor:
        """The value ``(..., time, width)`` of rows ``(..., time, columns)`` at times ``(..., time)`` float64."""
        return self.after(inputs, self.elapsed(inputs, time))

    def slope(self, inputs: Tensor, time: Tensor) -> Tensor:
        """The derivative in time, as :meth:`at`."""
        return interpolation_slope(inputs[..., :-2], self.elapsed(inputs, time), self.width(inputs))

    def __repr__(self) -> str:
        return f"InputPath({self.kind!r})"
