"""Which compiled operators are in use, and why the others are not."""

from typing import NamedTuple

from pyro_ssm.ops.compiled import library

__all__ = ["OpsInfo", "info"]

#: those that have a compiled version
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
        explanation: one sentence for a person.

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
    if found.functions is None:
        return OpsInfo(
            compiled=(),
            missing={name: found.reason for name in OPERATORS},
            explanation="No compiled operator is in use: every operator runs as plain torch.",
        )
    threads = "torch's threads" if found.parallel_for else "one thread"
    return OpsInfo(
        compiled=OPERATORS, missing={}, explanation=f"The compiled operators are in use ({found.isa}, {threads})."
    )
