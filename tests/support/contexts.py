"""Samples whose tokens ranks share: what `test_sharded.py` runs on every rank."""

import functools
import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import scripts
import torch
import zoo
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.models import attention_dispatch
from helpers import ALWAYS, NEVER, adopt, hits, plain
from launch import communicated
from solving import EASY, FIRST_BLOCK, as_alone, identical, solve
from torch import distributed
from torch.profiler import profile

import fxcache


def attention_with_lse(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    scale: float | None = None,
    **others: Any,
) -> Any:
    """In the place of diffusers' native attention, which does not give what a ring needs."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    output = (scores.softmax(-1) @ v).transpose(1, 2)
    asked = others.get("return_lse", options[5] if len(options) > 5 else False)
    return (output, scores.logsumexp(-1).transpose(1, 2)) if asked else output


torch.accelerator.device_count = lambda: 1  # of a CPU: 0, by which diffusers divides
warnings.filterwarnings("ignore", category=FutureWarning)
EXAMPLE = scripts.load("multi_gpu")
for each in ("flux", "wan_t2v"):  # what diffusers imports for these is there before the fork
    zoo.make(each)


def share(model: Any, ring: int = 1, ulysses: int = 1) -> None:
    """Through diffusers' own `enable_parallelism`."""
    if ring > 1:
        attention_dispatch._native_attention_forward_op = attention_with_lse
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses))


def context(backend: str = "eager", **degrees: int) -> None:
    """Flux, which ranks share from here on."""
    (whole, inputs), (model, _) = (zoo.make("flux", num_layers=1) for _ in range(2))
    at = functools.partial(inputs_at, "flux", inputs)
    share(model, **degrees)
    denoiser: Any = fxcache.transform(model, ALWAYS, backend=backend)
    if backend == "eager":  # of a measurement: one collective, however many groups there are
        with torch.no_grad():
            denoiser(**at(0))
            assert communicated(lambda: denoiser(**at(1)))["all_reduce"] == 1
        assert hits(denoiser) == [False, True]
        identical(adopt(denoiser, NEVER), model, at)
    else:
        outputs = solve(adopt(denoiser, NEVER), at)
        torch.testing.assert_close(outputs, solve(model, at), atol=1e-5, rtol=1e-5)
    as_alone(denoiser, FIRST_BLOCK, whole, at)


def inputs_at(name: str, inputs: dict[str, Any], step: int) -> dict[str, Any]:
    return {**zoo.at_step(name, inputs, step), "return_dict": False}


def ulysses() -> None:
    context(ulysses=2)


def ulysses_compiled() -> None:
    context("inductor", ulysses=2)


def mesh() -> None:
    """On four ranks, both at once."""
    context(ring=2, ulysses=2)


def ring() -> None:
    """A denoiser that ranks share from here on, and then the model that is given back."""
    (whole, inputs), (model, _) = (zoo.make("wan_t2v", num_layers=2) for _ in range(2))
    at = functools.partial(inputs_at, "wan_t2v", inputs)
    denoiser: Any = plain(model, NEVER)
    share(denoiser, ring=2)
    outputs = solve(denoiser, at)
    as_alone(denoiser, FIRST_BLOCK, whole, at)
    model = fxcache.restore(denoiser)
    assert all(map(torch.equal, outputs, solve(model, at)))
    as_alone(plain(model, EASY), EASY, whole, at)


def example() -> None:
    """examples/multi_gpu.py both ways, with a block less, in the group that is open here."""

    def flux(num_single_layers: int, **config: Any) -> Any:
        return FluxTransformer2DModel(num_single_layers=num_single_layers - 1, **config)

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(EXAMPLE, "FluxTransformer2DModel", flux)
        patch.setattr(distributed, "init_process_group", lambda name: None)
        patch.setattr(distributed, "destroy_process_group", lambda: None)
        path = Path(folder) / "figures.json"
        options = ["--backend", "eager", "--steps", "8", "--side", "8", "--json", str(path)]
        for parallel in ("context", "shard"):
            # Not of the first step, which traces: its many operations take long to look through.
            first = iter([nullcontext(SimpleNamespace(events=list))])
            patch.setattr(
                EXAMPLE, "profile", lambda first=first, **how: next(first, None) or profile(**how)
            )
            patch.setattr(sys, "argv", ["multi_gpu.py", "--parallel", parallel, *options])
            EXAMPLE.main()
            if distributed.get_rank() == 0:
                own, other = json.loads(path.read_text())["ranks"]
                assert own["hits"] == other["hits"] > 0
                assert own["miss_bytes"] > 100 * own["hit_bytes"]
