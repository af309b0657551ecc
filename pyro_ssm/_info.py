"""The report of ``python -m pyro_ssm info``: what a bug report needs, without a path or a name of the machine."""

import platform
from importlib import metadata

import torch

from pyro_ssm._version import __version__
from pyro_ssm.ops.info import info as ops_info

PACKAGES = ("torch", "pyro-ppl", "torchsde", "torchdiffeq", "arviz", "numpy", "pandas", "xarray")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        return ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu (no accelerator is visible to torch)"


def report() -> str:
    """Versions, device, threads and compiled operators, one a line.

    The versions are those of the installed distributions, read without importing them.

    Returns:
        The text that ``python -m pyro_ssm info`` prints.

    Example:
        >>> from pyro_ssm._info import report
        >>> print(report().splitlines()[0])  # doctest: +ELLIPSIS
        pyro_ssm      ...
    """
    rows = {"pyro_ssm": __version__}
    rows["python"] = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    rows |= {package: _version(package) for package in PACKAGES}
    rows["device"] = _device()
    rows["threads"] = f"{torch.get_num_threads()} within an operator, {torch.get_num_interop_threads()} between them"
    rows["operators"] = str(ops_info())
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())
