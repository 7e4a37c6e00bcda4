"""Past Dynamo (guards="trajectory") and past the launches of kernels (CUDA graphs): whatever else
happens, outputs and decisions are those of a denoiser that takes neither way.

A pointer that is no longer the right one, or an input that was not staged, shows as wrong numbers.
"""

import functools
import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import graphed, hits, plain, sample, seeded, short, solve, times
from opened import Small, served_by_threads
from policies import EASY, MAG, MASK, NEVER, SEA, TAYLOR, name_of
from policy_cases import moving
from torch import nn

from fxcache import FirstBlockCache, StepSchedule

TWO = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)
TAIL = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2, tail_blocks=1)
WAYS = {
    "shortcut": short,
    "graphs": graphed,
    "both": functools.partial(graphed, guards="trajectory"),
}
CASES = [("shortcut", policy) for policy in (NEVER, TWO, TAYLOR, MASK, EASY, SEA, MAG)]
CASES += [("graphs", policy) for policy in (NEVER, TAYLOR, TAIL, MASK, EASY, SEA)]
CASES += [("both", TAYLOR), ("both", MASK)]


@pytest.fixture(params=WAYS)
def way(request, device):
    return request.param


def pair(way, model, policy):
    """A denoiser that takes `way`, one that takes none, and how their outputs compare: a device
    that runs a piece once more when it captures it rounds otherwise.
    """
    same = assert_identical if way in ("shortcut", "complete") else assert_close
    return WAYS.get(way, plain)(model, policy), plain(model, policy), same


ONCE, HEUN = [*range(12)], [0, *sorted([*range(1, 12)] * 2)]


@pytest.mark.parametrize(("way", "policy"), CASES, ids=name_of, indirect=["way"])
def test_the_same_numbers_and_decisions(way, device, policy):
    """Announced or not, and where a step has two evaluations, which no guess of the next foresees.

    What is measured at each step is compared from the second trajectory on: the stand-in runs a
    piece twice when it captures it.
    """
    a, b, same = pair(way, seeded(lambda: Small(3)), policy)

    def run(denoiser, steps, seed, announced=True):
        with denoiser.trajectory(12) if announced else nullcontext():
            x = sample(seed=seed)
            return [
                denoiser(moving(x, i) + 0.01 * place, times(1 - i / 12))
                for place, i in enumerate(steps)
            ]

    if way == "graphs" and policy in (EASY, SEA):
        run(a, ONCE, 2), run(b, ONCE, 2)
    for announced, steps in product((False, True), (ONCE, HEUN)):
        for seed in (0, 1):
            same(run(a, steps, seed, announced), run(b, steps, seed, announced))
            made = [each.report().records[-len(steps) :] for each in (a, b)]
            assert made[0] == made[1]
            assert policy is NEVER or any(record.is_hit for record in made[0])
    assert way == "shortcut" or device.captures > 0


@pytest.mark.parametrize("way", ["complete", *WAYS], indirect=True)
def test_slots_branches_and_threads_do_not_mix(model, device, way):
    """Each is what it is alone, also if their requests are served by threads."""
    a, b, same = pair(way, model, TWO)
    places, made = [("r", "cond"), ("r", "uncond"), ("s", "cond"), (None, None)], {}
    for repeat, i in product((0, 1), range(6)):
        for seed, (slot, branch) in enumerate(places):
            with a.slot(slot), a.branch(branch):
                output = a(sample(seed=seed + 7 * repeat) + 0.05 * i, times(1 - i / 6))
            made.setdefault(seed + 7 * repeat, []).append(output)
    assert way != "graphs" or device.captures == 3 * len(places)
    for seed, outputs in made.items():
        b.reset()
        same(outputs, solve(b, 6, seed))
    for seed, outputs in served_by_threads(a, range(4)).items():
        b.reset()
        same(outputs, solve(b, 8, seed))


MODES = [
    torch.no_grad(),
    torch.inference_mode(),
    torch.autocast("cpu", dtype=torch.bfloat16),
    torch.autocast("cpu", dtype=torch.float16),
]


def test_modes_of_torch_alternate(model, way):
    """Inputs are inference tensors now and then; what comes out is what the mode makes it. A model
    in training mode is cached, as ComfyUI leaves its models.
    """
    model.train()
    a, b, same = pair(way, model, TAYLOR if way == "shortcut" else MASK)
    modes = MODES if way == "shortcut" else MODES[:2]
    for seed in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(16):
                x, t = sample(seed=i + seed), times(1 - i / 16)
                with modes[(i if i % 3 else i // 2) % len(modes)]:
                    if i % 2:
                        x, t = x.clone(), t.clone()
                    got, expected = a(x, t), b(x, t)
                same(got.float(), expected.float())
                assert got.is_inference() == expected.is_inference()
                assert got.dtype == expected.dtype
    assert hits(a) == hits(b)


def test_one_executor_in_both_modes(model, device, monkeypatch):
    """Whoever filters Dynamo's guards may bring inference_mode to graphs made without it."""
    monkeypatch.setattr("fxcache.runtime.shortcut._ambient", lambda: None)
    a, b, same = pair("both", model, TAYLOR)
    for first in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(12):
                x, t = sample(seed=i), times(1 - i / 12)
                with torch.inference_mode() if i % 3 == first else torch.no_grad():
                    same(a(x, t), b(x, t))


class LoRA(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Linear(self.in_features, 2, bias=False)
        self.up = nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replaced(parameter):
    return nn.Parameter(torch.randn_like(parameter))


def scaled(model):
    return {name: value.clone() * 1.5 for name, value in model.state_dict().items()}


CHANGES = {
    "weight": lambda m: setattr(m.blocks[1].up, "weight", replaced(m.blocks[1].up.weight)),
    "bias": lambda m: setattr(m.blocks[1].up, "bias", replaced(m.blocks[1].up.bias)),
    "data": lambda m: setattr(m.embed.weight, "data", torch.randn_like(m.embed.weight)),
    "in place": lambda m: m.blocks[1].up.weight.mul_(0.5),
    "round trip": lambda m: m.to(torch.float64).to(torch.float32),
    "load": lambda m: m.load_state_dict(scaled(m)),
    "assign": lambda m: m.load_state_dict(scaled(m), assign=True),
    "adapt": lambda m: setattr(m.blocks[1], "proj", LoRA(m.blocks[1].proj)),
}


@pytest.mark.parametrize("policy", [NEVER, StepSchedule(mask=[False])], ids=["head", "none"])
def test_changed_weights_are_used_at_once(model, way, device, policy):
    """With guards once a trajectory: what is replaced in the next one, what is written at once.
    Whether it is announced or not.
    """
    denoiser, _, same = pair(way, model, policy)
    for announced, (name, change) in product((False, True), CHANGES.items()):
        with denoiser.trajectory() if announced else nullcontext():
            for i in range(9):
                if i in (4, 7) and (way == "graphs" or name in ("in place", "load")):
                    change(model)
                x, t = sample(seed=i), times(1 - i / 9)
                same(denoiser(x, t), model(x, t))
            replayed = device.replays
            denoiser(sample(), times(0))
            denoiser(sample(), times(0))
        assert way == "shortcut" or device.replays > replayed, name
        change(model)
