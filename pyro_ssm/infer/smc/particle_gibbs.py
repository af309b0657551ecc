"""`particle_gibbs`: draws of parameters and paths, each given the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.components import SampleOnly
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.conditional import conditional_smc
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.model_steps import check_model_and_data
from pyro_ssm.infer.smc.parameter_likelihood import Filter
from pyro_ssm.infer.smc.parameter_moves import HamiltonianMove, ParameterMove, RandomWalkMove
from pyro_ssm.infer.smc.posterior_draws import ParticleMCMCResult, RandomParameters
from pyro_ssm.infer.smc.resume import RunFile, settings_of
from pyro_ssm.infer.smc.smoother import particle_smoother
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.laws import history, observation_law, path_law

__all__ = ["particle_gibbs"]

#: ``(values by dotted name, states) -> values``, a draw of the parameters given the path
Update = Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]]

_TRIES = 20  # draws of a start from the prior before a filter's failure is the user's


def particle_gibbs(
    model: StateSpaceModel,
    data: TimeSeries,
    num_samples: int,
    num_particles: int = 50,
    *,
    num_chains: int = 4,
    num_warmup: int | None = None,
    filter: Filter = bootstrap,
    update: str | ParameterMove | Update = "hmc",
    num_moves: int = 1,
    thin: int = 1,
    start: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> ParticleMCMCResult:
    """Draws of the random parameters and of the path from their joint posterior.

    .. math:: z \\sim K_N(z, \\cdot \\mid \\theta, y), \\qquad
        \\theta \\sim p(\\theta \\mid z, y) \\propto p(\\theta)\\, p(z \\mid \\theta)\\, p(y \\mid z, \\theta)

    Each sweep moves the path by conditional SMC, then the parameters given the whole path, by a move that leaves their
    conditional law invariant. The chain is exact for every number of particles; with few the path moves slowly. All
    chains run together, as a leading dim. Parameters with a prior (``PyroSample``) move, others stay as they are.

    It mixes well where the path says less about the parameters than the data does. Where a path pins its parameters
    down (the scale of a small noise), chains are slow whatever the number of particles: look at R-hat and effective
    sample sizes, and take particle marginal Metropolis-Hastings there.

    Args:
        model: unbound, with at least one random parameter.
        data: with values.
        num_samples: draws of each chain, after the warm-up.
        num_particles: N of conditional SMC.
        num_chains: chains.
        num_warmup: sweeps that are thrown away and in which moves tune themselves; default half of ``num_samples``.
        filter: a builder of a Feynman-Kac process from a bound model and data: ``bootstrap``, ``locally_optimal``,
            ``lambda model, data: guided(model, guide, data)``.
        update: of the parameters: ``"hmc"`` (needs gradients of the densities), ``"random_walk"``, a move (say
            ``HamiltonianMove(num_leapfrog=1)``), or a function ``(values, states) -> values`` that draws them from
            :math:`p(\\theta \\mid z, y)` itself (conjugate priors): ``values`` by dotted name ``(chains, *event)``,
            ``states`` ``(chains, *batch, time, state)``.
        num_moves: parameter moves of a sweep; they cost much less than a sweep of the path.
        thin: sweeps for one draw.
        start: first values by dotted name, ``(*event)`` or ``(chains, *event)``; default draws of the prior.
        checkpoint: path of a file that holds the whole state, written every ``checkpoint_every`` sweeps and at the end.
        checkpoint_every: sweeps.
        resume: go on from ``checkpoint`` if it exists; on one CPU thread the result is that of the uninterrupted run.
            More ``num_samples`` than before continue a finished run.
        progress: show a bar, with the mean acceptance and the fraction of states that moved.
        **options: of :func:`~pyro_ssm.infer.conditional_smc`.

    Returns:
        :class:`~pyro_ssm.infer.smc.ParticleMCMCResult`: a posterior for ``to_inference_data`` and ``predict``. Its
        ``log_likelihood`` is that of the filters that contain the path: no unbiased estimate.

    Raises:
        TypeError: the model is bound, or has a component without a density (``SampleOnly``); ``update`` is none of the
            above, or ``filter`` one without particles.
        ValueError: no random parameter, numbers below 1; a checkpoint of another run; and as
            :func:`~pyro_ssm.infer.conditional_smc`.

    Randomness: torch's global generator.

    Source: Andrieu, Doucet and Holenstein (2010), section 2.4.3; Lindsten, Jordan and Schon (2014), "Particle Gibbs
    with ancestor sampling".

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.randn(3, 4, 1))
    >>> found = ssm.infer.particle_gibbs(model, data, 10, num_particles=20, num_chains=2, progress=False)
    >>> found.parameters["transition.rate"].shape, found.states.shape
    (torch.Size([2, 10]), torch.Size([2, 10, 3, 4, 1]))
    """
    for name, number in (("num_samples", num_samples), ("num_chains", num_chains), ("thin", thin)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}")
    check_model_and_data(model, data, "particle_gibbs")
    for part in (model.initial, model.transition, model.emission):
        if isinstance(part, SampleOnly):
            raise TypeError(
                f"particle_gibbs needs the density of the path and the record given the parameters, and "
                f"{type(part).__name__} is SampleOnly. Use particle marginal Metropolis-Hastings"
            )
    if not callable(filter):
        raise TypeError(f"`filter` must be a function of a bound model and data, got {type(filter).__name__}")
    num_warmup = num_samples // 2 if num_warmup is None else num_warmup
    move = _move(update)
    parameters = RandomParameters(model)
    settings = settings_of(
        "particle_gibbs",
        parameters,
        data,
        filter,
        num_particles=num_particles,
        num_chains=num_chains,
        num_warmup=num_warmup,
        num_moves=num_moves,
        thin=thin,
        update=type(move).__name__,
    )
    file = RunFile(checkpoint, checkpoint_every, settings, resume, data.device)
    with torch.no_grad(), evaluating(model):
        chain = _Chain(parameters, data, filter, move, num_particles, num_moves, options)
        saved = file.load()
        if saved is None:
            chain.begin(num_chains, start)
        else:
            chain.load_state_dict(saved)
        last = num_warmup + num_samples * thin
        with tqdm(
            total=last, initial=chain.sweeps, desc="particle_gibbs", disable=not progress, dynamic_ncols=True
        ) as bar:
            while chain.sweeps < last:
                accepted, moved = chain.sweep(adapt=chain.sweeps < num_warmup)
                if chain.sweeps > num_warmup and (chain.sweeps - num_warmup) % thin == 0:
                    chain.keep()
                bar.set_postfix({"accepted": f"{accepted:.2f}", "moved": f"{moved:.2f}"}, refresh=False)
                bar.update()
                if file.due(chain.sweeps, last):
                    file.save(chain.state_dict())
        return chain.result(num_samples)


def _move(update: Any) -> Any:
    moves = {"hmc": HamiltonianMove, "random_walk": RandomWalkMove}
    if isinstance(update, str) and update in moves:
        return moves[update]()
    if isinstance(update, ParameterMove) or (callable(update) and not isinstance(update, type)):
        return update
    raise TypeError(f"`update` must be one of {sorted(moves)}, a ParameterMove or a function, got {update!r}")


class _Chain:
    """Particle Gibbs in progress; all chains of it."""

    def __init__(
        self,
        parameters: RandomParameters,
        data: TimeSeries,
        filter: Filter,
        move: Any,
        num_particles: int,
        num_moves: int,
        options: Mapping[str, Any],
    ) -> None:
        self.parameters, self.data, self.filter, self.move = parameters, data, filter, move
        self.num_particles, self.num_moves, self.options = num_particles, num_moves, options
        self.sweeps = 0
        self.kept: dict[str, list[Tensor]] = {"u": [], "path": [], "log_likelihood": [], "acceptance": []}

    def begin(self, num_chains: int, start: Mapping[str, Any] | None) -> None:
        """First values, and first paths from a filter that has them."""
        for left in range(_TRIES - 1, -1, -1):
            if start is None:
                self.u = self.parameters.draw(num_chains)
            else:
                self.u = self.parameters.start(start, num_chains, "chains")
            try:
                run = particle_smoother(self._process(), self.num_particles, method="genealogy", num_paths=1)
                break
            except ValueError:
                if start is not None or not left:
                    raise  # no parameters of the prior explain the data to a filter, or those given do not
        self.path = run.paths[0]

    def sweep(self, adapt: bool) -> tuple[float, float]:
        """Move the path, then the parameters; mean acceptance and fraction of states that moved."""
        fk = self._process()
        found = conditional_smc(fk, self.path, self.num_particles, **self.options)
        self.path = found.path
        self.log_likelihood = found.log_likelihood.sum(-1).reshape(len(self.u), -1).sum(-1)
        if isinstance(self.move, ParameterMove):
            moves = []
            for _ in range(self.num_moves):
                self.u, accepted = self.move(self._log_joint, self.u, adapt)
                moves.append(accepted)
            self.acceptance = torch.stack(moves).mean(0)
        else:
            values = self.parameters.to_values(self.u)
            self.u = self.parameters.to_vector({**values, **self.move(values, self.path)})
            self.acceptance = torch.ones_like(self.u[:, 0])
        self.sweeps += 1
        real = found.moved.double().mean() if fk.step_mask is None else found.moved[fk.step_mask].double().mean()
        return float(self.acceptance.mean()), float(real)

    def _process(self) -> FeynmanKac:
        fk = self.filter(self.parameters.bind(self.u, self.data), self.data)
        if not isinstance(fk, FeynmanKac):
            raise TypeError(
                "particle_gibbs needs `filter` to be a builder of particle filters (bootstrap, locally_optimal ...), "
                f"and it returned {type(fk).__name__}. For a filter without particles use pmmh, or NUTS on a Marginal"
            )
        return fk

    def _log_joint(self, u: Tensor) -> Tensor:
        """:math:`\\log p(u) + \\log p(z \\mid \\theta) + \\log p(y \\mid z, \\theta)`, ``(chains,)``."""
        bound, data = self.parameters.bind(u, self.data), self.data
        run = history(bound, data)
        given = path_law(bound, data, run).log_prob(self.path)
        given = given + observation_law(bound, data, self.path, run).log_prob(data.values)
        return self.parameters.log_prior(u) + given.reshape(len(u), -1).sum(-1).to(u)

    def keep(self) -> None:
        """Store the draw."""
        for name, values in self.kept.items():
            values.append(getattr(self, name).clone())

    def result(self, num_samples: int) -> ParticleMCMCResult:
        """All draws."""
        found = {name: torch.stack(values[:num_samples], 1) for name, values in self.kept.items()}
        values = self.parameters.to_values(found["u"])
        return ParticleMCMCResult(values, found["path"], found["log_likelihood"], found["acceptance"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        move = self.move.state if isinstance(self.move, ParameterMove) else {}
        return {"sweeps": self.sweeps, "u": self.u, "path": self.path, "move": move, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.sweeps, self.u, self.path, self.kept = state["sweeps"], state["u"], state["path"], state["kept"]
        if isinstance(self.move, ParameterMove):
            self.move.state = state["move"]
