"""What is done to a model at a time: checked, and aligned with a batch of series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.components import Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.predict.parameters import align, event_dims

__all__ = ["Intervention", "intervention"]


class Intervention(NamedTuple):
    """A change that takes hold at one position of the grid for each series.

    >>> from pyro_ssm.predict.intervention import Intervention
    >>> Intervention._fields
    ('position', 'first', 'data', 'action', 'parameters', 'transition')
    """

    position: Tensor  # (*batch,)
    first: int  # the smallest of them
    data: TimeSeries  # with the other inputs
    action: Callable[[Tensor], Tensor] | None  # on states (S, *batch, state)
    parameters: dict[str, Any]  # (1, *plates, *event), or functions
    transition: Transition | None

    def has_begun(self, k: int) -> Tensor:
        """Whether the position ``k`` is under the intervention, ``(*batch, 1, 1)``."""
        return (self.position <= k)[..., None, None]

    def is_before(self, k: int) -> Tensor:
        """Whether the move to the position ``k`` is under the intervention, ``(*batch, 1, 1)``."""
        return (self.position < k)[..., None, None]

    def set_state(self, state: Tensor, k: int) -> Tensor:
        """States ``(S, *batch, 1, state)`` at ``k``, set where this is the time to do so."""
        if self.action is None or not bool((self.position == k).any()):
            return state
        acted = torch.as_tensor(self.action(state.squeeze(-2))).to(state)
        try:
            acted = acted.expand(state.squeeze(-2).shape)
        except RuntimeError:
            raise ValueError(
                f"`state` gave the shape {tuple(acted.shape)} for states of shape {tuple(state.squeeze(-2).shape)}"
            ) from None
        return torch.where((self.position == k)[..., None, None], acted.unsqueeze(-2), state)

    def act_on(self, model: StateSpaceModel, drawn: Mapping[str, Tensor]) -> tuple[StateSpaceModel, Transition]:
        """The model and the transition that hold from then on, bound, for draws of the parameters."""
        changed: dict[str, Any] = dict(drawn)
        others: dict[str, Any] = {}
        for name, value in self.parameters.items():
            of_other = self.transition is not None and name.startswith("transition.")
            if callable(value):
                old = drawn[name] if name in drawn else _value_of(self.transition or model, name, of_other)
                value = torch.as_tensor(value(old))
            (others if of_other else changed)[name] = value
        bound = model.bind(changed or None)
        if self.transition is None:
            return bound, bound.transition
        return bound, bind(self.transition, {name.partition(".")[2]: value for name, value in others.items()} or None)


def _value_of(root: Any, name: str, of_other: bool) -> Tensor:
    value: Any = root
    for part in (name.partition(".")[2] if of_other else name).split("."):
        value = getattr(value, part)
    return value.detach().unsqueeze(0)


def intervention(
    model: StateSpaceModel,
    data: TimeSeries,
    time: Any,
    state: Any,
    inputs: Any,
    parameters: Mapping[str, Any] | None,
    transition: Transition | None,
) -> Intervention:
    """Check an intervention (see :func:`~pyro_ssm.predict.counterfactual`) against a model and its data.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.intervention import intervention
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> intervention(model, data, 2.0, {0: 1.0}, None, None, None).position
    tensor([2, 2, 2])
    """
    if state is None and inputs is None and not parameters and transition is None:
        raise ValueError("nothing is changed: give `state`, `inputs`, `parameters` or `transition`")
    position = _position(data, time)
    action = None if state is None else _action(state, model.initial.state_dim)
    if transition is not None and transition.state_dim != model.initial.state_dim:
        raise ValueError(
            f"`transition` moves a state of size {transition.state_dim}, but the model's has {model.initial.state_dim}"
        )
    other = data if inputs is None else _with_inputs(data, inputs, position)
    return Intervention(
        position, int(position.min()), other, action, _checked(model, data, parameters or {}, transition), transition
    )


def _position(data: TimeSeries, time: Any) -> Tensor:
    batch = data.batch_shape
    wanted = torch.as_tensor(time, dtype=data.times.dtype, device=data.device)
    try:
        wanted = wanted.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"`time` must be one number, or one a series of shape {tuple(batch)}, got shape {tuple(wanted.shape)}"
        ) from None
    grid = data.times.expand(batch + (data.num_times,))
    distance = (grid - wanted.unsqueeze(-1)).abs()
    if data.lengths is not None:
        distance = torch.where(data.step_mask, distance, torch.full_like(distance, torch.inf))
    nearest, position = distance.min(-1)
    gap = grid.diff(dim=-1).amin(-1) if data.num_times > 1 else torch.ones_like(nearest)
    off = nearest > 1e-3 * gap  # times that went through float32 are still meant
    if bool(off.any()):
        close = grid.gather(-1, position.unsqueeze(-1)).squeeze(-1)[off].flatten()[0]
        raise ValueError(
            f"`time` {wanted[off].flatten()[0].item():g} is not on the grid; the nearest time of that series is "
            f"{close.item():g}. For times between observations use data.refine(n), with the posterior given the same"
        )
    return position


def _action(state: Any, state_dim: int) -> Callable[[Tensor], Tensor]:
    if state_dim == 0:
        raise ValueError("`state` is given, but this model has no state: give `inputs` or `parameters`")
    if isinstance(state, Mapping):
        wrong = [i for i in state if not isinstance(i, int) or not -state_dim <= i < state_dim]
        if wrong:
            raise ValueError(f"`state` sets the coordinates {wrong}, but the state has {state_dim}, counted from 0")

        def put(z: Tensor) -> Tensor:
            z = z.clone()
            for i, value in state.items():
                z[..., i] = torch.as_tensor(value).to(z)
            return z

        return put
    if callable(state):
        return state
    value = torch.as_tensor(state)
    if not bool(torch.isfinite(value).all()):
        raise ValueError("`state` must be finite; to set some coordinates only, give a mapping {coordinate: value}")
    return lambda z: value.to(z)


def _with_inputs(data: TimeSeries, inputs: Any, position: Tensor) -> TimeSeries:
    if data.inputs is None:
        raise ValueError("`inputs` are given, but the data has none: give the factual ones to the TimeSeries")
    new = torch.as_tensor(inputs).to(data.inputs)
    try:
        new = new.expand(data.inputs.shape) if new.dim() < data.inputs.dim() else new
        if new.shape[-2:] != data.inputs.shape[-2:]:  # one column would be compared with each
            raise RuntimeError
        changed = data.replace(inputs=new)
    except RuntimeError:
        raise ValueError(f"`inputs` must have the shape {tuple(data.inputs.shape)}, got {tuple(new.shape)}") from None
    steps = torch.arange(data.num_times, device=data.device)
    early = (steps < position.unsqueeze(-1)).unsqueeze(-1) & (new != data.inputs)
    if bool(early.any()):
        where = int(early.any(-1).reshape(-1, data.num_times).any(0).nonzero()[0])
        raise ValueError(
            f"`inputs` differ from those of the data at position {where}, before the intervention: what has happened "
            "cannot be changed. Copy data.inputs and change the rows from `time` on, or give an earlier `time`"
        )
    return changed


def _checked(
    model: StateSpaceModel, data: TimeSeries, parameters: Mapping[str, Any], transition: Transition | None
) -> dict[str, Any]:
    names = parameter_names(model)
    own = [] if transition is None else [f"transition.{name}" for name in parameter_names(transition)]
    names = [name for name in names if transition is None or not name.startswith("transition.")] + own
    unknown = sorted(set(parameters) - set(names))
    if unknown:
        raise ValueError(f"`parameters` names {unknown}, which the model does not know; it has {sorted(names)}")
    initial = sorted(name for name in parameters if name.startswith("initial."))
    if initial:
        raise ValueError(
            f"{initial} belong to the law of the first state, which comes before any intervention: set the "
            "state itself by `state`"
        )
    dims = event_dims(model)
    return {
        name: value
        if callable(value)
        else torch.as_tensor(value).unsqueeze(0)
        if name in own
        else align(name, torch.as_tensor(value).unsqueeze(0), dims[name], data)
        for name, value in parameters.items()
    }
