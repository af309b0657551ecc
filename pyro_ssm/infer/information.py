"""Standard errors from the curvature of the log-likelihood."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.binding import bind, is_bound, parameter_names, random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.filter_terms import Filter, log_likelihood_terms
from pyro_ssm.infer.gaussian import kalman_filter
from pyro_ssm.models import StateSpaceModel

__all__ = ["ObservedInformation", "StandardErrorsResult", "observed_information", "standard_errors"]

Quantity = Callable[[Any], Tensor]


class ObservedInformation(NamedTuple):
    """What :func:`observed_information` returns; d counts the entries of all learnable parameters.

    >>> from pyro_ssm.infer import ObservedInformation
    >>> ObservedInformation._fields
    ('names', 'matrix', 'score', 'log_likelihood')
    """

    names: tuple[str, ...]  # d names, such as "transition.scale[0]"
    matrix: Tensor  # (d, d) float64, minus the Hessian in the unconstrained space
    score: Tensor  # (d,) float64, the gradient there: near zero at a maximum
    log_likelihood: float

    @property
    def covariance(self) -> Tensor:
        """The inverse of ``matrix``.

        Raises:
            ValueError: the information is not positive definite.
        """
        size = self.matrix.diagonal().abs().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        values, axes = torch.linalg.eigh(self.matrix / (size * size.unsqueeze(-1)))
        if not bool(values[0] > 1e-10):
            worst = [self.names[i] for i in axes[:, 0].abs().argsort(descending=True)[:3].tolist()]
            raise ValueError(
                f"the observed information is not positive definite (smallest scaled eigenvalue {float(values[0]):.3g}"
                f", mostly along {worst}): the parameters are not at a maximum, at a bound, or not identified. "
                "Fit longer, or hold some of them with requires_grad_(False)"
            )
        return (axes / values) @ axes.mT / (size * size.unsqueeze(-1))


class StandardErrorsResult(NamedTuple):
    """What :func:`standard_errors` returns, by parameter or quantity, each in its own shape and units.

    >>> from pyro_ssm.infer import StandardErrorsResult
    >>> StandardErrorsResult._fields
    ('estimate', 'standard_error', 'covariance', 'information')
    """

    estimate: dict[str, Tensor]
    standard_error: dict[str, Tensor]  # as estimate; 0 in entries that cannot vary
    covariance: Tensor  # (m, m) of all entries of all estimates, in their order
    information: ObservedInformation


def observed_information(
    model: StateSpaceModel, data: TimeSeries, filter: Filter = kalman_filter
) -> ObservedInformation:
    """Minus the Hessian of the log-likelihood at the model's parameters.

    .. math:: J(u) = -\\frac{\\partial^2}{\\partial u\\, \\partial u^T} \\log p(y \\mid \\theta(u))

    where u are the unconstrained values of all parameters that require a gradient (a scale's softplus inverse). It is
    computed by differentiating twice, in float64, one backward pass an entry.

    Args:
        model: unbound, without random parameters; left unchanged.
        data: with values.
        filter: twice differentiable; with an approximate one the information is that of its approximation.

    Raises:
        TypeError: the model is bound.
        ValueError: a parameter has a prior, or none requires a gradient.

    Source: Efron and Hinkley (1978), "Assessing the accuracy of the maximum likelihood estimator: observed versus
    expected Fisher information".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import observed_information
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.initial.requires_grad_(False), model.emission.requires_grad_(False)  # doctest: +ELLIPSIS
    (NormalInitial(...
    >>> observed_information(model, ssm.TimeSeries(torch.arange(4.0), torch.randn(3, 4, 1))).names
    ('transition.matrix[0, 0]', 'transition.offset[0]', 'transition.scale[0]')
    """
    return _information(_double(model), data, filter)


def _double(model: StateSpaceModel) -> StateSpaceModel:
    if not isinstance(model, StateSpaceModel) or is_bound(model):
        raise TypeError(f"`model` must be an unbound StateSpaceModel, got {type(model).__name__}")
    if random := random_parameters(model):
        raise ValueError(
            f"the information is that of parameters without a prior, but {random} have one. Give them values in place "
            "of priors, or look at the posterior's own spread (NUTS, AutoLaplaceApproximation on infer.Marginal)"
        )
    return copy.deepcopy(model).double()


def _free(model: StateSpaceModel) -> dict[str, Tensor]:
    """The unconstrained learnable parameters by the dotted name of what they make."""
    names = parameter_names(model)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        dotted = name if name in names else name.removesuffix("_unconstrained")
        if parameter.requires_grad:
            found[dotted] = parameter
    if not found:
        raise ValueError("no parameter requires a gradient, so nothing varies: there is no information to report")
    return found


def _information(model: StateSpaceModel, data: TimeSeries, filter: Filter) -> ObservedInformation:
    free = _free(model)
    with torch.enable_grad():
        total = log_likelihood_terms(filter, bind(model), data.to(dtype=torch.float64)).sum()
        score = _gradient(total, free, create_graph=True)
        matrix = -torch.stack([_gradient(entry, free) for entry in score])
    return ObservedInformation(_entries(free), 0.5 * (matrix + matrix.mT), score.detach(), float(total.detach()))


def _gradient(of: Tensor, free: Mapping[str, Tensor], create_graph: bool = False) -> Tensor:
    """The gradient as one vector."""
    leaves = list(free.values())
    if not of.requires_grad:
        return torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=of.dtype, device=of.device)
    found = torch.autograd.grad(of, leaves, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(u).flatten() if g is None else g.flatten() for g, u in zip(found, leaves)])


def _entries(parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """``name[i, j]`` of each entry."""
    names: list[str] = []
    for name, value in parameters.items():
        where = torch.ones(value.shape).nonzero().tolist()
        names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in where]
    return tuple(names)


def standard_errors(
    model: StateSpaceModel,
    data: TimeSeries,
    filter: Filter = kalman_filter,
    of: Mapping[str, Quantity] | None = None,
) -> StandardErrorsResult:
    """Asymptotic standard errors of maximum-likelihood estimates, or of functions of them.

    .. math:: \\text{Cov}(g(u)) \\approx G\\, J(u)^{-1} G^T, \\qquad G = \\frac{\\partial g}{\\partial u}

    with the :func:`observed_information` J and the delta method. They mean something at an interior maximum: look at
    ``information.score``. What does not require a gradient is known, and has standard error 0.

    Args:
        model: unbound, at its estimates.
        data: with values.
        filter: see :func:`observed_information`.
        of: quantities ``g(bound model)`` by name; default: every learnable parameter as it is read (a scale, not its
            softplus inverse).

    Raises:
        ValueError: as :func:`observed_information`; or the information is not positive definite.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import standard_errors
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> for name, parameter in model.named_parameters():
    ...     parameter.requires_grad_(name == "emission.offset")  # doctest: +ELLIPSIS
    Parameter containing...
    >>> found = standard_errors(model, ssm.TimeSeries(torch.arange(4.0), torch.randn(30, 4, 1)))
    >>> found.standard_error["emission.offset"].shape
    torch.Size([1])
    """
    exact = _double(model)
    information = _information(exact, data, filter)
    free = _free(exact)
    with torch.enable_grad():
        bound = bind(exact)
        if of is None:
            estimate = {name: _read(bound, name) for name in free}
        else:
            estimate = {name: quantity(bound) for name, quantity in of.items()}
        G = torch.stack([_gradient(entry, free) for value in estimate.values() for entry in value.flatten()])
    covariance = G @ information.covariance @ G.mT
    spread = covariance.diagonal().clamp(min=0.0).sqrt().split([value.numel() for value in estimate.values()])
    return StandardErrorsResult(
        {name: value.detach() for name, value in estimate.items()},
        {name: part.view(value.shape) for (name, value), part in zip(estimate.items(), spread)},
        covariance,
        information,
    )


def _read(module: Any, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module
