"""Tuning: the best schedule for a budget, verified by sampling."""

import functools
import gc
import json
import logging
import math
import weakref

import pytest
import torch
from helpers import NEVER, assert_identical, plain, sample, seeded, times
from torch import nn
from zoo import Denoiser

import fxcache
from fxcache import (
    FirstBlockCache,
    OptionError,
    PolicyError,
    ProfileError,
    StepSchedule,
    TuneResult,
    transform,
    tune,
)
from fxcache.capture.backend import Backend
from fxcache.policy.fitted import Fitted
from fxcache.tuning.sampling import as_tensor, psnr

STEPS = 8
GOES_ON = torch.Generator().manual_seed(0)
tune = functools.partial(tune, progress=False)
quick = functools.partial(tune, frontier=(), sensitivity_steps=0, verify_runs=1)


@torch.no_grad()
def euler(denoiser, seed, steps=STEPS, *, rising=False, heun=False, batch=1):
    """A sampler of flow matching."""
    x = sample(batch, seed=seed)
    for i in range(steps):
        t = i / steps if rising else 1 - i / steps
        v = denoiser(x, times(t, batch))
        if heun and i + 1 < steps:
            v = (v + denoiser(x - v / steps, times(1 - (i + 1) / steps, batch))) / 2
        x = x - v / steps
    return x


@torch.no_grad()
def guided(denoiser, seed):
    x = sample(1, seed=seed)
    for i in range(STEPS):
        t = times(1 - i / STEPS, 1)
        with denoiser.branch("cond"):
            v = denoiser(x, t)
        with denoiser.branch("uncond"):
            v = 1.5 * v - 0.5 * denoiser(0.5 * x, t)
        x = x - v / STEPS
    return x


def computed(denoiser):
    """The most steps that a branch computed in a trajectory."""
    steps = {}
    for record in denoiser.report().records:
        own = steps.setdefault((record.trajectory, record.branch), set())
        own |= set() if record.is_hit else {record.step}
    return max(map(len, steps.values()))


# --- budgets --------------------------------------------------------------------------------------


@pytest.fixture
def shared(model):
    """A denoiser; nothing that tuning does to it remains."""
    return plain(model)


@pytest.mark.parametrize("run", [euler, guided])
def test_the_budget_is_kept_and_the_psnr_is_that_of_the_policy(shared, run):
    """For every budget, in another denoiser; the samples are the same bit for bit."""
    model = fxcache.restore(shared)
    share = skipped(model)
    references = {seed: as_tensor(run(plain(model, NEVER), seed)) for seed in (2, 3)}
    for budget in range(1, STEPS + 2):
        result = tune(shared, run, max_computed_steps=budget, frontier=(), sensitivity_steps=2)
        point = result.point
        assert point.computed_steps == min(budget, STEPS)
        assert point.seeds == (2, 3)
        assert result.frontier == (point,)
        fresh, values = plain(model, result.policy), []
        for seed in point.seeds:
            values.append(psnr(as_tensor(run(fresh, seed)), references[seed]))
            assert computed(fresh) == min(budget, STEPS)
            fresh.reset()
        assert point.psnr_min == min(values)
        assert point.psnr_mean == sum(values) / 2
        assert (point.psnr_min == math.inf) == (budget >= STEPS)
        hits = STEPS - point.computed_steps
        assert point.speedup == pytest.approx(STEPS / (STEPS - hits * share))


def skipped(model):
    return fxcache.explain(
        model, torch.ones(1, 8, 4), torch.ones(1), policy=StepSchedule(mask=[False])
    ).skipped_share


class Level(nn.Module):
    """A block whose residual depends on the time alone."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, h, level):
        return h + level * self.outer(torch.tanh(self.inner(0 * h + 1)))


class Jumping(Denoiser):
    """Residuals that jump at 0.65 and at 0.3, and are the same in between."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Level() for _ in range(3))

    def forward(self, x, t):
        h = self.embed(x)
        level = 1 + 3 * (t < 0.65) + 5 * (t < 0.3)
        for block in self.blocks:
            h = block(h, level[:, None, None])
        return self.out(h)


def test_the_best_schedule_of_a_problem_with_a_known_answer():
    """Residuals that stay the same but for two jumps: compute these steps, and nothing is lost."""
    result = tune(seeded(Jumping), euler, max_computed_steps=3, frontier=[4], sensitivity_steps=3)
    at = [1 - i / STEPS for i in range(STEPS)]
    jumps = {0, at.index(0.625), at.index(0.25)}
    assert {step for step, is_hit in enumerate(result.policy.mask) if not is_hit} == jumps
    assert result.point.psnr_min > 100


@pytest.mark.parametrize("target", [1, 1.3, 2, 3.5])
def test_target_speedup(model, target):
    result = quick(model, euler, target_speedup=target)
    assert result.point.speedup >= target
    assert result.target == f"target_speedup={target}"
    share, more = skipped(model), result.point.computed_steps + 1
    assert more > STEPS or STEPS / (more + (STEPS - more) * (1 - share)) < target


def test_a_speedup_that_no_schedule_has(model):
    with pytest.raises(PolicyError, match=r"at most 7.5 .* skips 99% of the FLOPs.*got 100"):
        quick(model, euler, target_speedup=100)


@pytest.mark.parametrize("least", [0, 45, 60, 1000])
def test_min_psnr(model, least):
    result = quick(model, euler, min_psnr=least, verify_runs=2)
    assert result.point.psnr_min >= least
    assert (result.point.computed_steps == STEPS) == (least == 1000)
    if least == 0:
        assert result.point.computed_steps == 2  # at most six hits in a row


def test_a_tolerance_is_tried_on_the_callers_own_sampler(model, tmp_path):
    result = tune(model, functools.partial(euler, steps=12), tolerance=0.2, seed=3)
    policy, point = result.policy, result.point
    assert (policy.tolerance, policy.origin.model_classes) == (0.2, ("SequentialDiT",))
    assert [p.policy.tolerance for p in result.frontier] == pytest.approx([0.3, 0.2, 0.12])
    computed = [p.computed_steps for p in result.frontier]
    assert computed == sorted(computed)
    assert computed[0] < point.num_steps == len(point.mask) == 12
    assert point.seeds == (5, 6)
    for seed in point.seeds:  # what was measured is what the policy gives
        wanted, denoiser = euler(model, seed, 12), plain(model, policy)
        value = psnr(euler(denoiser, seed, 12).double(), wanted.double())
        assert value >= point.psnr_min - 1e-3
    assert denoiser.report().misses == point.computed_steps
    assert tuple(r.is_hit for r in denoiser.report().records) == point.mask
    assert point.speedup == pytest.approx(12 / (12 - skipped(model) * sum(point.mask)), rel=0.2)
    assert "guaranteed by the schedule" not in str(result)
    assert json.loads(json.dumps(result.to_dict()))["chosen"]["mask"] == list(point.mask)
    with pytest.raises(PolicyError, match=r"AdaptiveCache\(tolerance=0.2\) is all of it"):
        result.save(tmp_path / "schedule.json")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda d, seed: torch.zeros(3), "run must call the denoiser"),
        (lambda d, seed: euler(d, 0) + torch.randn(1, 8, 4, generator=GOES_ON), "same sample"),
        (lambda d, seed: euler(d, seed) * math.nan, "finite numbers, got inf or NaN"),
    ],
)
def test_a_run_with_which_a_tolerance_cannot_be_tried(model, run, message):
    with pytest.raises(ProfileError, match=message):
        tune(model, run, tolerance=0.1)


def test_a_tolerance_is_tried_with_a_run_that_resets(model):
    def run(denoiser, seed):
        sampled = euler(denoiser, seed, 12)
        denoiser.reset()
        return sampled

    point = tune(model, run, tolerance=0.2).point
    assert 0 < point.computed_steps < point.num_steps == 12


# --- what is returned -----------------------------------------------------------------------------


@pytest.fixture
def result(model):
    return tune(model, euler, max_computed_steps=3, frontier=[2, 5, 5, 99], sensitivity_steps=2)


def test_result(result, model, tmp_path, recwarn):
    assert isinstance(result, TuneResult)
    assert [point.computed_steps for point in result.frontier] == [2, 3, 5, STEPS]
    assert result.frontier[1] is result.point
    quality = [point.psnr_mean for point in result.frontier]
    assert quality == sorted(quality)
    assert result.policy.origin.model_classes == ("SequentialDiT",)
    assert "max_computed_steps=3" in result.policy.origin.source
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["target"] == "max_computed_steps=3"
    assert content["chosen"]["mask"] == list(result.policy.mask)
    assert content["chosen"]["seeds"] == [2, 3]
    assert content["frontier"][-1]["psnr_mean"] is None
    text = str(result)
    assert text.count("<- chosen") == 1
    assert "guaranteed by the schedule" in text
    assert "measured with seeds 2, 3, not guaranteed for others" in text
    picture = result.plot(tmp_path / "frontier.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = fxcache.load_schedule(result.save(tmp_path / "schedule.json"))
    assert_identical(euler(plain(model, again), 2), euler(plain(model, result.policy), 2))
    assert not recwarn.list


def test_a_picture_of_nothing_but_equal_samples(model, tmp_path):
    result = quick(model, euler, max_computed_steps=STEPS)
    assert result.plot(tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match="missing"):
        result.plot(tmp_path / "missing" / "x.png")


def test_two_calls_give_the_same(model, result):
    again = tune(model, euler, max_computed_steps=3, frontier=[2, 5, 8], sensitivity_steps=2)
    assert again.policy == result.policy
    for a, b in zip(again.frontier, result.frontier, strict=True):
        assert (a.policy, a.psnr_mean, a.psnr_min) == (b.policy, b.psnr_mean, b.psnr_min)


# --- denoisers and samplers -----------------------------------------------------------------------


def test_it_is_compiled_once_and_leaves_nothing(model, monkeypatch):
    graphs, found = [], []
    original = Backend.__call__
    monkeypatch.setattr(
        Backend, "__call__", lambda self, *args: graphs.append(1) or original(self, *args)
    )

    def run(d, seed):
        out, session = euler(d, seed), d._fxcache.session
        buffers = session.slots[None].branches[None].buffers
        found.extend(map(weakref.ref, (session.observe, buffers, buffers.rings[0][0])))
        return out

    denoiser = plain(model, FirstBlockCache(threshold=0.3))
    first = euler(denoiser, 0)
    before = denoiser.report().to_dict(), denoiser._fxcache, dict(model.__dict__)
    state = torch.get_rng_state()
    graphs.clear()
    with torch.enable_grad():
        tune(denoiser, run, max_computed_steps=4)
    assert len(graphs) == 1
    assert len(found) > 60
    gc.collect()
    assert all(kept() is None for kept in found)
    assert (denoiser.report().to_dict(), denoiser._fxcache, model.__dict__) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(euler(denoiser, 0), first)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_compiles_once(model, monkeypatch):
    compiled = []
    from fxcache.capture import backend

    original = backend.compile_pieces
    monkeypatch.setattr(
        backend, "compile_pieces", lambda *args: compiled.append(1) or original(*args)
    )
    denoiser = transform(model, FirstBlockCache())
    result = tune(denoiser, euler, max_computed_steps=4, frontier=[2], sensitivity_steps=2)
    assert len(compiled) == 1
    assert result.point.psnr_min > 40
    denoiser = transform(model, result.policy)
    euler(denoiser, 2)
    assert computed(denoiser) == 4


@pytest.mark.parametrize(
    "run",
    [
        lambda d, seed: euler(d, seed, rising=True),
        lambda d, seed: euler(d, seed, heun=True),
        lambda d, seed: torch.cat([euler(d, seed), euler(d, seed + 100)]),
        lambda d, seed: [euler(d, seed, batch=3), None],
        lambda d, seed: {"a": {"images": euler(d, seed).numpy()}},
    ],
    ids=["rising", "heun", "two trajectories", "batch", "nested"],
)
def test_samplers_of_many_kinds(model, run):
    result = quick(model, run, max_computed_steps=4, runs=2)
    assert result.point.computed_steps == 4
    assert result.point.psnr_min > 30
    fresh, uncached = plain(model, result.policy), plain(model, NEVER)
    for denoiser in (fresh, uncached):  # now it is known which way timesteps go
        run(denoiser, 0)
    (seed,) = result.point.seeds
    reference = as_tensor(run(uncached, seed))
    assert psnr(as_tensor(run(fresh, seed)), reference) == result.point.psnr_min


def test_announced_trajectories_of_named_requests(shared):
    def run(seed):
        with shared.slot(seed), shared.trajectory(STEPS):
            return euler(shared, seed)

    result = quick(shared, run, max_computed_steps=3, runs=3)
    assert result.policy.mask == quick(shared, euler, max_computed_steps=3, runs=3).policy.mask


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of target_speedup, max_computed_steps, min_psnr, tolerance"),
        ({"min_psnr": 30, "target_speedup": 2}, r"exactly one .*'min_psnr': 30"),
        ({"target_speedup": 0.5}, r"target_speedup must be a number in \[1, 1000\], got 0.5"),
        ({"target_speedup": math.nan}, "target_speedup"),
        ({"target_speedup": "2x"}, "target_speedup"),
        ({"max_computed_steps": 0}, "max_computed_steps must be an integer at least 1, got 0"),
        ({"max_computed_steps": 4.0}, "max_computed_steps"),
        ({"max_computed_steps": True}, "max_computed_steps"),
        ({"min_psnr": -1}, r"min_psnr must be a number in \[0, 1000\], got -1"),
        ({"min_psnr": math.inf}, "min_psnr"),
        ({"tolerance": 0}, r"tolerance must be a number in \[0.001, 10\], got 0"),
        ({"min_psnr": 30, "runs": 0}, "runs must be an integer at least 1"),
        ({"min_psnr": 30, "verify_runs": 0}, "verify_runs must be an integer at least 1"),
        ({"min_psnr": 30, "sensitivity_steps": -1}, "sensitivity_steps"),
        ({"min_psnr": 30, "frontier": [4, 0]}, "frontier must be an integer at least 1, got 0"),
        ({"min_psnr": 30, "seed": None}, "seed must be an integer"),
    ],
)
def test_bad_targets_are_named_before_anything_is_sampled(model, options, message):
    with pytest.raises(PolicyError, match=message):
        tune(model, lambda d, seed: pytest.fail("sampled"), **options)


def carried_on(generator):
    return lambda d, seed: euler(d, 0) + torch.randn(1, 8, 4, generator=generator)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda d, seed: euler(d, seed, steps=1), "at least 2"),
        (lambda d, seed: euler(d, seed, steps=4 + seed), "at least 2|same sample|trajector"),
        (lambda d, seed: None, "what was sampled"),
        (lambda d, seed: sample(), "did not call the denoiser"),
        (lambda d, seed: euler(d, seed) * math.nan, "finite numbers, got inf or NaN, seed 0"),
        (carried_on(torch.Generator()), "same sample for one seed, got two with seed 1"),
        (
            lambda d, seed: euler(d, seed) / (1 / (seed - 2)),
            "run raised ZeroDivisionError with seed 2",
        ),
    ],
    ids=["one step", "lengths", "None", "uncalled", "NaN", "generator", "later seed"],
)
def test_functions_that_do_not_fit(shared, run, message):
    before = shared._fxcache
    with pytest.raises(ProfileError, match=message):
        quick(shared, lambda d, seed: run(d, seed), max_computed_steps=3)
    assert shared._fxcache is before
    with pytest.raises(OptionError):
        tune(shared, "run", max_computed_steps=3)


def test_a_run_without_seed_is_said_to_be_one_sample(shared, caplog):
    with caplog.at_level(logging.WARNING, "fxcache"):
        quick(shared, lambda: euler(shared, 0), max_computed_steps=3)
    assert "the same sample for seeds [1, 2]" in caplog.text


def test_a_candidate_that_diverges_is_not_chosen(model):
    """NaN with every forecaster but the last that is tried."""

    def broken(d, seed):
        x, policy = euler(d, seed), d._fxcache.session.policy
        is_good = sum(policy.mask) == 0 or isinstance(policy.forecast.inner, Fitted)
        return x if is_good else x * math.nan

    result = quick(model, broken, max_computed_steps=3)
    assert result.point.forecast == "fitted weights"
    assert math.isfinite(result.point.psnr_min)
