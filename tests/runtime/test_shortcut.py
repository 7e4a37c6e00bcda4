"""guards="trajectory": later evaluations go past Dynamo, and nothing else changes."""

import copy
import gc
import math
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    ALWAYS,
    MASK,
    NEVER,
    adopt,
    assert_close,
    assert_identical,
    hits,
    plain,
    sample,
    seeded,
    short,
    solve,
    times,
)
from opened import Small, opened, served_by_threads
from policy_cases import name_of
from torch import nn

import fxcache
from fxcache import FirstBlockCache, OptionError, Taylor
from fxcache.runtime.regions import Regions

TAYLOR = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=Taylor(order=1))
TWO = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)


@pytest.fixture
def model():
    return seeded(Small)


def quick(model, policy=ALWAYS):
    """A denoiser that takes the shortcut."""
    return opened(model, policy, guards="trajectory")


def assert_same(denoisers, x, t, **where):
    """Both give the same for a call that is placed by `where`."""
    got = []
    for denoiser in denoisers:
        with denoiser.slot(where.get("slot")), denoiser.branch(where.get("branch")):
            got.append(denoiser(x, t))
    assert_identical(*got)


# --- the same outputs and records, fewer calls ---


@pytest.mark.parametrize("policy", [TWO, TAYLOR, MASK], ids=name_of)
def test_the_same_as_with_all_guards(model, policy):
    """Announced or not, and where nothing is hit."""
    a, b = quick(model, policy), plain(model, policy)
    calls = a.count_complete()
    for own, announced in ((policy, False), (policy, True), (NEVER, False)):
        if own is NEVER and policy is not TWO:
            continue
        adopt(a, own), adopt(b, own)
        calls.clear()
        for seed in range(3):
            with a.trajectory(6) if announced else nullcontext():
                got = solve(a, 6, seed)
            with b.trajectory(6) if announced else nullcontext():
                assert_identical(got, solve(b, 6, seed))
        assert a.report().records == b.report().records
        assert calls == [0, 6, 12], (own, announced)


def test_rising_timesteps(model):
    a, b = quick(model), plain(model)
    calls = a.count_complete()
    for _ in range(3):
        for t in (0.0, 0.1, 0.2, 0.3, 0.4):
            assert_same((a, b), sample(), times(t))
    assert a.report().records == b.report().records
    assert len(calls) == 5  # two are lost until the direction is understood


def test_branches_and_slots(model, monkeypatch):
    a, b = quick(model, TWO), plain(model, TWO)
    calls = a.count_complete()
    places = [("r", "cond"), ("r", "uncond"), ("s", "cond"), (None, None)]
    for seed in (0, 1):
        for i in range(5):
            for number, (slot, branch) in enumerate(places):
                x, t = sample(seed=seed + 7 * number) + 0.05 * i, times(1 - i / 5)
                assert_same((a, b), x, t, slot=slot, branch=branch)
    assert a.report().records == b.report().records
    assert len(calls) == 2 * len(places)

    monkeypatch.setattr("fxcache.runtime.shortcut._MAX_PATHS", 3)  # more requests than paths
    a.reset(), b.reset()
    for i in range(3):
        for slot in range(5):
            assert_same((a, b), sample(seed=slot), times(1 - i / 5), slot=slot)
    assert len(a.shortcut.paths) <= 3


def test_threads_with_slots(model):
    a, b = quick(model, TWO), plain(model, TWO)
    solve(a, 8)
    for seed, outputs in served_by_threads(a, range(4)).items():
        b.reset()
        assert_identical(outputs, solve(b, 8, seed))


def test_autocast_and_inference_mode(model):
    a, b = quick(model, TAYLOR), plain(model, TAYLOR)
    contexts = [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
    ]
    with a.trajectory(), b.trajectory():
        for i in range(16):
            with contexts[(i // 2) % 4] if i < 12 else contexts[i % 4]:
                got, expected = a(sample(), times(1 - i / 16)), b(sample(), times(1 - i / 16))
            assert_identical(got, expected)
            assert got.is_inference() == expected.is_inference()
            assert got.dtype == expected.dtype


# --- weights ---


@pytest.mark.parametrize("announced", [False, True])
def test_weights_replaced_between_trajectories(model, announced):
    denoiser = short(model, NEVER)

    def same():
        for i in range(3):
            x, t = sample(seed=i), times(1 - i / 3)
            assert_identical(denoiser(x, t), model(x, t))

    for name in ("weight", "bias", "data", "module", "dtype"):
        if announced:
            with denoiser.trajectory():
                same()
        else:
            same()
        layer = model.blocks[1].proj
        if name == "module":
            model.blocks[1].proj = nn.Sequential(nn.Linear(32, 16), nn.Tanh())
        elif name == "dtype":
            model.double().float()
        elif name == "data":
            layer.weight.data = torch.randn_like(layer.weight)
        else:
            setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name))))
    same()


def test_weights_written_in_place_are_seen_at_once(model):
    denoiser = quick(model, NEVER)
    with denoiser.trajectory():
        for _ in range(4):
            model.blocks[1].up.weight.mul_(0.7)
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
            assert_identical(denoiser(sample(), times(1)), model(sample(), times(1)))
    assert len(denoiser.shortcut.paths) == 1


def test_a_one_step_sampler_that_announces_nothing_notices_replaced_weights(model):
    denoiser = short(model, NEVER)
    denoiser(sample(), times(1))
    denoiser(sample(), times(1))
    model.out.weight = nn.Parameter(torch.randn_like(model.out.weight))
    assert_identical(denoiser(sample(), times(1)), model(sample(), times(1)))


# --- the rest of a denoiser's life ---


def test_reset_forgets_what_was_learned(model):
    denoiser = quick(model)
    solve(denoiser)
    calls = denoiser.count_complete()
    denoiser(sample(), times(0.1))
    assert calls == []
    denoiser.reset()
    assert denoiser.shortcut.paths == {}
    denoiser(sample(), times(0.05))
    assert len(calls) == 1
    assert hits(denoiser) == [False]


def test_copies_learn_by_themselves(model):
    denoiser = short(model)
    expected = solve(denoiser)
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert_identical(solve(twin), expected)
    assert fxcache.restore(denoiser) is model


def test_an_exception_forgets_and_comes_back(model, monkeypatch):
    a, begin, fails = quick(model, TWO), Regions.begin, []

    def failing(*given):
        if fails:
            raise RuntimeError("out of memory, say")
        return begin(*given)

    monkeypatch.setattr(Regions, "begin", failing)
    solve(a)
    with a.trajectory():
        solve(a, 3)
        fails.append(1)
        with pytest.raises(RuntimeError, match="out of memory"):
            a(sample(), times(0.1))
        fails.clear()
        assert_identical(a(sample(), times(0.1)), model(sample(), times(0.1)))
    assert hits(a)[-1] is False
    assert a.session.trusts_trajectory.get() is False


@pytest.mark.parametrize("guards", ["never", None, True, "Always"])
def test_unknown_guards(model, guards):
    with pytest.raises(OptionError, match="guards"):
        fxcache.transform(model, ALWAYS, backend="eager", guards=guards)


def test_the_backend_of_torch_compile_keeps_no_calls(model):
    options = {"policy": NEVER, "backend": "eager"}
    compiled = torch.compile(model, backend="fxcache", options=options)
    x = sample()
    ref = weakref.ref(x)
    assert_close(compiled(x, times(1)), model(x, times(1)))
    del x
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("policy", [ALWAYS, MASK], ids=name_of)
def test_nothing_of_the_callers_is_kept(model, policy):
    denoiser = quick(model, policy)
    kept = []
    for request in (None, "a", "b"):
        with denoiser.slot(request), denoiser.trajectory():
            for i in range(4):
                x, t = sample(seed=i), times(1 - i / 4)
                out = denoiser(x, t)
                kept += map(weakref.ref, (x, t, out))
                del x, t, out
                assert [ref() for ref in kept] == [None] * len(kept)
            if request is not None:
                kept += map(weakref.ref, denoiser.buffers())
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_call_that_fails_behind_the_executor_leaves_no_tensor_of_the_caller(model):
    denoiser = quick(model, NEVER)
    cached = denoiser.cached

    def failing(*args):
        cached(*args)
        raise RuntimeError("afterwards")

    denoiser.cached = failing
    given = sample()
    alive = weakref.ref(given)
    with pytest.raises(RuntimeError, match="afterwards"):
        denoiser(given, times(1))
    del given
    gc.collect()
    assert alive() is None


def test_wrong_arguments_are_a_type_error(model):
    with pytest.raises(TypeError, match="multiple values"):
        short(model)(sample(), times(1), t=times(1))
