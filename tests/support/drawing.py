"""Pipelines of which two ranks compute the denoiser: what `test_sharded.py` runs on every rank."""

from typing import Any

import torch
from contexts import share
from launch import on_one
from pipelines import PIPELINES
from solving import ADAPTIVE, STEPS

import fxcache

BUILT = {name: PIPELINES[name].build() for name in ("flux", "wan_t2v")}  # before the fork


def drawn(name: str) -> tuple[torch.Tensor, list[bool]]:
    """A picture, and what was decided."""
    pipe: Any = BUILT[name]
    with fxcache.apply(pipe, ADAPTIVE, backend="eager") as handle:
        picture = PIPELINES[name].call(pipe, "a cat", steps=STEPS, size=32, batch=1)
        return picture, [record.is_hit for record in handle.report().records]


def pipelines() -> None:
    """The same pictures as one process."""
    for name, pipe in BUILT.items():
        expected, decisions = on_one(lambda name=name: drawn(name))
        assert True in decisions
        share(pipe.transformer, ulysses=2)
        picture, own_decisions = drawn(name)
        assert own_decisions == decisions
        torch.testing.assert_close(picture, expected, atol=1e-5, rtol=1e-5)
