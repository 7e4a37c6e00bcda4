"""One denoiser on several ranks, cached: who decides, and what a hit does not send.

    torchrun --standalone --nproc-per-node 2 examples/multi_gpu.py --parallel context
    torchrun --standalone --nproc-per-node 2 examples/multi_gpu.py --parallel shard

``context``: the ranks hold a part of one sample's tokens each (diffusers' own context parallelism,
Ulysses attention). ``shard``: each rank has a sample of its own, and a part of every block's
weights (FSDP2). In both the ranks' collectives are in the captured graph, so they add up what they
measure and take the same decision; a hit of the span sends nothing of it. Runs on GPUs (NCCL) and
on CPUs (gloo). The model is Flux's architecture with random weights: what is shown is who decides
and what is sent, and nothing of quality.
"""

import argparse
import json
import logging
import warnings
from itertools import pairwise
from typing import Any

import torch
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

import fxcache
from fxcache import AdaptiveCache


def make_model(device: torch.device) -> Any:
    """Flux, tiny, with the same weights on every rank."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    return model.to(device).eval()


def share(model: Any, kind: str) -> None:
    """Spread `model` over all ranks."""
    if kind == "context":
        if not torch.accelerator.is_available():  # diffusers divides by their number
            torch.accelerator.device_count = lambda: 1
        degree = distributed.get_world_size()
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))
    else:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            fully_shard(block)
        fully_shard(model)


def make_inputs(device: torch.device, side: int, seed: int) -> dict[str, Any]:
    """A latent of `side` x `side` tokens and a prompt of 16, drawn from `seed`."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.arange(side).repeat_interleave(side).float()
    columns = torch.arange(side).repeat(side).float()
    inputs = {
        "hidden_states": torch.randn(1, side * side, 16, generator=draw),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=draw),
        "pooled_projections": torch.randn(1, 32, generator=draw),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=1),
        "txt_ids": torch.zeros(16, 3),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def sample(model: Any, inputs: dict[str, Any], steps: int, seen: list[int] | None) -> torch.Tensor:
    """Euler from noise (t = 1) to a picture (t = 0); the bytes sent at each step go to `seen`."""
    x, times = inputs["hidden_states"], torch.linspace(1, 0, steps + 1).tolist()
    for now, after in pairwise(times):
        t = torch.full((1,), now, device=x.device)
        call = {**inputs, "hidden_states": x, "timestep": t, "return_dict": False}
        if seen is None:
            velocity = model(**call)[0]
        else:
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
                velocity = model(**call)[0]
            seen.append(bytes_sent(profiled, x.element_size()))
        x = x + (after - now) * velocity
    return x


def bytes_sent(profiled: Any, element_size: int) -> int:
    """What this rank gave to collectives, each counted by its input."""
    collectives = (
        event
        for event in profiled.events()
        if event.name.startswith("_c10d_functional::") and "wait" not in event.name
    )
    return sum(torch.Size(event.input_shapes[0]).numel() * element_size for event in collectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=("context", "shard"), default="context")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=16, help="tokens a side of the latent")
    parser.add_argument("--tolerance", type=float, default=1.0, help="high: the weights are random")
    parser.add_argument("--backend", help='what compiles the pieces; "eager": nothing does')
    parser.add_argument("--json", help="write the figures of all ranks here")
    args = parser.parse_args()
    logging.getLogger("fxcache").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    device = device or torch.device("cpu")

    # Inductor starts several gathers at once, which gloo does not survive (torch 2.13).
    backend = args.backend or ("inductor" if on_gpu or args.parallel == "context" else "eager")
    model = make_model(device)
    share(model, args.parallel)
    inputs = make_inputs(device, args.side, seed=rank if args.parallel == "shard" else 0)
    denoiser: Any = fxcache.transform(
        model, AdaptiveCache(tolerance=args.tolerance), backend=backend
    )
    with torch.no_grad():
        plain = sample(model, inputs, args.steps, None)
        seen: list[int] = []
        with denoiser.trajectory(num_steps=args.steps):
            cached = sample(denoiser, inputs, args.steps, seen)

    report, off = denoiser.report(), (cached - plain).norm() / plain.norm()
    figures: dict[str, Any] = {"rank": rank, "hits": report.hits, "relative_error": off.item()}
    for kind, is_hit in (("miss", False), ("hit", True)):
        sent = [b for b, r in zip(seen, report.records, strict=True) if r.is_hit == is_hit]
        figures[f"{kind}_bytes"] = sent[-1] if sent else 0
    gathered: list[Any] = [None] * ranks
    distributed.all_gather_object(gathered, (figures, [r.is_hit for r in report.records]))
    if rank == 0:
        steps = "".join("-x"[is_hit] for is_hit in gathered[0][1])
        print(f"{args.parallel}, {ranks} ranks, {args.steps} steps: {steps} (x: a hit)")
        for own, decisions in gathered:
            assert decisions == gathered[0][1], "the ranks decided differently"
            saved = own["hits"] * (own["miss_bytes"] - own["hit_bytes"])
            print(
                f"rank {own['rank']}: {own['hits']} hits; sent a miss {own['miss_bytes']:,} bytes, "
                f"a hit {own['hit_bytes']:,}: {saved:,} bytes saved; relative error "
                f"{own['relative_error']:.1e}"
            )
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"torch": torch.__version__, "ranks": [g for g, _ in gathered]}, file)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
