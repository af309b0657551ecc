"""Two-filter smoothing at a cost linear in the number of particles: new states between pairs of old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.genealogy import Ancestry
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.stepper import normalise
from pyro_ssm.infer.smc.tree import take
from pyro_ssm.infer.smc.two_filter import Regression, artificial_laws, backward_filter, drawn, held, normalised
from pyro_ssm.ops.resampling import systematic

__all__ = ["two_filter_linear"]


def two_filter_linear(fk: FeynmanKac, ancestry: Ancestry, noise: Noise) -> tuple[Tensor, Tensor]:
    """States drawn between pairs of particles, one of each filter, and their weights under the smoother.

    .. math::
        i \\sim W_{k-1}, \\qquad j \\sim \\tilde W_{k+1}, \\qquad
        x_k \\sim q(x_k \\mid x_{k-1}^i, \\tilde x_{k+1}^j), \\qquad
        w_k = \\frac{L_k(x_{k-1}^i, x_k)\\, L_{k+1}(x_k, \\tilde x_{k+1}^j)}
        {\\gamma_{k+1}(\\tilde x_{k+1}^j)\\, q(x_k \\mid x_{k-1}^i, \\tilde x_{k+1}^j)}

    with :math:`L_k = M_k G_k` and the backward filter of
    :func:`~pyro_ssm.infer.smc.two_filter.two_filter_marginals`. The proposal q is Gaussian, fitted to the filter's
    particles, their parents and grandparents; any is consistent. No pair is weighed but those drawn. The two of a pair
    are drawn independently: where one step of the motion is short beside the spread of the states, few of them fit
    each other, and the weights are uneven (look at ``ess``). The last state is the filter's.

    Args:
        fk: with ``log_step`` and ``extend``.
        ancestry: of the filter, over all steps.
        noise: what to draw from; the pairs at k count as step 2 T + k.

    Returns:
        States ``(N, *batch, time, state)`` and weights ``(N, *batch, time)``.

    Raises:
        ValueError: the process lacks a density, or a coordinate of the state holds whole numbers only.

    Source: Fearnhead, Wyncoll and Tawn (2010), "A sequential smoothing algorithm with linear computational cost",
    Biometrika 97, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc import Genealogy, PseudoRandom
    >>> from pyro_ssm.infer.smc.two_filter_linear import two_filter_linear
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 100, collectors=[Genealogy()]).collected["genealogy"]
    >>> [x.shape for x in two_filter_linear(fk, found, PseudoRandom())]
    [torch.Size([100, 3, 4, 2]), torch.Size([100, 3, 4])]
    """
    laws = artificial_laws(ancestry)
    found, later = [], None
    for k, state, log_weights in backward_filter(fk, ancestry, laws, noise):
        cloud = ancestry.clouds[k]
        if later is None:  # the last step
            smoothed = ancestry.states[k], cloud.weights
        elif k == 0:
            first = log_weights - laws[0].law.log_prob(state) + fk.log_step(0, None, fk.extend(0, None, state))
            smoothed = state, normalised(fk, 0, first)
        else:
            smoothed = _between(fk, k, ancestry, *later, noise)
        if later is not None and fk.step_mask is not None:  # a series that ends here has its filter's last cloud
            goes_on = fk.step_mask[..., k + 1]
            states = torch.where(goes_on.unsqueeze(-1), smoothed[0], ancestry.states[k])
            smoothed = states, torch.where(goes_on, smoothed[1], cloud.weights)
        found.append(smoothed)
        later = state, normalise(log_weights)[2], laws[k].law.log_prob(state)
    return held(fk, found[::-1])


def _between(
    fk: FeynmanKac,
    k: int,
    ancestry: Ancestry,
    later: Tensor,
    later_weights: Tensor,
    later_log_prob: Tensor,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """States at k, 0 < k < T - 1, and their weights."""
    previous, step, batch = ancestry.clouds[k - 1], 2 * fk.num_times + k, fk.batch_shape
    num, device = previous.num_particles, later.device
    # one of each filter: even draws, of which one is dealt in random order
    i = systematic(previous.weights, noise.uniforms(step, torch.Size((1,)) + batch, device))
    i = i.gather(0, noise.uniforms(step, torch.Size((num,)) + batch, device).argsort(0))
    j = systematic(later_weights, noise.uniforms(step, torch.Size((1,)) + batch, device))
    early, late = take(ancestry.states[k - 1], i, batch), take(later, j, batch)
    proposal = _proposal(ancestry, k, batch).law(torch.cat([early, late], -1))
    state = drawn(noise, step, proposal, i.shape)
    particles = fk.extend(k, None, state)
    log_weights = fk.log_step(k, take(previous.particles, i, batch), particles)
    log_weights = log_weights + fk.log_step(k + 1, particles, fk.extend(k + 1, None, late))
    return state, normalised(fk, k, log_weights - take(later_log_prob, j, batch) - proposal.log_prob(state))


def _proposal(ancestry: Ancestry, k: int, batch: torch.Size) -> Regression:
    """Of a state given its neighbours, from the particles at k + 1, their parents and grandparents."""
    states, weights = ancestry.states, ancestry.clouds[k + 1].weights
    parents = _parents(ancestry, k + 1)
    grandparents = _parents(ancestry, k).gather(0, parents)
    middle = take(states[k], parents, batch)
    given = torch.cat([take(states[k - 1], grandparents, batch), states[k + 1]], -1)
    spread = (weights.unsqueeze(-1) * (middle - (weights.unsqueeze(-1) * middle).sum(0)).square()).sum(0)
    return Regression.fit(weights, middle, given, torch.diag_embed(spread))


def _parents(ancestry: Ancestry, k: int) -> Tensor:
    found, like = ancestry.ancestors[k], ancestry.clouds[k].log_weights
    if found is not None:
        return found
    itself = torch.arange(len(like), device=like.device)
    return itself.reshape((-1,) + (1,) * (like.dim() - 1)).expand(like.shape)
