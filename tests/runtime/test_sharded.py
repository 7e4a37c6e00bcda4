"""Models that several ranks share by what diffusers and torch offer: processes on the loopback."""

import pytest
from launch import on_ranks

pytestmark = pytest.mark.slow


def test_tokens_on_two_ranks():
    """And examples/multi_gpu.py."""
    names = ("example", "ulysses", "ring", "ulysses_compiled")
    written = on_ranks(*(f"contexts.{name}" for name in names), "drawing.pipelines")
    assert written.count("(x: a hit)") == 2


def test_weights_on_two_ranks_and_what_is_shared():
    """What is shared is decided alike, and compiled, not captured; the last scenario raises."""
    weights = ("tensors", "tensors_compiled", "sharded", "sharded_costs", "changed", "refused")
    names = ("audit", "metrics", "nan", "uncoupled", "compiled", "uncaptured", "checked")
    written = on_ranks(
        *(f"sharded.{name}" for name in (*weights, "votes_apart")),
        *(f"ranks.{name}" for name in (*names, "half_way")),
    )
    assert written.count("no CUDA graph of the miss: it has collectives of") == 2  # once a rank
    assert "no CUDA graph of the hit" not in written


def test_four_ranks():
    on_ranks("contexts.mesh", "sharded.tensors_and_context", ranks=4)
