"""Bounds beside Pyro's: importance-weighted per series, with free bits per time step, without a solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.annealing import is_path_site
from pyro_ssm.infer.elbo_differentiable import DifferentiableELBO
from pyro_ssm.infer.elbo_solver_free import SolverFree
from pyro_ssm.infer.elbo_weights import PlateShape, log_weights, plate_shape

__all__ = ["IWAE", "DifferentiableELBO", "FreeBits", "SolverFree"]


class IWAE(DifferentiableELBO):
    """The importance-weighted bound, one weight for each series.

    .. math::
        L_K = \\sum_b E\\left[ \\log \\tfrac1K \\sum_{k=1}^K
        \\frac{p(y_b, z_{kb} \\mid \\theta)}{q(z_{kb} \\mid y_b, \\theta)} \\right]
        + \\log p(\\theta) - \\log q(\\theta), \\qquad L_1 \\le L_2 \\le \\dots \\le \\log p(y)

    Draws lie beside each other in a plate left of the model's, so one run of model and guide gives all. Random
    parameters :math:`\\theta` (sites outside the plate over series) are drawn once for all particles. Pyro's
    ``RenyiELBO`` takes one weight for the whole batch instead: valid, and looser the more series there are. When no
    site is plated, the program has one weight. The scale of a mini-batch multiplies the logarithm, not the weight.

    Args:
        num_particles: K, at least 1; ``IWAE(1)`` is ``Trace_ELBO()``, for the same random numbers the same value.

    Raises:
        ValueError: ``num_particles`` is less than 1.
        NotImplementedError: a draw of the guide is not reparameterised.

    Gradients: reparameterised, through the weights; for the guide they lose signal as K grows (Rainforth et al. 2018).

    Source: Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance weighted autoencoders, ICLR, section 3.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ssm.infer import IWAE
    >>> def model(y):
    ...     with pyro.plate("series", 2):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def exact_posterior(y):
    ...     with pyro.plate("series", 2):
    ...         pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))
    >>> y = torch.tensor([1.0, -2.0])
    >>> evidence = dist.Normal(0.0, 2**0.5).log_prob(y).sum().item()
    >>> abs(IWAE(5).loss(model, exact_posterior, y) + evidence) < 1e-5
    True
    """

    def __init__(self, num_particles: int = 10) -> None:
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1, got {num_particles}")
        super().__init__(num_particles=num_particles)
        self._probed: tuple[Any, Any, Any, PlateShape] | None = None

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound, summed over series; differentiable."""
        weights = log_weights(
            model,
            guide,
            *args,
            num_particles=self.num_particles,
            shape=self._plate_shape(model, guide, *args),
            repeat_shared=False,
            reparameterised=True,
        )
        bounds = weights.series.logsumexp(0) - math.log(self.num_particles)
        return -(weights.scale * bounds.sum() + weights.shared)

    def _plate_shape(self, model: Any, guide: Any, *args: Any) -> PlateShape:
        """The plates of this model and guide, found once for each kind of data."""
        kind = tuple(len(arg.batch_shape) for arg in args if isinstance(arg, TimeSeries))
        if (
            self._probed is None
            or self._probed[0] is not model
            or self._probed[1] is not guide
            or self._probed[2] != kind
        ):
            self._probed = (model, guide, kind, plate_shape(model, guide, *args))
        return self._probed[3]


class FreeBits(DifferentiableELBO):
    """The bound with a floor under the KL of each time step, so that a step pays nothing for its first nats.

    .. math::
        L = E_q[\\log p(y \\mid z)] - \\sum_k n_k \\max\\left(\\lambda,\\; \\tfrac1{n_k} \\sum_{b} KL_{bk} \\right),
        \\qquad KL_{bk} = \\log q(z_{bk} \\mid z_{b,k-1}, y_b) - \\log p(z_{bk} \\mid z_{b,k-1})

    with :math:`n_k` the number of series that have a step k (padding has none). The KL is estimated by the draws of
    the step; both path laws give its terms by ``log_prob_steps``. Where the floor is reached the step has no gradient
    from its KL. Other sites (random parameters, observations) are as in ``Trace_ELBO``, which ``free_bits=0`` is: no
    floor at all. Plates scale all terms. The value is a looser bound than ``Trace_ELBO``; :func:`~pyro_ssm.infer.fit`
    validates with the latter.

    Args:
        free_bits: :math:`\\lambda`, nats per time step and series.
        num_particles: draws that are averaged, also inside the floor.
        per_series: put the floor under each series' step, instead of under the mean over the series of the
            (mini-)batch.
        sites: names of the path sites, or a function ``name -> bool``; default as in
            :class:`~pyro_ssm.infer.kl_annealing`.

    Raises:
        ValueError: an argument is out of its range, or no site of the guide is a path site.
        TypeError: the law of a path site has no ``log_prob_steps``.
        NotImplementedError: a draw of the guide is not reparameterised.

    Source: D. P. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016), Improved variational
    inference with inverse autoregressive flow, NeurIPS, appendix C.8, with time steps as groups.

    >>> from pyro_ssm.infer import FreeBits
    >>> FreeBits(0.1).free_bits
    0.1
    """

    def __init__(
        self,
        free_bits: float,
        num_particles: int = 1,
        per_series: bool = False,
        sites: Collection[str] | Callable[[str], bool] | None = None,
    ) -> None:
        if not (math.isfinite(free_bits) and free_bits >= 0):
            raise ValueError(f"`free_bits` must be a finite number >= 0 of nats per step, got {free_bits}")
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1, got {num_particles}")
        super().__init__(num_particles=num_particles)
        self.free_bits, self.per_series = float(free_bits), per_series
        self.selects = is_path_site if sites is None else sites if callable(sites) else frozenset(sites).__contains__

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound with its floor; differentiable."""
        rest: Tensor | float = 0.0
        divergences: dict[str, Tensor] = {}
        scales: dict[str, Any] = {}
        for model_trace, guide_trace in self._get_traces(model, guide, args, {}):
            paths = [
                name
                for name, site in guide_trace.nodes.items()
                if site["type"] == "sample" and not site["is_observed"] and self.selects(name)
            ]
            if not paths:
                raise ValueError(
                    f"FreeBits found no path site in the guide, which samples {guide_trace.stochastic_nodes}. "
                    "Name it: sites=[...]"
                )
            for sign, trace in ((1.0, model_trace), (-1.0, guide_trace)):
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and name not in paths:
                        rest = rest + sign * site["log_prob_sum"] / self.num_particles
            for name in paths:
                kl = _steps(guide_trace.nodes[name]) - _steps(model_trace.nodes[name])
                divergences[name] = divergences.get(name, 0.0) + kl / self.num_particles
                scales[name] = guide_trace.nodes[name]["scale"]
        total = sum(scales[name] * self._floored(kl, _step_mask(args, kl)) for name, kl in divergences.items())
        return total - rest

    def _floored(self, kl: Tensor, step_mask: Tensor) -> Tensor:
        """The KL summed over series and steps; ``kl`` is ``(*series, time)``, 0 at padding."""
        if self.free_bits == 0:
            return kl.sum()
        if self.per_series:
            return torch.where(step_mask, kl.clamp_min(self.free_bits), torch.zeros_like(kl)).sum()
        series = list(range(kl.dim() - 1))
        count = step_mask.sum(series).to(kl.dtype) if series else step_mask.to(kl.dtype)
        return torch.maximum(kl.sum(series) if series else kl, self.free_bits * count).sum()


def _steps(site: Any) -> Tensor:
    """The terms of a path site ``(*series, time)``, without plates' scale; hidden series add 0."""
    law = site["fn"]
    if not callable(getattr(law, "log_prob_steps", None)):
        raise TypeError(
            f"FreeBits needs a path law with `log_prob_steps`, and site `{site['name']}` is {type(law).__name__}. "
            "Use a MarkovPath, or kl_annealing, which needs no terms"
        )
    terms = law.log_prob_steps(site["value"])
    mask = site["mask"]
    if mask is None or mask is True:
        return terms
    return torch.where(torch.as_tensor(mask).unsqueeze(-1), terms, torch.zeros_like(terms))


def _step_mask(args: tuple[Any, ...], kl: Tensor) -> Tensor:
    """True at real steps; padding is what the data say, and without a TimeSeries there is none."""
    data = next((arg for arg in args if isinstance(arg, TimeSeries)), None)
    if data is None or data.lengths is None:
        return torch.ones_like(kl, dtype=torch.bool)
    steps = data.step_mask  # noise sites have a step less, and the start is one step, which every series has
    steps = steps[..., :1] if kl.shape[-1] == 1 else steps[..., -kl.shape[-1] :]
    return steps.expand(kl.shape)
