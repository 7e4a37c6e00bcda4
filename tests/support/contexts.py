"""Samples whose tokens ranks share: what `test_sharded.py` runs on every rank."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import zoo
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from launch import communicated
from pipelines import PIPELINES
from solving import NEVER, POLICIES, STEPS, compare, decided, solve

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache


def attention_with_lse(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    scale: float | None = None,
    **others: Any,
) -> Any:
    """In the place of diffusers' native attention, which does not give what a ring needs."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    output = (scores.softmax(-1) @ v).transpose(1, 2)
    asked = others.get("return_lse", options[5] if len(options) > 5 else False)
    return (output, scores.logsumexp(-1).transpose(1, 2)) if asked else output


torch.accelerator.device_count = lambda: 1  # of a CPU: 0, by which diffusers divides
warnings.filterwarnings("ignore", category=FutureWarning)


def shared_context(ring: int = 1, ulysses: int = 1) -> ContextParallelConfig:
    if ring > 1:
        attention_dispatch._native_attention_forward_op = attention_with_lse
    return ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses)


def context(
    name: str,
    *,
    before: bool = False,
    backend: str = "eager",
    policies: Sequence[Any] = POLICIES[:1],
    **degrees: int,
) -> None:
    """A model of the zoo through diffusers' own `enable_parallelism`."""
    (whole, inputs), (model, _) = zoo.make(name), zoo.make(name)

    def at(step: int) -> dict[str, Any]:
        return {**zoo.at_step(name, inputs, step), "return_dict": False}

    denoiser: Any = None
    if before:
        denoiser = fxcache.transform(model, NEVER, backend=backend)
        denoiser.enable_parallelism(config=shared_context(**degrees))
    else:
        model.enable_parallelism(config=shared_context(**degrees))
        plain = solve(model, at)
        denoiser = fxcache.transform(model, NEVER, backend=backend)
    if before:
        solve(denoiser, at)
        plain = solve(fxcache.restore(denoiser), at)
        denoiser = fxcache.transform(model, NEVER, backend=backend)
    compare(whole, denoiser, plain, at, is_eager=backend == "eager", policies=policies)
    if backend == "eager":  # of a measurement: one collective, however many groups there are
        denoiser.policy = FirstBlockCache(threshold=math.inf)
        denoiser.reset()
        with torch.no_grad():
            denoiser(**at(0))
            assert communicated(lambda: denoiser(**at(1)))["all_reduce"] == 1
        assert decided(denoiser) == [False, True]


def ulysses() -> None:
    context("flux", ulysses=2, policies=POLICIES[2:])


def ring() -> None:
    context("wan_t2v", ring=2, before=True)


def ulysses_compiled() -> None:
    context("flux", ulysses=2, backend="inductor")


def mesh() -> None:
    """On four ranks, both at once."""
    context("flux", ring=2, ulysses=2)


def pipelines() -> None:
    """A pipeline of which two ranks compute the denoiser: the same pictures as one process."""
    for name in ("flux", "wan_t2v"):
        family, pictures = PIPELINES[name], []
        for shares in (False, True):
            pipe = family.build()
            if shares:
                pipe.transformer.enable_parallelism(config=shared_context(ulysses=2))
            with fxcache.apply(pipe, AdaptiveCache(tolerance=0.5), backend="eager") as handle:
                pictures.append(family.call(pipe, "a cat", steps=STEPS, size=32, batch=1))
                pictures.append(torch.tensor([r.is_hit for r in handle.report().records]))
        assert pictures[1].any()
        assert torch.equal(pictures[1], pictures[3]), pictures
        torch.testing.assert_close(pictures[0], pictures[2], atol=1e-5, rtol=1e-5)
