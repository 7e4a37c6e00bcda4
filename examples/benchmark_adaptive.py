"""What a tolerance of AdaptiveCache gives on the demo's model, against fewer steps at equal cost.

Prints, for each number of steps and tolerance: steps over computed steps, PSNR against the uncached
pictures (mean, and the worst picture), and the PSNR of as many plain steps as were computed.

    python examples/benchmark_adaptive.py
    python examples/benchmark_adaptive.py --steps 30 --tolerances 0.08 --batches 1
"""

import argparse

import torch

import fxcache
from fxcache import AdaptiveCache
from fxcache.demo.sampler import load_denoiser, sample

BATCH = 4


def decibels(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR of each picture; both [N, C, H, W] in [0, 1]."""
    return -10 * (pictures - reference).square().flatten(1).mean(1).clamp_min(1e-10).log10()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 50])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.08, 0.1])
    parser.add_argument("--batches", type=int, default=3, help=f"of {BATCH} pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, classes = load_denoiser()
    numbers = range(1, args.batches + 1)
    batches = [((torch.arange(BATCH) + BATCH * n) % len(classes), 1000 * n) for n in numbers]

    def drawn(net: object, steps: int) -> list[torch.Tensor]:
        return [sample(net, labels, steps=steps, seed=seed) for labels, seed in batches]

    for steps in args.steps:
        plain = torch.cat(drawn(model, steps))
        for tolerance in args.tolerances:
            denoiser = fxcache.transform(model, AdaptiveCache(tolerance=tolerance), backend="eager")
            ours = decibels(torch.cat(drawn(denoiser, steps)), plain)
            computed = denoiser.report().misses / len(batches)
            fewer = decibels(torch.cat(drawn(model, max(1, round(computed)))), plain)
            print(
                f"{steps} steps, tolerance {tolerance:g}: {steps / computed:.2f}x "
                f"{ours.mean():.1f} dB (worst {ours.min():.1f}), "
                f"{round(computed)} plain steps {fewer.mean():.1f} dB",
                flush=True,
            )


if __name__ == "__main__":
    main()
