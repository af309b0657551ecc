"""Checkpoints: written atomically, read with ``weights_only=True``, refused when they belong to something else."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "load_checkpoint",
    "random_state",
    "refuse_other_settings",
    "refuse_other_state",
    "save_checkpoint",
    "set_random_state",
]


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` so that at every moment the file is either the old one or the new one, whole.

    The bytes go to a temporary file in the same directory, are forced to the disk, and take the name by ``os.replace``.

    Args:
        path: of the checkpoint; its directory must exist.
        state: tensors, numbers, strings, None, and lists, tuples and dicts of them.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from pyro_ssm.infer.checkpoint import load_checkpoint, save_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(Path(folder) / "fit.pt", {"step": 3})
    ...     load_checkpoint(Path(folder) / "fit.pt")
    {'step': 3}
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it can run code.

    >>> from pyro_ssm.infer.checkpoint import load_checkpoint
    >>> load_checkpoint("no such file")
    Traceback (most recent call last):
    ...
    FileNotFoundError: [Errno 2] No such file or directory: 'no such file'
    """
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state(devices: Collection[torch.device] = ()) -> dict[str, Any]:
    """The states of torch's (CPU, and those of the given CUDA devices), NumPy's and Python's global generators.

    >>> import torch
    >>> from pyro_ssm.infer.checkpoint import random_state, set_random_state
    >>> state = random_state()
    >>> first = torch.randn(3)
    >>> set_random_state(state)
    >>> torch.equal(first, torch.randn(3))
    True
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the global state is what is saved)
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(device): torch.cuda.get_rng_state(device) for device in devices},
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned.

    >>> from pyro_ssm.infer.checkpoint import random_state, set_random_state
    >>> set_random_state(random_state())
    """
    torch.set_rng_state(state["torch"])
    for device, saved in state["cuda"].items():
        torch.cuda.set_rng_state(saved, device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def refuse_other_settings(path: str | os.PathLike[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that names every setting in which a checkpoint differs from the present call.

    >>> from pyro_ssm.infer.checkpoint import refuse_other_settings
    >>> refuse_other_settings("fit.pt", {"lr": 0.1}, {"lr": 0.2})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: checkpoint fit.pt belongs to another fit: lr was 0.1 and is 0.2. ...
    """
    names = sorted(set(saved) | set(now))
    changes = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in names if saved.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(
            f"checkpoint {os.fspath(path)} belongs to another fit: {'; '.join(changes)}. Repeat the settings, "
            "give another `checkpoint=`, or pass resume=False to start afresh"
        )


def refuse_other_state(
    path: str | os.PathLike[str], what: str, saved: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise a ``ValueError`` that names the tensors of a state dict that are missing, unknown, or of another kind.

    >>> import torch
    >>> from pyro_ssm.infer.checkpoint import refuse_other_state
    >>> refuse_other_state("f.pt", "guide", {"a": torch.zeros(2)}, {"a": torch.zeros(3)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: checkpoint f.pt does not fit the guide: `a` was torch.float32 (2,) and is torch.float32 (3,). ...
    """

    def kind(x: Any) -> str:
        return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__

    faults = [f"`{name}` is missing from the checkpoint" for name in now if name not in saved]
    faults += [f"`{name}` is unknown to the {what}" for name in saved if name not in now]
    faults += [
        f"`{name}` was {kind(saved[name])} and is {kind(now[name])}"
        for name in now
        if name in saved and kind(saved[name]) != kind(now[name])
    ]
    if faults:
        raise ValueError(
            f"checkpoint {os.fspath(path)} does not fit the {what}: {'; '.join(faults)}. Give another "
            "`checkpoint=`, or pass resume=False to start afresh"
        )
