"""Two-filter smoothing: a particle filter that runs backward meets the one that ran forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.infer.smc.check import check_evidence
from pyro_ssm.infer.smc.collectors.genealogy import Ancestry
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.stepper import Cloud, normalise
from pyro_ssm.infer.smc.tree import take, tree_map
from pyro_ssm.ops.resampling import systematic

__all__ = [
    "ArtificialLaw",
    "Regression",
    "artificial_laws",
    "backward_filter",
    "drawn",
    "held",
    "normalised",
    "two_filter_marginals",
]

_PAIRS = 2**22  # pairs of particles weighed at a time
_WIDER = 1.5  # the covariance of an artificial law, in units of that of the filter: a proposal needs the heavier tail
_JITTER = 1e-6  # in units of the mean variance: a cloud that has collapsed still gives a density


class Regression(NamedTuple):
    r"""A Gaussian law of a state given other numbers, fitted to a cloud: :math:`N(m + K (g - m_g),\; c\, R R^T)`.

    >>> from pyro_ssm.infer.smc.two_filter import Regression
    >>> Regression._fields
    ('mean', 'gain', 'given_mean', 'root')
    """

    mean: Tensor  # (*batch, state)
    gain: Tensor  # (*batch, state, given)
    given_mean: Tensor  # (*batch, given)
    root: Tensor  # (*batch, state, state)

    @classmethod
    def fit(cls, weights: Tensor, states: Tensor, given: Tensor, covariance: Tensor) -> Regression:
        """Of states ``(N, *batch, state)`` on ``(N, *batch, given)``; ``covariance`` sets the scale of what is left."""
        dim = states.shape[-1]
        mean, joint = _moments(weights, torch.cat([states, given], -1))
        gain = torch.cholesky_solve(joint[..., dim:, :dim], _root(joint[..., dim:, dim:])).mT
        rest = joint[..., :dim, :dim] - gain @ joint[..., dim:, :dim]
        return cls(mean[..., :dim], gain, mean[..., dim:], _root(_WIDER * rest, covariance))

    def law(self, given: Tensor) -> MultivariateNormal:
        """At numbers ``(N, *batch, given)``."""
        mean = self.mean + (self.gain @ (given - self.given_mean).unsqueeze(-1)).squeeze(-1)
        return MultivariateNormal(mean, scale_tril=self.root, validate_args=False)


class ArtificialLaw(NamedTuple):
    r"""A Gaussian :math:`\gamma_k`, and a Gaussian kernel :math:`q(x_k \mid x_{k+1})` that leads to it.

    >>> from pyro_ssm.infer.smc.two_filter import ArtificialLaw
    >>> ArtificialLaw._fields
    ('law', 'kernel')
    """

    law: MultivariateNormal  # batch (*batch)
    kernel: Regression  # without meaning at the last step


def artificial_laws(ancestry: Ancestry) -> list[ArtificialLaw]:
    """Gaussians fitted to a filter's clouds, and to the pairs of its particles and their ancestors.

    .. math:: \\gamma_k = N(m_k, c\\, C_k), \\qquad
        q(x_k \\mid x_{k+1}) = N(m'_k + K (x_{k+1} - m'_{k+1}),\\; c\\, (C'_{k,k} - K C'_{k+1,k})), \\qquad
        K = C'_{k,k+1} C'^{-1}_{k+1,k+1}

    with moments of the cloud at k, those of the pairs (primed), and c somewhat above 1. Any choice leaves the smoother
    consistent; this one makes :math:`\\gamma_k(x)\\, p(y_{>k} \\mid x)` nearly the smoothed density.

    Args:
        ancestry: of the filter.

    Returns:
        One law a step.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc.two_filter import artificial_laws
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 100, collectors=[ssm.infer.smc.Genealogy()]).collected["genealogy"]
    >>> artificial_laws(found)[0].law.batch_shape
    torch.Size([3])
    """
    states, clouds = ancestry.states, ancestry.clouds
    batch, last = clouds[0].log_weights.shape[1:], len(clouds) - 1
    laws = []
    for k, cloud in enumerate(clouds):
        mean, covariance = _moments(cloud.weights, states[k])
        law = MultivariateNormal(mean, scale_tril=_root(_WIDER * covariance), validate_args=False)
        after = min(k + 1, last)
        ancestors = ancestry.ancestors[after]
        early = states[k] if ancestors is None else take(states[k], ancestors, batch)
        kernel = Regression.fit(clouds[after].weights, early, states[after], covariance)
        laws.append(ArtificialLaw(law, kernel))
    return laws


def two_filter_marginals(fk: FeynmanKac, ancestry: Ancestry, noise: Noise) -> tuple[Tensor, Tensor]:
    """States of a backward information filter, with the weights that make them those of the smoother.

    .. math::
        \\tilde\\gamma_k(x_k) = \\gamma_k(x_k)\\, p(y_{>k} \\mid x_k), \\qquad
        \\tilde w_k = \\tilde W_{k+1} \\frac{\\gamma_k(x_k)\\, L_{k+1}(x_k, x_{k+1})}{\\gamma_{k+1}(x_{k+1})\\,
        q(x_k \\mid x_{k+1})}, \\qquad
        W_{k \\mid T}^j \\propto \\frac{\\tilde W_k^j}{\\gamma_k(x_k^j)} \\sum_i W_{k-1}^i L_k(x_{k-1}^i, x_k^j)

    with :math:`L_k = M_k G_k` and artificial laws :math:`\\gamma_k` that are divided out again. States must be real
    numbers (the proposals are Gaussian), of a process that forgets what is not in the state.

    Args:
        fk: with ``log_step`` and ``extend``.
        ancestry: of the filter, over all steps.
        noise: what to draw from; the step at k counts as step T + k.

    Returns:
        States ``(N, *batch, time, state)`` and weights ``(N, *batch, time)``.

    Raises:
        ValueError: the process lacks a density, or a coordinate of the state holds whole numbers only.

    Source: Briers, Doucet and Maskell (2010), "Smoothing algorithms for state-space models", section 3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc import Genealogy, PseudoRandom
    >>> from pyro_ssm.infer.smc.two_filter import two_filter_marginals
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 100, collectors=[Genealogy()]).collected["genealogy"]
    >>> [x.shape for x in two_filter_marginals(fk, found, PseudoRandom())]
    [torch.Size([100, 3, 4, 2]), torch.Size([100, 3, 4])]
    """
    laws = artificial_laws(ancestry)
    found: list[tuple[Tensor, Tensor]] = []
    for k, state, log_weights in backward_filter(fk, ancestry, laws, noise):
        particles = fk.extend(k, None, state)
        if k == 0:
            link = fk.log_step(0, None, particles)
        else:
            link = _link(fk, k, ancestry.clouds[k - 1], particles)
        found.append((state, normalised(fk, k, log_weights - laws[k].law.log_prob(state) + link)))
    return held(fk, found[::-1])


def backward_filter(
    fk: FeynmanKac, ancestry: Ancestry, laws: list[ArtificialLaw], noise: Noise
) -> Iterator[tuple[int, Tensor, Tensor]]:
    r"""The information filter from the last step to the first: k, states ``(N, *batch, state)`` and log-weights.

    They stand for :math:`\gamma_k(x_k)\, p(y_{>k} \mid x_k)`; what was seen at k is not among the weights yet.

    Raises:
        ValueError: the process lacks a density, or a coordinate of the state holds whole numbers only.

    >>> from pyro_ssm.infer.smc.two_filter import backward_filter
    >>> backward_filter.__name__
    'backward_filter'
    """
    if fk.log_step is None or fk.extend is None:
        raise ValueError(
            "methods with two filters need the density of a step (`log_step`) and `extend`, and this process lacks "
            "them. Use method 'backward', 'marginal' or 'genealogy'"
        )
    flat = ancestry.states.flatten(0, -2)
    if bool((flat == flat.round()).all(0).any()):
        raise ValueError(
            "methods with two filters propose real states, and a coordinate of this state holds whole numbers only (a "
            "regime?). Use method 'marginal' or 'backward'"
        )
    num, last = len(flat) // (fk.num_times * fk.batch_shape.numel()), fk.num_times - 1
    lead = torch.Size((num,)) + fk.batch_shape
    state = drawn(noise, fk.num_times + last, laws[last].law, lead)
    log_weights = state.new_zeros(lead)
    yield last, state, log_weights
    for k in range(last - 1, -1, -1):
        state, log_weights = _step_back(fk, k, laws, state, log_weights, noise)
        yield k, state, log_weights


def normalised(fk: FeynmanKac, k: int, log_weights: Tensor) -> Tensor:
    """Weights that sum to 1; an error names the step and the series where none is left.

    >>> from pyro_ssm.infer.smc.two_filter import normalised
    >>> normalised.__name__
    'normalised'
    """
    total, _, weights, _ = normalise(log_weights)
    if fk.step_mask is None or bool(fk.step_mask[..., k].all()):
        check_evidence(fk, total.unsqueeze(-1), k)
    return weights


def _step_back(
    fk: FeynmanKac, k: int, laws: list[ArtificialLaw], later: Tensor, log_weights: Tensor, noise: Noise
) -> tuple[Tensor, Tensor]:
    """The backward filter's states at k and their log-weights, from those at k + 1."""
    batch = fk.batch_shape
    _, log_weights, weights, ess = normalise(log_weights)
    chosen = systematic(weights, noise.uniforms(fk.num_times + k, torch.Size((1,)) + batch, weights.device))
    need = ess < 0.5 * len(weights)
    later = torch.where(need.unsqueeze(-1), take(later, chosen, batch), later)
    log_weights = torch.where(need, -math.log(len(weights)), log_weights)

    kernel = laws[k].kernel.law(later)
    state = drawn(noise, fk.num_times + k, kernel, log_weights.shape)
    pair = fk.log_step(k + 1, fk.extend(k, None, state), fk.extend(k + 1, None, later))
    log_weights = log_weights + pair + laws[k].law.log_prob(state)
    log_weights = log_weights - laws[k + 1].law.log_prob(later) - kernel.log_prob(state)
    if fk.step_mask is not None:  # the last step of a series: its backward filter starts here
        goes_on = fk.step_mask[..., k + 1]
        fresh = laws[k].law.mean + (laws[k].law.scale_tril @ _white(kernel, state).unsqueeze(-1)).squeeze(-1)
        state = torch.where(goes_on.unsqueeze(-1), state, fresh)
        log_weights = torch.where(goes_on, log_weights, torch.zeros_like(log_weights))
    return state, log_weights


def _link(fk: FeynmanKac, k: int, previous: Cloud, particles: Any) -> Tensor:
    """:math:`\\log \\sum_i W_{k-1}^i L_k(x_{k-1}^i, x_k^j)`, ``(N, *batch)``, in blocks of j."""
    num = previous.num_particles
    block = max(1, _PAIRS // max(previous.log_weights.numel(), 1))
    early = tree_map(lambda x: x.unsqueeze(1), previous.particles)
    found = []
    for start in range(0, num, block):
        late = tree_map(lambda x, at=start: x[at : at + block].unsqueeze(0), particles)
        found.append((previous.log_weights.unsqueeze(1) + fk.log_step(k, early, late)).logsumexp(0))
    return torch.cat(found)


def held(fk: FeynmanKac, found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """States and weights of all steps, where a series that has ended keeps its last ones.

    >>> from pyro_ssm.infer.smc.two_filter import held
    >>> held.__name__
    'held'
    """
    if fk.step_mask is not None:
        for k in range(1, len(found)):
            alive = fk.step_mask[..., k]
            state = torch.where(alive.unsqueeze(-1), found[k][0], found[k - 1][0])
            found[k] = state, torch.where(alive, found[k][1], found[k - 1][1])
    return torch.stack([state for state, _ in found], -2), torch.stack([weights for _, weights in found], -1)


def drawn(noise: Noise, step: int, law: MultivariateNormal, lead: torch.Size) -> Tensor:
    """States ``(N, *batch, state)`` of a law of batch ``(*batch)`` or ``(N, *batch)``, by the noise of a step.

    >>> from pyro_ssm.infer.smc.two_filter import drawn
    >>> drawn.__name__
    'drawn'
    """
    with_time = MultivariateNormal(law.mean.unsqueeze(-2), scale_tril=law.scale_tril.unsqueeze(-3), validate_args=False)
    return noise.draw(step, with_time, lead + (1,)).squeeze(-2)


def _white(law: MultivariateNormal, state: Tensor) -> Tensor:
    """The standard normals that gave a draw."""
    centred = (state - law.mean).unsqueeze(-1)
    return torch.linalg.solve_triangular(law.scale_tril, centred, upper=False).squeeze(-1)


def _moments(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean ``(*batch, n)`` and covariance ``(*batch, n, n)`` over the first dim."""
    mean = (weights.unsqueeze(-1) * values).sum(0)
    centred = values - mean
    return mean, torch.einsum("n...i,n...j->...ij", weights.unsqueeze(-1) * centred, centred)


def _root(covariance: Tensor, like: Tensor | None = None) -> Tensor:
    """A Cholesky factor, with a jitter on the scale of the covariance (or of another one)."""
    of = covariance if like is None else like
    scale = of.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(of.dtype).tiny)
    eye = torch.eye(covariance.shape[-1], dtype=of.dtype, device=of.device)
    symmetric = 0.5 * (covariance + covariance.mT)
    root, info = torch.linalg.cholesky_ex(symmetric + (_JITTER * scale)[..., None, None] * eye)
    failed = (info > 0)[..., None, None]  # rounding left a direction negative: the diagonal will do
    return torch.where(failed, scale.sqrt()[..., None, None] * eye, root)
