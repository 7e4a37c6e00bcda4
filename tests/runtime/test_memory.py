"""Memory: it does not grow from trajectory to trajectory, and all of it is given back."""

import gc
import weakref

import pytest
import torch
from helpers import graphed, hits, plain, short, solve
from loops import Pipe
from policies import ALTERNATE, EASY, FORECAST
from torch._subclasses import FakeTensor

import fxcache
from fxcache.runtime.regions import Wiring
from fxcache.runtime.state import Buffers

E4M3 = torch.float8_e4m3fn

#: Ways to hold residuals, each a denoiser of a model.
WAYS = {
    "narrow": lambda model: plain(model, FORECAST, cache_dtype=E4M3),
    "host": lambda model: short(model, FORECAST, cache_dtype=torch.float16, cache_device="cpu"),
    "graphs": lambda model: graphed(model, FORECAST, cache_dtype=torch.float16),
    "whole model": lambda model: plain(model, EASY, cache_dtype=torch.bfloat16),
}


def objects(kind):
    """Those of this test."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


@pytest.fixture(autouse=True)
def others():
    """What tests before this one left in the process is not asked about it (nor looked through)."""
    gc.collect()
    gc.freeze()


def alive():
    """How many tensors there are, and how many bytes they hold."""
    real = [t for t in objects(torch.Tensor) if not issubclass(type(t), FakeTensor)]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real}
    return len(real), sum(memory.values())


def references():
    """Weak references to all that holds memory."""
    own = objects(Buffers)
    residuals = [residual for each in own for ring in each.rings for residual in ring]
    return [weakref.ref(thing) for thing in (*own, *residuals)]


def assert_dead(found):
    gc.collect()
    assert found
    assert [reference() for reference in found] == [None] * len(found)


def run(denoiser, number):
    """A trajectory of its own shape, in two branches."""
    for branch in ("cond", "uncond"):
        with denoiser.branch(branch):
            solve(denoiser, 5, seed=number, tokens=(8, 5, 11)[number % 3])


def test_50_trajectories_of_changing_shapes(model, device):
    denoiser = WAYS["graphs"](model)
    for number in range(6):
        run(denoiser, number)
    before, cached = alive(), denoiser.report().cached_bytes
    for number in range(51):
        run(denoiser, number)
    after = alive()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert denoiser.report().cached_bytes == cached > 0
    assert any(hits(denoiser)[-10:])


def test_50_requests_in_slots(model, monkeypatch):
    """Of a finished request nothing is left; of one under way, what it needs."""
    monkeypatch.setattr("fxcache.capture.rewrite.is_away", lambda host, device: bool(host))
    denoiser = WAYS["host"](model)

    def serve(number):
        with denoiser.slot(number), denoiser.trajectory():
            solve(denoiser, 5, tokens=(8, 5)[number % 2])
            assert denoiser.report().cached_bytes > 0

    for number in range(4):
        serve(number)
    before = alive()
    for number in range(50):
        serve(number)
    after = alive()
    assert denoiser.report().cached_bytes == 0
    assert after[0] <= before[0]
    assert after[1] <= before[1]


def test_failed_evaluations_and_other_layouts_leave_nothing(model, monkeypatch):
    denoiser, cached = WAYS["narrow"](model), []
    for tokens in (16, 4, 16):  # one layout is held at a time
        solve(denoiser, tokens=tokens)
        cached.append(denoiser.report().cached_bytes)
    assert cached[0] == cached[2] == 4 * cached[1]

    def fail(*call):
        raise RuntimeError("out of memory")

    def failing():
        with monkeypatch.context() as patch:
            patch.setattr(Wiring, "miss", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                solve(denoiser)
        solve(denoiser)

    failing()
    before = alive()
    for _ in range(5):
        failing()
    assert alive() <= before


def test_reset_and_restore_give_all_of_it_back(model):
    denoiser = WAYS["whole model"](model)
    before = alive()
    for name in ("first", "second"):
        with denoiser.slot(name):
            run(denoiser, 0)
    held = references()
    assert len(held) == 8  # two requests of two branches each
    denoiser.reset()
    assert_dead(held)
    assert denoiser.report().cached_bytes == 0
    assert denoiser.report().cached_by_device == {}
    assert alive()[1] <= before[1]
    run(denoiser, 0)
    assert denoiser.report().cached_bytes > 0
    held = references()
    assert fxcache.restore(denoiser) is model
    assert_dead(held)
    assert alive()[1] <= before[1]


def test_a_deleted_denoiser_gives_all_of_it_back(model, device):
    denoiser = WAYS["graphs"](model)
    run(denoiser, 0)
    held = references()
    del denoiser
    assert_dead(held)


def test_the_registered_backend_gives_it_back_with_its_code(model):
    options = {"policy": FORECAST, "backend": "eager", "cache_dtype": E4M3}
    compiled = torch.compile(model, backend="fxcache", options=options)
    solve(compiled)
    gc.collect()
    narrow = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == E4M3]
    held = [weakref.ref(tensor) for tensor in narrow]
    assert len(held) == 3
    del compiled, narrow
    torch._dynamo.reset()
    assert_dead(held)


def test_runs_of_a_pipeline():
    """Guided: two branches. Removal gives everything back."""
    pipe = Pipe()

    def run_pipe(number):
        pipe(2, calls=2, names=("cond", "uncond"), seed=number)

    pipe(2)
    unused = alive()
    handle = fxcache.apply(pipe, ALTERNATE, backend="eager", cache_dtype=E4M3)
    run_pipe(0)
    before, cached = alive(), handle.report().cached_bytes
    for number in range(50):
        run_pipe(number)
    after = alive()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert handle.report().cached_bytes == cached > 0
    assert handle.report().hits == handle.report().misses == 51 * 2

    held = references()
    assert {r.dtype for own in objects(Buffers) for ring in own.rings for r in ring} == {E4M3}
    handle.remove()
    assert_dead(held)
    assert handle.report().cached_bytes == 0
    assert alive()[1] <= unused[1]
