"""How outputs are compared, and work is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

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
