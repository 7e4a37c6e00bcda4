"""What the GPU path costs: replays, read-backs, kernels, and how near a hit comes to its floor.

    pip install -c constraints.txt -e ".[diffusers]"
    python examples/benchmark_gpu.py --output examples/results/gpu.json
    python examples/benchmark_gpu.py --tiny          # seconds, on any device: only tries the script

A Flux of 19 + 38 blocks, 3072 wide, with random bf16 weights (24 GB), at 1024 and 512 pixels; the
*floor* is the same model with its head block only. Contestants take turns in one process. Times of
evaluations are from CUDA events; host time is what the caller waits for apart from the read-back.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from fxcache.kernels import ops

import fxcache
from fxcache.runtime.device import CudaDevice

FULL = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "in_channels": 64,
    "axes_dims_rope": (16, 56, 56),
}
TINY = {
    **FULL,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
TEXT_TOKENS = 512
IMAGE_TOKENS = {"1024px": 4096, "512px": 1024}
KERNEL_SHAPES = {"4096 x 3072": (1, 4096, 3072), "75,600 x 5120": (1, 75_600, 5120)}


def build(config: dict[str, Any], device: torch.device, blocks: str = "all") -> torch.nn.Module:
    """The model with random weights, made on the device; ``blocks="head"`` is the floor."""
    if blocks == "head":
        config = {**config, "num_layers": 1, "num_single_layers": 0}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def inputs(config: dict[str, Any], tokens: int, step: int, device: torch.device) -> dict[str, Any]:
    """Arguments of one evaluation; the sample moves a little from step to step."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    side = math.isqrt(tokens)
    rows = torch.arange(tokens) // side
    positions = torch.stack([torch.zeros(tokens), rows, torch.arange(tokens) % side], dim=1)
    return {
        "hidden_states": noise(1, tokens, config["in_channels"]) + 0.01 * step,
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([1 - step / 64], device=device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.bfloat16),
        "img_ids": positions.to(device, torch.bfloat16),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device, dtype=torch.bfloat16),
    }


class Clock:
    """Milliseconds of a call on the device, and what the host spent on it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.waited = 0.0

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(device milliseconds, host microseconds without waiting for the read-back)."""
        self.waited = 0.0
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            spent = time.perf_counter() - start
            return spent * 1e3, spent * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start - self.waited
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host * 1e6

    def watch_reads(self) -> list[int]:
        """Count read-backs of replayed graphs, and do not count the wait for them as host time."""
        reads = [0]
        original = CudaDevice.read

        def read(device: CudaDevice, source: torch.Tensor) -> Callable[[], list[float]]:
            reads[0] += 1
            numbers = original(device, source)

            def wait() -> list[float]:
                start = time.perf_counter()
                result = numbers()
                self.waited += time.perf_counter() - start
                return result

            return wait

        CudaDevice.read = read  # type: ignore[method-assign]
        return reads


def contestants(model: torch.nn.Module, floor: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Everybody who is measured, by name."""
    never, always = (fxcache.FirstBlockCache(threshold=t) for t in (0.0, math.inf))
    hits = fxcache.StepSchedule(mask=[False] + [True] * 100_000)
    graphs = {"mode": "reduce-overhead"}
    fast = {**graphs, "guards": "trajectory"}
    made = {
        "uncached": torch.compile(model, fullgraph=True),
        "floor": torch.compile(floor, fullgraph=True),
        "floor, CUDA graphs": torch.compile(floor, fullgraph=True, mode="reduce-overhead"),
    }
    for name, policy in (("miss", never), ("hit", always)):
        made[name] = fxcache.transform(model, policy)
        made[f"{name}, graphs"] = fxcache.transform(model, policy, **graphs)
        made[f"{name}, graphs, guards a trajectory"] = fxcache.transform(model, policy, **fast)
        made[f"{name}, graphs, triton"] = fxcache.transform(model, policy, kernel="triton", **fast)
    made["scheduled hit, graphs"] = fxcache.transform(model, hits, **fast)
    return made


def measure(
    config: dict[str, Any], tokens: int, device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Device milliseconds, host microseconds and read-backs of a call, the contestants in turn."""
    clock = Clock(device)
    reads = clock.watch_reads()
    calls = contestants(build(config, device), build(config, device, "head"))
    for name, call in calls.items():
        start = time.perf_counter()
        for step in range(5):
            call(**inputs(config, tokens, step, device))
        print(f"  {name}: ready in {time.perf_counter() - start:.0f} s", flush=True)
    spent: dict[str, list[tuple[float, float, int]]] = {name: [] for name in calls}
    for step in range(5, 5 + repeats):
        given = inputs(config, tokens, step, device)
        for name, call in calls.items():
            reads[0] = 0
            times = clock.time(lambda call=call, given=given: call(**given))
            spent[name].append((*times, reads[0]))
    for name, call in calls.items():
        if isinstance(call, fxcache.denoiser.DenoiserMethods):
            records = call.report().records[-repeats:]
            assert all(record.is_hit == ("hit" in name) for record in records), name
    return {name: _summary(rows) for name, rows in spent.items()}


def _summary(rows: list[tuple[float, float, int]]) -> dict[str, float]:
    gpu, host = (sorted(row[i] for row in rows) for i in (0, 1))
    return {
        "ms_median": gpu[len(gpu) // 2],
        "ms_p10": gpu[len(gpu) // 10],
        "host_us_median": host[len(host) // 2],
        "read_backs": max(row[2] for row in rows),
    }


def bandwidth(shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Bytes a second of each kernel as a share of a device copy's, all tensors bf16.

    Tensors of several sets take turns, so that none is found in the cache.
    """
    sets = [[torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4)]
            for _ in range(4)]  # fmt: skip
    tickets = torch.zeros(shape[0], dtype=torch.int32, device=device)
    weights = torch.tensor([1.5, -0.5], device=device)
    size = sets[0][0].numel() * 2
    kernels: dict[str, tuple[Callable[..., Any], int]] = {
        "copy": (lambda a, b, c, d: a.copy_(b), 2 * size),
        "residual_diff": (lambda a, b, c, d: ops.residual_diff(a, b, c, tickets), 3 * size),
        "forecast": (lambda a, b, c, d: ops.forecast(a, [b, c], weights), 4 * size),
        "refresh": (lambda a, b, c, d: ops.refresh(a, b, d), 3 * size),
    }
    rates = {name: moved / _replayed(work, sets) for name, (work, moved) in kernels.items()}
    return {f"{name} / copy": rates[name] / rates["copy"] for name in kernels} | {
        "copy GB/s": rates["copy"] / 1e9
    }


def _replayed(work: Callable[..., Any], sets: list[list[torch.Tensor]]) -> float:
    """Seconds of one `work`, as the best of replays of a graph of many."""
    for tensors in sets:
        work(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            for tensors in sets:
                work(*tensors)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 10] / (8 * len(sets))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sizes", default="1024px,512px")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("needs a CUDA device (or --tiny, which measures nothing of interest)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": name,
        "versions": {
            "torch": torch.__version__,
            "fxcache": fxcache.__version__,
            "python": platform.python_version(),
        },
        "evaluations": {},
    }
    for size in args.sizes.split(","):
        torch._dynamo.reset()
        tokens = 16 if args.tiny else IMAGE_TOKENS[size]
        print(f"{size}: {tokens} + {TEXT_TOKENS} tokens on {name}", flush=True)
        rows = measure(TINY if args.tiny else FULL, tokens, device, args.repeats)
        result["evaluations"][size] = rows
        for contestant, row in rows.items():
            print(f"  {contestant:36} {row['ms_median']:8.3f} ms ({row['ms_p10']:.3f}), host "
                  f"{row['host_us_median']:7.0f} us, {row['read_backs']} read-backs")  # fmt: skip
        for a, b in (("miss, graphs", "uncached"), ("hit, graphs", "floor, CUDA graphs")):
            print(f"  {a} / {b}: {rows[a]['ms_median'] / rows[b]['ms_median']:.3f}")
        if device.type == "cuda":
            result["evaluations"][size]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()
    if device.type == "cuda":
        result["kernels"] = {key: bandwidth(shape, device) for key, shape in KERNEL_SHAPES.items()}
        print(json.dumps(result["kernels"], indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
