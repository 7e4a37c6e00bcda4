"""Start scenarios on several ranks of the loopback, and what these share.

``python launch.py 2 ranks.nan sharded.tensors``: functions by their modules. One process imports
what they need and forks the ranks. A collective that waits for more than half a minute raises:
what hangs is an error.
"""

import gc
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LIMIT = 30


def on_ranks(*scenarios: str, ranks: int = 2) -> str:
    """Run `scenarios` on `ranks` processes; what they wrote."""
    done = subprocess.run(
        [sys.executable, __file__, str(ranks), *scenarios],
        capture_output=True,
        text=True,
        timeout=10 * LIMIT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def everywhere(value: Any) -> list[Any]:
    """What `value` is on every rank."""
    from torch import distributed

    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def on_one(make: Callable[[], Any]) -> Any:
    """What `make` gives, which is called on the first rank only."""
    from torch import distributed

    made = [make() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(made)
    return made[0]


def communicated(run: Callable[[], Any]) -> dict[str, int]:
    """How many of which collectives `run` calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    counts = {event.key: event.count for event in profiled.key_averages()}
    kinds = ("all_gather_into_tensor", "all_to_all_single", "all_reduce")
    return {kind: counts.get(f"_c10d_functional::{kind}", 0) for kind in kinds}


def work(rank: int, ranks: int, folder: str, scenarios: list[Callable[[], None]]) -> None:
    """What a rank does."""
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT),
    )
    for scenario in scenarios:
        scenario()
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    import torch

    gc.set_threshold(200_000, 50, 1000)  # as in `conftest.py`
    torch.set_num_threads(1)
    ranks, names = int(sys.argv[1]), [name.split(".") for name in sys.argv[2:]]
    given = [getattr(importlib.import_module(module), name) for module, name in names]
    gc.freeze()  # what is shared is not looked at, and so not copied
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            work, (ranks, folder, given), nprocs=ranks, start_method="fork"
        )
    gc.unfreeze()
