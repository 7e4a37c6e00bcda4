"""Trajectories, branches, slots, modes: what is remembered, and for how long.

What holds for every model and policy is in tests/test_guarantees.py, memory in test_memory.py.
"""

import logging
import math

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import hits, plain, sample, seeded, solve, times
from opened import Small
from policies import ALTERNATE, ALWAYS
from torch import nn

import fxcache
from fxcache import FirstBlockCache, MagCache, PolicyError


def call(denoiser, *ts, batch=2, tokens=8, seed=0):
    """Evaluations of one sample at the timesteps `ts`; the outputs."""
    return [denoiser(sample(batch, tokens, seed), times(t, batch)) for t in ts]


def test_where_a_trajectory_begins(denoiser):
    """Where the timestep goes up, or where the caller says so, and only there."""
    with pytest.raises(fxcache.FxCacheError, match="num_steps"), denoiser.trajectory(num_steps=0):
        pass
    call(denoiser, 1.0, 0.75, 0.5, 1.0, 0.75)
    assert hits(denoiser) == [False, True, True, False, True]

    denoiser.reset()
    call(denoiser, 0.9)
    with denoiser.trajectory(num_steps=3):  # inside, going up is none (stochastic samplers)
        call(denoiser, 0.8, 0.85)
    call(denoiser, 0.7)
    assert hits(denoiser) == [False, False, True, False]

    denoiser.reset()  # the batch halves when guidance ends: the steps go on counting
    with denoiser.trajectory(num_steps=4):
        call(denoiser, 1.0, 0.75)
        call(denoiser, 0.5, 0.25, batch=1)
    assert [r.step for r in denoiser.report().records] == [0, 1, 2, 3]
    assert hits(denoiser) == [False, True, False, True]


def test_another_shape_or_dtype_is_another_trajectory(denoiser):
    call(denoiser, 1.0)
    call(denoiser, 0.9, batch=3)
    denoiser.to(torch.bfloat16)
    for t in (0.8, 0.7):
        out = denoiser(sample(3).bfloat16(), times(t, 3).bfloat16())
        assert out.dtype == torch.bfloat16
    assert hits(denoiser) == [False, False, False, True]


def test_timesteps_that_rise_are_understood(denoiser, caplog):
    """Some models count t from 0 to 1. Two steps are lost until that is seen, once."""
    with caplog.at_level(logging.INFO, "fxcache"):
        call(denoiser, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert hits(denoiser) == [False, False, False, True, True, True]
    assert "rise" in caplog.text
    call(denoiser, 0.0, 0.1, 0.2)
    assert hits(denoiser)[6:] == [False, True, True]


def test_a_model_without_a_time_input_says_so(caplog):
    class Timeless(Small):
        def forward(self, x):
            return super().forward(x, torch.ones(x.shape[0]))

    denoiser = plain(seeded(Timeless))
    for _ in range(3):
        denoiser(sample())
    assert [r.step for r in denoiser.report().records] == [0, 1, 2]
    assert caplog.text.count("shows no time input") == 1


def test_an_integer_time_input_is_found_without_its_name():
    class Indexed(Small):
        def forward(self, x, noise_index):
            return super().forward(x, noise_index.float())

    denoiser = plain(seeded(Indexed))
    for index in (900, 800, 900):
        denoiser(sample(), torch.full((2,), index))
    assert hits(denoiser) == [False, True, False]


@pytest.mark.parametrize("t", [0.5, 500])
def test_timesteps_may_be_python_numbers(t):
    class Timed(Small):
        def forward(self, x, timestep):
            return super().forward(x, torch.full((x.shape[0],), float(timestep)))

    denoiser = plain(seeded(Timed))
    for share in (1.0, 0.8, 0.6, 0.4):  # an int becomes dynamic: it is no part of the layout
        denoiser(sample(), type(t)(t * share))
    denoiser(sample(), t)
    assert hits(denoiser) == [False, True, True, True, False]
    assert denoiser.report().records[-1].timestep == float(t)


def test_a_request_has_a_policy_and_a_report_of_its_own(model):
    """Another threshold decides, and nothing is captured anew; a policy of other pieces is none."""
    denoiser = plain(model, FirstBlockCache(threshold=0))
    for t in (1.0, 0.9, 0.8):
        for slot, policy in (("never", None), ("always", FirstBlockCache(threshold=math.inf))):
            with denoiser.at(slot=slot, policy=policy):
                output = denoiser(sample(), times(t))
        alone = plain(model, ALWAYS)
    assert_identical(output, call(alone, 1.0, 0.9, 0.8)[-1])
    made = {slot: [r.is_hit for r in denoiser.report(slot).records] for slot in ("never", "always")}
    assert made == {"never": [False] * 3, "always": [False, True, True]}
    assert (denoiser.report().graphs, len(denoiser.report().records)) == (1, 6)
    for other in (FirstBlockCache(head_blocks=2), fxcache.AdaptiveCache(), "magcache"):
        with pytest.raises(PolicyError), denoiser.at(policy=other):
            pass


def test_branches_of_a_trajectory(denoiser, caplog):
    """Guidance may leave a branch out for many steps; its old residual must not come back."""
    for t in (1.0, 0.9):
        for name in ("cond", "uncond"):
            with denoiser.cache_context(name):  # diffusers' name for it
                call(denoiser, t)
    assert [r.branch for r in denoiser.report().records] == ["cond", "uncond"] * 2
    assert hits(denoiser) == [False, False, True, True]
    with denoiser.branch("cond"):
        call(denoiser, 1.0, seed=5)
    with denoiser.branch("uncond"):
        call(denoiser, 0.5, seed=5)
    assert hits(denoiser)[-2:] == [False, False]

    denoiser.reset()
    assert not caplog.text
    call(denoiser, 1.0, 1.0, 1.0)
    assert caplog.text.count("denoiser.branch") == 1


def test_the_span_may_be_the_end_of_the_model():
    class Headless(Small):
        def forward(self, x, t):
            return self.stack(self.embed(x) + self.time(t[:, None])[:, None])

    model = seeded(Headless)
    denoiser = plain(model)
    (first,) = call(denoiser, 1.0)
    assert_identical(first, model(sample(), times(1.0)))
    (hit,) = call(denoiser, 1.0)
    assert_close(hit, first)
    hit.zero_()  # no view of what is cached
    assert_close(call(denoiser, 1.0)[0], first)
    assert hits(denoiser) == [False, True, True]


FAIL = False


@torch.library.custom_op("fxcache_test::maybe_fail", mutates_args=())
def maybe_fail(x: torch.Tensor) -> torch.Tensor:
    if FAIL:
        raise RuntimeError("out of memory, say")
    return x.clone()


maybe_fail.register_fake(torch.empty_like)


def test_an_exception_leaves_no_half_written_state(monkeypatch):
    """It is raised in the middle of the span."""

    class Fails(Small):
        def stack(self, h):
            first, second, third = self.blocks
            return third(torch.ops.fxcache_test.maybe_fail(second(first(h))))

    model = seeded(lambda: Fails(3))
    denoiser = plain(model, FirstBlockCache(threshold=1e-9))
    with denoiser.trajectory():
        call(denoiser, 1.0)
        monkeypatch.setitem(globals(), "FAIL", True)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(denoiser, 0.9, seed=1)
        monkeypatch.setitem(globals(), "FAIL", False)
        # What was cached fits this call exactly: only the exception makes it a miss.
        assert_identical(call(denoiser, 1.0), [model(sample(), times(1.0))])
        assert hits(denoiser) == [False, False]
        call(denoiser, 1.0)
        assert hits(denoiser)[-1]


def test_a_dropout_that_is_on_is_not_cached():
    class Dropping(Small):
        def stack(self, h):
            return super().stack(nn.functional.dropout(h, 0.5, self.training))

    model = seeded(Dropping)
    denoiser = plain(model.train(), fallback=True)
    with pytest.warns(UserWarning, match="dropout"):
        call(denoiser, 1.0)
    model.eval()
    denoiser = plain(model, ALWAYS)
    call(denoiser, 1.0, 0.9, 0.8)
    assert hits(denoiser) == [False, True, True]


def test_a_dropout_of_the_conditioning_is_the_models_own():
    """The conditioning's encoder drops (ComfyUI's ACE-Step), the blocks do not."""

    class DroppingText(Small):
        def forward(self, x, t, text=None):
            told = nn.functional.dropout(text, 0.5, self.training).mean()
            return super().forward(x, t) + 1e-4 * told

    model, text = seeded(DroppingText).train(), torch.ones(1, 8)
    denoiser = plain(model, ALWAYS)
    for at in (1.0, 0.9, 0.8):
        torch.manual_seed(0)
        output = denoiser(sample(), times(at), text)
        torch.manual_seed(0)
        if at == 1.0:
            assert_identical(output, model(sample(), times(at), text))
    assert hits(denoiser) == [False, True, True]
    assert "a dropout" not in str(fxcache.explain(model, sample(), times(1.0), text))


def test_a_policy_holds_from_the_next_trajectory_on(model):
    denoiser = plain(model, ALWAYS)

    def run():
        solve(denoiser)
        return hits(denoiser)[-4:]

    assert run() == [False, True, True, True]
    denoiser(sample(), times(1.0))
    denoiser.policy = ALTERNATE
    assert denoiser.policy == ALTERNATE
    denoiser(sample(), times(0.9))
    assert hits(denoiser)[-1]
    assert run() == [False, True, False, True]
    assert denoiser.report().graphs == 1  # the same pieces serve both
    denoiser.policy = MagCache(ratios=[1.0] * 4, retention_ratio=0.0)
    assert run() == [False, True, True, False]
    assert denoiser.report().graphs == 2
    fresh = plain(model, MagCache(ratios=[1.0] * 4, retention_ratio=0.0))
    x = sample(seed=5)
    for t in (1.0, 0.5):
        assert_identical(denoiser(x * t, times(t)), fresh(x * t, times(t)))
    for _ in range(2):  # where nothing goes on, it holds at once
        denoiser.policy = ALTERNATE
        denoiser.reset()
        assert run() == [False, True, False, True]
        denoiser.reset()
        denoiser.policy = ALWAYS
        assert run() == [False, True, True, True]
    with pytest.raises(PolicyError, match="policy must be a policy"):
        denoiser.policy = "magcache"
