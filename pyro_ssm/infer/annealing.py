"""KL annealing as an effect handler, and the usual ramps.

Scaling the path site in model *and* guide by one factor turns the bound into
:math:`E_q[\\log p(y \\mid z)] - \\beta\\, KL(q(z) \\,\\|\\, p(z))` (Bowman et al. 2016, section 3; Krishnan et al.
2017, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["is_path_site", "kl_annealing", "linear_annealing", "warmup_cosine"]


def is_path_site(name: str) -> bool:
    """Whether a site holds a latent path: ``"z"``, or ``"child.z"`` when the model is a child of a user's module.

    So do ``"z_start"`` and ``"z_noise"``, of which the path of a ``NeuralSDE(site="noise")`` is a function.

    >>> from pyro_ssm.infer.annealing import is_path_site
    >>> is_path_site("z"), is_path_site("child.z"), is_path_site("transition.rate")
    (True, True, False)
    """
    return name.rpartition(".")[2] in ("z", "z_start", "z_noise")


class kl_annealing(Messenger):
    """Scale the log-probability of the latent path sites, in every model and guide that runs inside.

    .. math:: L_\\beta = E_q[\\log p(y \\mid z)] - \\beta\\, E_q[\\log q(z) - \\log p(z)]

    Both terms of the KL are scaled because the handler wraps model and guide alike. Observed sites and random
    parameters keep their weight. Use it around a loss (``with kl_annealing(0.2): loss = elbo(data)``) or around a step
    of ``pyro.infer.SVI``; :func:`pyro_ssm.infer.fit` does so when it gets ``annealing=``.

    Args:
        beta: the factor, at least 0.
        sites: names of the sites to scale, or a function ``name -> bool``; by default the path sites
            (:func:`is_path_site`).

    Raises:
        ValueError: ``beta`` is negative or not a finite number.

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> from pyro_ssm.infer import kl_annealing
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
    >>> with kl_annealing(0.25):
    ...     trace = pyro.poutine.trace(model).get_trace()
    >>> trace.nodes["z"]["scale"], trace.nodes["y"]["scale"]
    (0.25, 1.0)
    """

    def __init__(self, beta: float, sites: Collection[str] | Callable[[str], bool] | None = None) -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"`beta` must be a finite number >= 0, got {beta}; 1 is the bound itself")
        if isinstance(sites, str):
            raise TypeError(
                f"`sites` must be a collection of names or a function, got the string {sites!r}; use [{sites!r}]"
            )
        self.beta = float(beta)
        if sites is None:
            self.selects: Callable[[str], bool] = is_path_site
        else:
            self.selects = sites if callable(sites) else frozenset(sites).__contains__

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and self.selects(msg["name"]):
            msg["scale"] = self.beta * msg["scale"]


def linear_annealing(start: float, steps: int) -> Callable[[int], float]:
    """A ramp of the KL weight: ``start`` at step 0, 1 from step ``steps`` on.

    .. math:: \\beta(n) = \\min(1,\\; start + (1 - start)\\, n / steps)

    Args:
        start: weight at step 0, in [0, 1].
        steps: number of optimiser steps until the weight is 1; at least 1.

    Raises:
        ValueError: an argument is out of its range.

    >>> from pyro_ssm.infer import linear_annealing
    >>> beta = linear_annealing(0.5, 100)
    >>> beta(0), beta(50), beta(500)
    (0.5, 0.75, 1.0)
    """
    if not 0 <= start <= 1:
        raise ValueError(f"`start` must be in [0, 1], got {start}")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    return lambda step: min(1.0, start + (1.0 - start) * step / steps)


def warmup_cosine(num_steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """A learning-rate factor that rises linearly, then falls along half a cosine (Loshchilov & Hutter 2017, section 3).

    Args:
        num_steps: number of optimiser steps of the whole fit.
        warmup: number of steps of the rise from 0 (exclusive) to 1.
        final: the factor at the end, in [0, 1].

    Returns:
        A function from the step (starting at 0) to the factor.

    Raises:
        ValueError: an argument is out of its range.

    >>> from pyro_ssm.infer import warmup_cosine
    >>> factor = warmup_cosine(100, warmup=10)
    >>> [round(factor(step), 3) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup < num_steps:
        raise ValueError(f"`warmup` must be in [0, num_steps), got {warmup} with num_steps={num_steps}")
    if not 0 <= final <= 1:
        raise ValueError(f"`final` must be in [0, 1], got {final}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (num_steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
