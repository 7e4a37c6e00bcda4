"""Trajectories, branches, slots, reset, exceptions, memory: the five guarantees."""

import copy
import gc
import logging
import math
import threading

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, assert_identical, hits
from torch import nn
from zoo import SequentialDiT

import fxcache
from fxcache import FirstBlockCache, Taylor


def sample(batch=2, tokens=8, seed=0):
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(seed))


def times(t, batch=2):
    return torch.full((batch,), float(t))


def trajectory(denoiser, steps=4, seed=0, first=1.0, batch=2, tokens=8):
    """Outputs of a trajectory with falling timesteps."""
    x = sample(batch, tokens, seed)
    ts = [first - first * i / steps for i in range(steps)]
    return [denoiser(x + 0.05 * i, times(t, batch)) for i, t in enumerate(ts)]


# --- trajectories ---


def test_a_timestep_that_goes_up_starts_a_new_trajectory(model, denoiser):
    trajectory(denoiser, seed=0)
    second = trajectory(denoiser, seed=1)
    assert hits(denoiser) == [False, True, True, True] * 2
    fresh = trajectory(fxcache.transform(model, ALWAYS, backend="eager"), seed=1)
    assert_identical(second, fresh)


@pytest.mark.parametrize(
    "other", [{"batch": 3}, {"tokens": 5}, {"steps": 7}, {"first": 0.4}, {"batch": 1, "steps": 2}]
)
def test_second_runs_are_as_good_as_first_ones(model, denoiser, other):
    trajectory(denoiser, seed=0)
    with denoiser.trajectory():
        second = trajectory(denoiser, seed=1, **other)
    assert_identical(
        second, trajectory(fxcache.transform(model, ALWAYS, backend="eager"), seed=1, **other)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_shape_or_dtype_is_another_trajectory(denoiser, dtype):
    denoiser(sample(), times(1.0))
    denoiser(sample(batch=3), times(0.9, 3))
    denoiser(sample(tokens=6), times(0.8))
    denoiser.to(dtype)
    out = denoiser(sample(tokens=6).to(dtype), times(0.7).to(dtype))
    assert out.dtype == dtype
    assert hits(denoiser) == [False] * 4
    denoiser(sample(tokens=6).to(dtype), times(0.6).to(dtype))
    assert hits(denoiser)[-1]


def test_an_announced_trajectory_starts_clean_and_leaves_nothing(denoiser):
    denoiser(sample(), times(0.9))
    with denoiser.trajectory(num_steps=3):
        denoiser(sample(), times(0.8))
        denoiser(
            sample(), times(0.85)
        )  # inside, going up is no new trajectory (stochastic samplers)
    denoiser(sample(), times(0.7))
    assert hits(denoiser) == [False, False, True, False]


def test_timesteps_that_rise_are_understood(denoiser, caplog):
    """Some models count t from 0 to 1. Two steps are lost until that is seen, once."""
    with caplog.at_level(logging.INFO, "fxcache"):
        for t in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
            denoiser(sample(), times(t))
    assert hits(denoiser) == [False, False, False, True, True, True]
    assert "rise" in caplog.text
    for t in (0.0, 0.1, 0.2):
        denoiser(sample(), times(t))
    assert hits(denoiser)[6:] == [False, True, True]


def test_steps_are_counted_by_timestep_not_by_calls(model):
    """Heun calls twice a step: the second evaluation and the next step's first share a timestep."""
    denoiser = fxcache.transform(model, FirstBlockCache(threshold=math.inf, warmup_steps=3),
                                 backend="eager")  # fmt: skip
    for t in (1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7):
        denoiser(sample(), times(t))
    assert [r.step for r in denoiser.report().records] == [0, 1, 1, 2, 2, 3, 3]
    assert hits(denoiser) == [False] * 5 + [True] * 2


def test_steps_go_on_when_guidance_ends(denoiser):
    """The batch halves in the middle of an announced trajectory: its steps go on counting."""
    with denoiser.trajectory(num_steps=4):
        for i in range(4):
            batch = 2 if i < 2 else 1
            denoiser(sample(batch), times(1 - i / 4, batch))
    assert [r.step for r in denoiser.report().records] == [0, 1, 2, 3]
    assert hits(denoiser) == [False, True, False, True]


def test_a_model_without_a_time_input_says_so(caplog):
    class Timeless(SequentialDiT):
        def forward(self, x):
            return super().forward(x, torch.ones(x.shape[0]))

    denoiser = fxcache.transform(Timeless().eval(), ALWAYS, backend="eager")
    for _ in range(3):
        denoiser(sample())
    assert [r.step for r in denoiser.report().records] == [0, 1, 2]
    assert caplog.text.count("shows no time input") == 1


def test_an_integer_time_input_is_found_without_its_name():
    class Indexed(SequentialDiT):
        def forward(self, x, noise_index):
            return super().forward(x, noise_index.float())

    denoiser = fxcache.transform(Indexed().eval(), ALWAYS, backend="eager")
    for index in (900, 800, 900):
        denoiser(sample(), torch.full((2,), index))
    assert hits(denoiser) == [False, True, False]


def test_num_steps_reaches_the_policy(model):
    policy = FirstBlockCache(threshold=math.inf, start=0.5)
    denoiser = fxcache.transform(model, policy, backend="eager")
    with pytest.raises(fxcache.PolicyError, match="num_steps"):
        trajectory(denoiser, steps=2)
    with denoiser.trajectory(num_steps=4):
        trajectory(denoiser, steps=4)
    assert hits(denoiser)[-4:] == [False, False, True, True]
    with pytest.raises(fxcache.FxCacheError, match="num_steps"), denoiser.trajectory(num_steps=0):
        pass


@pytest.mark.parametrize("t", [0.5, 500])
def test_timesteps_may_be_python_numbers(t):
    class Timed(SequentialDiT):
        def forward(self, x, timestep):
            return super().forward(x, torch.full((x.shape[0],), float(timestep)))

    denoiser = fxcache.transform(Timed().eval(), ALWAYS, backend="eager")
    for share in (1.0, 0.8, 0.6, 0.4):  # an int becomes dynamic: it is no part of the layout
        denoiser(sample(), type(t)(t * share))
    denoiser(sample(), t)
    first, *others, last = hits(denoiser)
    assert not first
    assert not last
    assert all(others)
    assert denoiser.report().records[-1].timestep == float(t)


# --- branches and slots ---


def test_branches_never_mix(model, denoiser):
    alone = {}
    for seed in (1, 2):
        alone[seed] = trajectory(fxcache.transform(model, ALWAYS, backend="eager"), seed=seed)
    mixed = {1: [], 2: []}
    for i in range(4):
        for seed, name in ((1, "cond"), (2, "uncond")):
            with denoiser.branch(name):
                mixed[seed].append(denoiser(sample(seed=seed) + 0.05 * i, times(1.0 - i / 4)))
    assert_identical(mixed[1], alone[1])
    assert_identical(mixed[2], alone[2])
    assert [r.branch for r in denoiser.report().records[:2]] == ["cond", "uncond"]


def test_cache_context_names_a_branch(denoiser):
    with denoiser.cache_context("cond"):
        denoiser(sample(), times(1.0))
    with denoiser.cache_context("uncond"):
        denoiser(sample(), times(1.0))
    assert hits(denoiser) == [False, False]


def test_a_new_trajectory_resets_every_branch(denoiser):
    """Guidance may leave a branch out for many steps; its old residual must not come back."""
    for t in (1.0, 0.9):
        for name in ("cond", "uncond"):
            with denoiser.branch(name):
                denoiser(sample(), times(t))
    with denoiser.branch("cond"):
        denoiser(sample(seed=5), times(1.0))
    with denoiser.branch("uncond"):
        denoiser(sample(seed=5), times(0.5))
    assert hits(denoiser)[-2:] == [False, False]


def test_unnamed_branches_are_pointed_out(denoiser, caplog):
    for _ in range(3):
        denoiser(sample(), times(1.0))
    assert caplog.text.count("denoiser.branch") == 1


def test_slots_keep_their_own_trajectories(model, denoiser):
    expected = {
        s: trajectory(fxcache.transform(model, ALWAYS, backend="eager"), seed=s) for s in (1, 2)
    }
    got = {1: [], 2: []}
    for i in range(4):
        for request in (1, 2):
            with denoiser.slot(request):
                got[request].append(denoiser(sample(seed=request) + 0.05 * i, times(1.0 - i / 4)))
    assert_identical(got[1], expected[1])
    assert_identical(got[2], expected[2])


def test_threads_may_serve_slots(model, denoiser):
    expected = {
        s: trajectory(fxcache.transform(model, ALWAYS, backend="eager"), seed=s) for s in range(3)
    }
    trajectory(denoiser)  # compiled before the threads start
    got = {}

    def serve(request):
        with torch.no_grad(), denoiser.slot(request):
            got[request] = trajectory(denoiser, seed=request)

    threads = [threading.Thread(target=serve, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, outputs in expected.items():
        assert_identical(got[request], outputs)


# --- guarantees ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_misses_and_leave_no_trace(model, denoiser, bad):
    denoiser(sample(), times(1.0))
    broken = sample()
    broken[0, 0, 0] = bad
    denoiser(broken, times(0.9))
    assert hits(denoiser) == [False, False]
    assert denoiser.report().records[-1].reason == "not finite"
    good = denoiser(sample(), times(0.8))  # the reference is NaN now: a miss again
    assert_identical(good, model(sample(), times(0.8)))
    denoiser(sample(), times(0.7))
    assert hits(denoiser) == [False, False, False, True]


def test_nan_of_an_old_trajectory_does_not_reach_a_forecast(model):
    policy = FirstBlockCache(threshold=math.inf, forecast=Taylor(order=1))
    denoiser = fxcache.transform(model, policy, backend="eager")
    for t in (1.0, 0.9):
        denoiser(sample() * math.nan, times(t))
    denoiser(sample(), times(1.0))
    assert denoiser(sample(), times(0.9)).isfinite().all()


def test_nan_within_a_trajectory_does_not_reach_a_forecast(model):
    policy = FirstBlockCache(threshold=math.inf, forecast=Taylor(order=1))
    denoiser = fxcache.transform(model, policy, backend="eager")
    for x, t in ((sample(), 1.0), (sample() * math.nan, 0.9), (sample(), 0.8)):
        denoiser(x, times(t))
    assert denoiser(sample(), times(0.7)).isfinite().all()
    assert hits(denoiser) == [False, False, False, True]


def test_inputs_are_not_written_and_outputs_are_nobodys_view(denoiser):
    x, t = sample(), times(1.0)
    x_before, t_before = x.clone(), t.clone()
    outputs = []
    for _ in range(3):
        outputs.append(denoiser(x, t))
        outputs[-1].mul_(0)  # a caller may do what it likes with what it was given
    assert torch.equal(x, x_before)
    assert torch.equal(t, t_before)
    again = denoiser(x, t)
    assert again.abs().sum() > 0
    cached = [
        tensor.untyped_storage().data_ptr()
        for slot in denoiser._fxcache.session.slots.values()
        for state in slot.branches.values()
        for tensor in state.buffers.tensors()
    ]
    assert again.untyped_storage().data_ptr() not in cached


class Headless(SequentialDiT):
    """Returns the stack's own output: nothing runs after the span."""

    def forward(self, x, t):
        return self.stack(self.embed(x) + self.time(t[:, None])[:, None])


def test_the_span_may_be_the_end_of_the_model():
    torch.manual_seed(0)
    model = Headless().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    first = denoiser(sample(), times(1.0))
    assert_identical(first, model(sample(), times(1.0)))
    hit = denoiser(sample(), times(1.0))
    assert_close(hit, first)
    hit.zero_()
    assert_close(denoiser(sample(), times(1.0)), first)


class Fails(SequentialDiT):
    """Raises in the middle of the span when it is told to."""

    def stack(self, h):
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i == 2:
                h = torch.ops.fxcache_test.maybe_fail(h)
        return h


FAIL = False


@torch.library.custom_op("fxcache_test::maybe_fail", mutates_args=())
def maybe_fail(x: torch.Tensor) -> torch.Tensor:
    if FAIL:
        raise RuntimeError("out of memory, say")
    return x.clone()


@maybe_fail.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_exception_leaves_no_half_written_state(monkeypatch):
    torch.manual_seed(0)
    model = Fails().eval()
    denoiser = fxcache.transform(model, FirstBlockCache(threshold=1e-9), backend="eager")
    with denoiser.trajectory():
        denoiser(sample(), times(1.0))
        monkeypatch.setitem(globals(), "FAIL", True)
        with pytest.raises(RuntimeError, match="out of memory"):
            denoiser(sample(seed=1), times(0.9))
        monkeypatch.setitem(globals(), "FAIL", False)
        # What was cached fits this call exactly: only the exception makes it a miss.
        out = denoiser(sample(), times(1.0))
        assert hits(denoiser) == [False, False]
        assert_identical(out, model(sample(), times(1.0)))
        denoiser(sample(), times(1.0))
        assert hits(denoiser)[-1]


# --- gradients and training ---


def test_with_gradients_nothing_is_cached(model, denoiser, caplog):
    with torch.enable_grad():
        for _ in range(2):
            x = sample().requires_grad_()
            denoiser(x, times(1.0)).square().sum().backward()
            y = sample().requires_grad_()
            got = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            model(y, times(1.0)).square().sum().backward()
            assert_identical(x.grad, y.grad)
            assert_identical(got, [p.grad for p in model.parameters()])
            model.zero_grad()
    assert hits(denoiser) == []
    assert caplog.text.count("gradients are enabled") == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_in_training_mode_is_cached_without_gradients(model, denoiser, mode):
    """As ComfyUI leaves its models."""
    denoiser.train()
    assert model.training
    with mode():
        assert_identical(denoiser(sample(), times(1.0)), model(sample(), times(1.0)))
        denoiser(sample(), times(0.9))
    assert hits(denoiser) == [False, True]


class Dropping(SequentialDiT):
    def stack(self, h):
        return super().stack(nn.functional.dropout(h, 0.5, self.training))


def test_a_dropout_that_is_on_is_not_cached(caplog):
    torch.manual_seed(0)
    model = Dropping()
    denoiser = fxcache.transform(model.train(), ALWAYS, backend="eager", fallback=True)
    with pytest.warns(UserWarning, match="dropout"):
        denoiser(sample(), times(1.0))
    model.eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    trajectory(denoiser)
    assert hits(denoiser) == [False, True, True, True]


def test_inference_mode_and_no_grad_may_take_turns(denoiser):
    with torch.inference_mode():
        denoiser(sample(), times(1.0))
    denoiser(sample(), times(0.9))
    denoiser(sample(batch=3), times(0.8, 3))
    with torch.inference_mode():
        denoiser(sample(batch=3), times(0.7, 3))
    assert hits(denoiser) == [False, True, False, True]


# --- memory ---


def test_finished_requests_and_dead_denoisers_give_their_memory_back(model):
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    for request in range(3):
        with denoiser.slot(request), denoiser.trajectory():
            denoiser(sample(), times(1.0))
            assert denoiser.report().cached_bytes > 0
    assert denoiser.report().cached_bytes == 0
    denoiser(sample(), times(1.0))
    slots = denoiser._fxcache.session.slots
    assert slots
    del denoiser
    gc.collect()
    assert not slots


def count_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_memory_does_not_grow_and_is_given_back(denoiser):
    trajectory(denoiser)
    cached = denoiser.report().cached_bytes
    gc.collect()
    before = count_tensors()
    for seed in range(50):
        trajectory(denoiser, seed=seed)
    gc.collect()
    after = count_tensors()
    assert denoiser.report().cached_bytes == cached > 0
    assert after <= before
    denoiser.reset()
    gc.collect()
    report = denoiser.report()
    assert report.cached_bytes == 0
    assert report.records == ()
    assert count_tensors() < after


# --- forecasts ---


def test_taylor_extrapolates_the_residual():
    """A model whose residual is linear in the step is forecast exactly, reused ones are not."""

    class LinearBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, h, base, t):
            return h + t[:, None, None] * self.proj(base + 0 * h)

    class Linear(SequentialDiT):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(LinearBlock() for _ in range(3))

        def forward(self, x, t):
            h = base = self.embed(x)
            for block in self.blocks:
                h = block(h, base, t)
            return h

    torch.manual_seed(0)
    model = Linear().eval()
    steps = [1.0, 0.9, 0.8, 0.7, 0.6]

    def errors(forecast):
        policy = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=forecast)
        denoiser = fxcache.transform(model, policy, backend="eager")
        return [float((denoiser(sample(), times(t)) - model(sample(), times(t))).abs().max())
                for t in steps]  # fmt: skip

    assert max(errors(Taylor(order=1))) < 1e-5
    assert max(errors(fxcache.Reuse())) > 1e-2


def test_copies_have_their_own_state(denoiser):
    trajectory(denoiser)
    twin = copy.deepcopy(denoiser)
    assert twin.report().records == ()
    assert type(twin) is type(denoiser)
    assert twin.embed.weight is not denoiser.embed.weight
    twin(sample(), times(0.1))
    assert hits(twin) == [False]


def test_never_hits_equals_the_model(model):
    denoiser = fxcache.transform(model, NEVER, backend="eager")
    for i in range(4):
        x, t = sample(seed=i), times(1 - i / 4)
        assert_identical(denoiser(x, t), model(x, t))
