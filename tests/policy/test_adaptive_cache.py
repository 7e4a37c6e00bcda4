"""AdaptiveCache: the rule against a float64 copy of its definition, and its decisions on models."""

import math
import threading
from itertools import product

import pytest
import torch
from helpers import adopt, hits, plain, sample, seeded
from helpers import times as times_at
from opened import Small
from policy_cases import STEPS, moving
from torch import nn

from fxcache import AdaptiveCache, FirstBlockCache, PolicyError
from fxcache.demo import sampler
from fxcache.demo.metrics import psnr
from fxcache.policy import History
from fxcache.policy.base import ForecastError


def lagrange(nodes, t):
    return [math.prod((t - b) / (a - b) for b in nodes if b != a) for a in nodes]


def polynomial(entries, t):
    """At `t`, the one through (step, residual) `entries`."""
    weights = lagrange([at for at, _ in entries], t)
    return sum(w * residual for w, (_, residual) in zip(weights, entries, strict=True))


def expected(residuals, policy, num_steps):
    """Which steps the definition hits, and what it puts in the place of every residual, given each
    step's residuals as they are when computed.
    """
    past, scale, total, run, known, found, used = [], None, 0.0, [], [], [], []
    growth = lambda t, nodes: math.prod(abs(t - n) for n in nodes)  # noqa: E731
    for step, residual in enumerate(residuals):
        nodes = past[: policy.order + 1]
        steps = [at for at, _ in nodes]
        ready = len(nodes) == policy.order + 1
        if ready and scale is not None and len(run) < policy.max_consecutive_hits:
            error = total + scale * growth(step, steps)
            slope = policy.slope if num_steps else 0
            share = 1 - slope + 2 * slope * step / ((num_steps or 2) - 1)
            is_last = num_steps is not None and step >= num_steps - policy.final_steps
            if error < policy.tolerance * share and not is_last:
                forecast, total = polynomial(nodes, step), error
                made_good = [polynomial(past, hit) - then for hit, then in known if not run]
                run.append((step, forecast))
                used.append(forecast + sum(made_good))
                found.append(True)
                continue
        if ready:
            off = (polynomial(nodes, step) - residual).abs().mean() / residual.abs().mean()
            scale = float(off) / growth(step, steps)
        past, total = [(step, residual), *past[: policy.order + 1]], 0.0
        run, known = [], run
        used.append(residual)
        found.append(False)
    return found, used


class Moving(nn.Module):
    """A stack whose residual is a known function of the time, whatever the sample is."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x, t):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x) * t
        return self.out(x)


def residual_of(model, x, t):
    first = x = model.embed(x)
    for block in model.blocks:
        x = x + block(x) * t
    return (x - first).double()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_decisions_are_those_of_the_definition(order):
    """Whether the number of steps is announced or not."""
    model, x = seeded(Moving), torch.randn(1, 6, 4)
    times = [1 + 0.3 * math.sin(0.2 * i) + 0.01 * (i % 5 == 4) for i in range(20)]
    residuals = [residual_of(model, x, t) for t in times]
    denoiser = plain(model, AdaptiveCache(order=order))
    for tolerance, num_steps in product((0.003, 0.02, 0.08), (20, None)):
        policy = AdaptiveCache(order=order, tolerance=tolerance)
        adopt(denoiser, policy)
        with denoiser.trajectory(num_steps=num_steps):
            outputs = [denoiser(x, torch.tensor(t)) for t in times]
        made, (found, used) = hits(denoiser), expected(residuals, policy, num_steps)
        assert made == found, (tolerance, num_steps)
        assert order == 0 or tolerance < 0.02 or any(made)
        wanted = [model.out(model.embed(x) + residual.float()) for residual in used]
        torch.testing.assert_close(outputs, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_hits_lacked_is_made_good(order):
    """By the next hit alone, of its step; and nothing where no hit was."""
    forecast, past = AdaptiveCache(order=order).forecast, (12, 8, 6, 3)[: order + 2]
    values = {at: float(at**3 - 40 * at**2) for at in range(14)}
    at = lambda steps: [(step, values[step]) for step in steps]  # noqa: E731
    value = lambda weights: sum(w * v for w, (_, v) in zip(weights, at(past), strict=True))  # noqa: E731
    alone = polynomial(at(past[:-1]), 13)
    assert value(forecast.weights(13, past)) == pytest.approx(alone)
    lacked = sum(polynomial(at(past), hit) - polynomial(at(past[1:]), hit) for hit in (9, 11))
    for hits_, wanted in (
        ([7, 9, 11], alone + lacked),
        ([7, 9, 11, 13], alone + lacked),  # a second evaluation of the step (Heun)
        ([7], alone),  # another hit made it good; these steps were not evaluated, or computed
        ([], alone),
    ):
        assert value(forecast.correct(13, past, hits_)) == pytest.approx(wanted)
    assert forecast.correct(14, past, [9, 11, 13]) == forecast.weights(14, past)
    assert forecast.correct(13, past[:-1], [9]) == forecast.weights(13, past[:-1])


def test_steps_that_were_not_evaluated_were_no_hits():
    model, x = seeded(Moving), torch.randn(1, 6, 4)
    denoiser = plain(model, AdaptiveCache(tolerance=math.inf))
    entries = []
    with denoiser.trajectory(num_steps=40):
        for step in (0, 3, 6, 7):
            t = 1 + math.sin(0.1 * step)
            with denoiser.at(step=step):
                output = denoiser(x, torch.tensor(t))
            entries.append((step, residual_of(model, x, t)))
    assert hits(denoiser) == [False, False, False, True]
    forecast = polynomial(entries[1:3], 7)
    torch.testing.assert_close(output, model.out(model.embed(x) + forecast.float()))


def run(denoiser, steps=STEPS, given=lambda i: moving(sample(), i)):
    with denoiser.trajectory(num_steps=steps):
        return [denoiser(given(i), times_at(1 - i / STEPS)) for i in range(steps)]


def test_what_is_computed(caplog):
    """The rule's limits, a residual that is not finite, fresh noise, few steps: one capture."""
    loose = AdaptiveCache(tolerance=math.inf, max_consecutive_hits=2, warmup_steps=4)
    denoiser = plain(seeded(Small), loose)
    run(denoiser)
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons[:4] == ["nothing cached", "warm-up", "warm-up", "warm-up"]
    assert reasons[4:8] == [None, None, "max_consecutive_hits", None]
    assert reasons[-1] == "final step"
    assert denoiser.report().cached_bytes == 0  # nothing outlives its trajectory

    adopt(denoiser, AdaptiveCache(tolerance=math.inf, max_consecutive_hits=1))
    outputs = run(denoiser, given=lambda i: moving(sample(), i) * (math.nan if i == 4 else 1))
    assert [bool(out.isfinite().all()) for out in outputs] == [i != 4 for i in range(STEPS)]
    made = hits(denoiser)
    assert made[3]
    assert not any(made[4:8])
    assert any(made[8:])

    adopt(denoiser, AdaptiveCache(tolerance=0.01))
    run(denoiser, given=lambda i: torch.randn(2, 8, 4))
    assert not any(hits(denoiser))

    adopt(denoiser, AdaptiveCache())
    caplog.clear()
    for _ in range(2):
        run(denoiser, 4)
    said = [r.getMessage() for r in caplog.records if "AdaptiveCache" in r.getMessage()]
    assert len(said) == 1
    assert "4 evaluations" in said[0]
    assert "first 3 computed steps" in said[0]
    assert denoiser.report().graphs == 1


def test_one_word_for_a_quality_and_second_evaluations_of_a_step():
    assert AdaptiveCache.for_quality("balanced") == AdaptiveCache()
    names = ("high", "balanced", "fast")
    tolerances = [AdaptiveCache.for_quality(name).tolerance for name in names]
    assert tolerances == sorted(tolerances)
    assert AdaptiveCache.for_quality("fast", order=2).order == 2
    with pytest.raises(PolicyError, match="one of high, balanced, fast, got 'best'"):
        AdaptiveCache.for_quality("best")
    policy = AdaptiveCache(tolerance=math.inf)  # Heun's second one of a computed step is computed
    history = History(step=5, num_steps=20, past=(5, 4, 3), error=ForecastError((5, 4, 3), 0.1))
    assert policy.rule(math.nan, history).reason == "its step was computed"


def test_it_beats_fewer_steps_on_the_trained_model():
    model, classes = sampler.load_denoiser()
    labels = torch.arange(4) % len(classes)
    denoiser = plain(model, AdaptiveCache())
    computed_all = sampler.sample(model, labels, steps=30, seed=1000)
    ours = sampler.sample(denoiser, labels, steps=30, seed=1000)
    computed = denoiser.report().misses
    assert computed <= 19
    fewer = sampler.sample(model, labels, steps=computed, seed=1000)
    assert psnr(ours, computed_all) > 46
    assert psnr(ours, computed_all) > psnr(fewer, computed_all) + 8


def test_a_report_shows_the_predicted_and_the_measured_error(tmp_path):
    model = seeded(Moving)
    policy, x = AdaptiveCache(tolerance=0.1), torch.randn(2, 4)
    denoiser = plain(model, policy, audit=False)
    with denoiser.trajectory(num_steps=16):
        for i in range(16):
            denoiser(x, torch.tensor(1 + 0.3 * math.sin(0.2 * i)))
    report = denoiser.report()
    errors = [record.error for record in report.records]
    assert [error is None for error in errors[:3]] == [True, True, False]
    assert all((r.error is None) == r.is_hit for r in report.records[2:])
    known = [r for r in report.records if r.predicted is not None]
    assert any(r.is_hit for r in known)
    assert known[0].predicted == pytest.approx(errors[2])  # the next step, at the same distance
    assert "predicted" in str(report)
    assert f"{errors[2]:.4f}" in str(report)
    assert report.to_dict()["records"][2]["error"] == errors[2]
    assert report.plot(tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_reports_of_what_is_not_finite_and_of_two_policies(tmp_path):
    model = seeded(Moving)
    denoiser = plain(model, FirstBlockCache(threshold=0.0))
    x = torch.randn(2, 4)
    for policy in (FirstBlockCache(threshold=0.0), AdaptiveCache()):
        denoiser.policy = policy
        with denoiser.trajectory(num_steps=5):
            for i in range(5):
                broken = math.nan if isinstance(policy, AdaptiveCache) else 1.0
                denoiser(x * broken, torch.tensor(1 - 0.1 * i))
    report = denoiser.report()
    assert "metric" in str(report)
    assert "error" in str(report)
    assert [r.predicted for r in report.records[:5]] == [None] * 5
    assert math.isnan(report.records[-1].error)
    report.plot(tmp_path / "errors.png")


def test_a_report_may_be_asked_for_in_another_thread():
    model, x = seeded(Moving), torch.randn(1, 4)
    denoiser = plain(model, AdaptiveCache())
    done, failed = threading.Event(), []

    def poll():
        while not done.is_set():
            try:
                denoiser.report()
            except Exception as error:  # noqa: BLE001
                failed.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    with torch.no_grad(), denoiser.trajectory(num_steps=300):
        for i in range(300):
            denoiser(x, torch.tensor(1 - i / 300))
    done.set()
    thread.join()
    assert not failed
