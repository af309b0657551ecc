"""Switching linear dynamics: a regime that moves on a Markov chain, and a Gaussian state that moves as it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._regimes import regime_list, stack_affine, stack_regimes
from pyro_ssm.blocks._tables import pick, state_index
from pyro_ssm.components import Affine, AffineGaussian, DiscreteState, FiniteState, Gaussian, Initial, Transition
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.distributions.regimes import RegimeNormal

__all__ = ["SwitchingInitial", "SwitchingLinear"]


class SwitchingInitial(Initial, DiscreteState):
    """Where a switching model starts: a regime and a Gaussian vector,

    .. math:: P(s_1 = j) = \\pi_j, \\qquad x_1 \\mid s_1 = j \\;\\sim\\; N(m_j, L_j L_j^T), \\qquad z_1 = (s_1, x_1).

    Args:
        chain: the law of the first regime (``FiniteState``), such as ``CategoricalInitial(K)``.
        regimes: K Gaussian initial laws of x; the same object may stand for several.

    Raises:
        TypeError: a part lacks its capability.
        ValueError: the sizes differ.

    >>> import torch
    >>> from pyro_ssm.dynamics import CategoricalInitial, NormalInitial, SwitchingInitial
    >>> initial = SwitchingInitial(CategoricalInitial(3), [NormalInitial(2)] * 3)
    >>> initial(torch.zeros(1), None).event_shape       # the regime, then two coordinates
    torch.Size([3])
    """

    def __init__(self, chain: Initial, regimes: Sequence[Initial]) -> None:
        super().__init__()
        self.regimes = regime_list(regimes, Initial, Gaussian)
        self.num_regimes = _check_chain(chain, Initial, len(self.regimes))
        self.chain = chain
        self.state_dim = 1 + self.regimes[0].state_dim

    def by_regime(self, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean ``(..., time, K, n)`` and root ``(..., time, K, n, n)`` of x in each regime."""
        moments = [gaussian_moments(regime(time, inputs)) for regime in self.regimes]
        return stack_regimes([m for m, _ in moments], 1), stack_regimes([L for _, L in moments], 2)

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> RegimeNormal:
        """The law of the first regime and vector; ``time`` ``(..., 1)``."""
        return RegimeNormal(self.chain.log_weights(time, inputs), *self.by_regime(time, inputs))


class SwitchingLinear(Transition, DiscreteState):
    """A switching linear dynamical system; recurrent: its regime depends on where the state is,

    .. math::
        P(s_{k+1} = j \\mid s_k = i, x_k) &= A_{ij}, \\qquad\\text{recurrent:}\\quad
        \\text{softmax}_j(\\log A_{ij} + b_{ij}^T x_k) \\\\
        x_{k+1} \\mid s_{k+1} = j &\\;\\sim\\; N(F_j x_k + c_j, Q_j Q_j^T), \\qquad z_k = (s_k, x_k).

    The state tensor is the regime (an index, as a float) beside x, so that simulation and particle filters work on it
    as on any other state. Exact inference sums over :math:`K^T` paths of regimes: use ``infer.kim_filter`` or
    ``infer.imm_filter`` (Gaussian approximations), ``infer.enumerate_regimes`` (exact, short series),
    ``infer.mixture_kalman`` (Rao-Blackwellised particles), or ``infer.switching_em`` (variational EM).

    Args:
        chain: the regimes' transition (``FiniteState``), such as ``MarkovChain(K)`` or ``MarkovJump(K)``.
        regimes: K ``AffineGaussian`` transitions of x.
        recurrent: whether ``chain`` takes x as its inputs, as ``MarkovChain(K, input_dim=n)`` can (inputs of the data
            come after x where its ``input_dim`` has room for them).

    Raises:
        TypeError: a part lacks its capability.
        ValueError: the sizes differ.

    Sources: Ghahramani and Hinton (2000), "Variational learning for switching state-space models"; Linderman et al.
    (2017), "Bayesian learning and inference in recurrent switching linear dynamical systems" (there with stick-breaking
    in the place of softmax).

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearNormal, MarkovChain, SwitchingLinear
    >>> transition = SwitchingLinear(MarkovChain(3), [LinearNormal(2) for _ in range(3)])
    >>> times = torch.arange(5, dtype=torch.float64)
    >>> transition(torch.zeros(4, 3), times[:-1], times[1:], None).sample().shape
    torch.Size([4, 3])
    """

    def __init__(self, chain: Transition, regimes: Sequence[Transition], recurrent: bool = False) -> None:
        super().__init__()
        self.regimes = regime_list(regimes, Transition, AffineGaussian)
        self.num_regimes = _check_chain(chain, Transition, len(self.regimes))
        self.chain = chain
        self.recurrent = bool(recurrent)
        n = self.regimes[0].state_dim
        if self.recurrent and getattr(chain, "input_dim", n) < n:
            raise ValueError(
                f"recurrent=True gives x to the chain as inputs, so `chain` needs input_dim of at least {n}, "
                f"got {chain.input_dim}. Build it as MarkovChain({self.num_regimes}, input_dim={n})"
            )
        self.state_dim = 1 + n

    def by_regime(self, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Affine:
        """The law of the next x in each regime, with a dim K before its events."""
        return stack_affine([regime.affine(time, next_time, inputs) for regime in self.regimes])

    def log_matrix(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, x: Tensor | None = None) -> Tensor:
        """:math:`\\log P(s_{k+1} = j \\mid s_k = i, x_k)`, ``(..., time or 1, K, K)``; x is read if recurrent."""
        if self.recurrent:
            room = getattr(self.chain, "input_dim", self.state_dim - 1) > self.state_dim - 1
            if room and inputs is not None:
                lead = torch.broadcast_shapes(x.shape[:-1], inputs.shape[:-1])
                x = torch.cat([part.expand(lead + part.shape[-1:]) for part in (x, inputs.to(x.dtype))], -1)
            inputs = x
        return self.chain.log_matrix(time, next_time, inputs)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> RegimeNormal:
        """The law of the next regime and vector; ``state`` ``(..., time, 1 + n)``."""
        check_state(self, state)
        x = state[..., 1:]
        log_weights = pick(self.log_matrix(time, next_time, inputs, x), state_index(state), 1)
        matrix, offset, scale_tril = self.by_regime(time, next_time, inputs)
        return RegimeNormal(log_weights, (matrix @ x[..., None, :, None]).squeeze(-1) + offset, scale_tril)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_regimes={self.num_regimes}, state_dim={self.state_dim}, recurrent={self.recurrent}"


def _check_chain(chain: Any, kind: type, num_regimes: int) -> int:
    if not isinstance(chain, kind) or not isinstance(chain, FiniteState):
        raise TypeError(f"`chain` must be a components.{kind.__name__} that is FiniteState, got {type(chain).__name__}")
    if chain.num_states != num_regimes:
        raise ValueError(f"`chain` has {chain.num_states} states, but there are {num_regimes} `regimes`")
    return num_regimes
