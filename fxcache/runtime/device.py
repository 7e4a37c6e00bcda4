"""What CUDA graphs need of a device, small enough to be stood in for where there is no GPU."""

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
#: Gives the numbers of a tensor that is being copied; waits for the copy, not for later work.
Reading = Callable[[], list[float]]


class GraphDevice(Protocol):
    """Captures work into graphs, replays them, and reads small results back."""

    def capture(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """Record `work`; replaying writes into the very tensors that are returned here.

        `work` need not have run when this returns: replay before using the results.
        """

    def read(self, source: torch.Tensor) -> Reading:
        """Begin to copy `source` to the host, behind the work queued so far."""


class CudaDevice:
    """CUDA graphs in one memory pool, and reads through pinned memory and an event."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        #: Pinned memory and its event, free to use: one a thread that reads at the same time.
        self.free: list[tuple[torch.Tensor, Any]] = []

    def capture(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        # Other threads (data loaders, other requests) may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results

    def read(self, source: torch.Tensor) -> Reading:
        pinned, event = self._pinned(source.numel())
        host = pinned[: source.numel()]
        host.copy_(source, non_blocking=True)
        event.record()

        def numbers() -> list[float]:
            event.synchronize()
            result: list[float] = host.tolist()
            self.free.append((pinned, event))
            return result

        return numbers

    def _pinned(self, numel: int) -> tuple[torch.Tensor, Any]:
        with suppress(IndexError):
            pinned, event = self.free.pop()
            if len(pinned) >= numel:
                return pinned, event
        with torch.inference_mode(False):  # later calls outside of inference_mode write it
            memory = torch.empty(max(numel, 8), dtype=torch.float32, pin_memory=True)
            return memory, torch.cuda.Event()


#: One a device: its pinned memory is used again.
_reader = functools.cache(CudaDevice)


def begin_read(source: torch.Tensor) -> Reading:
    """Begin to read a few float32 numbers: of a GPU, without waiting before they are asked for."""
    return _reader(source.device).read(source) if source.is_cuda else source.tolist


def graph_device(device: torch.device) -> GraphDevice | None:
    """What captures graphs on `device`, None where nothing can."""
    return CudaDevice(device) if device.type == "cuda" else None
