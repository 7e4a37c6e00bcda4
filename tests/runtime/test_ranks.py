"""Several ranks that compute one sample together: two processes on the loopback."""

import pytest
from launch import on_ranks

pytestmark = pytest.mark.slow


def test_ranks_that_share_collectives_decide_alike():
    together = ("audit", "errors", "metrics", "nan", "uncoupled")
    on_ranks(*(f"ranks.{name}" for name in together))


def test_ranks_are_checked():
    on_ranks("ranks.checked", "sharded.votes_apart", FXCACHE_CHECK_RANKS="1")


def test_a_rank_that_raises_half_way():
    on_ranks("ranks.half_way")


def test_what_ranks_share_is_compiled_and_not_captured():
    written = on_ranks("ranks.compiled", "ranks.uncaptured")
    assert written.count("no CUDA graph of the miss: it has collectives of") == 2  # once a rank
    assert "no CUDA graph of the hit" not in written
