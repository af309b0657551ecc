"""Emissions of a finite state: one law a state, its parameters in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.blocks._tables import (
    cholesky_table,
    log_of_probability,
    pick,
    positive_table,
    simplex_parameter,
    state_index,
    table_of,
)
from pyro_ssm.components import Emission
from pyro_ssm.distributions.codes import CategoricalCodes

__all__ = ["ByState", "CategoricalTable", "NormalTable", "PoissonTable", "StateTable", "StudentTTable"]


class StateTable(Emission):
    """What emissions of a finite state share: the law of a state is a row of each table.

    The first coordinate of the state is the index; others (the remaining duration of a semi-Markov state) are not
    read. A subclass defines ``law(index)`` for an index ``(..., time)``.

    >>> from pyro_ssm.emissions import NormalTable, StateTable
    >>> issubclass(NormalTable, StateTable)
    True
    """

    def __init__(self, num_states: int, obs_dim: int, state_dim: int) -> None:
        super().__init__()
        self.num_states = check_size("num_states", num_states)
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.state_dim = check_size("state_dim", state_dim)

    def law(self, index: Tensor) -> Any:
        """The law of the observations in state ``index``, batch ``(..., time)``, event ``(obs,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define law(index)")

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        return self.law(state_index(state))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, obs_dim={self.obs_dim}, state_dim={self.state_dim}"


class NormalTable(StateTable):
    """A normal law for each state,

    .. math:: y_k \\mid z_k = j \\;\\sim\\; N(m_j, L_j L_j^T).

    Args:
        num_states: K.
        obs_dim: size of an observation.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        loc: first value of the means, ``(K, obs)`` or ``(K,)``; None draws them from :math:`N(0, 1)`.
        scale: first value of the standard deviations, a number, ``(K,)`` or ``(K, obs)``.
        floor: lower bound of the learnable standard deviations.
        state_dim: size of the state; 2 for a semi-Markov state.

    Parameters: ``loc`` ``(K, obs)``, ``scale`` ``(K, obs)`` or ``scale_tril`` ``(K, obs, obs)``.

    Raises:
        ValueError: a size is wrong, or a scale does not lie above its floor.

    >>> import torch
    >>> from pyro_ssm.emissions import NormalTable
    >>> emission = NormalTable(2, 1, loc=torch.tensor([-1.0, 1.0]))
    >>> emission(torch.tensor([[0.0], [1.0]]), torch.arange(2.0), None).mean.detach().squeeze(-1)
    tensor([-1.,  1.])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"loc": 2, "scale": 2, "scale_tril": 3}

    def __init__(
        self,
        num_states: int,
        obs_dim: int,
        covariance: str = "diagonal",
        loc: Tensor | None = None,
        scale: float | Tensor = 1.0,
        floor: float = 1e-4,
        state_dim: int = 1,
    ) -> None:
        super().__init__(num_states, obs_dim, state_dim)
        self.covariance = check_choice("covariance", covariance, ("diagonal", "full"))
        self.floor = check_positive("floor", floor)
        shape = (num_states, obs_dim)
        self.loc = nn.Parameter(torch.randn(shape) if loc is None else table_of("loc", loc, shape))
        if covariance == "full":
            self.scale_tril = cholesky_table("scale", scale, shape, floor)
        else:
            self.scale = positive_table("scale", scale, shape, floor)

    def law(self, index: Tensor) -> Any:
        """:math:`N(m_j, L_j L_j^T)` at ``j = index``."""
        loc = pick(self.loc, index, 1)
        if self.covariance == "diagonal":
            return diagonal_normal(loc, pick(self.scale, index, 1))
        return dist.MultivariateNormal(loc, scale_tril=pick(self.scale_tril, index, 2), validate_args=False)


class StudentTTable(StateTable):
    """A Student law for each state and entry, for observations with heavy tails,

    .. math:: y_{ki} \\mid z_k = j \\;\\sim\\; m_{ji} + s_{ji}\\, t(\\nu_{ji}), \\qquad \\nu_{ji} > 2.

    Args:
        num_states: K.
        obs_dim: size of an observation.
        loc: first value of the locations, ``(K, obs)`` or ``(K,)``; None draws them from :math:`N(0, 1)`.
        scale: first value of the scales, a number, ``(K,)`` or ``(K, obs)``.
        df: first value of the degrees of freedom, above 2.
        floor: lower bound of the learnable scales.
        state_dim: size of the state; 2 for a semi-Markov state.

    Parameters: ``loc``, ``scale``, ``df``, each ``(K, obs)``.

    Raises:
        ValueError: a size is wrong, or a scale or ``df`` does not lie above its bound.

    >>> import torch
    >>> from pyro_ssm.emissions import StudentTTable
    >>> StudentTTable(3, 2)(torch.zeros(5, 1), torch.arange(5.0), None).event_shape
    torch.Size([2])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"loc": 2, "scale": 2, "df": 2}

    def __init__(
        self,
        num_states: int,
        obs_dim: int,
        loc: Tensor | None = None,
        scale: float | Tensor = 1.0,
        df: float | Tensor = 5.0,
        floor: float = 1e-4,
        state_dim: int = 1,
    ) -> None:
        super().__init__(num_states, obs_dim, state_dim)
        self.floor = check_positive("floor", floor)
        shape = (num_states, obs_dim)
        self.loc = nn.Parameter(torch.randn(shape) if loc is None else table_of("loc", loc, shape))
        self.scale = positive_table("scale", scale, shape, floor)
        self.df = positive_table("df", df, shape, 2.0)

    def law(self, index: Tensor) -> Any:
        """The Student laws at ``index``."""
        df, loc, scale = (pick(table, index, 1) for table in (self.df, self.loc, self.scale))
        return dist.Independent(dist.StudentT(df, loc, scale, validate_args=False), 1, validate_args=False)


class PoissonTable(StateTable):
    """Counts with a rate for each state,

    .. math:: y_{ki} \\mid z_k = j \\;\\sim\\; \\text{Poisson}(r_{ji}).

    Args:
        num_states: K.
        obs_dim: size of an observation.
        rate: first value of the rates, a number, ``(K,)`` or ``(K, obs)``; None takes 1, 2, ..., K.
        floor: lower bound of the learnable rates.
        state_dim: size of the state; 2 for a semi-Markov state.

    Parameters: ``rate`` ``(K, obs)``.

    Raises:
        ValueError: a size is wrong, or a rate does not lie above its floor.

    >>> import torch
    >>> from pyro_ssm.emissions import PoissonTable
    >>> PoissonTable(2, 1)(torch.tensor([[1.0]]), torch.zeros(1), None).mean.detach()
    tensor([[2.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"rate": 2}

    def __init__(
        self,
        num_states: int,
        obs_dim: int,
        rate: float | Tensor | None = None,
        floor: float = 1e-6,
        state_dim: int = 1,
    ) -> None:
        super().__init__(num_states, obs_dim, state_dim)
        self.floor = check_positive("floor", floor)
        rate = torch.arange(1.0, num_states + 1) if rate is None else rate
        self.rate = positive_table("rate", rate, (num_states, obs_dim), floor)

    def law(self, index: Tensor) -> Any:
        """The Poisson laws at ``index``."""
        law = dist.Poisson(pick(self.rate, index, 1), validate_args=False)
        return dist.Independent(law, 1, validate_args=False)


class CategoricalTable(StateTable):
    """Each entry of an observation is one of several classes, with probabilities for each state,

    .. math:: P(y_{ki} = c \\mid z_k = j) = p_{jic}, \\qquad c = 0, \\dots, C - 1.

    Args:
        num_states: K.
        obs_dim: how many categorical variables are seen at a time.
        num_classes: C, at least 2.
        probs: first value, ``(K, obs, C)`` (or ``(K, C)`` where ``obs_dim`` is 1); None draws it near uniform. A zero
            stays zero.
        state_dim: size of the state; 2 for a semi-Markov state.

    Parameters: ``probs`` ``(K, obs, C)`` on the simplex (a prior: ``Dirichlet(...).to_event(2)``).

    Raises:
        ValueError: a size is wrong, or ``probs`` holds no probabilities along its last dim.

    >>> import torch
    >>> from pyro_ssm.emissions import CategoricalTable
    >>> law = CategoricalTable(2, 1, num_classes=4)(torch.zeros(5, 1), torch.arange(5.0), None)
    >>> law.batch_shape, law.event_shape, law.sample().dtype
    (torch.Size([5]), torch.Size([1]), torch.float32)
    """

    event_dims: ClassVar[Mapping[str, int]] = {"probs": 3}

    def __init__(
        self, num_states: int, obs_dim: int, num_classes: int, probs: Tensor | None = None, state_dim: int = 1
    ) -> None:
        super().__init__(num_states, obs_dim, state_dim)
        self.num_classes = check_size("num_classes", num_classes, least=2)
        shape = (num_states, obs_dim, num_classes)
        if probs is None:
            start = torch.softmax(0.5 * torch.randn(shape), -1)
        else:
            start = torch.as_tensor(probs).to(torch.get_default_dtype())
            start = start.unsqueeze(1) if start.dim() == 2 and obs_dim == 1 else start
            if start.shape != shape:
                raise ValueError(f"`probs` must have shape {shape}, got {tuple(start.shape)}")
        self.probs = simplex_parameter("probs", start)

    def law(self, index: Tensor) -> Any:
        """The categorical laws at ``index``."""
        logits = pick(log_of_probability(self.probs), index, 2)
        return dist.Independent(CategoricalCodes(logits=logits, validate_args=False), 1, validate_args=False)


class ByState(StateTable):
    """Any law of a finite state, by a function of the index,

    .. math:: y_k \\mid z_k = j \\;\\sim\\; f(j).

    Args:
        num_states: K.
        obs_dim: size of an observation.
        function: ``f(index)`` from whole numbers ``(..., time)`` to a law with batch ``(..., time)`` and event
            ``(obs,)``; a ``PyroModule`` (parameters found by ``bind`` under ``function.``) or a plain function.
        state_dim: size of the state; 2 for a semi-Markov state.

    Raises:
        TypeError: ``function`` cannot be called.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.emissions import ByState
    >>> scales = torch.tensor([0.5, 2.0])
    >>> emission = ByState(2, 1, lambda j: dist.Laplace(0.0, scales[j].unsqueeze(-1)).to_event(1))
    >>> emission(torch.ones(4, 1), torch.arange(4.0), None).variance[0]
    tensor([8.])
    """

    def __init__(self, num_states: int, obs_dim: int, function: Callable[[Tensor], Any], state_dim: int = 1) -> None:
        super().__init__(num_states, obs_dim, state_dim)
        if not callable(function):
            raise TypeError(f"`function` must be a function of the index, got {type(function).__name__}")
        if isinstance(function, nn.Module) and not isinstance(function, PyroModule):
            raise TypeError("`function` must be a PyroModule or a plain function, so that `bind` finds its parameters")
        self.function = function

    def law(self, index: Tensor) -> Any:
        """``function(index)``."""
        return self.function(index)
