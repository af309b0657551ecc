"""What particle MCMC returns, and the vector of random parameters in which it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, biject_to

from pyro_ssm.binding import is_bound, random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.prior import sample_prior

__all__ = ["ParticleMCMCResult", "RandomParameters"]

_PROBES = 13  # rows on which evaluation of all rows at once is compared with evaluation one by one


class ParticleMCMCResult(NamedTuple):
    """Draws of parameters and states from particle MCMC; ``to_inference_data`` and ``predict`` take it as posterior.

    >>> import torch
    >>> from pyro_ssm.infer.smc import ParticleMCMCResult
    >>> rate, z = torch.ones(4, 100), torch.zeros(4, 100, 3, 7, 2)
    >>> found = ParticleMCMCResult({"transition.rate": rate}, z, torch.zeros(4, 100), torch.ones(4, 100))
    >>> found.num_chains, found.get_samples()["z"].shape
    (4, torch.Size([400, 3, 7, 2]))
    """

    parameters: dict[str, Tensor]  # dotted name -> (chains, draws, *event), constrained
    states: Tensor  # (chains, draws, *batch, time, state), at all times of the grid
    log_likelihood: Tensor  # (chains, draws), log of the estimate of p(y | parameters), summed over series
    acceptance: Tensor  # (chains, draws), the probability with which the parameter move was accepted

    @property
    def num_chains(self) -> int:
        """Chains."""
        return self.log_likelihood.shape[0]

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Parameters by dotted name and the path as ``"z"``, chains one after the other unless grouped."""
        grouped = {**self.parameters, "z": self.states}
        return grouped if group_by_chain else {name: value.flatten(0, 1) for name, value in grouped.items()}


class _Slot(NamedTuple):
    """Where a parameter lies in the vector, and what it looks like there."""

    at: slice
    unconstrained: torch.Size
    like: Tensor  # of its dtype and device


class RandomParameters:
    """The random parameters (``PyroSample``) of a model as one vector of real numbers.

    .. math:: \\theta = T(u), \\qquad \\log p_u(u) = \\log p(\\theta) + \\log |\\det \\partial T / \\partial u|

    with T the bijection from the reals to the support of each prior. A prior may depend on other parameters, its
    support included. Parameters that are functions of others (``PyroSample`` of a function that returns a tensor, or a
    ``Delta``) are no part of the vector, and are among the values.

    Rows are evaluated all at once where that gives what one by one gives (tried when this is made), else one by one.

    Args:
        model: an unbound model with at least one random parameter.

    Attributes:
        names: dotted names of the parameters in the vector.
        dim: its length.

    Raises:
        TypeError: the model is bound, or a prior is discrete.
        ValueError: it has no random parameter.

    Gradients: values and density are differentiable in the vector. Vectors are float64; values have the dtype of their
    prior.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.infer.smc import RandomParameters
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> parameters = RandomParameters(model)
    >>> u = torch.zeros(5, parameters.dim)
    >>> parameters.to_values(u)["transition.rate"], parameters.log_prior(u)[0]
    (tensor([1., 1., 1., 1., 1.]), tensor(-0.9189, dtype=torch.float64))
    """

    def __init__(self, model: PyroModule) -> None:
        if not isinstance(model, PyroModule) or is_bound(model):
            raise TypeError(f"`model` must be unbound, got {type(model).__name__}: its parameters are numbers")
        self.model = model
        with model._pyro_context:
            self._sites = {model._pyro_get_fullname(name): name for name in random_parameters(model)}
        layout = _Layout(set(self._sites))
        self._trace(layout)
        self._slots, self._plates, self._own_dims = layout.slots, layout.plates, layout.own_dims
        if not self._slots:
            raise ValueError(
                "the model has no random parameter. Give one a prior: model.transition.rate = PyroSample(...)"
            )
        self.names = tuple(self._sites[site] for site in self._slots)
        self.dim = layout.used
        self._at_once = self._rows_agree()

    def draw(self, num: int) -> Tensor:
        """Vectors ``(num, dim)`` of independent draws of the prior.

        Randomness: torch's global generator.
        """
        return self.to_vector(sample_prior(self.model, num))

    def to_vector(self, values: Mapping[str, Any]) -> Tensor:
        """The vectors ``(*lead, dim)`` of values ``(*lead, *plates, *event)`` by dotted name.

        Raises:
            KeyError: a parameter has no value.
        """
        if missing := [name for name in self.names if name not in values]:
            raise KeyError(f"`values` has no {missing}; it has {sorted(values)}")
        given = {site: torch.as_tensor(values[self._sites[site]]) for site in self._slots}
        site = next(iter(self._slots))
        lead = given[site].shape[: given[site].dim() - self._own_dims[site]]
        flat = {site: value.reshape((-1,) + value.shape[len(lead) :]) for site, value in given.items()}
        if self._at_once:
            return self._invert(flat, 1).reshape(lead + (self.dim,))
        rows = [self._invert({site: value[i] for site, value in flat.items()}, 0) for i in range(math.prod(lead))]
        return torch.stack(rows).reshape(lead + (self.dim,))

    def start(self, values: Mapping[str, Any], num: int, whose: str) -> Tensor:
        """Vectors ``(num, dim)`` to begin at, of values that a user gave: ``(*event)``, or ``(num, *event)``.

        Raises:
            KeyError: a parameter has no value.
            ValueError: a name that is no random parameter's, values outside the support of their prior, or not as many.
        """
        if unknown := sorted(set(values) - set(self._sites.values())):
            raise ValueError(f"`start` has {unknown}, and the random parameters are {sorted(self._sites.values())}")
        vectors = self.to_vector(values)
        for site, slot in self._slots.items():
            if not bool(torch.isfinite(vectors[..., slot.at]).all()):
                name = self._sites[site]
                raise ValueError(f"`start`: {name} is {values[name]}, which is outside the support of its prior")
        if not bool(torch.isfinite(self.log_prior(vectors)).all()):
            raise ValueError(f"`start`: the prior has no density at {dict(values)}")
        if vectors.shape not in ((self.dim,), (num, self.dim)):
            raise ValueError(
                f"`start` holds values for {tuple(vectors.shape[:-1])}, but one for all or one for each of the "
                f"{num} {whose} is wanted"
            )
        return vectors.expand(num, self.dim).contiguous()

    def to_values(self, vector: Tensor) -> dict[str, Tensor]:
        """All random parameters by dotted name, ``(*lead, *plates, *event)``, of vectors ``(*lead, dim)``."""
        return self._read(vector)[0]

    def log_prior(self, vector: Tensor) -> Tensor:
        """The log density of vectors ``(*lead, dim)``, the transforms' Jacobians included: float64 ``(*lead)``.

        -inf where the transform leaves the support by rounding.
        """
        return self._read(vector)[1]

    def bind(self, vector: Tensor, data: TimeSeries) -> Any:
        """The model with the values of vectors ``(*lead, dim)``, of batch ``(*lead, *batch)`` beside ``data``."""
        values = self.to_values(vector)
        lead, batch = vector.dim() - 1, len(data.batch_shape)
        for site, name in self._sites.items():
            value = values[name]
            ones = (1,) * (batch - self._plates[site]) if lead else ()
            values[name] = value.reshape(value.shape[:lead] + ones + value.shape[lead:])
        with local_parameters():
            return self.model.bind(values)

    # ------------------------------------------------------------------------------------------------ readings

    def _read(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if vector.shape[-1] != self.dim:
            raise ValueError(f"`vector` must be (*lead, {self.dim}), got {tuple(vector.shape)}")
        lead, rows = vector.shape[:-1], vector.reshape(-1, self.dim)
        values, density = self._all(rows) if self._at_once else self._one_by_one(rows)
        named = {self._sites[site]: value.reshape(lead + value.shape[1:]) for site, value in values.items()}
        return named, density.reshape(lead)

    def _invert(self, values: dict[str, Tensor], lead: int) -> Tensor:
        reading = _Invert(self._slots, values)
        self._trace(reading)
        parts = [reading.found[site].double() for site in self._slots]
        return torch.cat([part.reshape(part.shape[:lead] + (-1,)) for part in parts], -1)

    def _all(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        reading = _Constrain(set(self._sites), self._slots, rows)
        self._trace(reading)
        return reading.found, reading.density

    def _one_by_one(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = [self._all(row) for row in rows]
        values = {site: torch.stack([row[0][site] for row in found]) for site in self._sites}
        return values, torch.stack([row[1] for row in found])

    def _rows_agree(self) -> bool:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(_PROBES, self.dim, dtype=torch.float64, generator=generator)
            values, density = self._one_by_one(rows)
            try:
                together, density_together = self._all(rows)
            except Exception:  # whatever a user's prior raises, given many rows at once
                return False
            if density_together.shape != density.shape or not torch.allclose(density_together, density, equal_nan=True):
                return False
            return all(
                together[site].shape == value.shape and torch.allclose(together[site], value, equal_nan=True)
                for site, value in values.items()
            )

    def _trace(self, reading: Messenger) -> None:
        with poutine.block(), local_parameters(), reading:
            self.model.bind()


class _Layout(Messenger):
    """Finds where each parameter goes in the vector."""

    def __init__(self, sites: set[str]) -> None:
        super().__init__()
        self.sites, self.used = sites, 0
        self.slots: dict[str, _Slot] = {}  # of parameters that are drawn
        self.own_dims: dict[str, int] = {}  # plates and event of each parameter
        self.plates: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name, law, value = msg["name"], msg["fn"], msg["value"]
        if name not in self.sites:
            return
        self.own_dims[name], self.plates[name] = value.dim(), value.dim() - law.event_dim
        if msg["is_observed"] or _is_delta(law):  # a function of others
            return
        if law.support.is_discrete:
            raise TypeError(
                f"the prior of `{name}` is discrete ({type(law).__name__}): there is no density to move in. "
                "Sum it out, or put it into the state"
            )
        shape = biject_to(law.support).inv(value).shape
        self.slots[name] = _Slot(slice(self.used, self.used + shape.numel()), shape, value.detach())
        self.used += shape.numel()


class _Constrain(Messenger):
    """Puts the values of vectors in the place of draws, and adds up their density."""

    def __init__(self, sites: set[str], slots: dict[str, _Slot], vector: Tensor) -> None:
        super().__init__()
        self.sites, self.slots, self.vector = sites, slots, vector
        self.found: dict[str, Tensor] = {}
        self.density = vector.new_zeros(vector.shape[:-1], dtype=torch.float64)

    def _pyro_sample(self, msg: Any) -> None:
        slot = self.slots.get(msg["name"])
        if slot is None:
            return
        law, transform = msg["fn"], biject_to(msg["fn"].support)
        u = self.vector[..., slot.at].reshape(self.vector.shape[:-1] + slot.unconstrained).to(slot.like)
        value = transform(u)
        inside = law.support.check(value)
        if not bool(inside.all()):  # exp(-1000) = 0: no draw, and no reason to stop
            entries = inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim()))
            value = torch.where(entries, value, transform(torch.zeros_like(u)))
        jacobian = transform.log_abs_det_jacobian(u, value)
        density = self._sum(law.log_prob(value)) + self._sum(jacobian)
        self.density = self.density + torch.where(self._sum(~inside) > 0, -math.inf, density)
        self.found[msg["name"]] = msg["value"] = value

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and msg["name"] not in self.slots:
            self.found[msg["name"]] = msg["value"]

    def _sum(self, terms: Tensor) -> Tensor:
        lead = self.vector.dim() - 1
        terms = terms.to(self.density)
        return terms if terms.dim() == lead else terms.flatten(lead).sum(-1)


class _Invert(Messenger):
    """Puts given values in the place of draws, and finds their vector."""

    def __init__(self, slots: dict[str, _Slot], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.slots, self.values = slots, values
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.slots:
            value = msg["value"] = self.values[msg["name"]]
            self.found[msg["name"]] = biject_to(msg["fn"].support).inv(value)


def _is_delta(law: Any) -> bool:
    while isinstance(law, Independent):
        law = law.base_dist
    return isinstance(law, Delta)
