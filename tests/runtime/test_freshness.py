"""What shows that weights changed (see test_changed_weights.py for what then happens)."""

import gc
import weakref

import pytest
import torch
from helpers import ALWAYS, assert_identical, sample, seeded, times
from opened import Small, opened
from torch import nn

from fxcache.runtime.freshness import Weights


@pytest.fixture
def tensors():
    return [nn.Parameter(torch.ones(3)), torch.zeros(2), nn.Parameter(torch.ones(1))]


def weights(count=3, **options):
    given = {"registered": [True, False, True], "numbers": {}, "constants": dict}
    return Weights(range(count), **{**given, **options})


def stamped(weights, inputs):
    return weights.now(inputs)().keep(weights.pick(inputs))


def checked(weights, stamp, inputs):
    return weights.check(stamp, inputs, weights.now(inputs))


def test_what_changes_a_stamp(tensors):
    own = weights()
    stamp = stamped(own, tensors)
    assert checked(own, stamp, tensors) == (stamp, None)
    tensors[1].add_(1)  # counted
    new, reason = checked(own, stamp, tensors)
    assert reason == "weights changed"
    assert checked(own, new, tensors) == (new, None)
    tensors[0] = nn.Parameter(tensors[0].clone())
    new, reason = checked(own, new, tensors)
    assert reason == "weights changed"
    tensors[0], tensors[2] = tensors[2], tensors[0]  # the same ones in other places
    assert checked(own, new, tensors)[1] == "weights changed"


def test_a_weight_that_is_gone_voids_the_stamp(tensors):
    own = weights()
    stamp = stamped(own, tensors)
    reference = weakref.ref(tensors[2])
    tensors[2] = nn.Parameter(torch.ones(1))
    gc.collect()
    assert reference() is None  # a stamp keeps none alive
    assert stamp.is_void


def test_an_optimizers_step_voids_the_stamps_of_its_parameters(tensors):
    own, others = weights(), [nn.Parameter(torch.ones(1)) for _ in range(3)]
    stamp, other = stamped(own, tensors), stamped(own, others)
    tensors[0].grad = torch.ones(3)
    torch.optim.AdamW([tensors[0]], fused=True).step()
    assert stamp.is_void
    assert not other.is_void


def test_inference_tensors_have_no_count_of_writes():
    with torch.inference_mode():
        tensors = [torch.ones(1) for _ in range(3)]
    own = weights()
    assert checked(own, stamped(own, tensors), tensors)[1] is None


def test_numbers_of_the_model():
    number = torch.tensor(0.5)
    own = Weights([], [], {"scale": 0}, lambda: {"shift": frozenset({"== 1"})})
    stamp = stamped(own, [number])
    assert checked(own, stamp, [torch.tensor(0.5)])[1] is None
    assert checked(own, stamp, [torch.tensor(0.25)])[1] == "a number of the model changed"


def test_another_graph_of_the_same_model(tensors):
    """Tables that models keep may be others, parameters and numbers may not."""
    own = weights()
    stamp = stamped(own, tensors)
    other = weights(constants=lambda: {"scale": frozenset({"== 1"})})
    table = torch.zeros(5)
    new, reason = checked(other, stamp, [tensors[0], table, tensors[2]])
    assert reason is None
    assert new.weights is other
    third = weights(constants=lambda: {"scale": frozenset({"== 2"})})
    assert checked(third, new, tensors)[1] == "a number of the model changed"
    assert checked(own, stamp, [tensors[2], tensors[1], tensors[2]])[1] == "weights changed"


# --- past Dynamo: what its guards check is checked late ---


class Switched(Small):
    """Has attributes that its forward reads."""

    factor, is_doubled, calls = 1, False, 0

    def forward(self, x, t):
        out = super().forward(x, t) * self.factor
        return out * 2 if self.is_doubled else out


CHANGES = {
    "attribute": lambda model: setattr(model, "factor", 3),
    "flag": lambda model: setattr(model, "is_doubled", True),
    "parameter": lambda model: setattr(
        model.blocks[1].proj, "weight", nn.Parameter(torch.randn(16, 32))
    ),
    "layout": lambda model: setattr(model.out.bias, "data", torch.ones(1)),
    "child": lambda model: setattr(model.blocks[1], "proj", nn.Linear(32, 16)),
    "block": lambda model: model.blocks.__setitem__(0, nn.Identity()),
    "state": lambda model: model.load_state_dict(
        {k: v + 0.1 for k, v in model.state_dict().items()}, assign=True
    ),
    "forward": lambda model: setattr(
        model, "forward", lambda x, t: type(model).forward(model, x, t) + 1
    ),
}


def test_every_change_amid_a_trajectory_is_seen():
    """What goes past Dynamo gives what goes the complete way, and says so."""
    model = seeded(lambda: Switched(4))
    quick, slow = opened(model), opened(model)
    for name, change in CHANGES.items():
        with quick.trajectory(), slow.trajectory():
            for i in range(8):
                if i == 5:
                    assert len(quick.shortcut.paths) == 1, name
                    change(model)
                x, t = sample() * (1 - i / 9), times(1 - i / 9)
                slow.shortcut.forget()
                assert_identical(quick(x, t), slow(x, t))
        assert quick.report().records == slow.report().records, name
        assert_identical(quick(sample(), times(1)), model(sample(), times(1)))
        slow(sample(), times(1))


def test_what_the_model_does_to_its_own_objects_is_done_at_each_call():
    class Counting(Small):
        def forward(self, x, t):
            self.seen.append(1)
            return super().forward(x, t)

    model = seeded(Counting)
    model.seen = []
    denoiser = opened(model, ALWAYS)
    with denoiser.trajectory():
        for i in range(5):
            denoiser(sample(), times(1 - i / 9))
    assert len(model.seen) >= 5
    assert denoiser.shortcut.paths == {}
