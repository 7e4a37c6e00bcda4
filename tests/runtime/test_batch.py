"""Requests in one call decide as each of them does alone, and none touches another."""

import math
from dataclasses import replace

import pytest
import torch
from batches import NAMES, Requests, decisions, of_net, together
from comparing import assert_close, assert_identical
from helpers import graphed, plain, seeded
from nets import Net, Residual
from opened import Small
from policies import ALWAYS, MASK
from torch import nn
from zoo import SequentialDiT

import fxcache
from fxcache.runtime.regions import Wiring

CAPTURES_ARE_SHARED = True
ADAPTIVE, FIRST = fxcache.AdaptiveCache(tolerance=0.6), fxcache.FirstBlockCache(threshold=0.3)


class Conditioned(SequentialDiT):
    """Places have no rows; the sizes of two inputs meet in one formula, as in SDXL."""

    def __init__(self):
        super().__init__(depth=3)
        self.text = nn.Linear(4 + 12, 4)

    def forward(self, x, t, text, numbers, img_ids):
        flat = (numbers.flatten()[:, None] * torch.arange(2)).sin().reshape(len(text), -1)
        shift = self.text(torch.cat([text, flat], -1))[:, None]
        return super().forward(x + shift + img_ids, t)


CONDITIONS = {"text": torch.ones(2, 4), "numbers": torch.ones(2, 6), "img_ids": torch.randn(8, 4)}
#: By what is different.
CASES = {
    "whole model": ("sequential_dit", fxcache.EasyCache(threshold=0.3, warmup_steps=2)),
    "8-bit residuals": ("sequential_dit", ADAPTIVE, {"cache_dtype": torch.float8_e4m3fn}),
    "signal": ("sequential_dit", fxcache.TeaCache(threshold=0.3, coefficients=[0, 0, 0, 1, 0])),
    "several streams": ("structured_dit", replace(FIRST, forecast=fxcache.Taylor(order=2))),
    "U shape": ("uvit", MASK),
    "conditions": (Conditioned, fxcache.SeaCache(threshold=0.4)),
    "masks of a mask": ("ltx_video", ADAPTIVE),
}


#: How many rows passed through each block.
ROWS = []


@torch.library.custom_op("fxcache_tests::noted", mutates_args=())
def noted(x: torch.Tensor) -> torch.Tensor:
    ROWS.append(len(x))
    return x.clone()


noted.register_fake(torch.empty_like)


class Noting(Residual):
    def forward(self, x, t):
        return x + noted(super().forward(x, t) - x)


@pytest.fixture(scope="module")
def captured():
    """Of each kind of policy a denoiser of a small net."""
    return {}


@pytest.fixture
def served(captured):
    """Gives a denoiser that knows of nothing, and follows a policy."""

    def denoiser(policy=ALWAYS):
        kind = type(policy)
        if kind not in captured:
            captured[kind] = plain(seeded(lambda: Net(depth=3)), policy, audit=False)
        captured[kind].reset()
        captured[kind].policy = policy
        return captured[kind]

    return denoiser


def hits(denoiser, name):
    return [is_hit for is_hit, _ in decisions(denoiser, name)]


def assert_as_alone(requests, one, many, tolerance=1e-5):
    """Together in `many` as one after the other in `one`, which may be the same denoiser."""
    expected = requests.alone(one)
    made = {name: decisions(one, name) for name in requests.names}
    one.reset()
    outputs = requests.batched(many)
    for name in requests.names:
        assert decisions(many, name) == made[name]
        assert_close(outputs[name], expected[name], tolerance)
    return sum(is_hit for own in made.values() for is_hit, _ in own)


@pytest.mark.parametrize("case", CASES)
def test_decisions_and_numbers_are_those_of_each_request_alone(case):
    """Requests come and go at different steps; the first two calls have one request only."""
    of, policy, *options = CASES[case]
    requests = Requests(of, **(CONDITIONS if case == "conditions" else {}))
    denoiser = plain(requests.model, policy, audit=False, **(options or [{}])[0])
    assert 0 < assert_as_alone(requests, denoiser, denoiser) < len(NAMES) * requests.steps
    report = denoiser.report()
    assert report.graphs == 2  # of one request, and of any number
    assert report.cached_bytes == 0  # all of them are over


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_inductor(rows):
    requests = Requests(lambda: SequentialDiT(depth=3), rows=rows)
    denoiser = fxcache.transform(requests.model, ADAPTIVE, audit=False)
    assert assert_as_alone(requests, denoiser, denoiser)


@pytest.mark.parametrize("policy", [ADAPTIVE, FIRST])
def test_cuda_graphs_run_buckets(device, policy):
    """Graphs of 1, 2, 4 and 8 requests are replayed, and of no other number."""
    requests = Requests(lambda: Small(3), names=tuple("abcde"), gap=1)
    many = graphed(requests.model, policy, audit=False)
    assert_as_alone(requests, plain(requests.model, policy, audit=False), many)
    assert device.replays > 0


def test_buckets_are_filled_up(device):
    """As many rows run as fill one: seen by the blocks."""
    many = graphed(seeded(lambda: Net(Noting, depth=3)), ADAPTIVE, audit=False)
    ROWS.clear()
    for step in range(6):
        for number in (3, 5, 6, 7):
            together(many, list(range(number)), *of_net(step, number))
    assert set(ROWS) == {1, 2, 4, 8}  # 1 and 2: how it is tried that requests are apart


def test_only_the_rows_that_miss_run_the_blocks():
    """Counted in what passes through the blocks' last layers."""
    denoiser = plain(seeded(lambda: Net(Noting, depth=3)), ADAPTIVE, audit=False)
    names = list(range(8))
    for step in range(6):
        if step == 5:
            denoiser.release(3)
        ROWS.clear()
        together(denoiser, names, *of_net(step, 8))
        made = [hits(denoiser, name)[-1] for name in names]
        if step > 0:  # at first, one request is computed by itself, too
            assert [8 - sum(made)] * 3 * (sum(made) < 8) == ROWS
    assert made == [name != 3 for name in names]


def test_nan_in_one_row_touches_no_other(served):
    """It is a miss of its request, then and after."""
    outputs = []
    for broken in (False, True):
        denoiser = served(FIRST)
        for step in range(4):
            x, t = of_net(step, 3)
            if broken and step == 2:
                x[1] = math.nan
            outputs.append(together(denoiser, list("abc"), x, t)[::2])
    assert_identical(outputs[4:], outputs[:4])
    assert hits(denoiser, "a") == hits(denoiser, "c") == [False, True, True, True]
    assert hits(denoiser, "b") == [False, True, False, False]


def test_a_request_is_called_alone_and_with_others(served):
    """In turn, also inside of a batch: it has one state, and hits where it would."""
    denoiser = served()
    together(denoiser, ["a", "b"], *of_net(0))
    with denoiser.slot("a"):
        denoiser(*of_net(1, 1))
    together(denoiser, ["a"], *of_net(2, 1))
    together(denoiser, ["b", "a"], *of_net(3, 2))
    with denoiser.batch(["a", "b"]):
        denoiser(*of_net(4))
        with denoiser.slot("a"):
            denoiser(*of_net(5, 1))
        denoiser(*of_net(6))
    assert hits(denoiser, "a") == [False] + [True] * 6
    assert hits(denoiser, "b") == [False] + [True] * 3


def test_branches_of_requests(served):
    """Two calls a step, of which each is a batch. Without names they never hit: a batch shows too
    little of a call to tell branches apart.
    """
    denoiser = served()
    for step in range(3):
        for branch in ("cond", "uncond"):
            with denoiser.branch(branch):
                together(denoiser, ["a", "b"], *of_net(step))
    records = denoiser.report("a").records
    assert [(r.branch, r.is_hit) for r in records] == [
        (branch, step > 0) for step in range(3) for branch in ("cond", "uncond")
    ]
    denoiser.reset()
    for step in range(3):
        for _ in ("cond", "uncond"):
            together(denoiser, ["a", "b"], *of_net(step))
    assert decisions(denoiser, "a")[1:] == [(False, "which branch it is cannot be told")] * 5


def test_each_request_has_its_own_policy(served):
    denoiser = served(ADAPTIVE)
    policies = {"strict": replace(ADAPTIVE, tolerance=0), "loose": replace(ADAPTIVE, tolerance=9)}
    for step in range(6):
        together(denoiser, policies, *of_net(step))
    assert not any(hits(denoiser, "strict"))
    assert any(hits(denoiser, "loose"))


def test_conditioning_is_looked_at_by_request():
    """A policy with a control_threshold: what changed for one is a miss of that one."""

    class Controlled(Net):
        def forward(self, x, t, control):
            return self.out(self.stack(self.embed(x) + control, t))

    policy = fxcache.FirstBlockCache(threshold=math.inf, control_threshold=0.1)
    denoiser = plain(seeded(lambda: Controlled(depth=2)), policy, audit=False)
    control = torch.ones(2, 16, 32)
    for step in range(3):
        if step == 2:
            control = control * torch.tensor([1.0, 2.0])[:, None, None]
        with denoiser.batch(["a", "b"]):
            denoiser(*of_net(step), control)
    assert hits(denoiser, "a") == [False, True, True]
    assert decisions(denoiser, "b")[-1] == (False, "control changed")


def test_new_weights_are_a_miss_of_all(served):
    denoiser = served(ADAPTIVE)
    for step in range(6):
        if step == 5:
            denoiser.blocks[2].up.weight.mul_(1.1)
        together(denoiser, ["a", "b"], *of_net(step))
    for name in "ab":
        assert decisions(denoiser, name)[-1] == (False, "weights changed")
        assert any(hits(denoiser, name))


def test_as_many_rows_as_tokens():
    """A tensor without rows may have the same first size; symbols tell it apart, not numbers."""

    class Placed(Net):
        def forward(self, x, t, places):
            return super().forward(x + places.sum(1)[None, :, None], t)

    model, places = seeded(lambda: Placed(depth=2)), torch.rand(16, 3)
    denoiser, names = plain(model, ALWAYS, audit=False), list(range(16))
    x = torch.randn(16, 16, 8)
    for given, order in ((x, names), (x.flip(0)[:5], names[::-1][:5])):
        output = together(denoiser, order, given, torch.ones(len(given)), places)
        assert_close(output, model(given, torch.ones(len(given)), places))


def test_a_table_with_as_many_entries_as_the_batch():
    """Belongs to all: who reads its first entry reads it for each request, alone in a miss, too."""

    class Reading(Net):
        def forward(self, x, t, table):
            return super().forward(x + table[0], t)

    model, table = seeded(lambda: Reading(depth=2)), torch.randn(2, 16, 8)
    denoiser = plain(model, ALWAYS, audit=False)
    for step in range(3):
        if step == 2:
            denoiser.release("b")
        x, t = of_net(step)
        output = together(denoiser, ["a", "b"], x, t, table)
    assert [r.is_hit for r in denoiser.report().records[-2:]] == [True, False]
    assert_close(output[1], model(x, t, table)[1])


def test_outputs_of_other_kinds():
    """Views of inputs, switches, and what has no rows."""

    class Telling(Net):
        def forward(self, x, t):
            out = super().forward(x, t)
            return {"out": out, "given": x[:, :2], "high": out > 0, "name": "telling"}

    model = seeded(lambda: Telling(depth=2))
    denoiser = plain(model, ALWAYS, audit=False)
    for names in (["a"], ["a", "b"], ["b"]):
        x, t = of_net(0, len(names))
        denoiser.reset()
        output, expected = together(denoiser, names, x, t), model(x, t)
        assert output.keys() == expected.keys()
        assert_close(output["out"], expected["out"])
        assert_identical(output["given"], expected["given"])
        assert output["high"].shape == expected["high"].shape


def test_requests_have_their_audit():
    """Made where a request's own policy may hit, and no other."""
    never, always = fxcache.FirstBlockCache(threshold=0), ALWAYS
    for own, other, audits in ((never, always, 1), (always, never, 0)):
        denoiser = plain(seeded(lambda: Net(depth=2)), own)
        together(denoiser, {"a": other, "b": other}, *of_net(0))
        assert len(denoiser._fxcache.session.audits) == audits


@torch._dynamo.config.patch(recompile_limit=3)
def test_more_kinds_of_calls_than_dynamo_captures():
    """They are captured anew, as those of single requests are."""

    class Worded(Net):
        def forward(self, x, t, word):
            return super().forward(x * len(word), t)

    model = seeded(lambda: Worded(depth=2))
    denoiser, (x, t) = plain(model, ALWAYS, audit=False), of_net(0)
    for length in range(1, 6):
        denoiser.reset()
        output = together(denoiser, ["a", "b"], x, t, "x" * length)
        assert_close(output, model(x, t, "x" * length))
    assert denoiser.report().graphs >= 5


def test_finished_requests_leave_nothing(served):
    """With steps that are known, when the last was seen; else when they are released."""
    denoiser = served()
    for step in range(3):
        together(denoiser, ["a", "b"], *of_net(step))
    held = denoiser.report().cached_bytes
    denoiser.release("a")
    assert denoiser.report().cached_bytes == held // 2
    with denoiser.trajectory(num_steps=2, slot="c"):
        for step in range(3, 5):
            together(denoiser, ["b", "c"], *of_net(step))
    assert denoiser.report().cached_bytes == held // 2
    assert hits(denoiser, "b") == [False] + [True] * 4
    denoiser.reset()
    assert denoiser.report().cached_bytes == 0


def test_more_requests_than_slots_are_kept(served):
    """None of a batch is dropped for another of it."""
    denoiser = served()
    for step in range(2):
        together(denoiser, list(range(80)), *of_net(step, 80))
    assert all(record.is_hit for record in denoiser.report().records[80:])


def test_an_error_leaves_no_half_written_state(served, monkeypatch):
    """Of those in the call: others go on."""
    denoiser = served()
    together(denoiser, ["a", "b", "c"], *of_net(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Wiring, "hit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            together(denoiser, ["a", "b"], *of_net(1))
    together(denoiser, ["a", "b", "c"], *of_net(2, 3))
    assert [hits(denoiser, name)[-1] for name in "abc"] == [False, False, True]
