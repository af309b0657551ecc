"""The law of a whole Markov path: one site, stepped when drawn, one vectorised call when its density is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.components import DiscreteState, Initial, Memory, Transition, gaps
from pyro_ssm.distributions.history import History

__all__ = ["MarkovPath"]

#: ``(state, k, summary) -> law``: k is a slice of steps, ``state`` holds z[k - 1] with a time axis, None for
#: slice(0, 1)
Step = Callable[[Tensor | None, slice, Tensor | None], Any]
#: a whole path at once: shape -> path, noise, scale
Draw = Callable[[torch.Size], tuple[Tensor, Tensor, Tensor]]


class MarkovPath(TorchDistribution):
    """The law of a path :math:`z_{1:T}` with event ``(time, state)``.

    .. math:: p(z_{1:T}) = p(z_1) \\prod_{k=1}^{T-1} p(z_{k+1} \\mid z_k, m_k)

    ``rsample`` steps through time; ``log_prob`` is one vectorised call, and ``log_prob_steps`` gives its terms
    ``(*batch, time)``. A padded step (``step_mask`` False) adds exactly 0. The terms of a fresh draw are cached,
    keyed by ``value is cached``; for normal steps they are written in the noise, :math:`-\\tfrac12 \\epsilon^2 -
    \\log\\sigma - \\tfrac12 \\log 2\\pi`, whose *total* gradient with respect to the parameters is that of
    :math:`\\log q(z(\\phi); \\phi)` (the partial gradient with respect to z alone is not available from the cache;
    pass a detached value for it).

    Args:
        initial: the law of the first state.
        transition: the law of the next state.
        times: ``(time,)`` or ``(*batch, time)`` float64.
        inputs: ``(*batch, time, input)`` or None.
        memory: a :class:`~pyro_ssm.distributions.History`, a :class:`~pyro_ssm.components.Memory` of states, or None.
        step_mask: bool ``(*batch, time)``, False on padding; None means no padding.
        batch_shape: leading dims of a draw; by default those of ``times`` and ``inputs``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.distributions import MarkovPath
    >>> path = MarkovPath(ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), torch.arange(5.0).double())
    >>> z = path.rsample((3,))
    >>> z.shape, path.log_prob(z).shape, path.log_prob_steps(z).shape
    (torch.Size([3, 5, 2]), torch.Size([3]), torch.Size([3, 5]))
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        initial: Initial,
        transition: Transition,
        times: Tensor,
        inputs: Tensor | None = None,
        memory: History | Memory | None = None,
        *,
        step_mask: Tensor | None = None,
        batch_shape: torch.Size | tuple[int, ...] | None = None,
    ) -> None:
        def step(state: Tensor | None, k: slice, summary: Tensor | None) -> Any:
            if state is None:
                return initial(times[..., k], None if inputs is None else inputs[..., k, :], memory=summary)
            last = slice(k.start - 1, k.stop - 1)
            held = None if inputs is None else inputs[..., last, :]
            return transition(state, times[..., last], times[..., k], held, memory=summary)

        if isinstance(memory, Memory):
            like = next(memory.parameters(), torch.zeros(()))
            memory = History(memory, gaps(times, like), inputs)
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(times.shape[:-1], () if inputs is None else inputs.shape[:-2])
        discrete = isinstance(transition, DiscreteState)
        self._set(step, times.shape[-1], initial.state_dim, memory, step_mask, torch.Size(batch_shape), None, discrete)

    @classmethod
    def over(
        cls,
        step: Step,
        num_times: int,
        state_dim: int,
        *,
        memory: History | None = None,
        step_mask: Tensor | None = None,
        batch_shape: torch.Size | tuple[int, ...] = (),
        draw: Draw | None = None,
        discrete: bool = False,
    ) -> MarkovPath:
        """A path law from one function ``step(state, k, summary) -> law`` (a guide's).

        ``draw``, where all steps are normal, draws the whole path at once: a shape ``(*sample, *batch, time, state)``
        to the path, its standard normal noise and the scale of each step, all of that shape. ``discrete`` says that a
        coordinate of the state is an index, so that draws carry no gradient.
        """
        path = cls.__new__(cls)
        path._set(step, num_times, state_dim, memory, step_mask, torch.Size(batch_shape), draw, discrete)
        return path

    def _set(
        self,
        step: Step,
        num_times: int,
        state_dim: int,
        history: History | None,
        step_mask: Tensor | None,
        batch_shape: torch.Size,
        draw: Draw | None,
        discrete: bool,
    ) -> None:
        self._step, self._history, self._step_mask, self._draw = step, history, step_mask, draw
        self._discrete = discrete
        self._fresh: tuple[Tensor, Tensor] | None = None
        super().__init__(batch_shape, torch.Size([num_times, state_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovPath:
        num_times, state_dim = self.event_shape
        path = MarkovPath.__new__(MarkovPath)
        shape = torch.Size(batch_shape)
        path._set(self._step, num_times, state_dim, self._history, self._step_mask, shape, self._draw, self._discrete)
        return path

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether a draw is differentiable: not where the state holds an index."""
        return not self._discrete

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Real paths; what asks for it (NUTS, automatic guides) works on every coordinate, and padding has no
        density.
        """
        if self._discrete:
            raise ValueError(
                "the state holds an index (a finite state or a regime), so NUTS and automatic guides cannot walk over "
                'the explicit path "z". Integrate states out by infer.Marginal: filter=infer.hmm_filter for finite '
                "states, filter=infer.kim_filter for switching models; or use particle filters"
            )
        if self._step_mask is not None and not bool(self._step_mask.all()):
            raise ValueError(
                "series of unequal lengths: the padded coordinates of the path have no density, so NUTS and automatic "
                "guides over the explicit path are improper. Integrate states out with infer.Marginal, use a guide of "
                "pyro_ssm.guides, or run the series one by one"
            )
        return constraints.independent(constraints.real, 2)

    # --------------------------------------------------------------------------------------------- draws

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        if self._draw is not None and self._history is None:
            path, noise, scale = self._draw(shape + self.event_shape)
            self._fresh = (path, self._hide_padding(_normal_terms(noise, scale)))
            return path
        return self._rsample_by_steps(shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            path = self.rsample(sample_shape)
        self._fresh = None  # its terms carry no gradient
        return path

    def _rsample_by_steps(self, shape: torch.Size) -> Tensor:
        history, state, summary, carry = self._history, None, None, None
        if history is not None:
            carry, summary = history.start(shape)
        states, terms, noises, scales, observations = [], [], [], [], []
        for k in range(self.event_shape[0]):
            law = self._step(state, slice(k, k + 1), summary)
            if isinstance(law, Independent) and isinstance(law.base_dist, Normal):
                loc, scale = law.base_dist.loc, law.base_dist.scale
                noise = torch.randn(shape + (1, self.event_shape[1]), dtype=loc.dtype, device=loc.device)
                state = loc + scale * noise
                noises.append(noise)
                scales.append(scale.expand(noise.shape))
            else:
                if law.batch_shape != shape + (1,):
                    law = law.expand(shape + (1,))
                state = law.rsample() if law.has_rsample else law.sample()
                terms.append(_log_prob_or_none(law, state))
            states.append(state)
            if history is not None:
                carry, summary, value = history.advance(carry, summary, state, k)
                if value is not None:
                    observations.append(value)
        path = torch.cat(states, -2)
        if not terms:
            self._fresh = (path, self._hide_padding(_normal_terms(torch.cat(noises, -2), torch.cat(scales, -2))))
        elif not noises and all(term is not None for term in terms):
            self._fresh = (path, self._hide_padding(torch.cat(terms, -1)))
        if history is not None and history.simulates:
            history.remember(path, torch.cat(observations, -2))
        return path

    # ------------------------------------------------------------------------------------------- density

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob``: :math:`\\log p(z_1)` and :math:`\\log p(z_{k+1} | z_k)`, shape ``(*batch,
        time)``.
        """
        if self._fresh is not None and self._fresh[0] is value:
            return self._fresh[1]
        before = None if self._history is None else self._history.summaries(value)[0]
        num_times = value.shape[-2]
        first = self._step(None, slice(0, 1), None if before is None else before[..., :1, :])
        terms = [first.log_prob(value[..., :1, :])]
        if num_times > 1:
            rest = self._step(value[..., :-1, :], slice(1, num_times), None if before is None else before[..., 1:, :])
            terms.append(rest.log_prob(value[..., 1:, :]))
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        return self._hide_padding(torch.cat([term.expand(shape + term.shape[-1:]) for term in terms], -1))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)

    def _hide_padding(self, terms: Tensor) -> Tensor:
        if self._step_mask is None:
            return terms
        return torch.where(self._step_mask, terms, torch.zeros((), dtype=terms.dtype, device=terms.device))


def _normal_terms(noise: Tensor, scale: Tensor) -> Tensor:
    """log N(loc + scale e; loc, scale), summed over the state."""
    constant = 0.5 * math.log(2 * math.pi) * noise.shape[-1]
    return -0.5 * noise.square().sum(-1) - scale.log().sum(-1) - constant


def _log_prob_or_none(law: Any, value: Tensor) -> Tensor | None:
    """A law that can only be drawn from has no density: nothing is cached, and log_prob raises when it is asked."""
    try:
        return law.log_prob(value)
    except NotImplementedError:
        return None
