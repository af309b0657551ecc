"""Long runs that can be stopped and taken up again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import checkpoint as files
from pyro_ssm.infer.batches import observation_count
from pyro_ssm.infer.smc.parameter_likelihood import Filter, ParameterLikelihood
from pyro_ssm.infer.smc.posterior_draws import RandomParameters

__all__ = ["RunFile", "run_settings", "settings_of"]


class RunFile:
    """The file of a sampler's run: written every so many steps, atomically, with the state of the random generators.

    Args:
        path: None: nothing is written.
        every: steps between writings; one is due at the end too.
        settings: what must be the same for a run to go on.
        resume: whether to read the file where it exists.
        device: of the run: its random generator is saved beside the CPU's, and what is read comes back to it.

    Raises:
        ValueError: ``every`` is less than 1, or the file is of another run.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.infer.smc.resume import RunFile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     RunFile(Path(folder) / "run.pt", 10, {"draws": 3}, True).save({"step": 20})
    ...     RunFile(Path(folder) / "run.pt", 10, {"draws": 3}, True).load()["step"]
    20
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        every: int,
        settings: dict[str, Any],
        resume: bool,
        device: torch.device | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"`checkpoint_every` must be at least 1, got {every}")
        self.path = None if path is None else Path(path)
        self.every, self.settings, self.resume = every, settings, resume
        self.device = torch.device("cpu") if device is None else device

    def load(self) -> dict[str, Any] | None:
        """What was saved; the random generators go back to their states then. None: begin afresh."""
        if self.path is None or not self.resume or not self.path.exists():
            return None
        saved = files.load_checkpoint(self.path)
        files.refuse_other_settings(self.path, saved["settings"], self.settings)
        files.set_random_state(saved["random"])
        return _moved(saved["state"], self.device)

    def due(self, step: int, last: int) -> bool:
        """Whether to save after ``step`` (from 1) of ``last``."""
        return self.path is not None and (step % self.every == 0 or step == last)

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of the run and of the random generators."""
        if self.path is not None:
            random = files.random_state([self.device] if self.device.type == "cuda" else [])
            files.save_checkpoint(self.path, {"settings": self.settings, "state": state, "random": random})


def _moved(value: Any, device: torch.device) -> Any:
    """The tensors in nested lists and dicts on a device; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list) else value


def run_settings(method: str, likelihood: ParameterLikelihood, **more: Any) -> dict[str, Any]:
    """What tells one run of a sampler with a likelihood from another.

    >>> from pyro_ssm.infer.smc.resume import run_settings
    >>> run_settings.__name__
    'run_settings'
    """
    numbers = {"num_particles": likelihood.num_particles, "ess_threshold": likelihood.ess_threshold}
    return settings_of(method, likelihood.parameters, likelihood.data, likelihood.filter, **numbers, **more)


def settings_of(
    method: str, parameters: RandomParameters, data: TimeSeries, filter: Filter, **more: Any
) -> dict[str, Any]:
    """What tells one run from another.

    >>> from pyro_ssm.infer.smc.resume import settings_of
    >>> settings_of.__name__
    'settings_of'
    """
    return {
        "method": method,
        "parameters": list(parameters.names),
        "filter": getattr(filter, "__name__", type(filter).__name__),
        "batch": list(data.batch_shape),
        "times": data.num_times,
        "observations": observation_count(data),
        **more,
    }
