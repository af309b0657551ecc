"""A state-space model: three laws (and a memory) that make one Pyro program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.binding import bind
from pyro_ssm.components import Component, Emission, Initial, Memory, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.models.laws import check_record, history, observation_law
from pyro_ssm.models.parameter_store import refuse_strangers_in_mcmc
from pyro_ssm.models.plates import series_plate, site_name
from pyro_ssm.models.sde_sites import sample_states

__all__ = ["StateSpaceModel"]


class StateSpaceModel(PyroModule):
    """A latent Markov model as a Pyro program with the sites ``"z"`` (the whole path) and ``"y"``.

    .. math::
        z_1 \\sim p(z_1), \\qquad z_{k+1} \\sim p(z_{k+1} \\mid z_k), \\qquad y_k \\sim p(y_k \\mid z_k)

    ``model(data)`` reads every parameter once (:meth:`bind`), outside its own plate, so that a ``PyroSample`` is
    shared by all series; then, unless the caller's plates already cover the batch, it opens ``plate("series")``
    around ``"z"`` and ``"y"`` and returns ``(z, y)``. ``"y"`` is observed exactly when ``data.values is not None``.
    Inside a user's plate the parameters are per series. The class is final and has no verbs: ``infer.fit(model,
    guide, data)`` trains it.

    Args:
        initial: law of the state at ``times[0]``.
        transition: law of the next state.
        emission: law of what is seen.
        memory: for models that remember; an emission that brings its own exposes it as ``.memory``.

    Raises:
        TypeError: a part is not a component of its kind.
        ValueError: state dimensions differ, or two memories are given.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     initial=ssm.dynamics.NormalInitial(state_dim=2),
    ...     transition=ssm.dynamics.LinearNormal(state_dim=2),
    ...     emission=ssm.emissions.LinearNormal(state_dim=2, obs_dim=1),
    ... )
    >>> data = ssm.TimeSeries(times=torch.arange(5.0), values=torch.zeros(3, 5, 1))
    >>> z, y = model(data.without_values())  # a draw from the prior
    >>> z.shape
    torch.Size([3, 5, 2])
    """

    #: ``(*draws, *plates)`` of the parameters of a bound copy
    parameter_shape: torch.Size

    def __init__(
        self, initial: Initial, transition: Transition, emission: Emission, memory: Memory | None = None
    ) -> None:
        super().__init__()
        for name, part, kind in (
            ("initial", initial, Initial),
            ("transition", transition, Transition),
            ("emission", emission, Emission),
        ):
            _check(part, name, kind)
            setattr(self, name, part)
        dims = {name: getattr(self._modules[name], "state_dim", None) for name in ("initial", "transition", "emission")}
        if len({dim for dim in dims.values() if dim is not None}) > 1:
            raise ValueError(
                f"the components' state dimensions differ: {dims}. Build all three with the same state_dim"
            )
        brought = getattr(emission, "memory", None)
        if memory is not None and brought is not None:
            raise ValueError("two memories: `memory` was given, and the emission brings its own. Leave `memory` out")
        if memory is not None:
            _check(memory, "memory", Memory)
            # by hand, since the property `memory` stands in the way of an ordinary assignment
            memory._pyro_set_supermodule("memory", self._pyro_context)
            self._modules["memory"] = memory

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_is_bound" not in cls.__dict__:
            raise TypeError("StateSpaceModel is final: vary its components, or compose it in a PyroModule of your own")
        super().__init_subclass__(**kwargs)

    @property
    def memory(self) -> Any:  # Memory | None; what the table of modules holds is typed too widely
        """The memory of the model: its own, or the one that its emission brings; None for a Markov model."""
        return self._modules["memory"] if "memory" in self._modules else getattr(self.emission, "memory", None)

    def bind(self, values: Mapping[str, Any] | None = None) -> StateSpaceModel:
        """Read every parameter once; returns a shallow copy that speaks no Pyro (see :func:`pyro_ssm.binding.bind`)."""
        return bind(self, values)

    def forward(self, data: TimeSeries) -> tuple[Tensor, Tensor]:
        """The generative program over ``data``: returns the path ``(*batch, time, state)`` and the record ``y``."""
        check_record(self, data)
        refuse_strangers_in_mcmc(self)
        bound = self.bind()
        run = history(bound, data)
        with series_plate(self, data):
            z = sample_states(self, bound, data, run)
            y = pyro.sample(site_name(self, "y"), observation_law(bound, data, z, run), obs=data.values)
        if run is not None and run.simulates:
            run.conclude(z, y)
        return z, y

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        if self._pyro_context.used:
            raise RuntimeError(
                f"this StateSpaceModel has run already, and Pyro cannot rename its sites to `{name}.z`: "
                "compose first, run afterwards (build a fresh model inside your PyroModule)"
            )
        super()._pyro_set_supermodule(name, context)


def _check(part: Any, name: str, kind: type[Component]) -> None:
    if not isinstance(part, kind):
        raise TypeError(f"`{name}` must be a components.{kind.__name__}, got {type(part).__name__}")
    if part._pyro_context.used:
        raise RuntimeError(f"`{name}` has run inside another model already: compose first, run afterwards")
