"""What would have been seen, had something been different from a time on: abduction, action, prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import exogenous
from pyro_ssm.models import StateSpaceModel, history
from pyro_ssm.predict.impute import complete
from pyro_ssm.predict.intervention import Intervention, intervention
from pyro_ssm.predict.posterior import PosteriorDraws, draw_chunks
from pyro_ssm.predict.record import record_of
from pyro_ssm.predict.remember import Remembered

__all__ = ["Counterfactual", "counterfactual"]


class Counterfactual(NamedTuple):
    """Draws of two worlds with the same noise, sample dims leftmost; ``values - factual_values`` is the effect.

    >>> from pyro_ssm.predict import Counterfactual
    >>> Counterfactual._fields
    ('values', 'states', 'factual_values', 'factual_states', 'times')
    """

    values: Tensor  # (S, *batch, time, obs)
    states: Tensor  # (S, *batch, time, state), at observation times
    factual_values: Tensor  # what was seen; where nothing was, what was drawn
    factual_states: Tensor
    times: Tensor  # (time,) or (*batch, time)


def counterfactual(
    model: StateSpaceModel,
    posterior: Any,
    data: TimeSeries,
    time: Any,
    *,
    state: Tensor | Mapping[int, Any] | Callable[[Tensor], Tensor] | None = None,
    inputs: Any = None,
    parameters: Mapping[str, Any] | None = None,
    transition: Transition | None = None,
    observation_noise: str = "abducted",
    num_samples: int | None = None,
    chunk: int | None = None,
) -> Counterfactual:
    """Draws of the record as it would have been under an intervention at ``time``, all else, luck included, the same.

    .. math::
        \\theta, z, \\varepsilon, \\eta \\sim p(\\cdot \\mid y), \\qquad
        z'_{k+1} = f'(z'_k, \\varepsilon_k), \\qquad y'_k = h'(z'_k, \\eta_k)

    where :math:`z_{k+1} = f(z_k, \\varepsilon_k)` and :math:`y_k = h(z_k, \\eta_k)` in the world that was seen
    (abduction), and the primes mark what the intervention changes (action). Up to ``time`` both worlds are one. This is
    not a forecast under the intervention, which would draw new noise: the effect on *this* series is
    ``values - factual_values``, often far less uncertain than either.

    How noise becomes values is the choice of :func:`~pyro_ssm.distributions.exogenous`; for counts and classes, and
    where the scale of a law changes, another choice would give other counterfactuals.

    Args:
        model: the state-space model; memory is run in both worlds.
        posterior: what :func:`~pyro_ssm.predict.posterior_draws` takes.
        data: what the posterior was given; use ``data.refine(n)`` there and here for times between observations.
        time: when the intervention takes hold: a time of the grid, or one a series.
        state: sets the state at ``time``: a tensor ``(*batch, state)``, a mapping from coordinates to values, or a
            function of the state ``(S, *batch, state)``.
        inputs: ``(*batch, time, input)`` that replace those of the data, the same before ``time``.
        parameters: dotted names to values ``(*plates, *event)``, or functions of the value that they had, which hold
            from ``time`` on: for moves that begin there, and for what is seen there.
        transition: moves the state from ``time`` on in place of the model's (another field); without random parameters
            that ``parameters`` does not give.
        observation_noise: ``"abducted"`` or ``"fresh"`` (drawn anew from ``time`` on, for laws without a mechanism).
        num_samples: S; default: all draws that there are, 200 for guides and None.
        chunk: draws at a time; bounds the memory that whole paths take.

    Returns:
        :class:`Counterfactual`, values 0 at padding; not differentiable; draws come from torch's global generator.

    Raises:
        ValueError: nothing is changed, a time is not on the grid, inputs differ before it, names are unknown.
        TypeError: a law of the model has no known mechanism (random regimes; steps known by draws only: give
            ``NeuralSDE(method="euler")`` or a transition of ``dynamics.discretize``); and as ``posterior_draws``.

    Source: Pearl (2009), "Causality", section 7.1; Oberst and Sontag (2019), "Counterfactual off-policy evaluation with
    Gumbel-max structural causal models".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict import counterfactual
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.tensor([[0.3], [-0.2], [0.5], [0.1]]))
    >>> other = counterfactual(model, None, data, time=1.0, state=lambda z: z + 1.0, num_samples=10)
    >>> effect = other.states - other.factual_states  # the same for all draws: the model is linear
    >>> bool(torch.allclose(effect[:, 1:3], effect[0, 1:3])), effect[0, 0].item()
    (True, 0.0)
    """
    if observation_noise not in ("abducted", "fresh"):
        raise ValueError(f'`observation_noise` must be "abducted" or "fresh", got {observation_noise!r}')
    record_of(data)
    change = intervention(model, data, time, state, inputs, parameters, transition)
    worlds = [
        _two_worlds(model, draws, data, change, observation_noise == "fresh")
        for draws in draw_chunks(model, posterior, data, num_samples, chunk)
    ]
    values, states, factual_values, factual_states = (torch.cat(part) for part in zip(*worlds, strict=True))
    return Counterfactual(values, states, factual_values, factual_states, data.observed_times)


@torch.no_grad()
def _two_worlds(
    model: StateSpaceModel, draws: PosteriorDraws, data: TimeSeries, change: Intervention, fresh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn, path = draws.parameters, draws.states
    bound = model.bind(drawn or None)
    seen = _World(bound, bound.transition, data, path)
    other = _World(*change.act_on(model, drawn), change.data, path)
    values, mask = record_of(data)
    positions = range(data.num_times) if data.observed_index is None else data.observed_index.tolist()
    step_of = {position: j for j, position in enumerate(positions)}
    found: list[list[Tensor]] = [[], [], [], []]
    for k in range(data.num_times):
        now = path[..., k : k + 1, :]
        changed = now
        if k > change.first:
            changed = other.move(k).replay(seen.move(k).abduct(now))
            changed = torch.where(change.is_before(k), changed, now)
        changed = change.set_state(changed, k)
        seen.state, other.state = now, changed
        if k not in step_of:
            continue
        j = step_of[k]
        law, lead = seen.look(j), path.shape[:-2]
        was = complete(law, values[..., j : j + 1, :], mask[..., j : j + 1, :], lead)
        would, other_law = was, other.look(j)
        if k >= change.first:
            would = _draw(other_law, lead) if fresh else exogenous(other_law).replay(exogenous(law).abduct(was))
            would = torch.where(change.has_begun(k), would, was)
        seen.see(was, mask[..., j : j + 1, :])
        other.see(would, mask[..., j : j + 1, :])
        alive = data.observed_step_mask[..., j, None, None]
        for column, value in zip(found, (would * alive, changed, was * alive, now), strict=True):
            column.append(value)
    return tuple(torch.cat(column, -2) for column in found)  # type: ignore[return-value]


def _draw(law: Any, lead: torch.Size) -> Tensor:
    shape = lead + (1,)
    return (law if law.batch_shape == shape else law.expand(shape)).sample()


class _World:
    """One of the two worlds: its laws, its memory, and its state now."""

    def __init__(self, bound: StateSpaceModel, transition: Transition, data: TimeSeries, path: Tensor) -> None:
        self.bound, self.transition, self.data, self.state = bound, transition, data, path[..., :1, :]
        self.run = history(bound, data)
        self.past = None if self.run is None else Remembered(self.run.memory, *self.run.start(path.shape[:-2]))

    def move(self, k: int) -> Any:
        """The mechanism that led to the state ``k``."""
        times, inputs, before = self.data.times, self.data.inputs, slice(k - 1, k)
        held = None if inputs is None else inputs[..., before, :]
        summary = None if self.past is None else self.past.summary
        return exogenous(self.transition(self.state, times[..., before], times[..., k : k + 1], held, memory=summary))

    def look(self, j: int) -> Any:
        """The law of the observation ``j``, which memory has not seen."""
        at = slice(j, j + 1)
        inputs = self.data.inputs
        if inputs is not None and self.data.observed_index is not None:
            inputs = inputs.index_select(-2, self.data.observed_index)
        held = None if inputs is None else inputs[..., at, :]
        summary = None
        if self.past is not None and self.run is not None:
            summary = self.past.see_state(self.state, self.run.gap[..., at, :], held)
        return self.bound.emission(self.state, self.data.observed_times[..., at], held, memory=summary)

    def see(self, values: Tensor, mask: Tensor) -> None:
        """Memory sees what was observed, as far as it was."""
        if self.past is not None:
            self.past.see_observation(values, mask.expand(values.shape))
