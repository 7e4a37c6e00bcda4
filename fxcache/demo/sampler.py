"""The demo's trained denoiser and its sampler."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.resources import as_file, files
from itertools import pairwise
from typing import Any, cast

import torch

from fxcache.policy import StepSchedule
from fxcache.policy.schedule_file import load_schedule

GUIDANCE = 2.0


def load_denoiser() -> tuple[Any, tuple[str, ...]]:
    """The denoiser that ships with fxcache, in float32 and eval mode, and its class names.

    A diffusers ``DiTTransformer2DModel`` trained by ``examples/train_demo.py`` on 724 bitmaps of
    the Noto Color Emoji font (SIL Open Font License 1.1).
    """
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import load

    folder = files("fxcache.demo") / "model"
    config = json.loads((folder / "config.json").read_text())
    classes = tuple(config.pop("classes"))
    del config["_class_name"]
    model: Any = cast(Any, DiTTransformer2DModel)(**config)
    model.load_state_dict(load((folder / "model.safetensors").read_bytes()))
    return model.eval(), classes


def tuned_schedule() -> StepSchedule:
    """What ``fxcache tune demo --target-speedup 1.98 --runs 3 --seed 100`` found."""
    with as_file(files("fxcache.demo") / "model" / "schedule.json") as path:
        return load_schedule(path)


def sample(denoiser: Any, labels: torch.Tensor, *, steps: int, seed: int) -> torch.Tensor:
    """Flow-matching Euler sampling with classifier-free guidance, both branches in one batch.

    Args:
        denoiser: predicts noise minus picture; trained with labels 0 .. C - 1 and C for none.
        labels: int64 [N].
        steps: Euler steps from t = 1 to 0.
        seed: of the noise.

    Returns:
        Pictures, float32 [N, 3, H, W] in [0, 1].
    """
    *_, pictures = trajectory(denoiser, labels, steps=steps, seed=seed)
    return pictures


def sampling_target() -> tuple[Any, Any]:
    """The denoiser, and a function of (denoiser, seed) that samples 8 pictures in 30 steps: what
    `fxcache.calibrate` and `fxcache.tune` take.
    """
    model, classes = load_denoiser()

    def run(denoiser: Any, seed: int) -> torch.Tensor:
        labels = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))[:8]
        return sample(denoiser, labels, steps=30, seed=seed)

    return model, run


def trajectory(
    denoiser: Any, labels: torch.Tensor, *, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """The pictures after each step of `sample`, so that samplers can take turns."""
    config = denoiser.config
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
    announced = getattr(denoiser, "trajectory", lambda num_steps: nullcontext())
    with announced(num_steps=steps):
        for now, after in pairwise(torch.linspace(1, 0, steps + 1)):
            timestep = (now * 1000).expand(len(both))
            with torch.no_grad():
                velocity = denoiser(torch.cat([x, x]), timestep=timestep, class_labels=both).sample
                cond, uncond = velocity.chunk(2)
                x = x + (after - now) * (uncond + GUIDANCE * (cond - uncond))
            yield (x.clamp(-1, 1) + 1) / 2
