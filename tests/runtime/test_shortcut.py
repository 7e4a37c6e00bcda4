"""guards="trajectory": later evaluations go past Dynamo, and nothing else changes."""

import copy
import gc
import math
import pickle
import threading
import weakref

import pytest
import torch
from helpers import (
    ALWAYS,
    MASK,
    NEVER,
    assert_close,
    assert_identical,
    count_complete,
    hits,
    plain,
    sample,
    short,
    solve,
    times,
)
from torch import nn

import fxcache
from fxcache import FirstBlockCache, OptionError, Taylor

TAYLOR = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=Taylor(order=1))
TWO = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)


# --- the same outputs and records, fewer calls ---


@pytest.mark.parametrize("policy", [NEVER, TWO, TAYLOR, MASK])
@pytest.mark.parametrize("announced", [False, True])
def test_the_same_as_with_all_guards(model, policy, announced):
    a, b = short(model, policy), plain(model, policy)
    calls = count_complete(a)
    for seed in range(3):
        if announced:
            with a.trajectory(6), b.trajectory(6):
                assert_identical(solve(a, 6, seed), solve(b, 6, seed))
        else:
            assert_identical(solve(a, 6, seed), solve(b, 6, seed))
    assert a.report().records == b.report().records
    first = calls[1:2] if announced or len(calls) == 3 else calls[1:]
    assert calls[0] == 0
    assert len(calls) == 3, calls
    assert first == [6]


def test_rising_timesteps(model):
    a, b = short(model), plain(model)
    calls = count_complete(a)
    for _ in range(3):
        for t in (0.0, 0.1, 0.2, 0.3, 0.4):
            assert_identical(a(sample(), times(t)), b(sample(), times(t)))
    assert a.report().records == b.report().records
    assert len(calls) == 5  # two are lost until the direction is understood


def test_branches_and_slots(model):
    a, b = short(model, TWO), plain(model, TWO)
    calls = count_complete(a)
    places = [("r", "cond"), ("r", "uncond"), ("s", "cond"), (None, None)]
    for seed in (0, 1):
        for i in range(5):
            for number, (slot, branch) in enumerate(places):
                x, t = sample(seed=seed + 7 * number) + 0.05 * i, times(1 - i / 5)
                got = []
                for denoiser in (a, b):
                    with denoiser.slot(slot), denoiser.branch(branch):
                        got.append(denoiser(x, t))
                assert_identical(*got)
    assert a.report().records == b.report().records
    assert len(calls) == 2 * len(places)


def test_more_requests_than_paths(model, monkeypatch):
    monkeypatch.setattr("fxcache.runtime.shortcut._MAX_PATHS", 3)
    a, b = short(model), plain(model)
    for i in range(3):
        for slot in range(5):
            x, t = sample(seed=slot), times(1 - i / 5)
            got = []
            for denoiser in (a, b):
                with denoiser.slot(slot):
                    got.append(denoiser(x, t))
            assert_identical(*got)
    assert len(a._fxcache.shortcut.paths) <= 3


def test_threads_with_slots(model):
    a, expected = short(model, TWO), {s: solve(plain(model, TWO), 8, s) for s in range(4)}
    solve(a, 8)
    got = {}

    def serve(request):
        with torch.no_grad(), a.slot(request):
            got[request] = [solve(a, 8, request) for _ in range(3)][-1]

    threads = [threading.Thread(target=serve, args=(s,)) for s in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, outputs in expected.items():
        assert_identical(got[request], outputs)


def test_autocast_and_inference_mode(model):
    a, b = short(model, TAYLOR), plain(model, TAYLOR)
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


def test_gradients_and_training_in_between(model):
    a, b = short(model), plain(model)
    for i in range(6):
        for denoiser in (a, b):
            with torch.set_grad_enabled(i == 2):
                denoiser.train(i == 4)
                out = denoiser(sample(), times(1 - i / 6))
                assert out.requires_grad == (i == 2)
            denoiser.eval()
    assert a.report().records == b.report().records
    # What went around the cache is newer. A training mode without gradients does not matter.
    assert hits(a) == [False, True, False, True, True]


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
        layer = model.blocks[2].proj
        if name == "module":
            model.blocks[2].proj = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        elif name == "dtype":
            model.double().float()
        elif name == "data":
            layer.weight.data = torch.randn_like(layer.weight)
        else:
            setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name))))
    same()


def test_weights_written_in_place_are_seen_at_once(model):
    denoiser = short(model, NEVER)
    with denoiser.trajectory():
        for i in range(4):
            model.blocks[1].qkv.weight.mul_(0.7)
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
            assert_identical(denoiser(sample(), times(1)), model(sample(), times(1 - 0 * i)))
    assert len(denoiser._fxcache.shortcut.paths) == 1


# --- the rest of a denoiser's life ---


def test_hooks_still_run(model):
    denoiser = short(model)
    ran = []
    denoiser.register_forward_pre_hook(lambda *_: ran.append("pre"))
    denoiser.register_forward_hook(lambda module, args, out: out + 1)
    outputs = solve(denoiser, 4)
    assert ran == ["pre"] * 4
    assert_identical(outputs, [out + 1 for out in solve(plain(restored(model)), 4)])


def restored(model):
    model._forward_hooks.clear()
    model._forward_pre_hooks.clear()
    return model


def test_reset_restore_and_copies(model):
    denoiser = short(model)
    solve(denoiser)
    calls = count_complete(denoiser)
    denoiser(sample(), times(0.1))
    assert calls == []
    denoiser.reset()
    denoiser(sample(), times(0.05))
    assert len(calls) == 1
    assert hits(denoiser) == [False]
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert twin._fxcache.shortcut.paths == {}
        assert_identical(solve(twin), solve(plain(model)))
    assert fxcache.restore(denoiser) is model
    assert denoiser._fxcache.shortcut.paths == {}


def test_an_exception_forgets_and_comes_back(model):
    a, fails = short(model, TWO), []
    solve(a)
    executor = next(iter(a._fxcache.shortcut.paths.values())).executor
    make_regions = executor._regions

    def failing(*where):
        if fails:
            raise RuntimeError("out of memory, say")
        return make_regions(*where)

    executor._regions = failing
    with a.trajectory():
        solve(a, 3)
        fails.append(1)
        with pytest.raises(RuntimeError, match="out of memory"):
            a(sample(), times(0.1))
        fails.clear()
        assert_identical(a(sample(), times(0.1)), model(sample(), times(0.1)))
    assert hits(a)[-1] is False
    assert a._fxcache.session.trusts_trajectory.get() is False


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


@pytest.mark.parametrize("policy", [ALWAYS, MASK])
def test_nothing_of_the_callers_is_kept(model, policy):
    denoiser = short(model, policy)
    kept = []
    for request in (None, "a", "b"):
        with denoiser.slot(request), denoiser.trajectory():
            for i in range(4):
                x, t = sample(seed=i), times(1 - i / 4)
                out = denoiser(x, t)
                kept += map(weakref.ref, (x, t, out))
                del x, t, out
                assert [ref() for ref in kept] == [None] * len(kept)
            (state,) = denoiser._fxcache.session.slot.branches.values()
            if request is not None:
                kept.append(weakref.ref(state.buffers))
            del state
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_one_step_sampler_that_announces_nothing_notices_replaced_weights(model):
    denoiser = short(model, NEVER)
    denoiser(sample(), times(1))
    denoiser(sample(), times(1))
    model.out.weight = nn.Parameter(torch.randn_like(model.out.weight))
    assert_identical(denoiser(sample(), times(1)), model(sample(), times(1)))


def test_a_call_that_fails_behind_the_executor_leaves_no_tensor_of_the_caller(model):
    denoiser = short(model, NEVER)
    runner = denoiser._fxcache
    cached = runner.cached

    def failing(*args):
        cached(*args)
        raise RuntimeError("afterwards")

    runner.cached = failing
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
