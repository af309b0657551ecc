"""A drift that is a sum of terms from a library, of which few matter: for finding equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks.linear import linear

__all__ = ["TermLibrary", "with_sparse_prior"]

#: ``(time, state, inputs) -> (..., time)``
Term = Callable[[Tensor, Tensor, Any], Tensor]


class TermLibrary(PyroModule):
    """The drift

    .. math:: f_i(z) = \\frac{c_i}{\\tau} \\sum_p C_{ip}\\, \\theta_p(z), \\qquad
        \\theta_p(z) = \\prod_j (z_j / c_j)^{\\alpha_{pj}}, \\quad \\textstyle\\sum_j \\alpha_{pj} \\le \\text{degree},

    linear in its coefficients C, with all monomials up to a degree and functions of one's own beside them. With
    ``scale`` c about the size of the states and ``time_scale`` :math:`\\tau` that of their motion, all coefficients are
    comparable, which both an optimiser and a sparse prior (:func:`with_sparse_prior`) need; :meth:`in_units` and
    :meth:`equations` give them in the units of the states.

    Args:
        state_dim: size of the state.
        degree: highest total degree of the monomials; 0 has the constant alone.
        functions: further terms, by name: ``(time, state, inputs) -> (..., time)``, of states in their own units.
        scale: c, a number or ``(state,)``, positive.
        time_scale: :math:`\\tau`, positive.

    Parameters: ``coefficients`` ``(state, terms)``, from 0.

    Attributes:
        names: of the terms, in order.

    Raises:
        ValueError: ``scale`` has the wrong shape or is not positive.

    Source: Brunton, Proctor and Kutz (2016), "Discovering governing equations from data by sparse identification of
    nonlinear dynamical systems", PNAS 113.

    >>> import torch
    >>> from pyro_ssm.dynamics import TermLibrary
    >>> drift = TermLibrary(state_dim=2, degree=2, functions={"sin(z1)": lambda t, z, u: z[..., 0].sin()})
    >>> drift.names
    ('1', 'z1', 'z2', 'z1^2', 'z1 z2', 'z2^2', 'sin(z1)')
    >>> with torch.no_grad():
    ...     drift.coefficients[0, 2], drift.coefficients[1, 6] = 1.0, -9.81
    >>> drift.equations()
    ['dz1/dt = 1 z2', 'dz2/dt = -9.81 sin(z1)']
    """

    event_dims: ClassVar[Mapping[str, int]] = {"coefficients": 2, "local_scale": 2, "overall_scale": 2}
    scale: Tensor

    def __init__(
        self,
        state_dim: int,
        degree: int = 2,
        *,
        functions: Mapping[str, Term] | None = None,
        scale: float | Tensor = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.state_dim, self.degree = check_size("state_dim", state_dim), check_size("degree", degree, least=0)
        self.functions = dict(functions or {})
        self.time_scale = check_positive("time_scale", time_scale)
        size = torch.as_tensor(scale, dtype=torch.get_default_dtype()).detach()
        if size.dim() > 1 or size.numel() not in (1, state_dim) or not bool((size > 0).all()):
            raise ValueError(f"`scale` must be positive, a number or ({state_dim},), got {scale}")
        self.register_buffer("scale", size.expand(state_dim).clone())
        self._monomials = [m for r in range(degree + 1) for m in combinations_with_replacement(range(state_dim), r)]
        place = {m: i for i, m in enumerate(self._monomials)}
        # each monomial is an earlier one times a coordinate: one gather and one product a degree
        self._products = [
            ([place[m[:-1]] for m in self._monomials if len(m) == r], [m[-1] for m in self._monomials if len(m) == r])
            for r in range(1, degree + 1)
        ]
        self.names = tuple(_name(m) for m in self._monomials) + tuple(self.functions)
        self.coefficients = nn.Parameter(torch.zeros(state_dim, len(self.names)))

    def terms(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`\\theta(z)` ``(..., time, terms)``."""
        check_state(self, state)
        z = state / self.scale
        found = torch.ones_like(z[..., :1])
        for parents, coordinates in self._products:
            found = torch.cat([found, found[..., parents] * z[..., coordinates]], -1)
        own = [term(time, state, inputs).expand(state.shape[:-1]) for term in self.functions.values()]
        return torch.cat([found, torch.stack(own, -1)], -1) if own else found

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``state`` ``(..., time, state)`` to the same shape."""
        return linear(self.terms(time, state, inputs), self.coefficients) * (self.scale / self.time_scale)

    def in_units(self, coefficients: Tensor | None = None) -> Tensor:
        """Coefficients ``(..., state, terms)``, by default the drift's own, in units of state and time."""
        value = self.coefficients if coefficients is None else coefficients
        size = [self.scale[list(m)].prod() for m in self._monomials] + [self.scale.new_ones(())] * len(self.functions)
        return value * (self.scale / self.time_scale).unsqueeze(-1) / torch.stack(size)

    def equations(self, coefficients: Tensor | None = None, threshold: float = 0.0, digits: int = 4) -> list[str]:
        """The equations in words, one for each coordinate, in the units of state and time.

        Args:
            coefficients: ``(state, terms)`` as the parameter (a posterior mean); by default the drift's own.
            threshold: terms are left out whose coefficient, before the change of units, is not above it in size.
            digits: significant ones.
        """
        own = (self.coefficients if coefficients is None else coefficients).detach()
        lines = []
        for i, (row, kept) in enumerate(zip(self.in_units(own), own.abs() > threshold, strict=True)):
            parts = [(float(value), name) for value, keep, name in zip(row, kept, self.names, strict=True) if keep]
            text = " + ".join(f"{value:.{digits}g}" + (f" {name}" if name != "1" else "") for value, name in parts)
            lines.append(f"dz{i + 1}/dt = {text.replace('+ -', '- ') or '0'}")
        return lines

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, degree={self.degree}, terms={len(self.names)}"


def with_sparse_prior(library: TermLibrary, kind: str = "horseshoe", scale: float = 1.0) -> TermLibrary:
    """Put a prior on the coefficients of a library that expects most of them to be (near) zero, in place.

    * ``"horseshoe"``: :math:`C_{ip} \\sim N(0, \\lambda_{ip}^2 \\tau_i^2)`, :math:`\\lambda_{ip} \\sim C^+(1)`,
      :math:`\\tau_i \\sim C^+(\\text{scale})`, the scales being random parameters too (``local_scale``,
      ``overall_scale``).
    * ``"laplace"``: :math:`C_{ip} \\sim \\text{Laplace}(0, \\text{scale})`.
    * ``"spike"``: a mixture in equal parts of a slab :math:`N(0, \\text{scale}^2)` and a spike a hundred times
      narrower.

    Args:
        library: the drift.
        kind: see above.
        scale: in units of the scaled coefficients.

    Returns:
        ``library`` itself; move it to its device and dtype first, because a prior stays where it was made.

    Source: Carvalho, Polson and Scott (2010), "The horseshoe estimator for sparse signals", Biometrika 97; George and
    McCulloch (1993), "Variable selection via Gibbs sampling", for the spike.

    >>> from pyro_ssm.binding import random_parameters
    >>> from pyro_ssm.dynamics import TermLibrary, with_sparse_prior
    >>> sorted(random_parameters(with_sparse_prior(TermLibrary(2))))
    ['coefficients', 'local_scale', 'overall_scale']
    """
    check_choice("kind", kind, ("horseshoe", "laplace", "spike"))
    scale, like = check_positive("scale", scale), library.coefficients.detach()
    zero = torch.zeros_like(like)
    if kind == "laplace":
        prior: Any = dist.Laplace(zero, scale).to_event(2)
    elif kind == "spike":
        both = scale * torch.tensor([1.0, 0.01], dtype=like.dtype, device=like.device).expand(like.shape + (2,))
        parts = dist.Normal(torch.zeros_like(both), both)
        mixed = _SpikeAndSlab(dist.Categorical(logits=torch.zeros_like(both)), parts)
        prior = mixed.to_event(2)
    else:
        library.overall_scale = PyroSample(dist.HalfCauchy(scale * torch.ones_like(like[:, :1])).to_event(2))
        library.local_scale = PyroSample(dist.HalfCauchy(torch.ones_like(like)).to_event(2))
        prior = _horseshoe
    setattr(library, "coefficients", PyroSample(prior))  # noqa: B010  (the attribute is typed as a Parameter)
    return library


class _SpikeAndSlab(dist.MixtureSameFamily):
    """A mixture of normals, which automatic guides can walk over: torch's support of a mixture has no transform."""

    support = constraints.real


def _horseshoe(library: Any) -> Any:
    width = library.local_scale * library.overall_scale
    return dist.Normal(torch.zeros_like(width), width).to_event(2)


def _name(monomial: tuple[int, ...]) -> str:
    powers = [(j, monomial.count(j)) for j in sorted(set(monomial))]
    return " ".join(f"z{j + 1}" + (f"^{power}" if power > 1 else "") for j, power in powers) or "1"
