"""The loop of :func:`pyro_ssm.infer.fit`: its state, one step of it, and how it is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from pyro_ssm.infer import checkpoint as files
from pyro_ssm.infer.annealing import kl_annealing
from pyro_ssm.infer.batches import Batches, observation_count
from pyro_ssm.infer.diagnose import FitError, find_faults
from pyro_ssm.infer.fit_gradient import AbstractGradient

__all__ = ["FitLoop"]


@dataclass
class FitLoop:
    """A fit in progress; everything that changes is in :meth:`state_dict`.

    Fields up to ``checkpoint_every`` are the settings of :func:`pyro_ssm.infer.fit`; ``step`` counts the optimiser
    steps taken.

    >>> from pyro_ssm.infer.fit_loop import FitLoop
    >>> FitLoop.__dataclass_fields__["step"].default
    0
    """

    gradient: AbstractGradient
    optimizer: Optimizer
    scheduler: LRScheduler | None
    batches: Batches
    num_observations: int
    clip_norm: float | None
    annealing: Callable[[int], float] | None
    annealed_sites: Collection[str] | Callable[[str], bool] | None
    validation: Any
    validation_loss: ELBO
    validation_seed: int
    validate_every: int
    patience: int | None
    checkpoint: Path | None
    checkpoint_every: int

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validated: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped: str = ""
    seconds: float = 0.0
    saved_step: int | None = None

    def __post_init__(self) -> None:
        self.parameters = list(self.gradient.parameters.values())
        self.devices = sorted({p.device for p in self.parameters if p.device.type == "cuda"}, key=str)

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, num_steps: int, progress: bool, callback: Callable[[int, float], bool | None] | None) -> None:
        """Go on until ``num_steps`` have been taken, or until the loop stops itself."""
        if self.stopped == "num_steps" and self.step < num_steps:
            self.stopped = ""  # a finished fit that is given more steps
        began = time.monotonic() - self.seconds
        with tqdm(total=num_steps, initial=self.step, desc="fit", disable=not progress, dynamic_ncols=True) as bar:
            running = math.nan
            while not self.stopped:
                bound = -self.advance()
                running = bound if math.isnan(running) else 0.95 * running + 0.05 * bound
                shown = {"bound/obs": f"{running:.4f}"}
                if self.step % self.validate_every == 0 or self.step == num_steps:
                    self.validate()
                if self.validated:
                    shown["held-out"] = f"{self.validated[-1][1]:.4f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if callback is not None and callback(self.step, bound):
                    self.stopped = self.stopped or "callback"
                if self.step >= num_steps:
                    self.stopped = self.stopped or "num_steps"
                self.seconds = time.monotonic() - began
                if self.stopped or self.step % self.checkpoint_every == 0:
                    self.save()

    def advance(self) -> float:
        """One step of the optimiser; returns the loss in nats per observation."""
        batch = self.batches.at(self.step)
        random = self._random()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self._annealed():
                loss = self.gradient.loss_and_grads(batch, self.num_observations)
        except (ValueError, RuntimeError) as error:  # laws refuse parameters that are NaN before there is a loss
            if faults := self._faults(batch, random):
                raise self._error("the loss cannot be evaluated", faults) from error
            raise
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError("nothing to fit: the loss depends on no parameter of the model or the guide")
        norm = get_total_norm(gradients)
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()
        if not math.isfinite(loss_value):
            raise self._error(f"the loss is {loss_value}", self._faults(batch, random))
        if not math.isfinite(norm_value):
            named = [
                name
                for name, p in self.gradient.parameters.items()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise self._error(f"the loss is finite, but the gradient of {named} is not", self._faults(batch, random))
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.losses.append(loss_value / self.num_observations)
        return self.losses[-1]

    def _annealed(self) -> Any:
        beta = 1.0 if self.annealing is None else float(self.annealing(self.step))
        return nullcontext() if beta == 1.0 else kl_annealing(beta, self.annealed_sites)

    # ------------------------------------------------------------------------------------------------ held-out data

    def validate(self) -> None:
        """Evaluate the held-out bound with the same noise each time, and note whether it is the best."""
        if self.validation is None:
            return
        self.gradient.train(False)
        with torch.random.fork_rng(devices=[device.index for device in self.devices]):
            torch.manual_seed(self.validation_seed)
            loss = self.gradient.evaluate(self.validation_loss, self.validation)
        self.gradient.train(True)
        bound = -loss / observation_count(self.validation)
        self.validated.append((self.step, bound))
        if self.patience is None:
            return
        if self.best is None or bound > self.best["bound"]:
            state = self.gradient.state_dict()
            copied = {part: {name: x.detach().clone() for name, x in state[part].items()} for part in state}
            self.best = {"bound": bound, "step": self.step, "evaluation": len(self.validated), "state": copied}
        elif len(self.validated) - self.best["evaluation"] >= self.patience:
            self.stopped = "patience"

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _random(self) -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.devices]

    def _faults(self, batch: Any, random: tuple[Tensor, list[Tensor]]) -> list[Any]:
        """The sites that are not finite when the step is run again with the same parameters and the same noise."""
        torch.set_rng_state(random[0])
        for device, state in zip(self.devices, random[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        with self._annealed():
            return find_faults(lambda: self.gradient.evaluate(self.gradient.loss, batch))

    def _error(self, what: str, faults: list[Any]) -> FitError:
        site = faults[0].text if faults else "no single site is to blame: each is finite, their sum or gradient is not"
        kept = (
            f"; the checkpoint of step {self.saved_step} is in {self.checkpoint}" if self.saved_step is not None else ""
        )
        names = tuple(dict.fromkeys(fault.site for fault in faults))
        return FitError(
            f"step {self.step}: {what}: {site}. The parameters are those before this step{kept}. Try a smaller lr, a "
            "smaller clip_norm, or a law with a floor under its scale",
            self.step,
            names,
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def settings(self) -> dict[str, Any]:
        """What must be equal for a resumed fit to be the same fit (the number of steps may grow)."""
        return {
            "loss": type(self.gradient.loss).__name__,
            "num_particles": self.gradient.loss.num_particles,
            "optimizer": type(self.optimizer).__name__,
            "lr": self.optimizer.defaults.get("lr"),
            "schedule": None if self.scheduler is None else type(self.scheduler).__name__,
            "clip_norm": self.clip_norm,
            "annealing": self.annealing is not None,
            "batch_size": self.batches.batch_size,
            "by_length": self.batches.by_length,
            "batches per epoch": self.batches.per_epoch,
            "observations": self.num_observations,
            "validation": None if self.validation is None else observation_count(self.validation),
            "validate_every": self.validate_every,
            "patience": self.patience,
            "parameters": list(self.gradient.parameters),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed fit needs."""
        return {
            "version": 1,
            "settings": self.settings(),
            "programs": self.gradient.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": files.random_state(self.devices),
            "batch_seed": self.batches.seed,
            "validation_seed": self.validation_seed,
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validated": self.validated,
            "best": self.best,
            "stopped": self.stopped,
            "seconds": self.seconds,
        }

    def save(self) -> None:
        """Write the checkpoint, if one is wanted."""
        if self.checkpoint is not None:
            files.save_checkpoint(self.checkpoint, self.state_dict())
            self.saved_step = self.step

    def load(self) -> None:
        """Go back to the state of the checkpoint; refuse one of another fit, before anything is changed."""
        if self.checkpoint is None:
            return
        state = files.load_checkpoint(self.checkpoint)
        files.refuse_other_settings(self.checkpoint, state["settings"], self.settings())
        for part, now in self.gradient.state_dict().items():
            files.refuse_other_state(self.checkpoint, part, state["programs"].get(part, {}), now)
        self.gradient.load_state_dict(state["programs"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.batches.reseed(state["batch_seed"])
        self.validation_seed = state["validation_seed"]
        self.step, self.saved_step = state["step"], state["step"]
        self.losses = state["losses"].tolist()
        self.validated = [tuple(pair) for pair in state["validated"]]
        self.best, self.stopped, self.seconds = state["best"], state["stopped"], state["seconds"]
        files.set_random_state(state["random"])

    def restore_best(self) -> None:
        """Put the parameters of the best held-out bound back."""
        if self.best is not None:
            self.gradient.load_state_dict(self.best["state"])
