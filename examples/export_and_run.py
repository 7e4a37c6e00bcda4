"""Export a denoiser with its decision inside, and run it without the model's code or this library.

    python examples/export_and_run.py --output exported

Three parts. The demo's model is exported with `AdaptiveCache` and compiled by AOTInductor into one
file. A process of its own, which imports torch alone, samples with that file: `run` below is all
that a host must do, in Python here, a dozen lines in any other language (docs/deployment.md). Then
the pictures are compared with those of the plain model.
"""

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PICTURES = 4


def run(folder: Path) -> None:
    """The host: an Euler sampler without guidance, and the state between its steps."""
    step = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    given = torch.load(folder / "given.pt")
    x, labels, state, hits = given["noise"], given["labels"], given["state"], 0
    times = torch.linspace(1, 0, given["steps"] + 1).tolist()
    for now, after in pairwise(times):
        timestep = torch.full((len(x),), 1000 * now)
        (velocity,), changed = step(
            {
                "hidden_states": x,
                "timestep": timestep,
                "class_labels": labels,
                "return_dict": False,
            },
            state,
        )
        slot = int(changed["slot"])  # -1: a hit
        state["numbers"], hits = changed["numbers"], hits + (slot < 0)
        if slot >= 0:
            state[f"entry_0_{slot}"] = changed["fresh_0"]
        x = x + (after - now) * velocity
    assert not {"fxcache", "diffusers"} & set(sys.modules)
    torch.save({"pictures": x, "hits": hits}, folder / "result.pt")


def main() -> None:
    import fxcache
    from fxcache.demo.metrics import psnr
    from fxcache.demo.sampler import load_denoiser

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=0.08)
    parser.add_argument("--output", default="exported", help="folder for the package")
    args = parser.parse_args()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    model, _ = load_denoiser()
    side, channels = model.config.sample_size, model.config.in_channels
    noise = torch.randn(PICTURES, channels, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(PICTURES)
    example = {
        "hidden_states": noise,
        "timestep": torch.full((PICTURES,), 1000.0),
        "class_labels": labels,
        "return_dict": False,
    }
    policy = fxcache.AdaptiveCache(tolerance=args.tolerance)
    exported = fxcache.export(model, policy, kwargs=example)
    print(f"packaging {type(model).__name__} (AOTInductor compiles it) ...", flush=True)
    path = exported.package(folder / "model.pt2")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")

    state: dict[str, Any] = exported.initial_state(num_steps=args.steps)
    del state["key"]  # the loader's own check
    given = {"noise": noise, "labels": labels, "state": state, "steps": args.steps}
    torch.save(given, folder / "given.pt")
    subprocess.run([sys.executable, __file__, "--host", str(folder)], check=True)
    result = torch.load(folder / "result.pt")

    x, times = noise, torch.linspace(1, 0, args.steps + 1).tolist()
    with torch.no_grad():
        for now, after in pairwise(times):
            timestep = torch.full((PICTURES,), 1000 * now)
            x = (
                x
                + (after - now) * model(**{**example, "hidden_states": x, "timestep": timestep})[0]
            )
    quality = psnr(result["pictures"] / 2 + 0.5, x / 2 + 0.5)
    print(
        f"{result['hits']} of {args.steps} steps were hits in a process without fxcache; "
        f"{quality:.1f} dB against the plain model"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        run(Path(sys.argv[2]))
    else:
        main()
