"""What the cache itself costs: a miss against the uncached model, a hit against the floor.

The *floor* is the same model built with the head block only: what a hit could not have skipped.
All are compiled by `--backend` and called in turn in one process, so the ratios hold on a noisy
machine; medians and 10th percentiles are printed.

    python examples/benchmark_overhead.py --size host-bound
    python examples/benchmark_overhead.py --size compute-bound
    python examples/benchmark_overhead.py --size host-bound --blocks 57    # guards of 800 weights
    python examples/benchmark_overhead.py --backend eager                  # what nothing compiles
"""

import argparse
import functools
import json
import math
import platform
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import fxcache
from fxcache.denoiser import DenoiserMethods

SIZES = {
    # heads, width of a head, image tokens, text tokens, calls
    "host-bound": (2, 16, 16, 4, 240),
    "compute-bound": (4, 64, 256, 64, 40),
}
BLOCKS, WARMUP = 12, 3


def build(size: str, blocks: int) -> FluxTransformer2DModel:
    """A Flux of `blocks` blocks, a third of them double-stream, with random weights."""
    heads, width, *_ = SIZES[size]
    torch.manual_seed(0)
    double = max(1, blocks // 3)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=blocks - double,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[width // 4, width // 4, width // 2],
    ).eval()


def separate(model: torch.nn.Module) -> Callable[..., object]:
    """A function that calls `model` and has a code object of its own.

    Two models of one class otherwise share Dynamo's entries, which is fatal without guards.
    """

    def call(**kwargs: torch.Tensor) -> object:
        return model(**kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


def inputs(size: str, step: int) -> dict[str, torch.Tensor]:
    """Inputs of one evaluation; they move a little from step to step."""
    _, _, image, text, _ = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, image, 16, generator=generator)
    return {
        "hidden_states": sample + 0.01 * step,
        "encoder_hidden_states": torch.randn(1, text, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([1.0 - 1e-3 * step]),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def measure(calls: dict[str, object], size: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a call, the contestants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(WARMUP, WARMUP + repeats):  # going on: going back were a new trajectory
        given = inputs(size, step)
        for name, call in calls.items():
            start = time.perf_counter()
            call(**given)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: quantiles(own) for name, own in times.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "p10": ordered[len(ordered) // 10]}


def contestants(
    size: str, blocks: int, backend: str, *, whole: bool
) -> dict[str, Callable[..., object]]:
    """Everybody who is measured, by name; names begin with what they are compared to."""
    model, head = build(size, blocks), build(size, 1)
    # The floor: embeddings, the head block and the output projection, nothing else.
    head.single_transformer_blocks = torch.nn.ModuleList()
    never, always = (fxcache.FirstBlockCache(threshold=t) for t in (0.0, math.inf))
    made: dict[str, Callable[..., object]] = {"uncached": model, "floor": head}
    if backend != "eager":  # else the plain model, as it is called
        made = {
            name: torch.compile(separate(made[name]), backend=backend, fullgraph=True)
            for name in made
        }
    transform = functools.partial(fxcache.transform, backend=backend)
    for name, policy in (("miss", never), ("hit", always)):
        made[name] = transform(model, policy)
        made[f"{name}, guards a trajectory"] = transform(model, policy, guards="trajectory")
        skip = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        made[f"{name}, no module guards"] = transform(model, policy, options=skip)
    if whole:
        made["miss, not outlined"] = transform(model, never, outline=False)
        made["miss, not outlined, guards a trajectory"] = transform(
            model, never, outline=False, guards="trajectory"
        )
    return made


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each miss against the uncached model, each hit against the floor."""
    compared = {}
    for name, row in figures.items():
        if name not in ("uncached", "floor"):
            base = "uncached" if name.startswith("miss") else "floor"
            compared[f"{name} / {base}"] = {k: row[k] / figures[base][k] for k in row}
    return compared


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="host-bound")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--backend", default="inductor", help='or "eager": against the plain model')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="also without outlining (slow)")
    parser.add_argument("--calls", type=int, help="calls of each (default: by size)")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    calls = contestants(args.size, args.blocks, args.backend, whole=args.whole)
    for name, call in calls.items():
        start = time.perf_counter()
        for step in range(WARMUP):
            call(**inputs(args.size, step))
        print(f"{name}: ready in {time.perf_counter() - start:.0f} s", flush=True)
    figures = measure(calls, args.size, args.calls or SIZES[args.size][-1])
    compared = ratios(figures)

    weights = len(list(build(args.size, args.blocks).parameters()))
    print(f"{args.size}, {args.blocks} blocks, {weights} weights, {args.threads} thread(s), "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'':40} {'median ms':>10} {'p10 ms':>10}")
    for name, row in figures.items():
        print(f"{name:40} {row['median']:10.3f} {row['p10']:10.3f}")
    for name, row in compared.items():
        print(f"{name:50} {row['median']:.3f} median, {row['p10']:.3f} p10")
    for name, call in calls.items():
        if isinstance(call, DenoiserMethods):
            report = call.report()
            assert report.recompiles == 0, name
            assert all(r.is_hit == name.startswith("hit") for r in report.records[1:]), name
    if args.output:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {
            "size": args.size,
            "blocks": args.blocks,
            "weights": weights,
            "threads": args.threads,
            "ms": figures,
            "ratios": compared,
            "versions": versions,
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
