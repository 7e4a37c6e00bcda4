"""Weights that change within a trajectory: training, adapters, numbers; and what shows it."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import graphed, hits, plain, sample, seeded, short, times
from opened import Small, at
from policies import ALWAYS, EASY, MAG, MASK, TAYLOR, TEA, name_of
from policy_cases import STEPS, moving
from torch import nn

import fxcache
from fxcache.runtime.freshness import Weights

CHANGED = "weights changed"


def train(model, optimizer):
    """One training step on a batch of mixed noise levels."""
    with torch.enable_grad():
        x, t = sample(seed=9), torch.tensor([0.3, 0.8])
        (model(x, t) - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def last(denoiser):
    record = denoiser.report().records[-1]
    return record.is_hit, record.reason


def add_noise(model):
    torch._foreach_add_(list(model.parameters()), 0.01)


def merge(model):
    model.blocks[1].proj.weight += 0.1


CHANGES = {
    "step": lambda model: train(model, torch.optim.AdamW(model.parameters(), 0.01)),
    "fused step": lambda model: train(model, torch.optim.AdamW(model.parameters(), fused=True)),
    "written": add_noise,
    "merged": merge,
    "assigned": lambda model: model.load_state_dict(
        {name: value + 0.01 for name, value in model.state_dict().items()}, assign=True
    ),
    "replaced": lambda model: setattr(model.blocks[1], "proj", nn.Linear(32, 16)),
}


def test_no_residual_meets_changed_weights(model, denoiser):
    for announced in (True, False):
        denoiser.reset()
        step = 0
        with denoiser.trajectory() if announced else contextlib.nullcontext():
            at(denoiser, step)
            for name, change in CHANGES.items():
                at(denoiser, step + 1)
                assert last(denoiser) == (True, None), name
                change(model)
                out = at(denoiser, step + 2)
                assert last(denoiser) == (False, CHANGED), name
                assert_identical(out, at(model, step + 2))
                step += 2
            at(denoiser, step + 1)
        assert hits(denoiser)[-1]
    assert denoiser.report().graphs == 1


def test_a_forecast_takes_no_residual_of_old_weights(model):
    denoiser = plain(model, TAYLOR)
    with denoiser.trajectory(num_steps=12):
        for i in range(5):
            at(denoiser, i)
        merge(model)
        outputs = [at(denoiser, i) for i in (5, 6)]
    assert hits(denoiser) == [False] * 3 + [True, True, False, True]
    fresh = plain(model, fxcache.FirstBlockCache(threshold=math.inf))
    assert_identical(outputs, [at(fresh, i) for i in (5, 6)])


@pytest.mark.parametrize("policy", [MASK, EASY, TEA, MAG], ids=name_of)
def test_no_policy_hits_on_changed_weights(model, policy):
    """Amid a trajectory, on the step that would be the first hit. The same policy then goes on."""
    denoiser = plain(model, policy)

    def at_step(i):
        return {"x": moving(sample(), i), "t": times(1 - i / STEPS)}

    with denoiser.trajectory(num_steps=STEPS):
        for i in range(STEPS):
            denoiser(**at_step(i))
    first = hits(denoiser).index(True)
    denoiser.reset()
    with denoiser.trajectory(num_steps=STEPS):
        for i in range(STEPS):
            if i == first:
                merge(model)
            out = denoiser(**at_step(i))
            if i == first:
                assert_identical(out, model(**at_step(i)))
    records = denoiser.report().records
    assert [r.step for r in records] == list(range(STEPS))
    assert records[first].reason == CHANGED
    assert any(r.is_hit for r in records[first:])
    assert denoiser.report().graphs == 1


def test_an_aborted_preview_then_training_then_one_from_a_lower_timestep(model):
    denoiser, fresh = plain(model), plain(model)
    for branch in ("cond", "uncond"):
        with denoiser.branch(branch):
            at(denoiser, 0)
            at(denoiser, 4)
    CHANGES["step"](model)
    for branch in ("cond", "uncond"):
        with denoiser.branch(branch), fresh.branch(branch):
            for i in (8, 12):
                assert_identical(at(denoiser, i), at(fresh, i))
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons == ["nothing cached", None] * 2 + [CHANGED, None] * 2


def test_whoever_trusts_trajectories_is_not_asked(model):
    denoiser = short(model)
    with denoiser.trajectory():
        for i in range(3):
            at(denoiser, i)
        add_noise(model)
        at(denoiser, 3)
    at(denoiser, 4)
    assert hits(denoiser) == [False, True, True, True, False]


class Counting(Small):
    """Counts its calls, and makes a table at the first one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(3))
        self.table = None

    def stack(self, h):
        self.calls += 1
        self.seen.add_(1)
        if self.table is None:
            self.table = torch.linspace(0, 1, h.shape[-1])
        return super().stack(h) + self.table


def test_counters_and_tables_of_the_model_change_nothing():
    model = seeded(Counting)
    denoiser = plain(model)
    for i in range(4):
        at(denoiser, i)
    assert hits(denoiser) == [False, True, True, True]
    assert (model.calls, model.seen[1]) == (4, 4)


class Gain(nn.Module):
    """Like an adapter: a float on a module."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gain = block, {"default": 1.0}

    def forward(self, h):
        return h + self.gain["default"] * (self.block(h) - h)


class Gained(Small):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*map(Gain, self.blocks))
        self.shift = 0.0
        self.scale = nn.Parameter(torch.ones(()))

    def stack(self, h):
        return self.scale * super().stack(h) + self.shift


def set_gain(model, value):
    for block in model.blocks:
        block.gain["default"] = value


@pytest.mark.parametrize("make_denoiser", [plain, graphed])
def test_numbers_of_the_model_are_like_weights(make_denoiser, device):
    """At their second change Dynamo makes floats inputs of the graph, and recompiles no more."""
    model = seeded(Gained)
    denoiser = make_denoiser(model, ALWAYS)
    changes = [(set_gain, value) for value in (0.5, 0.25, 0.125)]
    changes += [(lambda m, v: setattr(m, "shift", v), value) for value in (0.5, 0.25, 0.125)]
    changes += [(lambda m, v: m.scale.fill_(v), 0.5)]
    step = 0
    at(denoiser, step)
    for change, value in changes:
        for _ in range(2):
            at(denoiser, step + 1)
            assert last(denoiser) == (True, None), value
            step += 1
        change(model, value)
        assert_close(at(denoiser, step + 1), at(model, step + 1), 1e-6)
        is_hit, reason = last(denoiser)
        assert not is_hit, value
        assert reason in (CHANGED, "a number of the model changed"), value
        step += 1
    assert denoiser.report().graphs <= 4
    if make_denoiser is graphed:  # numbers are part of a capture: there is one for each value
        assert device.captures >= len(changes)


def test_adapters_that_come_and_go():
    peft = pytest.importorskip("peft")
    model = seeded(Small)
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, model)
    layers = [m for m in adapted.modules() if hasattr(m, "set_scale")]
    denoiser = plain(adapted)
    at(denoiser, 0)
    step = 0
    for change in (
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
    ):
        at(denoiser, step + 1)
        assert last(denoiser) == (True, None)
        for layer in layers:
            change(layer)
        assert_identical(at(denoiser, step + 2), at(adapted, step + 2))
        is_hit, reason = last(denoiser)
        assert not is_hit
        assert reason in (CHANGED, "a number of the model changed")
        step += 2


@pytest.fixture
def tensors():
    return [nn.Parameter(torch.ones(3)), torch.zeros(2), nn.Parameter(torch.ones(1))]


def weights(count=3, **options):
    given = {"registered": [True, False, True], "numbers": {}, "constants": dict}
    return Weights(range(count), **{**given, **options})


def checked(weights, stamp, inputs):
    return weights.check(stamp, inputs, weights.now(inputs))


def test_what_changes_a_stamp(tensors):
    own = weights()
    stamp = own.now(tensors)()
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


def test_weights_that_are_gone_and_fused_steps(tensors):
    """What lies where a weight was is another one; an optimizer's step is one of its parameters."""
    own, others = weights(), [nn.Parameter(torch.ones(1)) for _ in range(3)]
    stamp, other, reference = own.now(tensors)(), own.now(others)(), weakref.ref(tensors[2])
    tensors[2] = nn.Parameter(torch.ones(1))
    gc.collect()
    assert reference() is None  # a stamp keeps none alive
    for graph in (own, weights()):
        assert checked(graph, stamp, tensors)[1] == "weights changed"
    stamp = own.now(tensors)()
    tensors[0].grad = torch.ones(3)
    torch.optim.AdamW([tensors[0]], fused=True).step()
    assert own.check(stamp, tensors, own.now(tensors), are_same=True)[1] == "weights changed"
    assert own.check(other, others, own.now(others), are_same=True) == (other, None)


def test_inference_tensors_and_numbers_of_the_model():
    with torch.inference_mode():  # they have no count of writes
        tensors = [torch.ones(1) for _ in range(3)]
    own = weights()
    assert checked(own, own.now(tensors)(), tensors)[1] is None
    number = torch.tensor(0.5)
    own = Weights([], [], {"scale": 0}, lambda: {"shift": frozenset({"== 1"})})
    stamp = own.now([number])()
    assert checked(own, stamp, [torch.tensor(0.5)])[1] is None
    assert checked(own, stamp, [torch.tensor(0.25)])[1] == "a number of the model changed"


def test_another_graph_of_the_same_model(tensors):
    """Tables that models keep may be others, parameters and numbers may not."""
    own = weights()
    stamp = own.now(tensors)()
    other = weights(constants=lambda: {"scale": frozenset({"== 1"})})
    table = torch.zeros(5)
    new, reason = checked(other, stamp, [tensors[0], table, tensors[2]])
    assert reason is None
    assert new.weights is other
    third = weights(constants=lambda: {"scale": frozenset({"== 2"})})
    assert checked(third, new, tensors)[1] == "a number of the model changed"
    assert checked(own, stamp, [tensors[2], tensors[1], tensors[2]])[1] == "weights changed"
