"""Several ranks that compute one sample together: two processes on the loopback."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "ranks.py"


def on_two_ranks(*names):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", SCRIPT, *names], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_ranks_that_share_collectives_decide_alike():
    on_two_ranks("audit", "errors", "metrics", "nan", "uncoupled")


@pytest.mark.slow
def test_what_ranks_share_is_compiled():
    on_two_ranks("compiled")
