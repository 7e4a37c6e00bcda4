"""Several ranks that compute one sample together: two processes on the loopback."""

import pytest
from launch import on_ranks

pytestmark = pytest.mark.slow


def test_ranks_that_share_collectives():
    """They decide alike, and what they share is compiled and not captured; the last one raises."""
    names = ("audit", "metrics", "nan", "uncoupled", "compiled", "uncaptured", "half_way")
    written = on_ranks(*(f"ranks.{name}" for name in names))
    assert written.count("no CUDA graph of the miss: it has collectives of") == 2  # once a rank
    assert "no CUDA graph of the hit" not in written


def test_ranks_are_checked():
    on_ranks("ranks.checked", "sharded.votes_apart", FXCACHE_CHECK_RANKS="1")
