"""What takes part in the race of `benchmark_peers.py`: the steps, the contestants, what they hold.

This file is imported by that script; run that one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import benchmark_overhead as overhead
import torch

import fxcache

overhead.SIZES.setdefault("small", (4, 32, 64, 16, 100))
#: m: the latent jumps, a miss; h: it hardly moves, a hit. Single hits and two in a row.
PATTERN = "mmhmhhmhmhmhhmhmmhmm"
HITS = [letter == "h" for letter in PATTERN]
THRESHOLD = 0.15


@dataclass
class Contestant:
    """A model made ready: how to call it, how to start a trajectory, and what it says it did."""

    call: Callable[..., Any]
    trajectory: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    #: Whether the last call was a hit, by the contestant's own account.
    was_hit: Callable[[], bool | None] = lambda: None
    #: Everything in which it keeps tensors from step to step.
    state: Callable[[], Any] = lambda: None


def uncached(model: torch.nn.Module, how: str) -> Contestant:
    return Contestant(model if how == "eager" else torch.compile(model, fullgraph=True))


def diffusers_cache(model: Any, how: str) -> Contestant:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    (hook,) = model.transformer_blocks[0]._diffusers_hook.hooks.values()

    @contextlib.contextmanager
    def trajectory() -> Iterator[None]:
        model._reset_stateful_cache()  # what pipelines do through maybe_free_model_hooks
        yield

    def was_hit() -> bool:
        return not hook.state_manager._state_cache["cond"].should_compute

    return Contestant(compiled(model, how), trajectory, was_hit, lambda: hook.state_manager)


def cache_dit_cache(model: Any, how: str) -> Contestant:
    import cache_dit

    def config() -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=THRESHOLD,
            max_warmup_steps=0,
            enable_separate_cfg=False,
            num_inference_steps=len(PATTERN),
        )

    cache_dit.enable_cache(model, cache_config=config())
    # One context: cache-dit joins Flux's two lists of blocks into one stack, as fxcache does.
    (name,) = model._context_names

    def context() -> Any:
        return model._context_manager.get_context(name)

    @contextlib.contextmanager
    def trajectory() -> Iterator[None]:
        cache_dit.refresh_context(model, cache_config=config())
        yield

    def was_hit() -> bool:
        return context().get_current_step() in context().get_cached_steps()

    return Contestant(compiled(model, how), trajectory, was_hit, lambda: context().buffers)


def compiled(model: Any, how: str) -> Any:
    """`model` after a cache was enabled on it: as it is, compiled whole, or block by block.

    Both peers break the graph by design, so ``fullgraph=True`` is not for them.
    """
    if how == "compiled":
        return torch.compile(model)
    if how == "regional":
        model.compile_repeated_blocks()
    return model


def fxcache_cache(model: torch.nn.Module, how: str) -> Contestant:
    policy = fxcache.FirstBlockCache(threshold=THRESHOLD)
    options = {
        "eager": {"backend": "eager"},
        "inductor": {},
        "trajectory": {"guards": "trajectory"},
        "whole": {"guards": "trajectory", "outline": False},
    }
    denoiser = fxcache.transform(model, policy, **options[how])
    return Contestant(
        denoiser,
        lambda: denoiser.trajectory(num_steps=len(PATTERN)),
        lambda: denoiser.report().records[-1].is_hit,
        lambda: denoiser.report().cached_bytes,
    )


#: Name: how it is built, and the distribution it needs besides diffusers.
CONTESTANTS: dict[str, tuple[Callable[[Any, str], Contestant], str, str]] = {
    "uncached eager": (uncached, "eager", "diffusers"),
    "uncached compiled": (uncached, "compiled", "diffusers"),
    "diffusers eager": (diffusers_cache, "eager", "diffusers"),
    "diffusers compiled": (diffusers_cache, "compiled", "diffusers"),
    "diffusers regional": (diffusers_cache, "regional", "diffusers"),
    "cache-dit eager": (cache_dit_cache, "eager", "cache-dit"),
    "cache-dit compiled": (cache_dit_cache, "compiled", "cache-dit"),
    "cache-dit regional": (cache_dit_cache, "regional", "cache-dit"),
    "fxcache eager": (fxcache_cache, "eager", "fxcache"),
    "fxcache inductor": (fxcache_cache, "inductor", "fxcache"),
    "fxcache trajectory": (fxcache_cache, "trajectory", "fxcache"),
    "fxcache trajectory whole": (fxcache_cache, "whole", "fxcache"),
}


def latents(size: str, number: int) -> list[dict[str, torch.Tensor]]:
    """The inputs of trajectory `number`: a new latent where it shall miss, the old one else."""
    generator = torch.Generator().manual_seed(1000 + number)
    steps = []
    for step, is_hit in enumerate(HITS):
        given = overhead.inputs(size, step)
        shape = given["hidden_states"].shape
        if is_hit:
            drift = 0.02 * torch.randn(shape, generator=generator)
            given["hidden_states"] = steps[-1]["hidden_states"] + drift
        else:
            given["hidden_states"] = torch.randn(shape, generator=generator)
        # The time embedding is the same for all blocks; almost no change of it is a jump.
        given["timestep"] = torch.tensor([1.0 - 1e-6 * step])
        steps.append(given)
    return steps


def reference(model: Any, steps: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What a First Block Cache must give, by hooks that compute everything and then discard it.

    It is told where to hit. On a hit the first block adds what the others added at the last miss,
    and the others hand on what they got.
    """
    first, *others = [*model.transformer_blocks, *model.single_transformer_blocks]
    after_first: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    is_hit = False

    def at_first(block: Any, args: Any, output: Any) -> Any:
        after_first[:] = output
        return tuple(map(torch.add, output, residuals)) if is_hit else output

    def at_others(block: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if is_hit:
            return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        residuals[:] = map(torch.sub, output, after_first)  # the last block's remain
        return output

    hooks = [first.register_forward_hook(at_first)]
    hooks += [block.register_forward_hook(at_others, with_kwargs=True) for block in others]
    outputs = []
    for is_hit, given in zip(HITS, steps, strict=True):  # noqa: B007 - the hooks read it
        outputs.append(model(**given).sample)
    for hook in hooks:
        hook.remove()
    return outputs


def held_bytes(root: Any) -> int | None:
    """Bytes of the storages behind all tensors in `root`, each once; None if there is no state.

    Storages, because a small view keeps all of what it looks at alive.
    """
    if root is None or isinstance(root, int):
        return root
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    open_ends = [root]
    while open_ends:
        item = open_ends.pop()
        if id(item) in seen or isinstance(item, torch.nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            open_ends.extend(item.values())
        elif isinstance(item, list | tuple):
            open_ends.extend(item)
        elif hasattr(item, "__dict__"):
            open_ends.extend(vars(item).values())
    return sum(sizes.values())


def count_compiled() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def count_regions(contestant: Contestant, steps: list[Any]) -> dict[str, int]:
    """How many Inductor graphs the last miss and the last hit of a trajectory run."""
    regions = {}
    with contestant.trajectory(), silent_stderr():  # some builds print as the profiler starts
        for is_hit, given in zip(HITS, steps, strict=True):
            context = contestant.call.cache_context("cond")
            with torch.autograd.profiler.profile(use_kineto=False) as profiler, context:
                contestant.call(**given)
            names = [event.name for event in profiler.function_events]
            key = "regions_hit" if is_hit else "regions_miss"
            regions[key] = sum("Call CompiledFxGraph" in name for name in names)
    return regions


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing reaches this process's stderr inside, not even from C++."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
