"""Dynamo's guards: each change of the model is seen; what nobody wrote into is not looked at."""

import gc
import weakref

import pytest
import torch
from comparing import assert_identical
from helpers import sample, seeded, times
from opened import Small, opened
from policies import ALWAYS, NEVER
from torch import nn

from fxcache.capture import torch_guards

SHIFT, DEFAULT = {"is on": False}, {"is on": False}


class Base(Small):
    shared = {"is on": False}  # noqa: RUF012


class Switched(Base):
    """Has attributes of many kinds that its forward reads."""

    factor, is_doubled, calls = 1, False, 0

    def __init__(self, blocks):
        super().__init__(blocks)
        self.flags, self.table, self.limits = [False], {"a": {"is on": False}}, {1, 2}
        self.helper = type("Helper", (), {"is_on": False})()
        self.register_buffer("null", torch.zeros(2))
        self.plain = torch.zeros(1)

    def forward(self, x, t):
        out = super().forward(x, t) * self.factor + self.plain + self.null.numel()
        ons = self.flags[0], self.table["a"]["is on"], 3 in self.limits, self.helper.is_on
        more = hasattr(self.helper, "more"), hasattr(self.out.weight, "more"), self.by_default()
        ons += (*more, self.shared["is on"], SHIFT["is on"])
        return out * 2 if self.is_doubled else out + sum(ons)

    def by_default(self, given=DEFAULT):
        return given["is on"]


def increased(m):
    return {k: v + 0.1 for k, v in m.state_dict().items()}


KINDS = {
    "class": lambda m: setattr(type(m), "factor", 2),
    "class of a helper": lambda m: setattr(type(m.helper), "is_on", True),
    "helper": lambda m: setattr(m.helper, "is_on", False),
    "list": lambda m: m.flags.__setitem__(0, True),
    "set": lambda m: m.limits.add(3),
    "dictionary": lambda m: m.table["a"].update({"is on": True}),
    "global": lambda m: SHIFT.update({"is on": True}),
    "default": lambda m: DEFAULT.update({"is on": True}),
    "inherited": lambda m: m.shared.update({"is on": True}),
    "another attribute": lambda m: setattr(m.helper, "more", 1),
    "attribute of a weight": lambda m: setattr(m.out.weight, "more", 1),
    "tensor": lambda m: setattr(m, "plain", torch.ones(1)),
    "buffer": lambda m: setattr(m, "null", torch.zeros(3)),
    "size of a buffer": lambda m: m.null.resize_(4),
    "data of a buffer": lambda m: setattr(m.null, "data", torch.zeros(5)),
}
SEEN = {
    "attribute": lambda m: setattr(m, "factor", 3),
    "flag": lambda m: setattr(m, "is_doubled", True),
    "parameter": lambda m: setattr(m.blocks[1].proj, "weight", nn.Parameter(torch.randn(16, 32))),
    "layout": lambda m: setattr(m.out.bias, "data", torch.ones(1)),
    "child": lambda m: setattr(m.blocks[1], "proj", nn.Linear(32, 16)),
    "block": lambda m: m.blocks.__setitem__(0, nn.Identity()),
    "state": lambda m: m.load_state_dict(increased(m), assign=True),
    "forward": lambda m: setattr(m, "forward", lambda x, t: type(m).forward(m, x, t) + 1),
}


def test_every_change_amid_a_trajectory_is_seen():
    """What goes past Dynamo gives what goes the complete way, and says so."""
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


#: From Python 3.13 on writes into dictionaries are not counted, and all guards are asked.
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("counts_writes", {torch_guards._COUNTS_WRITES, False})
def test_kinds_of_changes(counts_writes, monkeypatch):
    """Each with what was changed before."""
    monkeypatch.setattr(torch_guards, "_COUNTS_WRITES", counts_writes)
    monkeypatch.setattr(Switched, "factor", 1)
    for table in (SHIFT, DEFAULT, Base.shared):
        monkeypatch.setitem(table, "is on", False)
    model = seeded(lambda: Switched(2))
    denoiser = opened(model, NEVER)
    complete = denoiser.count_complete()
    for kind, change in KINDS.items():
        if kind == "tensor" and not counts_writes:
            continue  # who gives an object another plain tensor says so
        complete.clear()
        with denoiser.trajectory():
            for i in range(5):
                if i == 3:
                    change(model)
                x, t = sample(), times(1 - i / 9)
                assert_identical(denoiser(x, t), model(x, t))
        assert [at % 5 for at in complete] == [0, 3], kind


@pytest.mark.skipif(not torch_guards._COUNTS_WRITES, reason="all guards are asked, always")
@pytest.mark.parametrize("looks", [1, 4])
def test_all_guards_are_asked_only_after_a_write(model, looks, monkeypatch):
    """And for a while: where each call writes, it is of no use to look for what is written into."""
    monkeypatch.setattr(torch_guards, "_AT_ONCE", looks)
    asked, hold = [], torch_guards.Guards.hold

    def spied(guards, given):
        asked.append(guards.dicts is None)
        return hold(guards, given)

    monkeypatch.setattr(torch_guards.Guards, "hold", spied)
    denoiser = opened(model)
    complete = denoiser.count_complete()
    with denoiser.trajectory():
        for i in range(12):
            if i in (6, 9, 10, 11):
                model.written = i
            denoiser(sample(), times(1 - i / 12))
    assert complete == ([0, 6] if looks == 1 else [0, 6, 9, 10, 11])
    assert asked == [False] * 6 + [looks == 1] * 5


@pytest.mark.skipif(not torch_guards._COUNTS_WRITES, reason="who replaces by hand says so")
def test_weights_replaced_by_hand_are_given_back(model, monkeypatch):
    """Where it is not looked again what guards hang from, nothing is kept of what was found."""
    monkeypatch.setattr(torch_guards, "_AT_ONCE", 1)
    denoiser = opened(model)
    for i in range(6):
        if i == 3:
            old = weakref.ref(model.out.weight)
            by_hand = {"weight": nn.Parameter(torch.zeros_like(model.out.weight))}
            model.out._parameters.update(by_hand)
        denoiser(sample(), times(1 - i / 9))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize(
    ("name", "policy", "seen"),
    [("blocks.1.up", NEVER, True), ("blocks.1.up", ALWAYS, False), ("embed", ALWAYS, True)],
)
def test_the_layout_of_a_weight_is_seen_where_it_is_read(model, name, policy, seen):
    denoiser = opened(model, policy)
    complete = denoiser.count_complete()
    with denoiser.trajectory():
        for i in range(6):
            if i == 4:
                weight = model.get_submodule(name).weight
                weight.data = weight.data.t().contiguous().t()
            denoiser(sample(), times(1 - i / 9))
    assert complete == ([0, 4] if seen or not torch_guards._COUNTS_WRITES else [0])


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
