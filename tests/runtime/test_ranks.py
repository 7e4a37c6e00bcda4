"""Several ranks that compute one sample together: two processes on the loopback."""

import pytest
from launch import on_ranks

pytestmark = pytest.mark.slow


def test_ranks_that_share_collectives():
    """They decide alike, and what they share is compiled and not captured; the last one raises."""
    names = ("audit", "metrics", "nan", "uncoupled", "compiled", "uncaptured", "checked")
    scenarios = (f"ranks.{name}" for name in (*names, "half_way"))
    written = on_ranks("sharded.votes_apart", *scenarios)
    assert written.count("no CUDA graph of the miss: it has collectives of") == 2  # once a rank
    assert "no CUDA graph of the hit" not in written
