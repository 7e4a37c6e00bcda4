"""Small things that several tests need."""

from collections.abc import Callable
from typing import Any

import torch
from comparing import assert_close as assert_close
from comparing import assert_identical, tensors
from policies import ALWAYS
from policies import NEVER as NEVER
from torch import nn

import fxcache
from fxcache.runtime.device import Reading, Replay


def adopt(denoiser: Any, policy: Any) -> Any:
    """`denoiser`, anew and with any other policy: it holds from the next trajectory on, so one is
    begun. It is captured anew only if probe, span, ring or checks differ.
    """
    denoiser.policy = policy
    with denoiser.trajectory():
        pass
    denoiser.reset()
    return denoiser


def hits(denoiser: nn.Module) -> list[bool]:
    """Whether each evaluation so far was a hit."""
    return [record.is_hit for record in denoiser.report().records]


def sample(batch: int = 2, tokens: int = 8, seed: int = 0) -> torch.Tensor:
    """A sample for the hand-written models of the zoo."""
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(seed))


def times(t: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), float(t))


def solve(denoiser: nn.Module, steps: int = 4, seed: int = 0, **shape: int) -> list[torch.Tensor]:
    """The outputs of a trajectory on slowly moving samples, with falling timesteps."""
    x = sample(seed=seed, **shape)
    return [denoiser(x + 0.05 * i, times(1 - i / steps, len(x))) for i in range(steps)]


def evaluate(denoiser: nn.Module, inputs: dict[str, Any], expected: Any) -> None:
    """A trajectory, of everything anew: a miss that gives `expected`, then two hits."""
    denoiser.reset()
    assert_identical(denoiser(**inputs), expected)
    for t in (0.9, 0.8):
        denoiser(**{**inputs, "t": inputs["t"] * t})
    assert hits(denoiser) == [False, True, True]


class EagerDevice:
    """The same interface by running the work again: what a replay would do, on any device.

    Unlike a GPU's, a capture runs the work, too: once more than the model asked for.
    """

    def capture(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        results = work()

        @torch.inference_mode()  # for a replay, it does not matter where the results came from
        def replay() -> None:
            for static, new in zip(tensors(results), tensors(work()), strict=True):
                static.copy_(new)

        return replay, results

    def read(self, source: torch.Tensor) -> Reading:
        copied = source.clone()
        return copied.tolist


class CountingDevice(EagerDevice):
    """Stands in for a GPU and counts what it is asked for."""

    def __init__(self) -> None:
        self.captures = self.replays = self.reads = 0

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        replay, results = super().capture(work)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, results

    def read(self, source: torch.Tensor) -> Callable[[], list[float]]:
        self.reads += 1
        return super().read(source)

    def counts(self) -> tuple[int, int, int]:
        """Captures, replays and reads since the last time."""
        counted = self.captures, self.replays, self.reads
        self.captures = self.replays = self.reads = 0
        return counted


def as_written(gm: Any, example_inputs: Any) -> Any:
    """A compiler that compiles nothing: not the "eager" backend, which is treated specially."""
    return gm


def graphed(model: nn.Module, policy: Any, **options: Any) -> Any:
    """A denoiser whose pieces the fixture `device` captures."""
    return fxcache.transform(model, policy, backend=as_written, **options)


def plain(model: nn.Module, policy: Any = ALWAYS, **options: Any) -> Any:
    """A denoiser without compiler and graphs."""
    return fxcache.transform(model, policy, backend="eager", **options)


def short(model: nn.Module, policy: Any = ALWAYS, **options: Any) -> Any:
    """A denoiser that takes the shortcut."""
    return plain(model, policy, guards="trajectory", **options)


def seeded(cls: Any) -> Any:
    """An instance in eval mode with seeded weights."""
    torch.manual_seed(0)
    return cls().eval()
