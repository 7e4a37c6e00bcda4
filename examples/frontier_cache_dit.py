"""cache-dit's caches for `benchmark_frontier.py`; imported by that script.

cache-dit has an adapter for DiT. Each cache is tried with many settings.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from frontier_measure import BlockCounter, Sampler, Settings, Task, grid, named, regular_masks


def cache_dit_cache(config: dict[str, Any], calibrator: Any, task: Task) -> Sampler:
    """cache-dit's adapter for DiT; `config` is that of its DBCache."""
    import cache_dit

    def configs() -> dict[str, Any]:
        cache = cache_dit.DBCacheConfig(
            **config, num_inference_steps=task.steps, enable_separate_cfg=False
        )
        return {"cache_config": cache, "calibrator_config": calibrator}

    model = task.load()
    counter = BlockCounter(model, task.steps)
    cache_dit.enable_cache(model, **configs())

    def run(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        cache_dit.refresh_context(model, **configs())
        return task.sample(model, labels, seed), counter.take()

    return run


def calibrators() -> dict[str, Any]:
    """cache-dit's forecasters, for the hidden states' residual."""
    from cache_dit.caching import cache_contexts

    def taylor(order: int) -> Any:
        return cache_contexts.TaylorSeerCalibratorConfig(taylorseer_order=order)

    kinds = {f"TaylorSeer {order}": taylor(order) for order in (1, 2, 3)}
    kinds["FoCa"] = cache_contexts.calibrators.FoCaCalibratorConfig()
    kinds["DMD"] = cache_contexts.calibrators.DMDCalibratorConfig()
    for config in kinds.values():
        config.enable_encoder_calibrator = False  # DiT has no encoder's hidden states
    return kinds


#: A head block; two; one and a tail block.
ONE, TWO, TAIL = [
    {"Fn_compute_blocks": f, "Bn_compute_blocks": b} for f, b in ((1, 0), (2, 0), (1, 1))
]


def cache_dit_db_cache(task: Task) -> Settings:
    thresholds = {"residual_diff_threshold": (0.08, 0.12, 0.18, 0.25, 0.4, 1.0)}
    settings = [
        {**blocks, **rest}
        for blocks, choices in (
            (ONE, {"max_continuous_cached_steps": (1, 2, 4, 8), "max_warmup_steps": (3, 6)}),
            (TWO, {"max_continuous_cached_steps": (2,), "max_warmup_steps": (6,)}),
            (TAIL, {"max_continuous_cached_steps": (2,), "max_warmup_steps": (6,)}),
        )
        for rest in grid(**thresholds, **choices)
    ]
    for config in settings:
        yield named(**config), functools.partial(cache_dit_cache, config, None, task)


def cache_dit_forecast(task: Task) -> Settings:
    """DBCache with cache-dit's forecasters; 1.0 hits whenever it may."""
    often = grid(
        residual_diff_threshold=(1.0,),
        max_continuous_cached_steps=(1, 2, 3, 4, 6),
        max_warmup_steps=(3, 6, 9),
    )
    configs = [{**ONE, **setting} for setting in often]
    limited = {"max_continuous_cached_steps": 4, "max_warmup_steps": 6}
    configs += [{**ONE, "residual_diff_threshold": 0.15, **limited}]
    configs += [{**blocks, "residual_diff_threshold": 1.0, **limited} for blocks in (TWO, TAIL)]
    for (name, calibrator), config in itertools.product(calibrators().items(), configs):
        make = functools.partial(cache_dit_cache, config, calibrator, task)
        yield f"{name}, {named(**config)}", make


def cache_dit_steps_mask(task: Task) -> Settings:
    """Its presets, and a regular distance after a warm-up; the last step is computed."""
    from cache_dit import steps_mask

    masks = {}
    for policy in ("slow", "medium", "fast", "ultra"):
        masks[policy] = steps_mask(total_steps=task.steps, mask_policy=policy)
    for name, hits in regular_masks(task.steps).items():
        masks[name] = [int(not is_hit) for is_hit in hits]
    known = calibrators()
    kinds = {
        "reuse": None,
        **{name: known[name] for name in ("TaylorSeer 1", "TaylorSeer 3", "DMD")},
    }
    for (name, mask), (kind, calibrator) in itertools.product(masks.items(), kinds.items()):
        config = {
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "max_warmup_steps": task.steps,
            "steps_computation_mask": mask,
            "steps_computation_policy": "static",
        }
        make = functools.partial(cache_dit_cache, config, calibrator, task)
        yield f"{kind}, {name}", make


#: Name: its settings. What it needs is imported when it is asked for them.
CACHE_DIT: dict[str, Callable[[Task], Settings]] = {
    "cache-dit DBCache": cache_dit_db_cache,
    "cache-dit DBCache + forecast": cache_dit_forecast,
    "cache-dit steps mask": cache_dit_steps_mask,
}
