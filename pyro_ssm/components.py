"""The contract between the parts of a state-space model: four kinds of component and their capabilities.

A model is ``initial + transition + emission (+ memory)``. Each component is a :class:`~pyro.nn.PyroModule` whose
``forward`` returns a distribution with one event dimension, and which always sees a time axis::

    Initial(time, inputs, memory=None)                        p(z_1)                 event (state,)
    Transition(state, time, next_time, inputs, memory=None)   p(z_{k+1} | z_k)       event (state,)
    Emission(state, time, inputs, memory=None)                p(y_k | z_k)           event (obs,)

States have shape ``(*sample, *batch, time, state)``; one step is ``time = 1``; one call evaluates all steps at once.
``inputs[k]`` holds on ``[times[k], times[k + 1])``: the transition ``k -> k + 1`` and the emission ``k`` get
``inputs[k]``.

Parameters are read once, by :func:`pyro_ssm.binding.bind`, which turns the Pyro program into plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor

__all__ = [
    "Affine",
    "AffineGaussian",
    "Component",
    "Diffuse",
    "DiscreteState",
    "Emission",
    "FiniteState",
    "Gaussian",
    "Initial",
    "Memory",
    "SampleOnly",
    "Transition",
    "gap",
    "gaps",
    "require",
]


# ------------------------------------------------------------------------------------------------ time


def gap(time: Tensor, next_time: Tensor, like: Tensor) -> Tensor:
    """Time differences for networks: subtracted in float64, then cast.

    .. math:: \\Delta_k = t_{k+1} - t_k

    Args:
        time: ``(..., time)`` float64.
        next_time: ``(..., time)`` float64, later than ``time``.
        like: a tensor whose dtype and device the result takes (usually the state).

    Returns:
        ``(..., time, 1)``, in the units of ``time``; not differentiable with respect to anything but the times.

    >>> import torch
    >>> from pyro_ssm.components import gap
    >>> times = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    >>> gap(times[:-1], times[1:], like=torch.zeros(1)).squeeze(-1)
    tensor([0.5000, 1.5000])
    """
    return (next_time - time).to(dtype=like.dtype, device=like.device).unsqueeze(-1)


def gaps(times: Tensor, like: Tensor) -> Tensor:
    """The gap *before* each time, with 1 before the first (what a :class:`Memory` and an encoder see).

    .. math:: \\Delta_1 = 1, \\qquad \\Delta_k = t_k - t_{k-1}

    Args:
        times: ``(..., time)`` float64.
        like: a tensor whose dtype and device the result takes.

    Returns:
        ``(..., time, 1)``.

    >>> import torch
    >>> from pyro_ssm.components import gaps
    >>> gaps(torch.tensor([3.0, 3.5, 5.0], dtype=torch.float64), like=torch.zeros(1)).squeeze(-1)
    tensor([1.0000, 0.5000, 1.5000])
    """
    first = torch.ones_like(times[..., :1]).to(dtype=like.dtype, device=like.device).unsqueeze(-1)
    return torch.cat([first, gap(times[..., :-1], times[..., 1:], like)], dim=-2)


# ------------------------------------------------------------------------------------------- components


class Component(PyroModule):
    """A part of a state-space model; its parameters declare how many event dimensions they have.

    ``event_dims`` maps a parameter's name to the number of its rightmost dimensions that belong to the parameter itself
    (a scalar that broadcasts over the state counts as 1, a matrix as 2). Names that are not listed take the event
    dimension of their prior, and at least 1.

    >>> from pyro_ssm.components import Component
    >>> class Decay(Component):
    ...     event_dims = {"rate": 1}
    >>> Decay.event_dims["rate"]
    1
    """

    event_dims: ClassVar[Mapping[str, int]] = {}


class Initial(Component):
    """Where the state starts: ``forward(time, inputs, memory=None)`` is :math:`p(z_1)`.

    ``time`` is ``times[..., :1]`` and ``inputs`` is ``inputs[..., :1, :]``; the law has batch ``(..., 1)``, event
    ``(state_dim,)``. A subclass sets ``state_dim``.

    >>> from pyro_ssm.components import Component, Initial
    >>> issubclass(Initial, Component)
    True
    """

    state_dim: int

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define forward(time, inputs, memory=None)")


class Transition(Component):
    """How the state moves: ``forward(state, time, next_time, inputs, memory=None)`` is :math:`p(z_{k+1} | z_k)`.

    ``state`` is ``(*sample, *batch, time, state)``, ``time`` and ``next_time`` are ``(..., time)`` in float64 (use
    :func:`gap`), ``inputs`` ``(..., time, input)`` or None, ``memory`` ``(..., time, features)`` or None.

    >>> from pyro_ssm.components import Transition
    >>> Transition.__name__
    'Transition'
    """

    state_dim: int

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(state, time, next_time, inputs, memory=None)"
        )


class Emission(Component):
    """What is seen: ``forward(state, time, inputs, memory=None)`` is :math:`p(y_k | z_k)` with event ``(obs_dim,)``.

    >>> from pyro_ssm.components import Emission
    >>> Emission.__name__
    'Emission'
    """

    state_dim: int
    obs_dim: int

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define forward(state, time, inputs, memory=None)")


class Memory(Component):
    """What a model remembers besides its Markov state; one step is

    .. math::
        z_t \\sim p(z_t \\mid z_{t-1}, m_{t-1}), \\quad m'_t = \\text{see\\_state}, \\quad
        y_t \\sim p(y_t \\mid z_t, m'_t), \\quad m_t = \\text{see\\_observation}.

    A memory has a *carry* (a tensor or a nested tuple whose leading dimensions are the state's; only steps and
    resampling see it) and a *summary* (one tensor ``(..., time, features)``; all that laws see). States, values, masks,
    gaps and inputs keep their time axis; in the step form it has length 1. The gap before the first time is 1.

    A memory that sees observations treats a missing one as *skipped*: its mask is an input of ``see_observation``.
    That is not the same as marginalising it; ``predict.impute`` samples it.

    Subclasses define ``start``, ``see_state``, ``see_observation``; ``sequence`` loops over them unless a subclass has
    a faster form, which must agree with the loop to rounding.

    >>> from pyro_ssm.components import Memory
    >>> Memory.sees_observations
    False
    """

    #: number of features of a summary
    features: int
    #: whether laws at time t depend on observations before t
    sees_observations: bool = False

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Any, Tensor]:
        """The carry and the summary ``(*shape, 1, features)`` before the first step; ``shape`` is ``(*sample,
        *batch)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start(shape)")

    def see_state(self, carry: Any, state: Tensor, gap: Tensor, inputs: Tensor | None) -> tuple[Any, Tensor]:
        """The carry and the summary after seeing ``state`` ``(..., 1, state)``; ``gap`` ``(..., 1, 1)`` is the time
        since the last step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define see_state(carry, state, gap, inputs)")

    def see_observation(self, carry: Any, values: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """The carry and the summary after seeing ``values`` ``(..., 1, obs)``, of which only entries with a True
        ``mask`` count.
        """
        raise NotImplementedError(f"{type(self).__name__} must define see_observation(carry, values, mask)")

    def sequence(
        self,
        states: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        gap: Tensor,
        inputs: Tensor | None,
        carry: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """All steps at once: the summaries before each step, those after each state, and the final carry.

        Args:
            states: ``(*sample, *batch, time, state)``.
            values: ``(*batch, time, obs)`` (or with the sample dims of the states), None for a memory of states only.
            mask: as ``values``, True where observed.
            gap: ``(..., time, 1)`` the gap before each time.
            inputs: ``(..., time, input)`` or None.
            carry: where to go on from; None starts afresh.
        """
        shape = states.shape[:-2]
        start_carry, summary = self.start(shape)
        if carry is not None:
            raise NotImplementedError(
                f"{type(self).__name__}.sequence cannot resume from a carry: its summary is unknown. "
                "Define sequence in the subclass, or call the step form"
            )
        carry = start_carry
        before, after = [], []
        for k in range(states.shape[-2]):
            now = slice(k, k + 1)
            before.append(summary)
            carry, seen = self.see_state(
                carry, states[..., now, :], gap[..., now, :], None if inputs is None else inputs[..., now, :]
            )
            after.append(seen)
            summary = seen
            if self.sees_observations:
                if values is None or mask is None:
                    raise ValueError(
                        f"{type(self).__name__} sees observations: `values` and `mask` are needed, got None"
                    )
                carry, summary = self.see_observation(carry, values[..., now, :], mask[..., now, :])
        return torch.cat(before, -2), torch.cat(after, -2), carry


# ----------------------------------------------------------------------------------------- capabilities


class Affine(NamedTuple):
    """An affine Gaussian law :math:`N(A x + b, L L^T)`; column convention, one matrix a step.

    ``matrix`` ``(..., time, out, in)``, ``offset`` ``(..., time, out)``, ``scale_tril`` ``(..., time, out, out)`` lower
    triangular; each may broadcast over leading dims and time.

    >>> from pyro_ssm.components import Affine
    >>> Affine._fields
    ('matrix', 'offset', 'scale_tril')
    """

    matrix: Tensor
    offset: Tensor
    scale_tril: Tensor


class Gaussian:
    """Capability: ``forward`` returns a Gaussian law for every state (EKF, UKF and their kin apply).

    >>> from pyro_ssm.components import AffineGaussian, Gaussian
    >>> issubclass(AffineGaussian, Gaussian)
    True
    """


class AffineGaussian(Gaussian):
    """Capability: the law is Gaussian with a mean affine in the state (the exact Kalman filter applies).

    A transition defines ``affine(time, next_time, inputs, memory=None)``, an emission ``affine(time, inputs,
    memory=None)``; both return :class:`Affine`. An initial law needs only :class:`Gaussian`.

    >>> from pyro_ssm.components import AffineGaussian
    >>> AffineGaussian.affine.__name__
    'affine'
    """

    def affine(self, *args: Any, **kwargs: Any) -> Affine:
        raise NotImplementedError(f"{type(self).__name__} must define affine(...) and return components.Affine")


class Diffuse(Gaussian):
    """Capability of an initial law: Gaussian, with infinite variance in some directions.

    .. math:: z_1 = m + L \\varepsilon + D \\delta, \\qquad \\varepsilon \\sim N(0, I), \\quad
        \\delta \\sim N(0, \\kappa I), \\quad \\kappa \\to \\infty

    It defines ``moments(time, inputs) -> (mean, scale_tril, diffuse)``: ``mean`` ``(..., n)``, ``scale_tril``
    ``(..., n, n)`` (zero rows where all is diffuse) and ``diffuse`` ``(..., n, q)``. Leading dims, where there are any,
    end in a time axis of 1, as the batch of an initial law does. Such a law is improper: it cannot be called (to draw
    from it, or for a path density); the exact Kalman family integrates it out.

    >>> from pyro_ssm.components import Diffuse, Gaussian
    >>> issubclass(Diffuse, Gaussian)
    True
    """

    def moments(self, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} must define moments(time, inputs) -> mean, scale_tril, diffuse"
        )


class DiscreteState:
    """Capability: the first coordinate of the state is an index, a whole number 0, 1, ... held as a float.

    Draws of such a state carry no gradient, so reparametrised guides and NUTS over the explicit path are refused.

    >>> from pyro_ssm.components import DiscreteState, FiniteState
    >>> issubclass(FiniteState, DiscreteState)
    True
    """


class FiniteState(DiscreteState):
    """Capability: the state is one of ``num_states`` values (forward-backward applies).

    .. math:: z_k \\in \\{0, \\dots, K - 1\\}, \\qquad P(z_1 = j) \\propto e^{w_j}, \\qquad
        P(z_{k+1} = j \\mid z_k = i) \\propto e^{W_{k, ij}}

    The state tensor has ``state_dim = 1`` and holds the index in the dtype of the model. An initial law defines
    ``log_weights(time, inputs, memory=None)``, ``(..., time, K)``; a transition defines ``log_matrix(time, next_time,
    inputs, memory=None)``, ``(..., time, K, K)``, from row to column. Both are normalised, and may have a time axis of
    1 where nothing varies. -inf is an event that cannot happen. An emission needs no capability: it is called with
    each of the K states.

    >>> from pyro_ssm.components import FiniteState
    >>> FiniteState.log_matrix.__name__
    'log_matrix'
    """

    num_states: int

    def log_weights(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define log_weights(time, inputs, memory=None)")

    def log_matrix(
        self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define log_matrix(time, next_time, inputs, memory=None)")


class SampleOnly:
    """Capability: the law can be drawn from but has no density (bootstrap particle filters apply, SVI does not).

    >>> from pyro_ssm.components import SampleOnly
    >>> SampleOnly.__name__
    'SampleOnly'
    """


def require(component: Component, capability: type, method: str, instead: str) -> None:
    """Raise a ``TypeError`` that names what would work, unless ``component`` has ``capability``.

    Args:
        component: a transition, emission or initial law.
        capability: one of the capability classes of this module.
        method: the name of the inference method that asks.
        instead: the methods that would work.

    >>> from pyro_ssm.components import AffineGaussian, Transition, require
    >>> require(Transition(), AffineGaussian, "kalman_filter", "SVI")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: kalman_filter needs a component that is AffineGaussian, got Transition. Use SVI; or give Transition ...
    """
    if not isinstance(component, capability):
        name = type(component).__name__.removeprefix("Bound")
        if getattr(component, "state_dim", None) == 0:
            raise TypeError(
                f"{method} needs a component that is {capability.__name__}, got {name}: this model has no state to "
                "filter. Its predictions and its likelihood are exact: use infer.predictive_filter"
            )
        raise TypeError(
            f"{method} needs a component that is {capability.__name__}, got {name}. "
            f"Use {instead}; or give {name} the capability {capability.__name__}"
        )
