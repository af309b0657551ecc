"""Capture of a function of tensors in fixed places: by CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

__all__ = ["Capture", "CudaGraphs"]


@runtime_checkable
class Capture(Protocol):
    """How a function of no arguments, which works on tensors in fixed places, becomes one that is quick to call.

    >>> from pyro_ssm.infer.smc.capture import Capture, CudaGraphs
    >>> all(hasattr(CudaGraphs, name) for name in ("rehearse", "record", "finish"))
    True
    """

    def rehearse(self, function: Callable[[], None]) -> None:
        """Call it."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Take down what it does, without doing it; what is returned does it."""

    def finish(self) -> None:
        """Wait until all is done: what was taken down may be forgotten then."""


class CudaGraphs:
    """Capture by ``torch.cuda.CUDAGraph``, on a stream of its own.

    Args:
        device: a CUDA device.

    >>> from pyro_ssm.infer.smc.capture import CudaGraphs
    >>> CudaGraphs.__name__
    'CudaGraphs'
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def rehearse(self, function: Callable[[], None]) -> None:
        """Call it on the stream on which it will be captured: libraries make their handles and workspaces there."""
        with torch.cuda.device(self._device):
            now = torch.cuda.current_stream()
            self._stream.wait_stream(now)
            with torch.cuda.stream(self._stream):
                function()
            now.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Its graph's ``replay``."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay

    def finish(self) -> None:
        """Wait for the replays."""
        torch.cuda.current_stream(self._device).synchronize()
