"""What the cache itself costs: a miss against the uncached model, a hit against the floor.

The *floor* is the same model built with the head block only: what a hit could not have skipped.
All four are compiled by Inductor and called in turn in one process, so the ratios hold on a noisy
machine; medians and 10th percentiles are printed.

    python examples/benchmark_overhead.py --size host-bound
    python examples/benchmark_overhead.py --size compute-bound
"""

import argparse
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

SIZES = {
    # heads, width of a head, image tokens, text tokens, calls
    "host-bound": (2, 16, 16, 4, 240),
    "compute-bound": (4, 64, 256, 64, 40),
}
BLOCKS = 12


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
    for step in range(repeats):
        given = inputs(size, step)
        for name, call in calls.items():
            start = time.perf_counter()
            call(**given)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"median": sorted(t)[len(t) // 2], "p10": sorted(t)[len(t) // 10]}
        for name, t in times.items()
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="host-bound")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--skip-guards",
        action="store_true",
        help="for all four, torch.compiler.skip_guard_on_all_nn_modules_unsafe: Dynamo then does "
        "not notice weights or modules that were replaced",
    )
    parser.add_argument("--calls", type=int, help="calls of each (default: by size)")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, head = build(args.size, BLOCKS), build(args.size, 1)
    # The floor: embeddings, the head block and the output projection, nothing else.
    head.single_transformer_blocks = torch.nn.ModuleList()
    skip = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    options = skip if args.skip_guards else {}
    never, always = (fxcache.FirstBlockCache(threshold=t) for t in (0.0, math.inf))
    hit = fxcache.transform(model, always, options=dict(options))
    calls = {
        "uncached": torch.compile(separate(model), fullgraph=True, options=dict(options)),
        "miss": fxcache.transform(model, never, options=dict(options)),
        "hit": hit,
        "floor": torch.compile(separate(head), fullgraph=True, options=dict(options)),
    }
    for step in range(3):
        for call in calls.values():
            call(**inputs(args.size, step))
    hit.reset()
    hit(**inputs(args.size, 0))
    figures = measure(calls, args.size, args.calls or SIZES[args.size][-1])
    report = hit.report()

    guards = "skipped" if args.skip_guards else "all"
    print(f"module guards: {guards}")
    print(f"{args.size}, {BLOCKS} blocks, {args.threads} thread(s), torch {torch.__version__}")
    print(f"{'':10} {'median ms':>10} {'p10 ms':>10}")
    for name, row in figures.items():
        print(f"{name:10} {row['median']:10.3f} {row['p10']:10.3f}")
    ratios = {}
    for a, b in (("miss", "uncached"), ("hit", "floor")):
        ratios[f"{a}/{b}"] = {k: figures[a][k] / figures[b][k] for k in ("median", "p10")}
        print(f"{a}/{b}: {ratios[f'{a}/{b}']['median']:.3f} median, "
              f"{ratios[f'{a}/{b}']['p10']:.3f} p10")  # fmt: skip
    print(f"graphs {report.graphs}, recompiles {report.recompiles}, hit rate {report.hit_rate:.2f}")
    if args.output:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {
            "size": args.size,
            "module_guards": guards,
            "ms": figures,
            "ratios": ratios,
            "versions": versions,
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
