"""The log-likelihood of a linear-Gaussian model, and its gradient, by peers.

Parameters are a dict of float64 NumPy arrays: m (n), L (n, n), F, b, Q (n, n), H, d, R with covariances as roots. The
initial law N(m, L L') is that of the first observation's state for dynamax and statsmodels, and stands one transition
before it for cuthbert and Pyro. A leading dim of all of them is one of series with parameters of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = ("m", "L", "F", "b", "Q", "H", "d", "R")
Answer = dict[str, Any]


def jax_peer(total: Callable, parameters: dict, y: np.ndarray, gradient: bool) -> Callable[[], Answer]:
    """A jitted value, or value and gradient, computed to the end."""
    import jax

    found = jax.jit(jax.value_and_grad(total) if gradient else total)
    arguments = {name: jax.numpy.asarray(x) for name, x in parameters.items()}, jax.numpy.asarray(y)

    def run() -> Answer:
        out = jax.block_until_ready(found(*arguments))
        return {"value": out[0], **out[1]} if gradient else {"value": out}

    return run


def dynamax(parameters: dict, y: np.ndarray, gradient: bool) -> Callable[[], Answer]:
    """dynamax's sequential filter in covariance form, mapped over series."""
    from dynamax.linear_gaussian_ssm.inference import lgssm_filter, make_lgssm_params

    def one(q: dict, y: Any) -> Any:
        P, Q, R = (q[name] @ q[name].T for name in ("L", "Q", "R"))
        params = make_lgssm_params(q["m"], P, q["F"], Q, q["H"], R, dynamics_bias=q["b"], emissions_bias=q["d"])
        return lgssm_filter(params, y).marginal_loglik

    return jax_peer(_over_series(one, parameters, y), parameters, y, gradient)


def cuthbert(parameters: dict, y: np.ndarray, gradient: bool) -> Callable[[], Answer]:
    """cuthbert's square-root filter, sequential (faster than its parallel form on a CPU)."""
    from cuthbert.filtering import filter
    from cuthbert.gaussian.kalman import build_filter

    def one(q: dict, y: Any) -> Any:
        found = build_filter(
            q["m"], q["L"], lambda _: (q["F"], q["b"], q["Q"]), lambda y_t: (q["H"], q["d"], q["R"], y_t)
        )
        states = filter(found, y, found.init_prepare())
        return states.log_normalizing_constant[-1]

    return jax_peer(_over_series(one, parameters, y), parameters, y, gradient)


def _over_series(one: Callable, parameters: dict, y: np.ndarray) -> Callable:
    import jax

    if y.ndim == 2:
        return one
    mapped = jax.vmap(one, in_axes=(0 if parameters["F"].ndim == 3 else None, 0))
    return lambda q, y: mapped(q, y).sum()


def pyro_hmm(parameters: dict, y: np.ndarray, gradient: bool, dtype: str = "float64") -> Callable[[], Answer]:
    """Pyro's GaussianHMM: a parallel scan over time."""
    import torch
    from pyro.distributions import GaussianHMM, MultivariateNormal

    q = {name: torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=gradient) for name, x in parameters.items()}
    values = torch.tensor(y, dtype=getattr(torch, dtype))
    own = q["F"].dim() == 3

    def run() -> Answer:
        law = GaussianHMM(
            MultivariateNormal(q["m"], scale_tril=q["L"], validate_args=False),
            (q["F"].unsqueeze(-3) if own else q["F"]).mT,
            MultivariateNormal(*(x.unsqueeze(1) if own else x for x in (q["b"],)),
                               scale_tril=q["Q"].unsqueeze(1) if own else q["Q"], validate_args=False),
            (q["H"].unsqueeze(-3) if own else q["H"]).mT,
            MultivariateNormal(*(x.unsqueeze(1) if own else x for x in (q["d"],)),
                               scale_tril=q["R"].unsqueeze(1) if own else q["R"], validate_args=False),
            duration=values.shape[-2],
            validate_args=False,
        )  # fmt: skip
        total = law.log_prob(values).sum()
        if not gradient:
            return {"value": total}
        return {"value": total.detach(), **dict(zip(q, torch.autograd.grad(total, list(q.values())), strict=True))}

    return run


def statsmodels(parameters: dict, y: np.ndarray, gradient: bool) -> Callable[[], Answer]:
    """statsmodels' compiled filter, nothing stored, the faster of its conventional and univariate forms; value only."""
    import time

    from statsmodels.tsa.statespace.kalman_filter import MEMORY_CONSERVE, KalmanFilter

    if gradient:
        raise ValueError("statsmodels has no gradient but finite differences")
    q = parameters
    n, p = q["F"].shape[-1], q["H"].shape[-2]
    series = y[None] if y.ndim == 2 else y
    forms = []
    for univariate in (False, True):
        filters = []
        for values in series:
            ssm = KalmanFilter(k_endog=p, k_states=n)
            ssm.bind(np.ascontiguousarray(values))
            ssm["design"], ssm["obs_intercept"], ssm["obs_cov"] = q["H"], q["d"][:, None], q["R"] @ q["R"].T
            ssm["transition"], ssm["state_intercept"] = q["F"], q["b"][:, None]
            ssm["selection"], ssm["state_cov"] = np.eye(n), q["Q"] @ q["Q"].T
            ssm.initialize_known(q["m"], q["L"] @ q["L"].T)
            ssm.filter_univariate = univariate
            ssm.set_conserve_memory(MEMORY_CONSERVE)
            filters.append(ssm)
        forms.append(lambda filters=filters: {"value": sum(ssm.loglike() for ssm in filters)})

    def seconds(run: Callable) -> float:
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(forms, key=seconds)
