"""Small things that several tests need."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

import fxcache
from fxcache import FirstBlockCache, StepSchedule, Taylor
from fxcache.runtime.device import Reading, Replay

NEVER = FirstBlockCache(threshold=0.0)
ALWAYS = FirstBlockCache(threshold=math.inf)
ALTERNATE = FirstBlockCache(threshold=math.inf, max_consecutive_hits=1)
TAYLOR = FirstBlockCache(threshold=math.inf, warmup_steps=3, forecast=Taylor(order=2))
FORECAST = FirstBlockCache(
    threshold=math.inf, warmup_steps=3, max_consecutive_hits=2, forecast=Taylor(order=2)
)
MASK = StepSchedule(mask=[False, True, True, False, True, True, False, True])

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution")


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, whatever its type."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def assert_identical(actual: Any, expected: Any) -> None:
    """Same number of tensors, each the same bit for bit."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), f"differs by {(a.float() - b.float()).abs().max()}"


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` relative to the largest value."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        scale = b.abs().max().clamp_min(1e-6)
        assert ((a - b).abs().max() / scale) < tolerance


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


def count_products(call: Callable[[], Any], inside: str | None = None) -> int:
    """Matrix products and convolutions that `call` runs, as the profiler sees them.

    With `inside`, only those within a `record_function` of that name.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    counted = [event for event in profiler.events() if event.name in PRODUCTS]
    if inside is None:
        return len(counted)
    return sum(any(a.name == inside for a in _ancestors(event)) for event in counted)


def _ancestors(event: Any) -> list[Any]:
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event)
    return found


class Marked:
    """While open, calls of `modules` show as "span" to the profiler."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.handles, self.open = modules, [], []

    def __enter__(self) -> "Marked":
        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave))
        return self

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.open.append(record_function("span"))
        self.open[-1].__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.pop().__exit__(None, None, None)

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def sample(batch: int = 2, tokens: int = 8, seed: int = 0) -> torch.Tensor:
    """A sample for the hand-written models of the zoo."""
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(seed))


def times(t: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), float(t))


def solve(denoiser: nn.Module, steps: int = 4, seed: int = 0, **shape: int) -> list[torch.Tensor]:
    """The outputs of a trajectory on slowly moving samples, with falling timesteps."""
    x = sample(seed=seed, **shape)
    return [denoiser(x + 0.05 * i, times(1 - i / steps, len(x))) for i in range(steps)]


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
