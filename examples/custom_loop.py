"""A sampling loop of one's own, in the style of k-diffusion, with a cached denoiser.

    python examples/custom_loop.py --steps 20 --images 4 --output loop.png

Three samplers by hand: Euler, Heun (two evaluations a step) and ancestral Euler, which adds fresh
noise at every step. The loop says what the cache cannot see by itself: where a trajectory begins
(``denoiser.trajectory``), and which call is which branch of guidance (``denoiser.branch``). Each is
compared with its own uncached run. No threshold suits the noise of the last one: the log says so.

The model (the demo's) predicts a velocity, noise minus picture, at x_t = (1 - t) picture + t noise.
k-diffusion's x = picture + sigma noise is the same point: x_t = x / (1 + sigma) at
t = sigma / (1 + sigma), and ``denoised = x_t - t velocity``.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fxcache
from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import load_denoiser

GUIDANCE = 2.0
#: D(x, sigma): the picture that the model sees in x.
Denoised = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def karras_sigmas(steps: int, low: float = 0.02, high: float = 80.0, rho: float = 7.0) -> Any:
    """The noise levels of Karras et al. (arXiv 2206.00364, eq. 5), and 0."""
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    return torch.cat([ramp, torch.zeros(1)])


def guided(denoiser: Any, labels: torch.Tensor, is_cached: bool) -> Denoised:
    """D(x, sigma) with classifier-free guidance, a call for each of its branches."""
    none = torch.full_like(labels, denoiser.config.num_embeds_ada_norm)

    def one(x: torch.Tensor, t: torch.Tensor, name: str, given: torch.Tensor) -> torch.Tensor:
        branch = denoiser.branch(name) if is_cached else contextlib.nullcontext()
        with branch:
            velocity = denoiser(x, timestep=1000 * t.expand(len(x)), class_labels=given).sample
        return x - t * velocity

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t, x = sigma / (1 + sigma), x / (1 + sigma)
        cond, uncond = one(x, t, "cond", labels), one(x, t, "uncond", none)
        return uncond + GUIDANCE * (cond - uncond)

    return denoised


def euler(model: Denoised, x: torch.Tensor, sigmas: torch.Tensor, seed: int) -> torch.Tensor:
    for now, after in pairwise(sigmas):
        x = x + (after - now) * (x - model(x, now)) / now
    return x


def heun(model: Denoised, x: torch.Tensor, sigmas: torch.Tensor, seed: int) -> torch.Tensor:
    for now, after in pairwise(sigmas):
        slope = (x - model(x, now)) / now
        there = x + (after - now) * slope
        if after > 0:  # the second evaluation, at the next step's noise level
            slope = (slope + (there - model(there, after)) / after) / 2
        x = x + (after - now) * slope
    return x


def ancestral(model: Denoised, x: torch.Tensor, sigmas: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    for now, after in pairwise(sigmas):
        up = (after**2 * (now**2 - after**2) / now**2).sqrt()
        down = (after**2 - up**2).sqrt()
        x = x + (down - now) * (x - model(x, now)) / now
        x = x + up * torch.randn(x.shape, generator=generator)
    return x


SAMPLERS = {"euler": euler, "heun": heun, "ancestral": ancestral}


@torch.no_grad()
def sample(denoiser: Any, name: str, labels: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [0, 1]; `denoiser` is the model, or the model behind a cache."""
    is_cached = hasattr(denoiser, "trajectory")
    config, sigmas = denoiser.config, karras_sigmas(steps)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    announced = denoiser.trajectory(num_steps=steps) if is_cached else contextlib.nullcontext()
    with announced:
        model = guided(denoiser, labels, is_cached)
        x = SAMPLERS[name](model, sigmas[0] * noise, sigmas, seed)
    return (x.clamp(-1, 1) + 1) / 2


def save_grid(rows: list[torch.Tensor], path: Path) -> None:
    """The pictures of each row beside each other."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.15, help="of First Block Cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="eager", help="what compiles the pieces")
    parser.add_argument("--output", type=Path, help="a PNG: uncached and cached, by sampler")
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="log: %(message)s")

    model, classes = load_denoiser()
    labels = torch.arange(args.images) % len(classes)
    policy = fxcache.FirstBlockCache(
        threshold=args.threshold,
        forecast=fxcache.Taylor(order=1),
        warmup_steps=3,
        max_consecutive_hits=1,
    )
    denoiser = fxcache.transform(model, policy, backend=args.backend)
    rows = []
    for name in SAMPLERS:
        denoiser.reset()
        uncached = sample(model, name, labels, args.steps, args.seed)
        cached = sample(denoiser, name, labels, args.steps, args.seed)
        print(f"{name}: PSNR to the uncached run {psnr(cached, uncached):.1f} dB")
        print(f"  {str(denoiser.report()).splitlines()[-1]}")
        rows += [uncached, cached]
    if args.output:
        save_grid(rows, args.output)
        print(f"pictures: {args.output}")


if __name__ == "__main__":
    main()
