"""Several ranks that compute one sample together: two processes on the loopback."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "ranks.py"


def on_two_ranks(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", SCRIPT, name], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audit", "compiled", "errors", "metrics", "nan", "uncoupled"])
def test_ranks_that_share_collectives_decide_alike(name):
    on_two_ranks(name)
