"""Dynamo's guards: each change of the model is seen; what nobody wrote into is not looked at."""

from types import SimpleNamespace

import pytest
import torch
from comparing import assert_identical
from helpers import sample, seeded, times
from opened import Small, opened
from policies import ALWAYS
from torch import nn

from fxcache.capture import torch_guards

SHIFT = {"is on": False}


class Switched(Small):
    """Has attributes of many kinds that its forward reads."""

    factor, is_doubled, calls = 1, False, 0

    def __init__(self, blocks):
        super().__init__(blocks)
        self.flags, self.table, self.limits = [False], {"a": {"is on": False}}, {1, 2}
        self.helper = type("Helper", (), {"is_on": False})()

    def forward(self, x, t):
        out = super().forward(x, t) * self.factor
        ons = self.flags[0], self.table["a"]["is on"], 3 in self.limits, self.helper.is_on
        return out * 2 if self.is_doubled else out + sum((*ons, SHIFT["is on"]))


def increased(m):
    return {k: v + 0.1 for k, v in m.state_dict().items()}


SEEN = {
    "class": lambda m: setattr(type(m), "factor", 2),
    "class of a helper": lambda m: setattr(type(m.helper), "is_on", True),
    "helper": lambda m: setattr(m.helper, "is_on", False),
    "list": lambda m: m.flags.__setitem__(0, True),
    "set": lambda m: m.limits.add(3),
    "dictionary": lambda m: m.table["a"].update({"is on": True}),
    "global": lambda m: SHIFT.update({"is on": True}),
    "attribute": lambda m: setattr(m, "factor", 3),
    "flag": lambda m: setattr(m, "is_doubled", True),
    "parameter": lambda m: setattr(m.blocks[1].proj, "weight", nn.Parameter(torch.randn(16, 32))),
    "layout": lambda m: setattr(m.out.bias, "data", torch.ones(1)),
    "child": lambda m: setattr(m.blocks[1], "proj", nn.Linear(32, 16)),
    "block": lambda m: m.blocks.__setitem__(0, nn.Identity()),
    "state": lambda m: m.load_state_dict(increased(m), assign=True),
    "forward": lambda m: setattr(m, "forward", lambda x, t: type(m).forward(m, x, t) + 1),
}


@pytest.mark.parametrize("counts_writes", [True, False])
def test_every_change_amid_a_trajectory_is_seen(counts_writes, monkeypatch):
    """What goes past Dynamo gives what goes the complete way, and says so. From Python 3.13 on
    writes into dictionaries are not counted, and all guards are asked.
    """
    if not counts_writes:
        monkeypatch.setattr("fxcache.capture.torch_guards._COUNTS_WRITES", False)
    monkeypatch.setattr(Switched, "factor", 1)
    monkeypatch.setitem(SHIFT, "is on", False)
    model = seeded(lambda: Switched(3))
    quick, slow = opened(model), opened(model)
    for name, change in SEEN.items():
        with quick.trajectory(), slow.trajectory():
            for i in range(6):
                if i == 4:
                    assert len(quick.shortcut.paths) == 1, name
                    change(model)
                x, t = sample() * (1 - i / 9), times(1 - i / 9)
                slow.shortcut.forget()
                assert_identical(quick(x, t), slow(x, t))
        assert quick.report().records == slow.report().records, name
        assert_identical(quick(sample(), times(1)), model(sample(), times(1)))
        slow(sample(), times(1))


@pytest.mark.skipif(not torch_guards._COUNTS_WRITES, reason="all guards are asked, always")
def test_the_tree_of_guards_is_asked_only_after_a_write():
    model = seeded(Small)
    denoiser, asked, counts = opened(model), [], []
    with denoiser.trajectory():
        for i in range(12):
            if i == 4:
                guards = next(iter(denoiser.shortcut.paths.values())).guards
                check, root = guards.manager.check, guards.manager.root
                counted = lambda given, check=check: asked.append(1) or check(given)  # noqa: E731
                guards.manager = SimpleNamespace(root=root, check=counted)
            if i in (6, 9, 10, 11):
                model.written = i
            denoiser(sample(), times(1 - i / 12))
            counts.append(len(asked))
    # Once more after it was looked what to count; where each call writes, that is of no use.
    assert counts[4:] == [0, 0, 2, 2, 2, 4, 5, 6]


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
