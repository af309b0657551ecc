"""Machine code of kernels on disk, so that each machine compiles once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pyro_ssm.ops.nvrtc import Compiled

__all__ = ["cache_folder", "cached"]


def cache_folder() -> Path:
    """Where machine code is kept: ``PYRO_SSM_CACHE``, or the folder of the system for such things.

    >>> from pyro_ssm.ops.kernel_cache import cache_folder
    >>> cache_folder().name
    'kernels'
    """
    if os.environ.get("PYRO_SSM_CACHE"):
        return Path(os.environ["PYRO_SSM_CACHE"]) / "kernels"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or tempfile.gettempdir()) / "pyro_ssm" / "kernels"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "pyro_ssm" / "kernels"


def cached(folder: Path, key: Sequence[str], make: Callable[[], Compiled]) -> Compiled:
    """What is kept under a key, or else made and kept.

    A file is written under another name and then renamed: another process sees all of it or nothing. A file that is
    not whole is made again; a folder that cannot be written to keeps nothing.

    Args:
        folder: that holds one file a key.
        key: all that the machine code depends on.
        make: the machine code.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.ops.kernel_cache import cached
    >>> from pyro_ssm.ops.nvrtc import Compiled
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = cached(Path(folder), ["key"], lambda: Compiled(b"code", {"f": "_Z1f"}))
    ...     cached(Path(folder), ["key"], lambda: 1 / 0) == first
    True
    """
    path = folder / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()}.bin"
    found = _read(path)
    if found is None:
        found = make()
        with suppress(OSError):
            _write(path, found)
    return found


def _read(path: Path) -> Compiled | None:
    try:
        head, _, image = path.read_bytes().partition(b"\n")
        about = json.loads(head)
        if about["sha256"] == hashlib.sha256(image).hexdigest():
            return Compiled(image, dict(about["names"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, what: Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = {"names": what.names, "sha256": hashlib.sha256(what.image).hexdigest()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(about).encode() + b"\n" + what.image)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
