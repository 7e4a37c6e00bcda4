"""Requests in one call decide as each of them does alone, and none touches another."""

import math

import pytest
import torch
from batches import NAMES, Requests, decisions, of_net, together
from helpers import ALWAYS, assert_close, assert_identical, graphed, plain
from nets import Net, Residual

import fxcache
from fxcache import (
    AdaptiveCache,
    EasyCache,
    FirstBlockCache,
    SeaCache,
    StepSchedule,
    Taylor,
    TeaCache,
)
from fxcache.runtime.regions import Wiring

ADAPTIVE = AdaptiveCache(tolerance=0.6)
CASES = {
    "sequential_dit": EasyCache(threshold=0.3, warmup_steps=2),
    "structured_dit": FirstBlockCache(threshold=0.3, forecast=Taylor(order=2)),
    "uvit": StepSchedule(mask=(False, True, False, True, False, False, True, True)),
    "flux": SeaCache(threshold=0.4),
    "wan_t2v": TeaCache(threshold=0.3, coefficients=[0, 0, 0, 1, 0]),
    "ltx_video": ADAPTIVE,  # a mask, of which the model makes others
    "sdxl_unet": ADAPTIVE,  # sizes of several inputs in one formula
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


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


# --- the same as alone ---


@pytest.mark.parametrize("name", CASES)
def test_decisions_and_numbers_are_those_of_each_request_alone(name):
    """Requests come and go at different steps; the first two calls have one request only."""
    requests, policy = Requests(name), CASES[name]
    one, many = (plain(requests.model, policy, audit=False) for _ in range(2))
    expected, outputs = requests.alone(one), requests.batched(many)
    hits = 0
    for request in NAMES:
        assert decisions(many, request) == decisions(one, request)
        assert_close(outputs[request], expected[request])
        hits += sum(is_hit for is_hit, _ in decisions(one, request))
    assert 0 < hits < len(NAMES) * requests.steps
    report = many.report()
    assert report.graphs == 2  # of one request, and of any number
    assert report.cached_bytes == 0  # all of them are over


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequential_dit", "flux"])  # of two rows, and of one
def test_inductor(name):
    requests = Requests(name)
    one, many = (fxcache.transform(requests.model, ADAPTIVE, audit=False) for _ in range(2))
    expected, outputs = requests.alone(one), requests.batched(many)
    for request in NAMES:
        assert decisions(many, request) == decisions(one, request)
        assert_close(outputs[request], expected[request])


@pytest.mark.parametrize("policy", [ADAPTIVE, FirstBlockCache(threshold=0.3)])
def test_cuda_graphs_run_buckets(device, policy):
    """Graphs of 1, 2, 4 and 8 requests are replayed, and of no other number."""
    requests = Requests("sequential_dit", names=tuple("abcde"), gap=1, steps=10)
    many = graphed(requests.model, policy, audit=False)
    one = plain(requests.model, policy, audit=False)
    outputs, expected = requests.batched(many), requests.alone(one)
    for request in requests.names:
        assert decisions(many, request) == decisions(one, request)
        assert_close(outputs[request], expected[request])
    assert device.replays > 0


def test_buckets_are_filled_up(device):
    """As many rows run as fill one: seen by the blocks."""
    torch.manual_seed(0)
    many = graphed(Net(Noting, depth=4).eval(), ADAPTIVE, audit=False)
    ROWS.clear()
    for step in range(6):
        for number in (3, 5, 6, 7):
            with torch.no_grad(), many.batch(list(range(number))):
                many(*of_net(step, number))
    assert set(ROWS) == {1, 2, 4, 8}  # 1 and 2: how it is tried that requests are apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_residuals_of_another_dtype(dtype):
    requests = Requests("sequential_dit")
    one, many = (plain(requests.model, ADAPTIVE, audit=False, cache_dtype=dtype) for _ in range(2))
    expected, outputs = requests.alone(one), requests.batched(many)
    for request in NAMES:
        assert decisions(many, request) == decisions(one, request)
        assert_close(outputs[request], expected[request])


def test_only_the_rows_that_miss_run_the_blocks(net):
    """Counted in what passes through the blocks' last layers."""
    torch.manual_seed(0)
    denoiser, names = plain(Net(Noting, depth=4).eval(), ADAPTIVE, audit=False), list(range(8))
    for step in range(6):
        if step == 5:
            denoiser.release(3)
        ROWS.clear()
        together(denoiser, names, *of_net(step, 8))
        hits = [decisions(denoiser, name)[-1][0] for name in names]
        if step > 0:  # at first, one request is computed by itself, too
            assert [8 - sum(hits)] * 4 * (sum(hits) < 8) == ROWS
    assert hits == [name != 3 for name in names]


def test_nan_in_one_row_touches_no_other(net):
    """It is a miss of its request, then and after."""
    denoiser, clean = (plain(net, FirstBlockCache(threshold=0.3), audit=False) for _ in range(2))
    for step in range(4):
        x, t = of_net(step, 3)
        expected = together(clean, list("abc"), x, t)
        if step == 2:
            x[1] = math.nan
        output = together(denoiser, list("abc"), x, t)
        assert_identical(output[::2], expected[::2])
    hits = {name: [is_hit for is_hit, _ in decisions(denoiser, name)] for name in "abc"}
    assert hits["a"] == hits["c"] == [False, True, True, True]
    assert hits["b"] == [False, True, False, False]


def test_a_request_is_called_alone_and_with_others(net):
    """In turn: it has one state, and hits where it would."""
    denoiser = plain(net, ALWAYS, audit=False)
    x, t = of_net(0, 2)
    together(denoiser, ["a", "b"], x, t)
    with torch.no_grad(), denoiser.slot("a"):
        denoiser(*of_net(1, 1))
    together(denoiser, ["a"], *of_net(2, 1))
    together(denoiser, ["b", "a"], *of_net(3, 2))
    assert [is_hit for is_hit, _ in decisions(denoiser, "a")] == [False, True, True, True]
    assert [is_hit for is_hit, _ in decisions(denoiser, "b")] == [False, True]


def test_branches_of_requests(net):
    """Two calls a step, of which each is a batch."""
    denoiser = plain(net, ALWAYS, audit=False)
    for step in range(3):
        for branch in ("cond", "uncond"):
            with denoiser.branch(branch):
                together(denoiser, ["a", "b"], *of_net(step))
    records = denoiser.report("a").records
    assert [(r.branch, r.is_hit) for r in records] == [
        (branch, step > 0) for step in range(3) for branch in ("cond", "uncond")
    ]


def test_each_request_has_its_own_policy(net):
    denoiser = plain(net, ADAPTIVE, audit=False)
    policies = {"strict": AdaptiveCache(tolerance=0), "loose": AdaptiveCache(tolerance=9)}
    for step in range(6):
        together(denoiser, policies, *of_net(step))
    assert not any(is_hit for is_hit, _ in decisions(denoiser, "strict"))
    assert any(is_hit for is_hit, _ in decisions(denoiser, "loose"))


def test_conditioning_is_looked_at_by_request(net):
    """A policy with a control_threshold: what changed for one is a miss of that one."""

    class Controlled(Net):
        def forward(self, x, t, control):
            return self.out(self.stack(self.embed(x) + control, t))

    torch.manual_seed(0)
    policy = FirstBlockCache(threshold=math.inf, control_threshold=0.1)
    denoiser, control = plain(Controlled().eval(), policy, audit=False), torch.ones(2, 16, 32)
    for step in range(3):
        if step == 2:
            control = control * torch.tensor([1.0, 2.0])[:, None, None]
        with torch.no_grad(), denoiser.batch(["a", "b"]):
            denoiser(*of_net(step), control)
    assert [is_hit for is_hit, _ in decisions(denoiser, "a")] == [False, True, True]
    assert decisions(denoiser, "b")[-1] == (False, "control changed")


def test_new_weights_are_a_miss_of_all(net):
    denoiser = plain(net, ADAPTIVE, audit=False)
    for step in range(6):
        if step == 5:
            with torch.no_grad():
                net.blocks[2].up.weight.mul_(1.1)
        together(denoiser, ["a", "b"], *of_net(step))
    for name in "ab":
        assert decisions(denoiser, name)[-1] == (False, "weights changed")
        assert any(is_hit for is_hit, _ in decisions(denoiser, name))


def test_as_many_rows_as_tokens(net):
    """A tensor without rows may have the same first size; symbols tell it apart, not numbers."""

    class Placed(Net):
        def forward(self, x, t, places):
            return super().forward(x + places.sum(1)[None, :, None], t)

    torch.manual_seed(0)
    model, places = Placed().eval(), torch.rand(16, 3)
    denoiser, names = plain(model, ALWAYS, audit=False), list(range(16))
    x = torch.randn(16, 16, 8)
    with torch.no_grad():
        with denoiser.batch(names):
            output = denoiser(x, torch.ones(16), places)
        with denoiser.batch(names[::-1][:5]):
            fewer = denoiser(x.flip(0)[:5], torch.ones(5), places)
        assert_close(output, model(x, torch.ones(16), places))
        assert_close(fewer, model(x.flip(0)[:5], torch.ones(5), places))


def test_a_table_with_as_many_entries_as_the_batch(net):
    """Belongs to all: who reads its first entry reads it for each request, alone in a miss, too."""

    class Reading(Net):
        def forward(self, x, t, table):
            return super().forward(x + table[0], t)

    torch.manual_seed(0)
    model, table = Reading().eval(), torch.randn(2, 16, 8)
    denoiser = plain(model, ALWAYS, audit=False)
    with torch.no_grad():
        for step in range(3):
            if step == 2:
                denoiser.release("b")
            x, t = of_net(step)
            with denoiser.batch(["a", "b"]):
                output = denoiser(x, t, table)
        assert [r.is_hit for r in denoiser.report().records[-2:]] == [True, False]
        assert_close(output[1], model(x, t, table)[1])


def test_outputs_of_other_kinds(net):
    """Views of inputs, switches, and what has no rows."""

    class Telling(Net):
        def forward(self, x, t):
            out = super().forward(x, t)
            return {"out": out, "given": x[:, :2], "high": out > 0, "name": "telling"}

    torch.manual_seed(0)
    model = Telling().eval()
    denoiser = plain(model, ALWAYS, audit=False)
    for names in (["a"], ["a", "b"], ["b"]):
        x, t = of_net(0, len(names))
        denoiser.reset()
        output, expected = together(denoiser, names, x, t), model(x, t)
        assert output.keys() == expected.keys()
        assert_close(output["out"], expected["out"])
        assert_identical(output["given"], expected["given"])
        assert output["high"].shape == expected["high"].shape


def test_calls_of_a_step_that_have_no_names_never_hit(net):
    """A batch shows too little of a call to tell branches apart."""
    denoiser = plain(net, ALWAYS, audit=False)
    for step in range(3):
        for _ in ("cond", "uncond"):
            together(denoiser, ["a", "b"], *of_net(step))
    assert decisions(denoiser, "a")[1:] == [(False, "which branch it is cannot be told")] * 5


def test_requests_have_their_audit(net):
    """Made where a request's own policy may hit, and no other."""
    never, always = FirstBlockCache(threshold=0), ALWAYS
    for own, other, audits in ((never, always, 1), (always, never, 0)):
        denoiser = plain(net, own)
        together(denoiser, {"a": other, "b": other}, *of_net(0))
        assert len(denoiser._fxcache.session.audits) == audits


def test_a_slot_inside_of_a_batch_is_that_slot(net):
    denoiser = plain(net, ALWAYS, audit=False)
    with denoiser.batch(["a", "b"]):
        denoiser(*of_net(0))
        with denoiser.slot("a"):
            denoiser(*of_net(1, 1))
        denoiser(*of_net(2))
    assert [is_hit for is_hit, _ in decisions(denoiser, "a")] == [False, True, True]


def test_more_kinds_of_calls_than_dynamo_captures(net):
    """They are captured anew, as those of single requests are."""

    class Worded(Net):
        def forward(self, x, t, word):
            return super().forward(x * len(word), t)

    torch.manual_seed(0)
    model = Worded().eval()
    denoiser, (x, t) = plain(model, ALWAYS, audit=False), of_net(0)
    for length in range(1, 11):
        denoiser.reset()
        with torch.no_grad(), denoiser.batch(["a", "b"]):
            assert_close(denoiser(x, t, "x" * length), model(x, t, "x" * length))


# --- what is left ---


def test_finished_requests_leave_nothing(net):
    """With steps that are known, when the last was seen; else when they are released."""
    denoiser = plain(net, ALWAYS, audit=False)
    for step in range(3):
        together(denoiser, ["a", "b"], *of_net(step))
    held = denoiser.report().cached_bytes
    denoiser.release("a")
    assert denoiser.report().cached_bytes == held // 2
    with denoiser.trajectory(num_steps=2, slot="c"):
        for step in range(3, 5):
            together(denoiser, ["b", "c"], *of_net(step))
    assert denoiser.report().cached_bytes == held // 2
    assert [is_hit for is_hit, _ in decisions(denoiser, "b")] == [False] + [True] * 4
    denoiser.reset()
    assert denoiser.report().cached_bytes == 0


def test_more_requests_than_slots_are_kept(net):
    """None of a batch is dropped for another of it."""
    denoiser = plain(net, ALWAYS, audit=False)
    for step in range(2):
        together(denoiser, list(range(80)), *of_net(step, 80))
    assert all(record.is_hit for record in denoiser.report().records[80:])


def test_an_error_leaves_no_half_written_state(net, monkeypatch):
    """Of those in the call: others go on."""
    denoiser = plain(net, ALWAYS, audit=False)
    together(denoiser, ["a", "b", "c"], *of_net(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Wiring, "hit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            together(denoiser, ["a", "b"], *of_net(1))
    together(denoiser, ["a", "b", "c"], *of_net(2, 3))
    assert [decisions(denoiser, name)[-1][0] for name in "abc"] == [False, False, True]
