"""What a tolerance of AdaptiveCache gives on trained models, against fewer steps at equal cost.

Prints, for each sampler, number of steps, guidance and tolerance: evaluations over computed
evaluations, PSNR against the uncached pictures (mean, and the worst picture), and the PSNR of the
same sampler with as many plain evaluations as were computed.

    python examples/benchmark_adaptive.py
    python examples/benchmark_adaptive.py --model unet --samplers euler heun dpmpp --tolerances 0.08

`--model` is a folder that ``examples/train_demo.py --output`` wrote; without it the demo's model is
taken.
"""

import argparse
import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

import fxcache
from fxcache import AdaptiveCache
from fxcache.demo.sampler import load_denoiser

BATCH, CLASSES = 4, 8
#: By what the model predicts, its samplers.
SAMPLERS: dict[str, dict[str, Any]] = {
    "velocity": {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    },
    "epsilon": {
        "euler": lambda: diffusers.DDIMScheduler(clip_sample=False),
        "heun": lambda: diffusers.HeunDiscreteScheduler(),
        "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler(),
    },
}


def load(folder: Path | None) -> tuple[Any, str]:
    """The model and what it predicts."""
    if folder is None:
        return load_denoiser()[0], "velocity"
    config = json.loads((folder / "config.json").read_text())
    kind, predict = getattr(diffusers, config.pop("_class_name")), config.pop("predict")
    del config["classes"]
    model = kind(**config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, predict


def sample(
    denoiser: Any, scheduler: Any, labels: torch.Tensor, seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [0, 1], both branches of the guidance in one batch."""
    scheduler.set_timesteps(steps)
    shape = (len(labels), 3, denoiser.config.sample_size, denoiser.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])
    is_cached = hasattr(denoiser, "trajectory")
    with denoiser.trajectory(num_steps=steps) if is_cached else nullcontext():
        for time in scheduler.timesteps:
            scaled = x
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, time)
            inputs = {"timestep": time.expand(len(both)), "class_labels": both}
            cond, uncond = denoiser(torch.cat([scaled, scaled]), **inputs).sample.chunk(2)
            x = scheduler.step(uncond + guidance * (cond - uncond), time, x).prev_sample
    return (x.clamp(-1, 1) + 1) / 2


def decibels(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR of each picture; both [N, C, H, W] in [0, 1]."""
    return -10 * (pictures - reference).square().flatten(1).mean(1).clamp_min(1e-10).log10()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default the demo's model")
    parser.add_argument("--samplers", nargs="+", default=["euler"], choices=SAMPLERS["epsilon"])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.08, 0.12])
    parser.add_argument("--batches", type=int, default=3, help=f"of {BATCH} pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, predict = load(args.model)
    numbers = range(1, args.batches + 1)
    batches = [((torch.arange(BATCH) + BATCH * n) % CLASSES, 1000 * n) for n in numbers]

    for name, steps, guidance in itertools.product(args.samplers, args.steps, args.guidance):

        def drawn(
            net: Any, steps: int, name: str = name, guidance: float = guidance
        ) -> torch.Tensor:
            scheduler = SAMPLERS[predict][name]()
            return torch.cat(
                [sample(net, scheduler, labels, seed, steps, guidance) for labels, seed in batches]
            )

        plain = drawn(model, steps)
        for tolerance in args.tolerances:
            denoiser = fxcache.transform(model, AdaptiveCache(tolerance=tolerance), backend="eager")
            ours = decibels(drawn(denoiser, steps), plain)
            report = denoiser.report()
            ratio = len(report.records) / report.misses
            fewer_steps = max(1, round(steps / ratio))
            fewer = decibels(drawn(model, fewer_steps), plain)
            print(
                f"{name}, {steps} steps, guidance {guidance:g}, tolerance {tolerance:g}: "
                f"{ratio:.2f}x {ours.mean():.1f} dB (worst {ours.min():.1f}), "
                f"{fewer_steps} plain steps {fewer.mean():.1f} dB (worst {fewer.min():.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
