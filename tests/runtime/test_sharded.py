"""Models that several ranks share by what diffusers and torch offer: processes on the loopback."""

import pytest
from launch import on_ranks

pytestmark = pytest.mark.slow


def test_tokens_on_two_ranks():
    on_ranks("contexts.ulysses", "contexts.ring", "contexts.ulysses_compiled", "contexts.pipelines")


def test_weights_on_two_ranks():
    on_ranks(
        "sharded.tensors",
        "sharded.tensors_compiled",
        "sharded.sharded",
        "sharded.sharded_costs",
        "sharded.sharded_training",
        "sharded.written",
        "sharded.moved",
        "sharded.explained",
        "sharded.refused",
    )


def test_four_ranks():
    on_ranks("contexts.mesh", "sharded.tensors_and_context", ranks=4)
