"""What every guide shares: its name, its parameters' posterior, and one path site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.binding import is_bound, random_parameters
from pyro_ssm.components import DiscreteState
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import MarkovPath
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.models import StateSpaceModel, batch_shape, history, series_plate, site_name
from pyro_ssm.models.laws import check_record
from pyro_ssm.models.ode_sites import through_start
from pyro_ssm.models.sde_sites import through_noise

__all__ = ["Guide"]


class _ParameterNormal(AutoNormal):
    """An AutoNormal whose copying leaves the original alone: Pyro's drops the model of the live object."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Guide(PyroModule):
    """An approximate posterior :math:`q(\\theta)\\, q(z_{1:T} \\mid y, \\theta)` with one path site ``"z"``.

    A subclass defines ``encode(data, model) -> context`` (with the *bound* model; it draws nothing) and ``step(state,
    k, context, memory=None) -> law``, where ``k`` is a slice of steps and ``state`` holds ``z[k - 1]`` with a time
    axis (None for ``slice(0, 1)``). The path site is a :class:`~pyro_ssm.distributions.MarkovPath` over ``step``, and
    a particle filter calls the same ``step`` as its proposal. A subclass whose steps are all normal may define
    ``draw(context, model)`` and so draw whole paths at once.

    The root is named ``"guide"``, since a model and a guide that share a name in Pyro's parameter store silently freeze
    each other; the model is held unregistered, so that its site names and parameters stay its own.

    Args:
        model: the state-space model; unbound.
        parameters: a guide over every parameter of the model that has a prior, called with the data; by default
            ``AutoNormal``. It must sample all of them.

    Attributes:
        looks_ahead: whether ``step`` at time k depends on data after k. Such a guide is a valid proposal, but filtering
            weights are then the wrong intermediate targets.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.Structured(model, hidden_dim=8)
    >>> isinstance(guide, ssm.guides.Guide), guide.looks_ahead
    (True, True)
    """

    looks_ahead: bool
    #: whether it samples the noise of a path where that is the model's random variable
    samples_noise: bool = False
    #: whether it samples the start of a path that is a function of it
    samples_start: bool = False
    #: whether its steps see the summary of the model's memory; if not, they may be drawn as for a model without one
    reads_memory: bool = True

    def __init__(self, model: StateSpaceModel, parameters: Callable[..., Any] | None = None) -> None:
        super().__init__(name="guide")
        if not isinstance(model, StateSpaceModel) or is_bound(model):
            raise TypeError(f"`model` must be an unbound StateSpaceModel, got {type(model).__name__}")
        if model.initial.state_dim == 0:
            raise TypeError(
                f"{type(self).__name__} samples a path, and this model has no state: fit it with guide=None (maximum "
                "likelihood); weights with priors take pyro.infer.autoguide or NUTS"
            )
        if through_noise(model) and not self.samples_noise:
            raise TypeError(
                f"{type(self).__name__} samples a path, but the random variable of this model is the noise that drives "
                "it (NeuralSDE with site='noise'). Use guides.PosteriorSDE, an automatic guide of Pyro, or "
                "dynamics.discretize(sde, 'euler_maruyama') in the model"
            )
        if through_start(model) and not self.samples_start:
            raise TypeError(
                f"{type(self).__name__} samples a path, but the path of this model is a function of its start "
                "(NeuralODE). Use guides.InitialState, an automatic guide of Pyro, or dynamics.discretize(ode, 'flow', "
                "noise_floor=s) in the model"
            )
        self._model = (model,)  # a tuple, so that it is not registered
        self.parameter_guide = parameters if parameters is not None else _ParameterNormal(self._parameter_program)

    @property
    def model(self) -> StateSpaceModel:
        """The model whose posterior this is."""
        return self._model[0]

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> Any:
        """Everything that ``step`` needs to know of the data; draws nothing. ``model`` is bound."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(data, model)")

    def step(self, state: Tensor | None, k: slice, context: Any, memory: Tensor | None = None) -> Any:
        """The law of ``z[k]`` given ``z[k - 1]``, batch ``(..., len(k))``, event ``(state,)``.

        A captured filter (``particle_filter(..., cuda_graph=True)``) passes an int64 tensor ``(1,)`` for ``k``, which
        selects the same of ``features[..., k, :]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(state, k, context, memory=None)")

    def draw(self, context: Any) -> Draw | None:
        """A function that draws whole paths, ``shape -> (path, noise, scale)``; None where paths must be stepped."""
        return None

    def path(self, data: TimeSeries, model: StateSpaceModel) -> MarkovPath:
        """The law of the path given data and a bound model."""
        if data.values is None:
            raise ValueError(
                "a guide needs observations: `data.values` is None. Simulate the prior with the model alone"
            )
        context = self.encode(data, model)
        remembers = model.memory is not None and self.reads_memory
        return MarkovPath.over(
            lambda state, k, summary: self.step(state, k, context, summary),
            data.num_times,
            model.initial.state_dim,
            memory=history(model, data) if remembers else None,
            step_mask=None if data.lengths is None else data.step_mask,
            batch_shape=batch_shape(model, data),
            draw=None if remembers else self.draw(context),
            discrete=isinstance(model.transition, DiscreteState),
        )

    def parameters_given(self, data: TimeSeries) -> dict[str, Tensor]:
        """Sample the model's random parameters; dotted names as :meth:`StateSpaceModel.bind` takes them."""
        check_record(self.model, data)
        names = random_parameters(self.model)
        if not names:
            return {}
        with pyro.poutine.trace() as traced:
            self.parameter_guide(data)
        sites = traced.trace.nodes
        full = {name: site_name(self.model, name) for name in names}
        if missing := [name for name, site in full.items() if site not in sites]:
            raise ValueError(
                f"the guide over parameters leaves out {missing}: every parameter with a prior needs a posterior. "
                "Add sites of these names, or leave `parameters` to the default AutoNormal"
            )
        return {name: sites[site]["value"] for name, site in full.items()}

    def forward(self, data: TimeSeries) -> Tensor:
        """Sample the parameters, bind the model to them, and sample the path ``(*batch, time, state)``."""
        bound = self.bind_model(self.parameters_given(data))
        with series_plate(self.model, data):
            return pyro.sample(site_name(self.model, "z"), self.path(data, bound))

    def bind_model(self, values: Mapping[str, Tensor]) -> StateSpaceModel:
        """The model bound to drawn parameters; its own learnable parameters are registered by the model, not here."""
        with pyro.poutine.block():
            return self.model.bind(values)

    def _parameter_program(self, data: TimeSeries) -> None:
        del data  # a guide is called with the data, priors do not depend on it
        with self.model._pyro_context:
            self.model.bind()
