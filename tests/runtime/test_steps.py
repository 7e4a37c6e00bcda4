"""Where evaluations belong: steps, branches without a name and requests."""

import itertools
import threading
from collections import UserDict as Held

import diffusers
import pytest
import torch
from comparing import assert_identical
from helpers import hits, plain, sample, seeded, times
from loops import Flow, Pipe
from opened import Small, opened
from policies import ALTERNATE, ALWAYS, MASK
from torch import nn

import fxcache
from fxcache import OptionError, StepSchedule


class Guided(Small):
    """A denoiser with a text input, added to the time embedding."""

    def __init__(self):
        super().__init__()
        self.text = nn.Linear(4, 16)

    def forward(self, x, t, text):
        return super().forward(x + self.text(text)[:, None, :4], t)


@pytest.fixture
def pipe():
    return Pipe()


def guided():
    return seeded(Guided)


class Listed:
    """A scheduler, and the loop that reads it."""

    def __init__(self, model, policy=ALTERNATE, scheduler=None):
        self.scheduler, self.transformer = scheduler or Flow(), model
        self.handle = fxcache.apply(self, policy, backend="eager")

    @torch.no_grad()
    def run(self, calls, steps=8):
        """`calls` gives the outputs of a step, the first being the prediction."""
        self.scheduler.set_timesteps(steps)
        x = torch.ones(1, 8, 4)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(calls(i, x, t)[0], t, x)[0]


def test_a_second_call_of_another_batch_is_a_branch_of_its_own():
    """Skip-layer guidance: in an interval one more call, of half the batch."""
    pipe = Listed(guided())
    model, pos, neg = pipe.transformer, torch.ones(1, 4), -torch.ones(1, 4)
    both = torch.cat([neg, pos])

    def calls(i, x, t):
        out = model(torch.cat([x, x]), t.expand(2), both)[1:]
        if 2 <= i < 5:
            out = out + 0.1 * (out - model(x, t[None], pos))
        return [out]

    pipe.run(calls)
    records = pipe.handle.report().records
    assert {r.trajectory for r in records} == {1}
    assert [r.is_hit for r in records if r.branch is None] == [False, True] * 4
    assert [(r.step, r.is_hit) for r in records if r.branch == "call 2"] == [
        (2, False), (3, True), (4, False)
    ]  # fmt: skip


def test_guidance_that_ends_leaves_each_branch_its_own_residual():
    """The negative call comes first: when it ends, the other must not take its place."""
    pos, neg = torch.ones(1, 4), -3 * torch.ones(1, 4)
    unnamed, named = Listed(guided()), Listed(guided())
    for end in (5, 8):
        seen, expected = [], []

        def call(i, x, t, end=end, seen=seen):
            if i < end:
                unnamed.transformer(x, t[None], neg)
            seen.append(unnamed.transformer(x, t[None], pos))
            return seen[-1:]

        def call_by_name(i, x, t, end=end, expected=expected):
            if i < end:
                with named.transformer.branch("uncond"):
                    named.transformer(x, t[None], neg)
            with named.transformer.branch("cond"):
                expected.append(named.transformer(x, t[None], pos))
            return expected[-1:]

        unnamed.run(call), named.run(call_by_name)
        assert_identical(seen, expected)
        assert unnamed.handle.report().hits == named.handle.report().hits > 4
        unnamed.handle.reset(), named.handle.reset()


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_tiles_of_one_step_are_branches(scheduler):
    """Nine views with one prompt: none takes another's residual, and all hit later."""
    pipe = Listed(guided(), ALWAYS, getattr(diffusers, scheduler)())
    model, text = pipe.transformer, torch.ones(1, 4)
    for is_made_anew in (False, True):

        def calls(i, x, t, anew=is_made_anew):
            given = text.clone() if anew else text
            return [model(x + view, t[None].float(), given) for view in range(4)]

        pipe.run(calls, steps=5)
        records = pipe.handle.report().records
        assert [r.is_hit for r in records[:4]] == [False] * 4
        assert sum(r.is_hit for r in records[4:]) >= 4 * 4 - is_made_anew
        assert [r.branch for r in records[:4]] == [None, "call 2", "call 3", "call 4"]
        pipe.handle.reset()


def test_a_new_prompt_in_a_branch_without_a_name_is_a_miss():
    model, (a, b) = guided(), (torch.ones(1, 4), -torch.ones(1, 4))
    denoiser = plain(model, ALWAYS)
    for i in range(6):
        denoiser(torch.ones(1, 8, 4) * (1 - i / 20), times(1 - i / 6, 1), a if i < 3 else b)
    assert hits(denoiser) == [False, True, True, False, True, True]
    with denoiser.branch("cond"):  # a name says that it is the same branch
        for i in range(6):
            denoiser(torch.ones(1, 8, 4), times(1 - i / 6, 1), a if i < 3 else b)
    assert hits(denoiser)[6:] == [False] + [True] * 5


def test_two_conditionings_at_one_timestep_do_not_share_a_residual():
    """Guidance by two calls of one sample, without names and without a scheduler."""
    model, (pos, neg) = guided(), (torch.ones(1, 4), -torch.ones(1, 4))
    denoiser = plain(model, ALWAYS)
    alone = {}
    for text in (pos, neg):
        alone[id(text)] = [
            denoiser(torch.ones(1, 8, 4) * (1 - i / 9), times(1 - i / 5, 1), text) for i in range(5)
        ]
        denoiser.reset()
    for i in range(5):
        x = torch.ones(1, 8, 4) * (1 - i / 9)
        for text in (neg, pos):
            assert_identical(denoiser(x, times(1 - i / 5, 1), text), alone[id(text)][i])


def test_the_place_in_the_list_counts_where_the_scheduler_does_not_move(pipe):
    """Diffusion forcing: each frame has a scheduler of its own, and the pipeline's stands still."""
    handle = fxcache.apply(pipe, StepSchedule.every(2, num_steps=8), backend="eager")
    for lag in (0, 3):
        handle.reset()
        for _ in range(2):
            pipe.scheduler.set_timesteps(8)
            listed = pipe.scheduler.timesteps
            with torch.no_grad(), pipe.transformer.branch("cond"):
                for i in range(8 + lag):
                    t = listed[max(i - lag, 0)].expand(2)
                    pipe.transformer(sample() * (1 - i / 50), t / 1000)
        own = [r for r in handle.report().records if r.branch == "cond"]
        assert [(r.step, r.is_hit) for r in own] == [(i, i % 2 == 1) for i in range(8)] * 2


def test_timesteps_that_rounding_made_equal_are_steps():
    """Karras' spacing repeats timesteps; Heun's list is longer than its steps."""
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    pipe = Pipe(scheduler)
    with fxcache.apply(pipe, ALTERNATE, backend="eager") as handle:
        pipe(80)
        assert len(set(scheduler.timesteps.tolist())) < 80
        assert [r.step for r in handle.report().records] == [*range(80)]
        pipe.scheduler = diffusers.HeunDiscreteScheduler()
        pipe(5)
        assert [r.step for r in handle.report().records][80:] == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_list_that_is_copied_and_put_back_is_the_same_run(pipe):
    with torch.no_grad(), fxcache.apply(pipe, ALTERNATE, backend="eager") as handle:
        pipe.scheduler.set_timesteps(6)
        for t in pipe.scheduler.timesteps.clone():
            x = torch.ones(1, 8, 4)
            pipe.scheduler.step(pipe.transformer(x, t[None] / 1000), t, x)
            pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()
        records = handle.report().records
    assert [(r.trajectory, r.step) for r in records] == [(1, step) for step in range(6)]


def test_announced_timesteps(denoiser):
    """Equal ones, and Heun's."""
    heun = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], [0, 1, 1, 2, 2, 3, 3]
    for ts, steps in (([1.0] * 5, [*range(5)]), heun):
        denoiser.reset()
        with denoiser.trajectory(num_steps=steps[-1] + 1):
            for t in ts:
                denoiser(sample(), times(t))
        assert [r.step for r in denoiser.report().records] == steps


def test_rounded_timesteps_do_not_shift_a_schedule(model):
    steps = torch.linspace(1, 0, 51)[:-1]
    shifted = 1000 * 7 * steps / (1 + 6 * steps)
    denoiser = plain(model, StepSchedule.every(2, num_steps=50))
    with denoiser.trajectory(num_steps=50):
        for t in shifted:
            denoiser(sample(), t.expand(2).bfloat16().float() / 1000)
    assert denoiser.report().records[-1].step == 49
    assert denoiser.report().hits == 25


def test_at_says_the_step_nests_and_refuses_what_is_none(model):
    denoiser = plain(model, MASK)
    for _ in range(2):
        for step in range(8):
            with denoiser.at(step=step, branch="cond"):
                denoiser(sample(), times(0.5))  # the time says nothing
    records = denoiser.report().records
    assert [(r.step, r.is_hit) for r in records] == list(enumerate(MASK.mask)) * 2
    assert {r.branch for r in records} == {"cond"}
    for step in (-1, 1.5, True, "3"):
        says = pytest.raises(OptionError, match="step must be an integer from 0 on")
        with says, denoiser.at(step=step):
            pass
    with denoiser.at(slot="a", branch="cond"), denoiser.branch("uncond"), denoiser.at(step=3):
        denoiser(sample(), times(0.5))
    last = denoiser.report().records[-1]
    assert (last.slot, last.branch, last.step) == ("a", "uncond", 3)


def test_a_finished_request_gives_its_memory_back(pipe, model):
    """Also one that is named call by call, whose guidance ends after four steps: a branch that does
    not come is not waited for.
    """
    handle = fxcache.apply(pipe, ALTERNATE, backend="eager")
    for request in range(5):
        with pipe.transformer.slot(request):
            pipe(4)
        assert handle.report().cached_bytes == 0
    assert handle.report().hits == 10
    listed, order, names = Listed(model), [], ("cond", "uncond")

    def call(name, step, x, t):
        order.append((name, step, step % 2 == 1))
        with listed.transformer.at(slot="r", branch=name):
            return listed.transformer(x, t.expand(1) / 1000)

    for steps in (4, 6):
        listed.run(lambda i, *at: [call(name, i, *at) for name in names[: 1 + (i < 4)]], steps)
        report = listed.handle.report()
        assert [(r.branch, r.step, r.is_hit) for r in report.records] == order
        assert report.cached_bytes == 0


def test_requests_that_never_end_are_bounded(denoiser):
    for request in range(100):
        with denoiser.slot(request):
            denoiser(sample(), times(1.0))
    one = denoiser.report().cached_bytes // 64
    assert one > 0
    assert denoiser.report().cached_bytes == 64 * one
    with denoiser.slot(99):
        denoiser(sample(), times(0.9))
    assert hits(denoiser)[-1]
    denoiser.release(99)
    denoiser.release("unknown")
    assert denoiser.report().cached_bytes == 63 * one


def test_two_threads_in_one_slot_are_pointed_out(model, caplog):
    denoiser = opened(model)
    denoiser(sample(), times(1.0))
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with torch.no_grad(), denoiser.session.settled({}, None):
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    denoiser(sample(), times(0.9))
    go_on.set()
    thread.join()
    assert caplog.text.count("denoiser.slot(...)") == 1


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_timesteps_that_nobody_reads(monkeypatch, scheduler):
    """As on a GPU: the list tells the steps, or the one read-back does."""
    monkeypatch.setattr("fxcache.runtime.steps.number_of", lambda timestep: None)
    pipe = Pipe(getattr(diffusers, scheduler)())
    handle = fxcache.apply(pipe, ALTERNATE, backend="eager")
    for _ in range(2):
        pipe(4)
    shown = [(r.step, r.is_hit) for r in handle.report().records]
    assert shown == [(0, False), (1, True), (2, False), (3, True)] * 2
    handle.reset()
    pipe(4, calls=2)  # of one scheduler which call it is cannot be told before the model is at work
    by_call = [[r.is_hit for r in handle.report().records][call::2] for call in (0, 1)]
    may_hit = scheduler.startswith("Flow")
    assert by_call == [[False, may_hit, False, may_hit]] * 2


def test_an_evaluation_that_comes_again_is_one_step(monkeypatch):
    """Its timestep is not read, it goes past Dynamo, and then a guard fails."""
    monkeypatch.setattr("fxcache.runtime.steps.number_of", lambda timestep: None)
    monkeypatch.setattr("fxcache.runtime.executor.number_of", lambda timestep: None)
    model = seeded(Small)
    model.stack_scale = 1.0
    model.forward = lambda x, t: Small.forward(model, x, t) * model.stack_scale
    denoiser = plain(model, MASK)
    with denoiser.trajectory(num_steps=8):
        for step in range(8):
            model.stack_scale = 1.0 if step < 5 else 2.0
            denoiser(sample(), times(1 - step / 8))
    assert [r.step for r in denoiser.report().records] == [*range(8)]
    assert denoiser.report().graphs == 2


class Opening(Small):
    """Takes what it needs out of what it is given."""

    def forward(self, *given):
        held = given[0] if len(given) == 1 else given
        return super().forward(*(held if isinstance(held, list | tuple) else held.values()))


def in_dict(x, t):
    return {"x_t": x, "sigma": t}


@pytest.mark.parametrize(
    "put",
    [lambda *g: g, lambda *g: [[*g]], lambda *g: [in_dict(*g)], lambda *g: [Held(in_dict(*g))]],
)
def test_a_time_input_among_more_arguments_or_in_what_holds_it(put):
    """It is read at each call: a solve that nobody announced begins with a miss."""
    denoiser = plain(seeded(Opening))
    for seed, step in itertools.product((0, 1), range(3)):
        denoiser(*put(sample(seed=seed), times(1 - step / 8)))
    assert hits(denoiser) == [False, True, True] * 2
    assert [r.timestep for r in denoiser.report().records] == [1.0, 0.875, 0.75] * 2
