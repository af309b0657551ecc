"""A run of a particle filter whose step is captured in a CUDA graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any, cast

import torch
from pyro import settings
from torch import Tensor

from pyro_ssm.infer.smc.capture import Capture, CudaGraphs
from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.device_constants import DeviceConstants
from pyro_ssm.infer.smc.device_stepper import DeviceStepper
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.stepper import Cloud, Step
from pyro_ssm.infer.smc.tree import leaves, tree_map
from pyro_ssm.infer.smc.whole_run import WholeRun
from pyro_ssm.ops.reading import no_reading

__all__ = ["captured_run", "graph_run"]

_TORCH = str(Path(torch.__file__).parent)


def graph_run(
    stepper: DeviceStepper,
    first: Step,
    capture: Capture,
    collectors: Sequence[Collector] = (),
    *,
    is_first: bool = True,
) -> WholeRun:
    """All steps after ``first``: the step is called once, captured the next time, and replayed from then on.

    A step with observations and one without are two graphs, as they are two kinds of work.

    Args:
        stepper: what makes a step.
        first: the first step, or the one to go on from.
        capture: how.
        collectors: started; ``first`` has been shown to them. They look at copies, between replays.
        is_first: whether ``first`` belongs to the run.

    Raises:
        RuntimeError: a step cannot be captured.

    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.device_stepper import DeviceStepper
    >>> from pyro_ssm.infer.smc.graph_run import graph_run
    >>> class Plain:  # without a graph
    ...     def rehearse(self, function):
    ...         function()
    ...     def record(self, function):
    ...         return function
    ...     def finish(self):
    ...         pass
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x**2, 3)
    >>> stepper = DeviceStepper(fk, 10, AncestorResampling(), 0.5, PseudoRandom())
    >>> graph_run(stepper, stepper.init(), Plain()).log_likelihood.shape
    torch.Size([3])
    """
    with torch.no_grad():
        run, idle = _Run(stepper, first, capture, collectors, is_first), stepper.idle
        for k in range(first.k + 1, stepper.num_alive):
            run.step(k, idle[k])
        return run.finish()


def captured_run(
    fk: FeynmanKac,
    num_particles: int,
    resampling: Resampling,
    ess_threshold: float,
    noise: Noise,
    start: Cloud | None = None,
    collectors: Sequence[Collector] = (),
) -> WholeRun:
    """:func:`graph_run` of a whole process on a CUDA device, or an error that says why it cannot be.

    Raises:
        TypeError: ``noise`` must know the step.
        ValueError: the particles are not on a CUDA device; ``resampling`` looks at values; too short a ``FixedNoise``.
        RuntimeError: a step cannot be captured.

    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.graph_run import captured_run
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x**2, 3)
    >>> captured_run(fk, 10, AncestorResampling(), 0.5, PseudoRandom())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: `cuda_graph=True` captures the step on a CUDA device, and the particles are on cpu. Move the model ...
    """
    noise.capture(fk.num_times)
    if resampling.reads and ess_threshold > 0:
        raise ValueError(
            f"`cuda_graph=True`: {type(resampling).__name__} looks at values, and a captured step does the same work "
            "each time. Leave `cuda_graph` out, fix the number of iterations (TransportResampling(num_iterations=30)), "
            'or resample otherwise (resampling="systematic")'
        )
    stepper = DeviceStepper(fk, num_particles, resampling, ess_threshold, noise)
    first = stepper.init() if start is None else stepper.resume(start)
    device = first.weights.device
    if device.type != "cuda":
        raise ValueError(
            f"`cuda_graph=True` captures the step on a CUDA device, and the particles are on {device}. Move the model "
            'and the data there (model.to("cuda"), data.to("cuda")), or leave `cuda_graph` out'
        )
    for collector in collectors:
        collector.start(fk, num_particles)
        if start is None:
            collector.collect(first)
    return graph_run(stepper, first, CudaGraphs(device), collectors, is_first=start is None)


class _Run:
    """One run: the tensors in fixed places between which a step works, and the graphs."""

    def __init__(
        self, stepper: DeviceStepper, first: Step, capture: Capture, collectors: Sequence[Collector], is_first: bool
    ) -> None:
        self.stepper, self.capture, self.collectors = stepper, capture, collectors
        self.last, self.start, self.first = first, first.k, first.k if is_first else first.k + 1
        self.held = self._of(first)  # particles, log-weights, weights, effective sample size
        self.k = torch.full((1,), first.k, dtype=torch.int64, device=first.weights.device)
        like, num_times = first.log_likelihood, stepper.fk.num_times
        self.log_likelihood, self.ess = like.new_zeros((2, num_times, *like.shape)).unbind(0)
        self.resampled = torch.zeros(self.ess.shape, dtype=torch.bool, device=like.device)
        if is_first:
            self.log_likelihood[first.k], self.ess[first.k] = first.log_likelihood, first.ess
        self.ancestors: Tensor | None = None
        self.known: set[bool] = set()
        self.replays: dict[bool, Callable[[], None]] = {}

    @staticmethod
    def _of(step: Step) -> Any:
        parts = (step.cloud.particles, step.cloud.log_weights, step.weights, step.ess)
        return tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), parts)

    def step(self, k: int, idle: bool) -> None:
        """Step k, from the tensors in their places to the same places."""
        self.stepper.is_idle = idle
        if idle not in self.known:
            self._rehearse()
            self.known.add(idle)
        else:
            if idle not in self.replays:
                self.replays[idle] = self._record(k)
            self.replays[idle]()
        if self.collectors:
            self._show(k)

    def _advance(self) -> None:
        """One step, as a function of the tensors in their places."""
        particles, log_weights, weights, ess = tree_map(torch.clone, self.held)  # what follows may keep or move them
        last = Step(Cloud(particles, log_weights, self.k), weights, ess, ess, None, None, False)  # type: ignore[arg-type]
        with no_reading(), DeviceConstants():
            self._keep(self.stepper.step(last))

    def _keep(self, step: Step) -> None:
        found = (step.cloud.particles, step.cloud.log_weights, step.weights, step.ess)
        if _layout(found) == _layout(self.held):
            tree_map(lambda place, x: place.copy_(x), self.held, found)
        elif self.known:
            raise ValueError(
                f"particles changed from {_layout(self.held[0])} to {_layout(found[0])} (shapes and dtypes) in the "
                "course of the run, and a captured step has fixed ones"
            )
        else:
            self.held = self._of(step)
        k = cast(Tensor, step.k)
        for whole, x in ((self.log_likelihood, step.log_likelihood), (self.ess, step.ess)):
            whole.index_copy_(0, k, x.to(whole.dtype).expand(whole.shape[1:]).unsqueeze(0))
        if isinstance(step.resampled, Tensor):
            self.resampled.index_copy_(0, k, step.resampled.expand(self.resampled.shape[1:]).unsqueeze(0))
        elif step.resampled:
            self.resampled.index_fill_(0, k, True)
        if self.collectors and step.ancestors is not None:
            if self.ancestors is None:
                self.ancestors = torch.empty_like(step.ancestors, memory_format=torch.contiguous_format)
            self.ancestors.copy_(step.ancestors)
        self.k.copy_(k)

    def _rehearse(self) -> None:
        try:
            self.capture.rehearse(self._advance)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RuntimeError(_refusal(error)) from error

    def _record(self, k: int) -> Callable[[], None]:
        try:
            with settings.context(validate_distributions_pyro=False, validate_distributions_torch=False):
                return self.capture.record(self._advance)
        except Exception as error:
            raise RuntimeError(f"{_refusal(_first_cause(error))} (step {k})") from error

    def _show(self, k: int) -> None:
        particles, log_weights, weights, ess = tree_map(torch.clone, self.held)
        ancestors = None if self.ancestors is None else self.ancestors.clone()
        self.last = Step(
            Cloud(particles, log_weights, k),
            weights,
            self.log_likelihood[k].clone(),
            ess,
            self.last.cloud,
            ancestors,
            self.resampled[k].clone(),
        )
        for collector in self.collectors:
            collector.collect(self.last)

    def finish(self) -> WholeRun:
        """The results; steps after all series have ended are those of the stepper itself, which has nothing to do."""
        particles, log_weights, weights, ess = tree_map(torch.clone, self.held)
        self.capture.finish()
        stop, num_times = max(self.stepper.num_alive, self.start + 1), self.stepper.fk.num_times
        cloud = Cloud(particles, log_weights, stop - 1)
        if stop < num_times:
            step = self.last if self.collectors else Step(cloud, weights, ess * 0, ess, None, None, False)
            for k in range(stop, num_times):
                step = self.stepper.step(step)
                self.ess[k] = step.ess
                for collector in self.collectors:
                    collector.collect(step)
            cloud = step.cloud
        found = (self.log_likelihood, self.ess, self.resampled)
        log_likelihood, ess, resampled = (x[self.first :].movedim(0, -1).contiguous() for x in found)
        return WholeRun(log_likelihood, cloud, ess, resampled)


def _layout(tree: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape), x.dtype) for x in leaves(tree)]


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong first: the end of a failed capture raises in its turn."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _refusal(cause: BaseException) -> str:
    return (
        f"`cuda_graph=True`: a step cannot be captured: {type(cause).__name__}{_place(cause)}: {cause}. In a captured "
        "step `k` is an int64 tensor (1,) on the device, with which tensors are indexed (`y[k]`, `x[..., k, :]`), and "
        "Python reads no value that is there: no if, int(), .item(), boolean index, copy from or to the CPU, nor "
        "`k` as a key or in a slice. Change the process so, or leave `cuda_graph` out"
    )


def _place(cause: BaseException) -> str:
    """The last line of Python that is not torch's."""
    frames = [f for f in extract_tb(cause.__traceback__) if not f.filename.startswith(_TORCH)]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
