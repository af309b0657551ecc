"""Which parameters EM moves: components read as regressions, and written back."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.binding import parameter_names, random_parameters
from pyro_ssm.blocks import CholeskyAbove
from pyro_ssm.dynamics import LinearNormal as LinearTransition
from pyro_ssm.dynamics import NormalInitial, RBFTransition
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.emissions import RBFNormal
from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments, coefficient_step, residual_covariance

__all__ = ["Regression", "held_entries", "regression_of"]

PARTS = ("initial", "transition", "emission")
#: the coefficients of each component, in the order of its regressors
COEFFICIENTS: Mapping[type, tuple[str, ...]] = {
    NormalInitial: ("input_matrix", "loc"),
    LinearTransition: ("matrix", "input_matrix", "offset"),
    LinearEmission: ("matrix", "input_matrix", "offset"),
    RBFTransition: ("matrix", "weights", "input_matrix", "offset"),
    RBFNormal: ("matrix", "weights", "input_matrix", "offset"),
}
SMALLEST = 1e-12  # standard deviation, where a parameter has no floor of its own
ABOVE_FLOOR = 1.001  # of a noise that the M-step puts at its floor, where the unconstrained parameter is infinite

Fixed = Collection[str] | Mapping[str, Any]


def held_entries(model: Any, fixed: Fixed) -> dict[str, Tensor]:
    """For each parameter a bool mask, True where EM must leave it: asked for, or without gradient.

    Raises:
        ValueError: a parameter has a prior.
        KeyError: a name is unknown.
        TypeError, ValueError: a mask is not boolean, or does not fit.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.infer.expectation_maximisation.parameters import held_entries
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> held = held_entries(model, ["initial", "emission.matrix"])
    >>> sorted(name for name, mask in held.items() if mask.any())
    ['emission.matrix', 'initial.loc', 'initial.scale']
    """
    if random := random_parameters(model):
        raise ValueError(
            f"em maximises the likelihood of parameters without a prior, but {random} have one. Give them values in "
            "place of priors, or use infer.Marginal(model) with NUTS, or with SVI and an AutoDelta guide (MAP)"
        )
    if isinstance(fixed, str):
        raise TypeError(f"`fixed` must be a collection of names, got the string {fixed!r}. Write [{fixed!r}]")
    known = parameter_names(model)
    held = {}
    for name in known:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value = getattr(module, attribute)
        learnt = value.requires_grad
        held[name] = torch.full(value.shape, not learnt, dtype=torch.bool, device=value.device)
    asked = fixed if isinstance(fixed, Mapping) else dict.fromkeys(fixed, True)
    for name, mask in asked.items():
        meant = [parameter for parameter in known if parameter == name or parameter.startswith(f"{name}.")]
        if not meant:
            close = difflib.get_close_matches(name, [*known, *PARTS], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"`fixed` names {name!r}, which is no parameter or component; the model has {known}.{hint}")
        for parameter in meant:
            held[parameter] = held[parameter] | _mask(name, mask, held[parameter])
    return held


def _mask(name: str, mask: Any, like: Tensor) -> Tensor:
    mask = torch.as_tensor(mask, device=like.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"`fixed[{name!r}]` must be boolean, True where the entry stays, got {mask.dtype}")
    try:
        return mask.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"`fixed[{name!r}]` has shape {tuple(mask.shape)}, but the parameter has {tuple(like.shape)}"
        ) from None


@dataclass
class Regression:
    """One component as :math:`r = W \\phi + L \\varepsilon`, and what of it may move.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.infer.expectation_maximisation.parameters import held_entries, regression_of
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> regression_of(model, "transition", held_entries(model, ())).W.shape  # two states and the offset
    torch.Size([2, 3])
    """

    component: Any
    names: tuple[str, ...]  # of the coefficients
    free: Tensor  # bool (rows, columns)
    diagonal: bool
    noise_free: Tensor  # bool (rows,)

    @property
    def W(self) -> Tensor:
        """The coefficients side by side, ``(rows, columns)``."""
        return torch.cat([_columns(getattr(self.component, name)) for name in self.names], -1)

    @property
    def S(self) -> Tensor:
        """The covariance of the noise, ``(rows, rows)``."""
        if self.diagonal:
            return self.component.scale.square().diag()
        return self.component.scale_tril @ self.component.scale_tril.mT

    @torch.no_grad()
    def maximise(self, moments: ResidualMoments) -> None:
        """The M-step: move what is free to the maximum of the expected log-likelihood."""
        step = coefficient_step(moments, self.free, self.S, self.diagonal)
        start = 0
        for name in self.names:
            old = getattr(self.component, name)
            width = 1 if old.dim() == 1 else old.shape[-1]
            if bool(self.free[:, start : start + width].any()):
                _write(self.component, name, old + step[:, start : start + width].reshape(old.shape))
            start += width
        seen = moments.steps > 0
        moving = self.noise_free & seen
        if not bool(moving.any()):
            return
        covariance = residual_covariance(moments, step, self.diagonal)
        if self.diagonal:
            least = ABOVE_FLOOR * _floor(self.component, "scale")
            scale = covariance.clamp(min=0.0).sqrt().clamp(min=least)
            _write(self.component, "scale", torch.where(moving, scale, self.component.scale), moving)
        else:  # the best covariance that is nowhere smaller than the floor has the same axes
            least = ABOVE_FLOOR * _floor(self.component, "scale_tril")
            size, axes = torch.linalg.eigh(covariance)
            raised = (axes * size.clamp(min=least**2).unsqueeze(-2)) @ axes.mT
            _write(self.component, "scale_tril", torch.linalg.cholesky(raised))


def _columns(value: Tensor) -> Tensor:
    return value.unsqueeze(-1) if value.dim() == 1 else value


def _write(module: Any, name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Write a parameter's value in place, through its constraint where it has one; only ``where`` it is to move."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.copy_(value)
        return
    raw = module._parameters[f"{name}_unconstrained"]
    before = raw.clone()
    setattr(module, name, value)
    if where is not None:  # there and back through the constraint would change a held entry's last bit
        raw.copy_(torch.where(where, raw, before))


def _floor(module: Any, name: str) -> float:
    """The lower bound of a scale, from its constraint."""
    constraint = module.__dict__.get("_pyro_params", {}).get(name, (None, None))[0]
    if isinstance(constraint, CholeskyAbove):
        return constraint.floor
    if isinstance(constraint, constraints.greater_than):
        return max(float(constraint.lower_bound), SMALLEST)
    return SMALLEST


def regression_of(model: Any, part: str, held: Mapping[str, Tensor]) -> Regression | None:
    """The regression of a component; None where nothing of it is free.

    Raises:
        TypeError: the component has free parameters, but no closed-form M-step for them.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.infer.expectation_maximisation.parameters import held_entries, regression_of
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> regression_of(model, "transition", held_entries(model, ["transition"])) is None
    True
    """
    component = getattr(model, part)
    mine = {name.removeprefix(f"{part}."): mask for name, mask in held.items() if name.startswith(f"{part}.")}
    if all(bool(mask.all()) for mask in mine.values()):
        return None
    way_out = (
        f"Hold it (fixed=[{part!r}]), or maximise the likelihood by gradients: "
        "infer.fit(infer.Marginal(model), None, data, ...)"
    )
    kind = next((kind for kind in COEFFICIENTS if type(component) is kind), None)
    if kind is None:
        raise TypeError(
            f"em has no closed-form M-step for the {part} {type(component).__name__}; it has one for NormalInitial, "
            f"LinearNormal, RBFTransition and RBFNormal. {way_out}"
        )
    if getattr(component, "noise", None) is not None:
        raise TypeError(f"em has no closed-form M-step for the {part} with known noise of every step. {way_out}")
    noise = "scale" if component.covariance == "diagonal" else "scale_tril"
    names = tuple(name for name in COEFFICIENTS[kind] if name != "input_matrix" or component.input_dim)
    rows = component.obs_dim if part == "emission" else component.state_dim
    values = {name: getattr(component, name) for name in (*names, noise)}
    if wrong := {name: tuple(value.shape) for name, value in values.items() if value.shape[:1] != (rows,)}:
        raise ValueError(f"em needs {rows} row(s) in each parameter of the {part}, got {wrong}. {way_out}")
    stays = {name: mine.get(name, torch.ones_like(value, dtype=torch.bool)) for name, value in values.items()}
    noise_stays = stays[noise]
    if noise == "scale_tril" and bool(noise_stays.any()) and not bool(noise_stays.all()):
        raise ValueError(f"`fixed` holds some entries of {part}.scale_tril: hold all or none, or use a diagonal noise")
    return Regression(
        component,
        names,
        ~torch.cat([_columns(stays[name]) for name in names], -1),
        component.covariance == "diagonal",
        ~(noise_stays if noise == "scale" else noise_stays.any(-1)),
    )
