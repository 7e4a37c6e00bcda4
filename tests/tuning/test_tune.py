"""Tuning: the best schedule for a budget, verified by sampling."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from comparing import assert_identical
from helpers import adopt, plain, sample, seeded, times
from opened import Small, SmallBlock
from policies import NEVER
from samplers import STEPS, euler, guided, observers
from torch import nn
from zoo import Denoiser

import fxcache
from fxcache import FirstBlockCache, OptionError, PolicyError, ProfileError, StepSchedule
from fxcache.capture.backend import Backend
from fxcache.tuning.sampling import as_tensor, psnr

tune = functools.partial(fxcache.tune, progress=False)
quick = functools.partial(tune, frontier=(), sensitivity_steps=0, verify_runs=1)


def computed(denoiser):
    """The most steps that a branch computed in a trajectory."""
    steps = {}
    for record in denoiser.report().records:
        own = steps.setdefault((record.trajectory, record.branch), set())
        own |= set() if record.is_hit else {record.step}
    return max(map(len, steps.values()))


@pytest.mark.parametrize(("run", "budgets"), [(euler, (1, 2, 5, STEPS + 1)), (guided, (3,))])
def test_the_budget_is_kept_and_the_psnr_is_that_of_the_policy(model, denoiser, run, budgets):
    """In another denoiser; the samples are the same bit for bit."""
    share, fresh = skipped(model), plain(model, NEVER)
    references = {seed: as_tensor(run(fresh, seed)) for seed in (2, 3)}
    for budget in budgets:
        result = tune(denoiser, run, max_computed_steps=budget, frontier=(), sensitivity_steps=2)
        point = result.point
        assert point.computed_steps == min(budget, STEPS)
        assert point.seeds == (2, 3)
        assert result.frontier == (point,)
        adopt(fresh, result.policy)
        values = []
        for seed in point.seeds:
            fresh.reset()
            values.append(psnr(as_tensor(run(fresh, seed)), references[seed]))
            assert computed(fresh) == min(budget, STEPS)
        assert point.psnr_min == min(values)
        assert point.psnr_mean == sum(values) / 2
        assert (point.psnr_min == math.inf) == (budget >= STEPS)
        hits = STEPS - point.computed_steps
        assert point.speedup == pytest.approx(STEPS / (STEPS - hits * share))


def skipped(model):
    return fxcache.explain(
        model, torch.ones(1, 8, 4), torch.ones(1), policy=StepSchedule(mask=[False])
    ).skipped_share


class Jumping(Denoiser):
    """Residuals that depend on the time alone: they jump at 0.65 and at 0.3."""

    def __init__(self):
        super().__init__()
        layers = ((nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(*each) for each in layers)

    def forward(self, x, t):
        h, level = self.embed(x), 1 + 3 * (t < 0.65) + 5 * (t < 0.3)
        for block in self.blocks:
            h = h + level[:, None, None] * block(0 * h + 1)
        return self.out(h)


def test_the_best_schedule_of_a_problem_with_a_known_answer():
    """Residuals that stay the same but for two jumps: compute these steps, and nothing is lost."""
    result = tune(seeded(Jumping), euler, max_computed_steps=3, frontier=[4], sensitivity_steps=3)
    at = [1 - i / STEPS for i in range(STEPS)]
    jumps = {0, at.index(0.625), at.index(0.25)}
    assert {step for step, is_hit in enumerate(result.policy.mask) if not is_hit} == jumps
    assert result.point.psnr_min > 100


def test_speeds_and_qualities(model, denoiser):
    share = skipped(model)
    for target in (1.3, 3.5):
        result = quick(denoiser, euler, target_speedup=target)
        assert result.point.speedup >= target
        assert result.target == f"target_speedup={target}"
        more = result.point.computed_steps + 1
        assert more > STEPS or STEPS / (more + (STEPS - more) * (1 - share)) < target
    with pytest.raises(PolicyError, match=r"at most 5.67 .* skips 94% of the FLOPs.*got 100"):
        quick(denoiser, euler, target_speedup=100)
    for least, steps in ((0, {2}), (45, range(2, STEPS)), (1000, {STEPS})):  # six hits in a row
        result = quick(denoiser, euler, min_psnr=least, verify_runs=2)
        assert result.point.psnr_min >= least
        assert result.point.computed_steps in steps


def test_a_tolerance_is_tried_on_the_callers_own_sampler(model, tmp_path):
    result = tune(model, functools.partial(euler, steps=12), tolerance=0.2, seed=3)
    policy, point = result.policy, result.point
    assert (policy.tolerance, policy.origin.model_classes) == (0.2, ("Small",))
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


def test_runs_with_which_a_tolerance_can_and_cannot_be_tried(denoiser):
    noise = iter(torch.randn(9, 1, 8, 4))
    for run, message in (
        (lambda d, seed: torch.zeros(3), "run must call the denoiser"),
        (lambda d, seed: euler(d, 0) + next(noise), "same sample"),
        (lambda d, seed: euler(d, seed) * math.nan, "finite numbers, got inf or NaN"),
    ):
        with pytest.raises(ProfileError, match=message):
            tune(denoiser, run, tolerance=0.1)

    def resets(denoiser, seed):
        sampled = euler(denoiser, seed, 12)
        denoiser.reset()
        return sampled

    point = tune(denoiser, resets, tolerance=0.2).point
    assert 0 < point.computed_steps < point.num_steps == 12


class Forgets(SmallBlock):
    """Little of its input is left in its output."""

    def forward(self, h):
        return super().forward(h) - 9 * torch.tanh(h / 10)


class Leading(Small):
    """What a hit leaves of an error in its input drives the sample on."""

    def __init__(self, gain):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(Forgets(16), Forgets(16)), nn.Identity()
        with torch.no_grad():
            self.out.weight.copy_(-gain * self.embed.weight.T)


@pytest.mark.parametrize(
    ("make", "noise", "share"), [(lambda: Leading(15), 0, 0.1), (Small, 0.3, 1)]
)
def test_the_input_share_that_samples_better(make, noise, share):
    """And the steps whose sensitivity is measured: the last one, and others before it."""
    seen, model = set(), seeded(make)

    @torch.no_grad()
    def run(d, seed):
        if isinstance(getattr(d, "policy", None), StepSchedule) and sum(d.policy.mask) == 1:
            seen.add(d.policy.mask.index(True))
        x, generator = sample(seed=seed), torch.Generator().manual_seed(seed)
        for step in range(16):
            x = x - d(x, times(1 - step / 16, 1)) / 16
            x = x + noise * torch.randn(x.shape, generator=generator)
        return x

    result = quick(model, run, max_computed_steps=8, sensitivity_steps=4)
    assert result.policy.input_share == share
    assert seen == {1, 8, 14, 15}
    (seed,) = result.point.seeds
    both = (result.policy, dataclasses.replace(result.policy, input_share=1.1 - share))
    ours, other = (psnr(as_tensor(run(plain(model, p), seed)), run(model, seed)) for p in both)
    assert other + 2 < ours == pytest.approx(result.point.psnr_min)


def test_result(model, denoiser, tmp_path):
    options = {"max_computed_steps": 3, "sensitivity_steps": 2}
    result = tune(denoiser, euler, frontier=[2, 5, 5, 99], **options)
    assert [point.computed_steps for point in result.frontier] == [2, 3, 5, STEPS]
    assert result.frontier[1] is result.point
    quality = [point.psnr_mean for point in result.frontier]
    assert quality == sorted(quality)
    assert result.policy.origin.model_classes == ("Small",)
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
    with pytest.raises(OSError, match="missing"):
        result.plot(tmp_path / "missing" / "x.png")
    loaded = fxcache.load_schedule(result.save(tmp_path / "schedule.json"))
    assert_identical(euler(plain(model, loaded), 2), euler(plain(model, result.policy), 2))
    # Another call gives the same.
    again = tune(denoiser, euler, frontier=[2, 5, 8], **options)
    assert again.policy == result.policy
    for a, b in zip(again.frontier, result.frontier, strict=True):
        assert (a.policy, a.psnr_mean, a.psnr_min) == (b.policy, b.psnr_mean, b.psnr_min)
    # A picture of nothing but equal samples.
    equal = quick(denoiser, euler, max_computed_steps=STEPS)
    assert equal.plot(tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_is_compiled_once_for_each_input_share_and_leaves_nothing(model, monkeypatch):
    graphs, seen, original = [], [], Backend.__call__
    monkeypatch.setattr(
        Backend, "__call__", lambda self, *args: graphs.append(1) or original(self, *args)
    )

    def run(d, seed):
        out = euler(d, seed)
        if len(seen) < 3:
            seen.append(observers())
        return out

    denoiser = fxcache.transform(model, FirstBlockCache(threshold=0.3), backend="aot_eager")
    first = euler(denoiser, 0)
    before, number = (denoiser.report(), denoiser.policy, dict(model.__dict__)), observers()
    state = torch.get_rng_state()
    graphs.clear()
    with torch.enable_grad():
        result = tune(denoiser, run, max_computed_steps=4)
    assert result.point.psnr_min > 40
    assert len(graphs) == 2
    assert min(seen) > number == observers()
    assert (denoiser.report(), denoiser.policy, model.__dict__) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(euler(denoiser, 0), first)
    assert len(graphs) == 2


SAMPLERS = {
    "rising": lambda d, seed: euler(d, seed, rising=True),
    "heun": lambda d, seed: euler(d, seed, heun=True),
    "two trajectories": lambda d, seed: torch.cat([euler(d, seed), euler(d, seed + 100)]),
    "batch": lambda d, seed: [euler(d, seed, batch=3), None],
}


@pytest.mark.parametrize("run", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_of_many_kinds(model, run):
    result = quick(model, run, max_computed_steps=4, runs=2)
    assert result.point.computed_steps == 4
    assert result.point.psnr_min > 30
    fresh = plain(model, result.policy)
    run(fresh, 0)  # now it is known which way timesteps go
    (seed,) = result.point.seeds
    reference = as_tensor(run(model, seed))
    assert psnr(as_tensor(run(fresh, seed)), reference) == result.point.psnr_min


def test_announced_trajectories_of_named_requests(denoiser, caplog):
    def run(seed):
        with denoiser.slot(seed), denoiser.trajectory(STEPS):
            return euler(denoiser, seed)

    result = quick(denoiser, run, max_computed_steps=3, runs=3)
    assert result.policy.mask == quick(denoiser, euler, max_computed_steps=3, runs=3).policy.mask
    assert not caplog.text
    quick(denoiser, lambda: euler(denoiser, 0), max_computed_steps=3)  # is said to be one sample
    assert "the same sample for seeds [0, 2]" in caplog.text


def test_bad_targets_are_named_before_anything_is_sampled(model):
    for options, message in (
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
    ):
        with pytest.raises(PolicyError, match=message):
            tune(model, lambda d, seed: pytest.fail("sampled"), **options)


def test_functions_that_do_not_fit(denoiser):
    noise = iter(torch.randn(9, 1, 8, 4))
    euler(denoiser, 0)
    before = denoiser.report(), denoiser.policy
    for run, message in (
        (lambda d, seed: euler(d, seed, steps=1), "at least 2"),
        (lambda d, seed: euler(d, seed, steps=4 + seed), "at least 2|same sample|trajector"),
        (lambda d, seed: None, "what was sampled"),
        (lambda d, seed: sample(), "did not call the denoiser"),
        (lambda d, seed: euler(d, seed) * math.nan, "finite numbers, got inf or NaN, seed 0"),
        (lambda d, seed: euler(d, 0) + next(noise), "same sample .*, got two with seed 0"),
        (lambda d, seed: euler(d, seed) / (1 / (seed - 2)), "raised ZeroDivision.* with seed 2"),
    ):
        with pytest.raises(ProfileError, match=message):
            quick(denoiser, run, max_computed_steps=3, sensitivity_steps=1)
        assert (denoiser.report(), denoiser.policy) == before, message
    with pytest.raises(OptionError):
        tune(denoiser, "run", max_computed_steps=3)


def test_what_is_sampled(model):
    """Seeds and numbers of computed steps, in order; candidates, where few steps are computed, of
    which one that diverges (NaN with the weights that are tried first) is not chosen.
    """
    sampled, tables = [], []

    def run(d, seed):
        sampled.append((seed, STEPS if sum(d.policy.mask) == 0 else d.policy.num_computed))
        x = euler(d, seed)
        if sampled[-1][1] != 3:
            return x
        tables.append(d.policy.forecast.inner.table)
        return x * math.nan if tables[-1] == tables[0] else x

    known = [(0, STEPS), (2, STEPS), (3, STEPS), *[(0, STEPS - 1)] * 4, *[(0, 4)] * 2]
    result = tune(model, run, max_computed_steps=6)
    assert "measured with seeds 2, 3 (the other rows with 2), not" in str(result)
    assert sampled == [*known, (2, 6), (3, 6), *[(2, number) for number in (2, 3, 4, 5)]]
    sampled.clear()
    result = tune(model, run, max_computed_steps=3, frontier=[5])
    chosen = [(1, STEPS), *[(1, 3)] * 4, (2, 3), (3, 3)]
    assert sampled == [*known, *chosen, (2, 5), (3, 5)]
    assert result.point.forecast == "weights fitted one by one"
    assert math.isfinite(result.point.psnr_min)
