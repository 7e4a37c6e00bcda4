"""Start scenarios on several ranks of the loopback, and what these share.

``torchrun --nproc-per-node 2 launch.py ranks.nan sharded.tensors``: functions by their modules. A
collective that waits for more than half a minute raises: what hangs is an error.
"""

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LIMIT = 30


def on_ranks(*scenarios: str, ranks: int = 2, **environment: str) -> str:
    """Run `scenarios` on `ranks` processes; what they wrote."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *scenarios],
        capture_output=True,
        text=True,
        timeout=10 * LIMIT,
        check=False,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def everywhere(value: Any) -> list[Any]:
    """What `value` is on every rank."""
    from torch import distributed

    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def communicated(run: Callable[[], Any]) -> dict[str, int]:
    """How many of which collectives `run` calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    counts = {event.key: event.count for event in profiled.key_averages()}
    kinds = ("all_gather_into_tensor", "all_to_all_single", "all_reduce")
    return {kind: counts.get(f"_c10d_functional::{kind}", 0) for kind in kinds}


if __name__ == "__main__":
    import torch
    from torch import distributed

    gc.set_threshold(200_000, 50, 1000)  # as in `conftest.py`
    distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    torch.set_num_threads(1)
    for scenario in sys.argv[1:]:
        module, name = scenario.split(".")
        getattr(importlib.import_module(module), name)()
        distributed.barrier()
    distributed.destroy_process_group()
