"""Which site made a loss NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Fault", "FitError", "SiteRecorder", "find_faults"]


class FitError(RuntimeError):
    """A fit met a number that is not finite; parameters are those before the step, and so is the last checkpoint.

    Attributes:
        step: the optimiser step (from 0) at which it happened.
        sites: the names of the sites that were not finite, the first one first; empty if no single site was.

    >>> from pyro_ssm.infer import FitError
    >>> FitError("the loss is nan", step=3, sites=("y",)).sites
    ('y',)
    """

    def __init__(self, message: str, step: int, sites: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.step, self.sites = step, sites


class Fault(NamedTuple):
    """A site that is not finite: its name, and a sentence that says what and where.

    >>> from pyro_ssm.infer.diagnose import Fault
    >>> Fault("y", "log_prob of `y`").site
    'y'
    """

    site: str
    text: str


class _Record(NamedTuple):
    program: str
    name: str
    law: Any
    value: Any
    mask: Any


class SiteRecorder(Messenger):
    """Write down every sample site that runs inside: first those of the guide, then those of the model.

    A site whose value is given (observed, or replayed from the guide) belongs to the model.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_ssm.infer.diagnose import SiteRecorder
    >>> with SiteRecorder() as recorder:
    ...     _ = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
    >>> [(record.program, record.name) for record in recorder.records]
    [('model', 'y')]
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[_Record] = []
        self._given: set[int] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            self._given.add(id(msg))

    def _pyro_post_sample(self, msg: Any) -> None:
        program = "model" if id(msg) in self._given else "guide"
        self._given.discard(id(msg))
        self.records.append(_Record(program, msg["name"], msg["fn"], msg["value"], msg["mask"]))


def _first_bad(x: Tensor) -> tuple[tuple[int, ...], float] | None:
    bad = ~torch.isfinite(x)
    if not bad.any():
        return None
    index = tuple(torch.nonzero(bad)[0].tolist())
    return index, x[index].item()


def _log_prob_terms(law: Any, value: Tensor) -> tuple[str, Tensor]:
    """The finest terms that a law gives: per time step, per entry, or per batch element."""
    if callable(getattr(law, "log_prob_steps", None)):
        return "time", law.log_prob_steps(value)
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return "entry", law.log_prob(value)


def _fault_of(record: _Record) -> Fault | None:
    where = f"site `{record.name}` of the {record.program}"
    if isinstance(record.value, Tensor) and record.value.is_floating_point() and (found := _first_bad(record.value)):
        index, number = found
        path = len(index) >= 2 and record.law.event_dim == 2
        at = f" (time index {index[-2]})" if path else ""
        return Fault(record.name, f"the value of {where} is {number} at index {index}{at}")
    if record.mask is False:
        return None
    try:
        kind, terms = _log_prob_terms(record.law, record.value)
    except (ValueError, RuntimeError) as error:
        return Fault(record.name, f"the log_prob of {where} cannot be evaluated: {error}")
    terms = torch.as_tensor(terms)
    if isinstance(record.mask, Tensor):
        hidden = ~record.mask.reshape(record.mask.shape + (1,) * (terms.dim() - len(record.law.batch_shape)))
        terms = terms.masked_fill(hidden, 0.0)
    found = _first_bad(terms)
    if found is None:
        return None
    index, number = found
    at = f"time index {index[-1]} (index {index})" if kind == "time" else f"index {index}"
    return Fault(record.name, f"the log_prob of {where} is {number} at {at}")


@torch.no_grad()
def find_faults(run: Callable[[], Any]) -> list[Fault]:
    """Run a loss and list the sites whose value or log-probability is not finite, in the order of the program.

    Args:
        run: evaluates the loss; what it raises is ignored, the sites that it met before that are looked at.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_ssm.infer.diagnose import find_faults
    >>> law = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> [fault.text for fault in find_faults(lambda: pyro.sample("y", law, obs=torch.tensor([0.0, float("inf"), 1.0])))]
    ['the value of site `y` of the model is inf at index (1,)']
    """
    with SiteRecorder() as recorder:
        try:
            run()
        except (ValueError, RuntimeError, ArithmeticError):
            pass  # the caller already holds the error; the sites before it are what is asked for
    faults = (_fault_of(record) for record in recorder.records)
    return [fault for fault in faults if fault is not None]
