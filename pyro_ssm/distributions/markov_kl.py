"""The divergence between two path laws, step by step in closed form, on a draw of the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_ssm.distributions.markov_path import MarkovPath
from pyro_ssm.distributions.singular_normal import SingularNormal

__all__ = ["markov_kl_steps"]


def markov_kl_steps(q: MarkovPath, p: MarkovPath, path: Tensor) -> Tensor:
    """The terms of the divergence of q from p along a path drawn from q.

    .. math:: KL_1 = KL(q(z_1) \\| p(z_1)), \\qquad
        KL_{k+1} = KL\\big(q(z_{k+1} \\mid z_k) \\,\\|\\, p(z_{k+1} \\mid z_k)\\big)

    Their sum has the expectation :math:`KL(q \\| p)` over paths of q. For two Euler chains of the same diffusion the
    terms are :math:`\\tfrac12 |u|^2 \\Delta` with :math:`g u = f_q - f_p`, the discrete form of Girsanov's.

    Args:
        q: without memory; its steps and those of p are of families whose divergence torch knows.
        p: without memory.
        path: ``(*batch, time, state)``.

    Returns:
        ``(*batch, time)``, 0 at padding of q; differentiable.

    Raises:
        NotImplementedError: a memory, or a pair of families without a closed form.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.distributions import MarkovPath, markov_kl_steps
    >>> path = MarkovPath(ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), torch.arange(5.0).double())
    >>> markov_kl_steps(path, path, path.sample()).detach()
    tensor([0., 0., 0., 0., 0.])
    """
    if q._history is not None or p._history is not None:
        raise NotImplementedError("path laws with a memory have no step-wise divergence in closed form")
    num_times = path.shape[-2]
    terms = [_divergence(q._step(None, slice(0, 1), None), p._step(None, slice(0, 1), None))]
    if num_times > 1:
        before, rest = path[..., :-1, :], slice(1, num_times)
        terms.append(_divergence(q._step(before, rest, None), p._step(before, rest, None)))
    shape = torch.broadcast_shapes(path.shape[:-2], q.batch_shape)
    return q._hide_padding(torch.cat([term.expand(shape + term.shape[-1:]) for term in terms], -1))


def _divergence(q: Any, p: Any) -> Tensor:
    for law in (q, p):
        if isinstance(law, SingularNormal):
            law._check_regular()  # a singular law has no density, which torch's formula does not see
    return kl_divergence(q, p)


@register_kl(MarkovPath, MarkovPath)
def _kl_markov_markov(q: MarkovPath, p: MarkovPath) -> Tensor:
    """On the fresh draw of q; without one torch's ``NotImplementedError`` sends an ELBO to the log-densities."""
    if q._fresh is None:
        raise NotImplementedError("the divergence of two path laws is taken on a draw of the first: draw from it first")
    return markov_kl_steps(q, p, q._fresh[0]).sum(-1)
