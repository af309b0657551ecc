"""Fitting a model and a guide by stochastic variational inference, with a torch optimiser."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.batches import Batches, observation_count
from pyro_ssm.infer.elbo import FreeBits
from pyro_ssm.infer.fit_gradient import EmptyGuide, gradient_of
from pyro_ssm.infer.fit_loop import FitLoop
from pyro_ssm.infer.marginal import Marginal
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.plates import uncovered_dims

__all__ = ["FitResult", "fit"]


class FitResult(NamedTuple):
    """What :func:`fit` returns; model and guide are the objects that were given, now trained.

    Attributes:
        model: the model.
        guide: the guide (an empty one if None was given).
        losses: ``(num_steps,)`` float64, the loss of each step in nats *per observation*: the negative (annealed,
            mini-batch) bound divided by ``num_observations``.
        validation: ``[(step, bound), ...]``: the held-out bound, never annealed, in nats per held-out observation,
            after that many steps.
        num_steps: optimiser steps taken.
        num_observations: observed (unmasked) entries of the data; ``losses * num_observations`` are nats of all the
            data.
        stopped: why it ended: ``"num_steps"``, ``"patience"`` or ``"callback"``.
        seconds: wall time of training, those before a resume included.

    >>> import torch
    >>> from pyro_ssm.infer import FitResult
    >>> FitResult(None, None, torch.tensor([3.0, 2.0]), [], 2, 10, "num_steps", 0.1).bounds
    tensor([-3., -2.])
    """

    model: Any
    guide: Any
    losses: Tensor
    validation: list[tuple[int, float]]
    num_steps: int
    num_observations: int
    stopped: str
    seconds: float

    @property
    def bounds(self) -> Tensor:
        """The bound of each step in nats per observation: ``-losses``."""
        return -self.losses

    @property
    def converged(self) -> bool:
        """Whether the held-out bound stopped to rise, before the steps were used up."""
        return self.stopped == "patience"


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    data: Any,
    *,
    loss: ELBO | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    lr: float = 1e-3,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    by_length: bool = False,
    schedule: Callable[..., Any] | None = None,
    clip_norm: float | None = 10.0,
    annealing: Callable[[int], float] | None = None,
    annealed_sites: Collection[str] | Callable[[str], bool] | None = None,
    validation: Any = None,
    validation_loss: ELBO | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    progress: bool = True,
    callback: Callable[[int, float], bool | None] | None = None,
) -> FitResult:
    """Maximise the evidence lower bound of ``model`` and ``guide`` on ``data``.

    .. math:: \\max_{\\theta, \\phi}\\; E_{q_\\phi(z \\mid y)}[\\log p_\\theta(y, z) - \\log q_\\phi(z \\mid y)]

    The objective that is differentiated is the bound *per observation* (the bound over the number of unmasked entries),
    so that ``lr`` and ``clip_norm`` mean the same for small and large data. A plate scales mini-batches. Losses with
    ``differentiable_loss`` (``Trace_ELBO``, ``TraceMeanField_ELBO``, :class:`~pyro_ssm.infer.IWAE`,
    :class:`~pyro_ssm.infer.FreeBits` ...) are trained as modules, each with its own parameters; the others
    (``RenyiELBO``, ``TraceGraph_ELBO``, ``ReweightedWakeSleep``), through
    Pyro's global parameter store, as ``pyro.infer.SVI`` does.

    Args:
        model: a ``StateSpaceModel``, a ``Marginal``, or any Pyro program ``model(data)``.
        guide: any Pyro guide ``guide(data)``; None for models without latent sites (maximum likelihood of a
            ``Marginal``).
        data: what both take; a ``TimeSeries`` where ``batch_size`` is given.
        loss: any Pyro ELBO; default ``Trace_ELBO()``.
        optimizer: called as ``optimizer(parameters, lr=lr)``, for instance ``torch.optim.AdamW`` or a
            ``functools.partial`` of it; default Adam (Kingma & Ba 2015).
        lr: learning rate.
        num_steps: optimiser steps; give this or ``num_epochs``.
        num_epochs: passes over the series.
        batch_size: series per step, drawn without replacement in each epoch; default all.
        by_length: mini-batches of series of like length, so that less padding is computed.
        schedule: a function ``step -> factor`` of the learning rate (:func:`~pyro_ssm.infer.warmup_cosine`), or a
            factory whose first argument is called ``optimizer`` and that returns a torch scheduler, stepped once a
            step.
        clip_norm: largest norm of the gradient of the bound per observation; None for no clipping.
        annealing: a function ``step -> beta``, the weight of the path's KL (:func:`~pyro_ssm.infer.linear_annealing`);
            training only.
        annealed_sites: which sites it weights; default the path (see :class:`~pyro_ssm.infer.kl_annealing`).
        validation: held-out data, on which the bound is evaluated with the same noise each time.
        validation_loss: the ELBO of that evaluation; default ``loss``, and ``Trace_ELBO()`` for ``FreeBits``.
        validate_every: steps between evaluations; default an epoch with mini-batches, else 100.
        patience: stop after this many evaluations without a better held-out bound; the best parameters are put back at
            the end. None: never stop, keep the last parameters.
        checkpoint: path of a file that holds the whole state; it is written atomically.
        checkpoint_every: steps between checkpoints; one is written at the end, too.
        resume: go on from ``checkpoint`` if it exists. On one CPU thread the result is that of the uninterrupted fit,
            bit for bit. More ``num_steps`` than before continue a finished fit.
        progress: show a bar with the bound per observation (a running mean).
        callback: called as ``callback(step, bound_per_observation)`` after each step (1, 2, ...); True stops the fit.

    Returns:
        A :class:`FitResult`.

    Raises:
        FitError: a loss or a gradient is not finite. The message names the step and the site. Parameters stay those
            before the step, and so does the last checkpoint.
        RuntimeError: nothing depends on a parameter; or Pyro's global store holds another model's parameters.
        ValueError: an argument is out of its range, the checkpoint belongs to another fit, or the data have batch dims
            that no plate covers.

    Randomness: torch's global generator; validation does not advance it.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.nn import PyroModule
    >>> from pyro_ssm.infer import fit
    >>> class Level(PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.level = torch.nn.Parameter(torch.zeros(()))
    ...     def forward(self, data):
    ...         pyro.sample("y", dist.Normal(self.level, 1.0).expand(data.shape).to_event(1), obs=data)
    >>> fitted = fit(Level(), None, torch.tensor([1.0, 3.0]), lr=0.1, num_steps=300, progress=False)
    >>> round(fitted.model.level.item(), 3)
    2.0
    """
    loss = Trace_ELBO() if loss is None else loss
    if not isinstance(loss, ELBO):
        raise TypeError(f"`loss` must be a Pyro ELBO object, got {loss!r}; for instance pyro.infer.Trace_ELBO()")
    guide = EmptyGuide() if guide is None else guide
    _check_batch_dims(model, data)
    batch_seed, validation_seed = torch.randint(2**62, (2,)).tolist()
    batches = Batches(data, batch_size, batch_seed, by_length)
    if validate_every is None:
        validate_every = batches.per_epoch if batch_size is not None else 100
    total = _number_of_steps(num_steps, num_epochs, batches.per_epoch)
    limits = {"lr": lr, "clip_norm": clip_norm, "validate_every": validate_every, "patience": patience}
    for name, value in {**limits, "checkpoint_every": checkpoint_every}.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value}")
    if patience is not None and validation is None:
        raise ValueError("`patience` needs held-out data: give `validation=`, or leave patience out")

    gradient = gradient_of(model, guide, loss)
    modes = [(module, module.training) for module in gradient.modules.values()]
    with gradient.context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # a FitError says more
        gradient.train(True)
        if isinstance(guide, EmptyGuide):
            _refuse_latent_sites(model, batches.at(0))
        gradient.initialise(batches.at(0))
        if not gradient.parameters:
            raise RuntimeError(
                "nothing to fit: neither the model nor the guide has a parameter that requires a gradient"
            )
        adapted = (Adam if optimizer is None else optimizer)(list(gradient.parameters.values()), lr=lr)
        loop = FitLoop(
            gradient=gradient,
            optimizer=adapted,
            scheduler=None if schedule is None else _scheduler(schedule, adapted),
            batches=batches,
            num_observations=observation_count(data),
            clip_norm=clip_norm,
            annealing=annealing,
            annealed_sites=annealed_sites,
            validation=validation,
            validation_loss=_held_out_loss(loss) if validation_loss is None else validation_loss,
            validation_seed=validation_seed,
            validate_every=validate_every,
            patience=patience,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            checkpoint_every=checkpoint_every,
        )
        if resume and loop.checkpoint is not None and loop.checkpoint.exists():
            loop.load()
        try:
            loop.run(total, progress, callback)
        finally:
            for module, mode in modes:
                module.train(mode)
        loop.restore_best()
    return FitResult(
        model=model,
        guide=guide,
        losses=torch.tensor(loop.losses, dtype=torch.float64),
        validation=loop.validated,
        num_steps=loop.step,
        num_observations=loop.num_observations,
        stopped=loop.stopped,
        seconds=loop.seconds,
    )


def _check_batch_dims(model: Any, data: Any) -> None:
    """A model by itself opens the plate of the last batch dim only; mini-batches are cut along that one."""
    program = poutine.unwrap(model) if callable(model) else model
    if not isinstance(program, (StateSpaceModel, Marginal)) or not isinstance(data, TimeSeries):
        return
    if deeper := uncovered_dims(data):
        raise ValueError(
            f"`data` has batch shape {tuple(data.batch_shape)}, and {type(program).__name__} has one plate, over the "
            f"last batch dim (`batch_size` cuts that one); dim(s) {deeper} have none. Give all series along one batch "
            "dim, TimeSeries(times, values.flatten(0, -3)), or put model and guide into a PyroModule each whose "
            "forward calls them inside `with pyro.plate(name, size, dim=...)` for these dims"
        )


def _number_of_steps(num_steps: int | None, num_epochs: int | None, per_epoch: int) -> int:
    if (num_steps is None) == (num_epochs is None):
        raise ValueError(
            f"give `num_steps` or `num_epochs`, one of them; got num_steps={num_steps}, num_epochs={num_epochs}"
        )
    total = num_epochs * per_epoch if num_epochs is not None else num_steps or 0
    if total < 1:
        raise ValueError(f"the number of optimiser steps must be at least 1, got {total}")
    return total


def _held_out_loss(loss: ELBO) -> ELBO:
    """A floor under the KL is a means of training; what is reported is the bound itself."""
    return Trace_ELBO(num_particles=loss.num_particles) if isinstance(loss, FreeBits) else loss


def _refuse_latent_sites(model: Callable[..., Any], batch: Any) -> None:
    """Without a guide, latent sites would be drawn from the prior at each step: another objective, without a word."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(batch)
    sites = prune_subsample_sites(trace).nodes.items()
    latent = [name for name, site in sites if site["type"] == "sample" and not site["is_observed"]]
    if latent:
        raise ValueError(
            f"guide=None is for models without latent sites, but the model draws {latent}. "
            "Give a guide, or integrate the states out with infer.Marginal(model, filter=...)"
        )


def _scheduler(schedule: Callable[..., Any], optimizer: Optimizer) -> LRScheduler:
    first = next(iter(inspect.signature(schedule).parameters), None)
    scheduler = schedule(optimizer) if first == "optimizer" else LambdaLR(optimizer, schedule)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "`schedule` must be a function step -> factor, or return a torch scheduler that steps without a metric; "
            f"got {type(scheduler).__name__}"
        )
    return scheduler
