"""diffusers' caches for `benchmark_frontier.py`; imported by that script.

Each is tried with many settings, also such as only somebody who knows it well would choose. DiT's
block is one of those that the hooks know; what the model's class lacks is `CacheMixin`, which is
mixed in here.
"""

import ast
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from frontier_measure import BlockCounter, Sampler, Settings, Task, grid, named, silence


class Announced:
    """A model that is told at every call where in the trajectory it is, as by a pipeline."""

    def __init__(self, model: Any, task: Task) -> None:
        self.model, self.config, self.task, self.step = model, model.config, task, 0

    def __call__(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: Any) -> Any:
        sigma = self.task.noise_share(timestep[0])
        place = {"step_index": self.step, "num_inference_steps": self.task.steps, "sigma": sigma}
        self.step += 1
        with self.model.cache_context("batched", **place):
            return self.model(x, timestep=timestep, class_labels=class_labels)

    def restart(self) -> None:
        """What a pipeline does between two requests."""
        self.step = 0
        self.model._reset_stateful_cache()


def hooked(config: Any, task: Task) -> tuple[Announced, BlockCounter]:
    """The denoiser with one of diffusers' caches."""
    from diffusers import CacheMixin

    model = task.load()
    counter = BlockCounter(model, task.steps)
    model.__class__ = type("CachedDiT", (type(model), CacheMixin), {})
    model.enable_cache(config)
    return Announced(model, task), counter


def diffusers_cache(config: Any, task: Task) -> Sampler:
    denoiser, counter = hooked(config, task)

    def run(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        denoiser.restart()
        return task.sample(denoiser, labels, seed), counter.take()

    return run


def diffusers_first_block_cache(task: Task) -> Settings:
    from diffusers import FirstBlockCacheConfig

    for threshold in (*(0.02 * n for n in range(2, 16)), 0.34, 0.38, 0.42, 0.5, 0.6, 0.8):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield (
            named(threshold=round(threshold, 2)),
            functools.partial(diffusers_cache, config, task),
        )


@functools.cache
def mag_ratios(task: Task) -> list[float]:
    """MagCache's table for this model, by its own calibration."""
    from diffusers import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=task.steps)
    denoiser, _ = hooked(config, task)
    with silence() as text:
        task.calibration_run(denoiser)
    tables = [
        ast.literal_eval(found) for found in re.findall(r"^\[[\d.,e\- ]+\]$", text.getvalue(), re.M)
    ]
    return [sum(ratios) / len(tables) for ratios in zip(*tables, strict=True)]


def diffusers_mag_cache(task: Task) -> Settings:
    from diffusers import MagCacheConfig

    def make(setting: dict[str, Any]) -> Sampler:
        config = MagCacheConfig(
            **setting, num_inference_steps=task.steps, mag_ratios=mag_ratios(task)
        )
        return diffusers_cache(config, task)

    for setting in grid(
        threshold=(0.04, 0.08, 0.16, 0.32, 1.0),
        max_skip_steps=(1, 2, 3, 5),
        retention_ratio=(0.1, 0.2, 0.3),
    ):
        yield named(**setting), functools.partial(make, setting)


#: What TaylorSeer forecasts: the paper's choice, whole blocks, and its "lite" variant by hand
#: (the presets look for "attn" and "proj_out", which DiT calls "attn1" and "proj_out_2").
TAYLOR_PARTS: dict[str, dict[str, list[str]]] = {
    "attention and feed-forward": {
        "cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|ff)"],
    },
    "blocks": {"cache_identifiers": [r"transformer_blocks\.\d+"]},
    "output": {
        "cache_identifiers": ["proj_out_2"],
        "skip_predict_identifiers": [r"transformer_blocks\.\d+"],
    },
}


def diffusers_taylorseer(task: Task) -> Settings:
    from diffusers import TaylorSeerCacheConfig

    def make(parts: dict[str, Any], setting: dict[str, Any]) -> Sampler:
        config = TaylorSeerCacheConfig(**parts, **setting, taylor_factors_dtype=torch.float32)
        return diffusers_cache(config, task)

    presets: dict[str, dict[str, Any]] = {"preset": {}, "lite preset": {"use_lite_mode": True}}
    for name, parts in presets.items():
        setting = {"cache_interval": 3, "max_order": 1, "disable_cache_before_step": 3}
        yield name, functools.partial(make, parts, setting)
    for setting in grid(
        cache_interval=(2, 3, 4, 5, 6),
        max_order=(1, 2, 3),
        disable_cache_before_step=(3, 4, 6, 9),
        disable_cache_after_step=(task.steps - 1, None),
    ):
        name = f"blocks, {named(**setting)}"
        yield name, functools.partial(make, TAYLOR_PARTS["blocks"], setting)
    for name, setting in itertools.product(
        ("attention and feed-forward", "output"),
        grid(cache_interval=(2, 3, 5), max_order=(1, 3), disable_cache_before_step=(4,)),
    ):
        yield f"{name}, {named(**setting)}", functools.partial(make, TAYLOR_PARTS[name], setting)


def diffusers_sea_cache(task: Task) -> Settings:
    from diffusers import SeaCacheConfig

    def latents(model: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The latent of each sample, [C, 1, H, W]; both halves of the batch are the same."""
        x = args[0]
        return list(x[: len(x) // 2, :, None])

    def make(setting: dict[str, Any]) -> Sampler:
        config = SeaCacheConfig(**setting, raw_vision_callback=latents)
        return diffusers_cache(config, task)

    thresholds = {"threshold": (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)}
    for setting in itertools.chain(
        grid(**thresholds, residual_order=(0, 1), retention_steps=(1, 4)),
        grid(**thresholds, residual_order=(1,), power_exp=(2.0,)),
        grid(threshold=(0.3, 0.5, 1.0), residual_order=(1,), max_consecutive_cached=(1, 3, 5)),
    ):
        yield named(**setting), functools.partial(make, setting)


#: Name: its settings. What it needs is imported when it is asked for them.
DIFFUSERS: dict[str, Callable[[Task], Settings]] = {
    "diffusers FirstBlockCache": diffusers_first_block_cache,
    "diffusers MagCache": diffusers_mag_cache,
    "diffusers TaylorSeer": diffusers_taylorseer,
    "diffusers SeaCache": diffusers_sea_cache,
}
