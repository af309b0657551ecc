"""Observation noise that is known and differs from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Component

__all__ = ["KnownNoise", "NoiseFunction", "StandardErrors"]


class KnownNoise(Component):
    """The square root of the noise covariance of every step, for ``emissions.LinearNormal(..., noise=...)``.

    .. math:: y_k = C z_k + d + R_k \\varepsilon_k

    A subclass says whether its noise is ``correlated`` and defines ``root(time, inputs)``: standard deviations
    ``(..., time, obs)``, or lower triangular factors ``(..., time, obs, obs)`` where it is correlated.

    Args:
        correlated: what ``root`` returns.
        plus_learned: whether the emission's own learnable noise comes on top, :math:`R_k R_k^T + R R^T`.

    >>> from pyro_ssm.emissions import KnownNoise, StandardErrors
    >>> issubclass(StandardErrors, KnownNoise)
    True
    """

    def __init__(self, correlated: bool = False, plus_learned: bool = False) -> None:
        super().__init__()
        self.correlated, self.plus_learned = correlated, plus_learned

    def root(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """Standard deviations or factors at ``time`` ``(..., time)``, given ``inputs`` ``(..., time, input)``."""
        raise NotImplementedError(f"{type(self).__name__} must define root(time, inputs)")

    def drivers(self, inputs: Tensor | None) -> Tensor | None:
        """The inputs without those that speak of noise: what shifts the mean of an emission of ``input_dim`` > 0."""
        return inputs


class StandardErrors(KnownNoise):
    """Known standard errors, one an entry, in columns of the data's inputs.

    .. math:: y_{ki} \\sim N\\left((C z_k + d)_i,\\; s_{ki}^2\\right)

    As for survey means, meta-analyses, or instruments that report their error. A missing value needs some standard
    error (inputs may not be missing); any positive one will do, it is never read. An error of 0 is an exact value: the
    Kalman family takes it as such where the state has noise in its direction; the density of an explicit path does not
    exist then, and the emission's ``floor`` stands for it.

    Args:
        columns: of ``data.inputs``, one for each entry of an observation, in its order.
        plus_learned: whether the emission's own learnable noise comes on top: the errors are known, and what the model
            does not explain beyond them is learned.

    A transition of ``input_dim`` > 0 sees all columns of the inputs, these too.

    Raises:
        ValueError: when called, inputs are missing or have too few columns, or an error is negative.

    >>> import torch, pyro_ssm as ssm
    >>> emission = ssm.emissions.LinearNormal(1, 1, matrix=torch.eye(1), noise=ssm.emissions.StandardErrors([0]))
    >>> errors = torch.tensor([[0.1], [2.0]])
    >>> emission(torch.zeros(2, 1), torch.arange(2.0), errors).variance
    tensor([[0.0100],
            [4.0000]])
    """

    def __init__(self, columns: Sequence[int], plus_learned: bool = False) -> None:
        super().__init__(False, plus_learned)
        self.columns = [int(column) for column in columns]
        if len(set(self.columns)) < len(self.columns) or min(self.columns, default=-1) < 0:
            raise ValueError(f"`columns` must be different positions of inputs, counted from 0, got {list(columns)}")

    def root(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """The columns of ``inputs`` ``(..., time, input)``."""
        if inputs is None or inputs.shape[-1] <= max(self.columns):
            got = "no inputs" if inputs is None else f"inputs of {inputs.shape[-1]} column(s)"
            raise ValueError(
                f"StandardErrors reads columns {self.columns} of the inputs, got {got}. Give the data its standard "
                "errors: TimeSeries(times, values, inputs=errors)"
            )
        errors = inputs[..., self.columns]
        if bool((errors < 0).any()):
            raise ValueError(f"standard errors must not be negative, got {errors.min().item()} in the inputs")
        return errors

    def drivers(self, inputs: Tensor | None) -> Tensor | None:
        """The other columns."""
        if inputs is None:
            return None
        return inputs[..., [i for i in range(inputs.shape[-1]) if i not in self.columns]]

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"columns={self.columns}, plus_learned={self.plus_learned}"


class NoiseFunction(KnownNoise):
    """Noise that a function gives for every step, correlated or not.

    .. math:: y_k = C z_k + d + R(t_k, u_k)\\, \\varepsilon_k

    Args:
        function: ``(time, inputs) -> root``, with ``time`` ``(..., time)`` float64 and ``inputs`` ``(..., time,
            input)`` or None; standard deviations ``(..., time, obs)``, or with ``correlated`` lower triangular factors
            ``(..., time, obs, obs)``. Leading dims may be left out, and a time axis of 1 stands for all times. A
            module's parameters are learned with the model's.
        correlated: which of the two it returns.
        plus_learned: whether the emission's own learnable noise comes on top.

    Raises:
        TypeError: ``function`` cannot be called.

    >>> import torch, pyro_ssm as ssm
    >>> grows = ssm.emissions.NoiseFunction(lambda time, inputs: 1 + time[..., None])
    >>> emission = ssm.emissions.LinearNormal(1, 1, noise=grows)
    >>> emission.affine(torch.arange(3.0), None).scale_tril.flatten()
    tensor([1., 2., 3.])
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor | None], Tensor], correlated: bool = False, plus_learned: bool = False
    ) -> None:
        super().__init__(correlated, plus_learned)
        if not callable(function):
            raise TypeError(f"`function` must be a function of time and inputs, got {type(function).__name__}")
        self.function: Any = function

    def root(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """What the function returns."""
        return torch.as_tensor(self.function(time, inputs))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"correlated={self.correlated}, plus_learned={self.plus_learned}"
