"""The ensemble Kalman filter and smoother: a few states stand for the law of a large one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_parts
from pyro_ssm.infer.gaussian.linearise import Law, expected_root
from pyro_ssm.infer.gaussian.nonlinear import NonlinearSystem, nonlinear_system
from pyro_ssm.ops.ensemble import anomalies, ensemble_smoother_gain, ensemble_update, relax_spread
from pyro_ssm.ops.kalman import innovation_terms, matvec
from pyro_ssm.ops.linalg import tria
from pyro_ssm.ops.quadrature import SigmaPoints

__all__ = [
    "EnsembleFiltered",
    "EnsembleSmoothed",
    "Localisation",
    "ensemble_kalman_filter",
    "ensemble_kalman_smoother",
]

METHODS = ("stochastic", "deterministic")


class Localisation(NamedTuple):
    """Tapers that multiply an ensemble's covariances entry by entry, such as :func:`~pyro_ssm.ops.gaspari_cohn`'s.

    They remove the spurious correlations between far coordinates that a small ensemble has. Each is 1 for coordinates
    at the same place and falls to 0; ``obs_obs`` and ``state_state`` must be positive semidefinite.

    >>> import torch
    >>> from pyro_ssm.infer import Localisation
    >>> from pyro_ssm.ops import gaspari_cohn
    >>> place = torch.arange(5.0)                              # five states on a line, the first and last observed
    >>> distance = (place[:, None] - place).abs()
    >>> seen = [0, 4]
    >>> tapers = Localisation(*(gaspari_cohn(d, radius=1.5) for d in (distance[:, seen], distance[seen][:, seen])))
    >>> tapers.state_obs.shape
    torch.Size([5, 2])
    """

    state_obs: Tensor  # (state, obs)
    obs_obs: Tensor  # (obs, obs)
    state_state: Tensor | None = None  # (state, state), for the smoother


class EnsembleFiltered(NamedTuple):
    """What :func:`ensemble_kalman_filter` returns; ``*batch`` is ``(*draws, *batch)`` of parameters and data together.

    Means and roots are those of the members; a root is computed when it is asked for.

    >>> from pyro_ssm.infer import EnsembleFiltered
    >>> EnsembleFiltered._fields
    ('log_likelihood', 'filtered_ensemble', 'predicted_ensemble', 'method')
    """

    log_likelihood: Tensor  # (*batch, time)  estimates log p(y_k | y_<k); exactly 0 where nothing is observed
    filtered_ensemble: Tensor  # (members, *batch, time, state)  given y_<=k
    predicted_ensemble: Tensor  # (members, *batch, time, state)  given y_<k
    method: str  # the name of the filter

    @property
    def exact(self) -> bool:
        """False: the likelihood and the laws are an approximation of the model's."""
        return False

    @property
    def filtered_mean(self) -> Tensor:
        """``(*batch, time, state)``."""
        return self.filtered_ensemble.mean(0)

    @property
    def filtered_scale_tril(self) -> Tensor:
        """``(*batch, time, state, state)``."""
        return tria(anomalies(self.filtered_ensemble)[1])

    @property
    def predicted_mean(self) -> Tensor:
        """``(*batch, time, state)``."""
        return self.predicted_ensemble.mean(0)

    @property
    def predicted_scale_tril(self) -> Tensor:
        """``(*batch, time, state, state)``."""
        return tria(anomalies(self.predicted_ensemble)[1])


class EnsembleSmoothed(NamedTuple):
    """What :func:`ensemble_kalman_smoother` returns; means and roots are those of the members.

    >>> from pyro_ssm.infer import EnsembleSmoothed
    >>> EnsembleSmoothed._fields
    ('log_likelihood', 'ensemble', 'method')
    """

    log_likelihood: Tensor  # (*batch, time)  of the filter
    ensemble: Tensor  # (members, *batch, time, state)  paths given y
    method: str  # the name of the smoother

    @property
    def exact(self) -> bool:
        """False: the likelihood and the laws are an approximation of the model's."""
        return False

    @property
    def mean(self) -> Tensor:
        """``(*batch, time, state)``."""
        return self.ensemble.mean(0)

    @property
    def scale_tril(self) -> Tensor:
        """``(*batch, time, state, state)``."""
        return tria(anomalies(self.ensemble)[1])

    @property
    def lag_one_covariance(self) -> Tensor:
        """:math:`Cov(z_k, z_{k+1} \\mid y)`, ``(*batch, time - 1, state, state)``."""
        X = anomalies(self.ensemble)[1]
        return X[..., :-1, :, :] @ X[..., 1:, :, :].mT


class Options(NamedTuple):
    """The choices of an ensemble filter, checked."""

    num_members: int
    method: str
    inflation: float
    relaxation: float
    localisation: Localisation | None
    seed: int | None

    def checked(self) -> Options:
        """Itself, or an error."""
        if self.num_members < 2:
            raise ValueError(f"`num_members` must be at least 2, got {self.num_members}")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        if not self.inflation > 0:
            raise ValueError(f"`inflation` multiplies deviations and must be positive, got {self.inflation}")
        if not 0 <= self.relaxation <= 1:
            raise ValueError(f"`relaxation` must lie between 0 and 1, got {self.relaxation}")
        return self

    def localised(self, system: NonlinearSystem) -> Options:
        """With the tapers in the dtype and on the device of the states, their shapes checked."""
        if self.localisation is None:
            return self
        n, p = system.mean.shape[-1], system.values.shape[-1]
        shapes = {"state_obs": (n, p), "obs_obs": (p, p), "state_state": (n, n)}
        tapers: dict[str, Tensor | None] = self.localisation._asdict()
        for name, taper in tapers.items():
            if taper is not None and taper.shape != shapes[name]:
                raise ValueError(f"`localisation.{name}` must have shape {shapes[name]}, got {tuple(taper.shape)}")
        cast = {name: taper if taper is None else taper.to(system.mean) for name, taper in tapers.items()}
        return self._replace(localisation=Localisation(**cast))


def ensemble_kalman_filter(
    model: Any,
    data: TimeSeries,
    num_members: int = 100,
    method: str = "stochastic",
    inflation: float = 1.0,
    relaxation: float = 0.0,
    localisation: Localisation | None = None,
    seed: int | None = None,
) -> EnsembleFiltered:
    """The ensemble Kalman filter: members move by the model, and an observation shifts them by Kalman's gain.

    .. math::
        x_i^- = f(x_i) + Q \\epsilon_i, \\qquad K = \\operatorname{Cov}(x^-, h) (\\operatorname{Cov} h + R R^T)^{-1},
        \\qquad x_i = x_i^- + K (y - h(x_i^-) - R \\eta_i),

    with covariances of the ensemble. For states too large for covariance matrices: the cost of a step is linear in the
    size of the state. In a linear-Gaussian model it tends to :func:`kalman_filter` as :math:`1 / \\sqrt{N}`; in others
    to a filter that updates linearly. With few members use ``localisation`` and some ``inflation``.

    A missing entry takes no part in the update. Padded steps add exactly 0 and carry the ensemble; on a refined grid
    members move between observations.

    Args:
        model: as for :func:`extended_kalman_filter`; functions see one more sample dim (the members).
        data: with values.
        num_members: N, at least 2.
        method: ``"stochastic"`` perturbs the observation for each member (Burgers et al. 1998); ``"deterministic"``
            shifts the mean and contracts the anomalies (a square-root filter), which has no sampling error in the
            update. Both draw the noise of the transition.
        inflation: factor of the members' deviations from their mean after each move; 1.02 to 1.1 is usual with few
            members.
        relaxation: part of the spread that an update took and that is given back, 0 to 1 (relaxation to prior spread).
        localisation: tapers for the covariances.
        seed: None draws from torch's global generator. A number gives the same noise in every call, which makes the
            likelihood a fixed smooth function of parameters (for NUTS or a line search on ``Marginal``).

    Returns:
        ``exact`` is False: ``log_likelihood`` is the Gaussian one of each observation under the ensemble's moments,
        with a bias of order 1/N. Differentiable by reparametrisation, with the noise held fixed.

    Raises:
        TypeError: a component is not ``Gaussian``, or the model has a memory.
        ValueError: an option has a wrong value or shape, the data has no values, or a law of the model is not finite
            (with its time and series).

    Sources: Evensen (1994), "Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo
    methods"; Burgers, van Leeuwen and Evensen (1998); Tippett et al. (2003), "Ensemble square root filters"; Houtekamer
    and Mitchell (2001), on localisation.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import ensemble_kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ensemble_kalman_filter(model, data, num_members=50, seed=0).filtered_ensemble.shape
    torch.Size([50, 3, 4, 1])
    """
    options = Options(num_members, method, inflation, relaxation, localisation, seed).checked()
    system, terms, predicted, filtered = _run(model, data, options, "ensemble_kalman_filter")
    return EnsembleFiltered(terms, filtered, predicted, system.method)


def ensemble_kalman_smoother(
    model: Any,
    data: TimeSeries,
    num_members: int = 100,
    method: str = "stochastic",
    inflation: float = 1.0,
    relaxation: float = 0.0,
    localisation: Localisation | None = None,
    seed: int | None = None,
) -> EnsembleSmoothed:
    """The ensemble Rauch-Tung-Striebel smoother: back through the regressions of each member on its future.

    .. math:: x_k^s = x_k + J_k (x_{k+1}^s - x_{k+1}^-), \\qquad J_k = X_k (X_{k+1}^-)^{+}

    Arguments, gradients and errors as :func:`ensemble_kalman_filter`. ``localisation`` needs its ``state_state`` here.
    A padded step repeats the last members. The members of ``ensemble`` are paths.

    Source: Raanes (2016), "On the ensemble Rauch-Tung-Striebel smoother and its equivalence to the ensemble Kalman
    smoother".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import ensemble_kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ensemble_kalman_smoother(model, data, num_members=50, seed=0).mean.shape
    torch.Size([3, 4, 1])
    """
    options = Options(num_members, method, inflation, relaxation, localisation, seed).checked()
    if localisation is not None and localisation.state_state is None:
        raise ValueError(
            "ensemble_kalman_smoother regresses states on later states: `localisation` needs `state_state`, got None"
        )
    system, terms, predicted, filtered = _run(model, data, options, "ensemble_kalman_smoother")
    taper = None if options.localisation is None else options.localised(system).localisation.state_state
    gain = ensemble_smoother_gain(filtered[..., :-1, :], predicted[..., 1:, :], taper)
    real = None if system.step_mask is None else system.step_mask[..., 1:, None]
    x = filtered[..., -1, :]
    path = [x]
    for k in range(system.num_times - 2, -1, -1):
        change = x - predicted[..., k + 1, :]
        for factor in reversed(gain):
            change = matvec(factor[..., k, :, :], change)
        moved = filtered[..., k, :] + change
        x = moved if real is None else torch.where(real[..., k, :], moved, x)
        path.append(x)
    ensemble = torch.stack(path[::-1], -2)
    return EnsembleSmoothed(terms, ensemble, system.method)


def _run(model: Any, data: TimeSeries, options: Options, name: str) -> tuple[NonlinearSystem, Tensor, Tensor, Tensor]:
    """The log-likelihood terms, and the predicted and filtered members ``(N, *lead, time, n)``."""
    system = nonlinear_system(model, data, name, use_affine=False)
    system = system._replace(method=f"{name} ({options.method})")
    options = options.localised(system)
    N, device = options.num_members, system.mean.device
    generator = None if options.seed is None else torch.Generator(device).manual_seed(options.seed)

    def draw(size: int) -> Tensor:
        shape = (N, *system.mean.shape[:-1], size)
        return torch.randn(shape, dtype=system.mean.dtype, device=device, generator=generator)

    at = range(system.num_times) if system.observed_index is None else system.observed_index
    seen = {k: j for j, k in enumerate(at)}
    x = system.mean + matvec(system.scale_tril, draw(system.mean.shape[-1]))
    predicted, filtered, innovations = [], [], []
    for k in range(system.num_times):
        if k > 0:
            new = _move(system, k - 1, x, draw(x.shape[-1]), options.inflation)
            x = new if system.step_mask is None else torch.where(system.step_mask[..., k, None], new, x)
        predicted.append(x)
        if k in seen:
            noise = draw(system.values.shape[-1]) if options.method == "stochastic" else None
            x, e, s = _look(system, seen[k], x, noise, options)
            innovations.append((e, s))
        filtered.append(x)
    terms = innovation_terms(innovations, system.mask, system.num_times, system.observed_index)
    return system, terms, torch.stack(predicted, -2), torch.stack(filtered, -2)


def _move(system: NonlinearSystem, k: int, x: Tensor, noise: Tensor, inflation: float) -> Tensor:
    real = None if system.step_mask is None else system.step_mask[..., k + 1, None]
    loc, root, diagonal = _evaluate(system, system.transition_law, "transition from", k, x, real)
    x = loc + (root * noise if diagonal else matvec(root, noise))
    if inflation == 1.0:
        return x
    mean = x.mean(0)
    return mean + inflation * (x - mean)


def _look(
    system: NonlinearSystem, j: int, x: Tensor, noise: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    mask = system.mask[..., j, :]
    told = mask.any(-1, keepdim=True)
    h, root, diagonal = _evaluate(system, system.emission_law, "emission at", j, x, told)
    weights = x.new_full((len(x),), 1 / len(x))
    R = expected_root(root, diagonal, SigmaPoints(x, weights, weights, weights))
    if noise is not None:
        noise = root * noise if diagonal else matvec(root, noise)
    tapers = None if options.localisation is None else options.localisation[:2]
    new, e, s = ensemble_update(x, h, system.values[..., j, :], mask, R, noise, tapers)
    if options.relaxation:
        new = relax_spread(x, new, options.relaxation)
    return (new if bool(told.all()) else torch.where(told, new, x)), e, s


def _evaluate(
    system: NonlinearSystem, law_at: Any, what: str, k: int, x: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """The law of each member at one step, in the dtype of the ensemble; ``real`` ``(..., 1)``."""
    now = slice(k, k + 1)
    state = x.unsqueeze(-2)
    law: Law = law_at(now)
    loc, root, diagonal = gaussian_parts(law(state))
    lead, p = state.shape[:-1], loc.shape[-1:]
    loc, root = loc.to(x.dtype).expand(lead + p), root.to(x.dtype).expand(lead + (p if diagonal else p + p))
    system.check_finite(what, now, state, (loc, root), real)
    return loc.squeeze(-2), root.squeeze(-2 if diagonal else -3), diagonal
