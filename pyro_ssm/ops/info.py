"""Which compiled operators are in use, and why the others are not."""

import warnings
from typing import NamedTuple

import torch

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.cuda import cuda_reason
from pyro_ssm.ops.nvrtc_engine import runtime_kernels

__all__ = ["OpsInfo", "info"]

#: those that have a compiled version; on CUDA causal_conv1d, diag_lti, linear_scan, scan2x2, selective_scan and ssd
OPERATORS = (
    "causal_conv1d",
    "diag_lti",
    "kalman_filter",
    "linear_scan",
    "normalise",
    "resampling",
    "scan2x2",
    "selective_scan",
    "ssd",
    "standard_normals",
)


class OpsInfo(NamedTuple):
    """The state of the compiled operators in this process.

    Attributes:
        compiled: names of the operators whose compiled version is in use.
        missing: name of each operator whose compiled version exists but is not in use, with the reason.
        explanation: a sentence or two for a person.
        cuda: why no compiled operator is in use for CUDA tensors; empty where they are.

    Example:
        >>> from pyro_ssm.ops.info import OpsInfo
        >>> print(OpsInfo(("scan",), {"resample": "no compiler was found"}, "One of two."))
        One of two.
          scan: compiled
          resample: torch (no compiler was found)
    """

    compiled: tuple[str, ...]
    missing: dict[str, str]
    explanation: str
    cuda: str = ""

    def __str__(self) -> str:
        lines = [self.explanation]
        lines += [f"  {name}: compiled" for name in self.compiled]
        lines += [f"  {name}: torch ({reason})" for name, reason in self.missing.items()]
        return "\n".join(lines)


def info() -> OpsInfo:
    """Tell which compiled operators are in use, and why the others are not.

    Every operator has a complete version in plain torch, so a missing compiled one costs time, never a result.

    Returns:
        The state of the compiled operators; printing it gives a readable list.

    Example:
        >>> from pyro_ssm.ops.info import info
        >>> state = info()
        >>> sorted([*state.compiled, *state.missing])[:4]
        ['causal_conv1d', 'diag_lti', 'kalman_filter', 'linear_scan']
    """
    found = library()
    cuda, route = _on_cuda()
    on_cuda = f" CUDA: {'not in use, ' + cuda if cuda else 'in use, ' + route}."
    if found.functions is None:
        return OpsInfo(
            compiled=(),
            missing={name: found.reason for name in OPERATORS},
            explanation="No compiled operator is in use: every operator runs as plain torch." + on_cuda,
            cuda=cuda,
        )
    threads = "torch's threads" if found.parallel_for else "one thread"
    explanation = f"The compiled operators are in use ({found.isa}, {threads}).{on_cuda}"
    return OpsInfo(compiled=OPERATORS, missing={}, explanation=explanation, cuda=cuda)


def _on_cuda() -> tuple[str, str]:
    """Why no kernel is in use for CUDA tensors, and where those that are come from."""
    if not torch.cuda.is_available():
        return cuda_reason(0), ""
    index = torch.cuda.current_device()
    reason = cuda_reason(index)
    if not reason:
        return "", "built by nvcc"
    with warnings.catch_warnings():  # the reason is told
        warnings.simplefilter("ignore")
        found = runtime_kernels(index)
    if not isinstance(found, str):
        return "", str(found)
    return (reason if found == reason else f"{reason}; {found}"), ""
