"""AdaptiveCache: the rule against a float64 copy of its definition, and its decisions on models."""

import math
import threading

import pytest
import torch
from helpers import hits
from policy_cases import STEPS, case
from torch import nn
from zoo import SequentialDiT

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, PolicyError
from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import load_denoiser, sample
from fxcache.policy import History
from fxcache.policy.base import ForecastError


def test_one_word_for_a_quality():
    assert AdaptiveCache.for_quality("balanced") == AdaptiveCache()
    names = ("high", "balanced", "fast")
    tolerances = [AdaptiveCache.for_quality(name).tolerance for name in names]
    assert tolerances == sorted(tolerances)
    assert AdaptiveCache.for_quality("fast", order=2).order == 2
    with pytest.raises(PolicyError, match="one of high, balanced, fast, got 'best'"):
        AdaptiveCache.for_quality("best")


def lagrange(nodes, t):
    return [math.prod((t - b) / (a - b) for b in nodes if b != a) for a in nodes]


def expected(residuals, policy, num_steps):
    """Which steps the definition hits, given each step's residuals as they are when computed."""
    past, scale, total, in_a_row, found = [], None, 0.0, 0, []
    growth = lambda t, nodes: math.prod(abs(t - n) for n in nodes)  # noqa: E731
    for step, residual in enumerate(residuals):
        nodes = past[: policy.order + 1]
        steps = [at for at, _ in nodes]
        ready = len(nodes) == policy.order + 1
        if ready and scale is not None and in_a_row < policy.max_consecutive_hits:
            error = total + scale * growth(step, steps)
            slope = policy.slope if num_steps else 0
            share = 1 - slope + 2 * slope * step / ((num_steps or 2) - 1)
            is_last = num_steps is not None and step >= num_steps - policy.final_steps
            if error < policy.tolerance * share and not is_last:
                total, in_a_row = error, in_a_row + 1
                found.append(True)
                continue
        if ready:
            forecast = sum(w * r for w, (_, r) in zip(lagrange(steps, step), nodes, strict=True))
            off = (forecast - residual).abs().mean() / residual.abs().mean()
            scale = float(off) / growth(step, steps)
        past, total, in_a_row = [(step, residual), *past[:4]], 0.0, 0
        found.append(False)
    return found


class Moving(nn.Module):
    """A stack whose residual is a known function of the time, whatever the sample is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x, t):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x) * t
        return self.out(x)


def residual_of(model, x, t):
    x = model.embed(x)
    start = x
    for block in model.blocks:
        x = x + block(x) * t
    return (x - start).double()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.08])
def test_decisions_are_those_of_the_definition(order, announced, tolerance):
    model, x = Moving().eval(), torch.randn(1, 6, 4)
    policy = AdaptiveCache(order=order, tolerance=tolerance)
    times = [1 + 0.3 * math.sin(0.2 * i) + 0.01 * (i % 5 == 4) for i in range(20)]
    residuals = [residual_of(model, x, t) for t in times]
    denoiser = fxcache.transform(model, policy, backend="eager")
    with denoiser.trajectory(num_steps=20 if announced else None):
        for t in times:
            denoiser(x, torch.tensor(t))
    steps = [r.is_hit for r in denoiser.report().records]
    assert steps == expected(residuals, policy, 20 if announced else None)
    assert order == 0 or tolerance < 0.02 or any(steps)


def run(denoiser, at, steps=STEPS, num_steps=STEPS):
    with denoiser.trajectory(num_steps=num_steps):
        return [denoiser(**at(i)) for i in range(steps)]


@pytest.mark.parametrize("name", [SequentialDiT, "flux", "sd3"])
def test_tolerance_0_is_the_model(name):
    model, at, _ = case(name)
    expect = [model(**at(i)) for i in range(STEPS)]
    denoiser = fxcache.transform(model, AdaptiveCache(tolerance=0), backend="eager")
    for ours, plain in zip(run(denoiser, at), expect, strict=True):
        ours, plain = (v if isinstance(v, torch.Tensor) else v[0] for v in (ours, plain))
        assert torch.equal(ours, plain)
    assert not any(hits(denoiser))


def test_what_is_computed():
    model, at, _ = case(SequentialDiT)
    policy = AdaptiveCache(tolerance=math.inf, max_consecutive_hits=2, warmup_steps=4)
    denoiser = fxcache.transform(model, policy, backend="eager")
    run(denoiser, at)
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons[:4] == ["nothing cached", "warm-up", "warm-up", "warm-up"]
    assert reasons[4:8] == [None, None, "max_consecutive_hits", None]
    assert reasons[-1] == "final step"
    assert denoiser.report().cached_bytes == 0  # nothing outlives its trajectory


def test_a_residual_that_is_not_finite():
    model, at, _ = case(SequentialDiT)
    policy = AdaptiveCache(tolerance=math.inf, max_consecutive_hits=1)
    denoiser = fxcache.transform(model, policy, backend="eager")
    with denoiser.trajectory(num_steps=STEPS):
        for i in range(STEPS):
            given = at(i)
            if i == 4:
                given["x"] = given["x"] * math.nan
            output = denoiser(**given)
            assert output.isfinite().all() == (i != 4)
    seen = [record.is_hit for record in denoiser.report().records]
    assert seen[3]
    assert not any(seen[4:8])
    assert any(seen[8:])


def test_second_evaluations_of_a_step():
    """Heun: the second evaluation of a computed step is computed, too."""
    policy = AdaptiveCache(tolerance=math.inf)
    history = History(step=5, num_steps=20, past=(5, 4, 3), error=ForecastError((5, 4, 3), 0.1))
    assert policy.rule(math.nan, history).reason == "its step was computed"


def test_fresh_noise_is_never_reused():
    model, at, _ = case(SequentialDiT)
    denoiser = fxcache.transform(model, AdaptiveCache(tolerance=0.01), backend="eager")
    run(denoiser, lambda i: {**at(i), "x": torch.randn(at(i)["x"].shape)})
    assert not any(hits(denoiser))


def test_few_steps_are_said_once(caplog):
    model, at, _ = case(SequentialDiT)
    denoiser = fxcache.transform(model, AdaptiveCache(), backend="eager")
    for _ in range(2):
        run(denoiser, at, 4, 4)
    said = [r.getMessage() for r in caplog.records if "AdaptiveCache" in r.getMessage()]
    assert len(said) == 1
    assert "4 evaluations" in said[0]
    assert "first 3 computed steps" in said[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance": -1}, {"tolerance": math.nan}, {"order": 4}, {"order": -1}, {"slope": 2},
        {"max_consecutive_hits": 0}, {"warmup_steps": -1}, {"final_steps": -1}, {"decide": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_values(wrong):
    (name,) = wrong
    with pytest.raises(PolicyError, match=name):
        AdaptiveCache(**wrong)


def test_it_beats_fewer_steps_on_the_trained_model():
    model, classes = load_denoiser()
    labels = torch.arange(4) % len(classes)
    denoiser = fxcache.transform(model, AdaptiveCache(), backend="eager")
    plain = sample(model, labels, steps=30, seed=1000)
    ours = sample(denoiser, labels, steps=30, seed=1000)
    computed = denoiser.report().misses
    assert computed <= 19
    fewer = sample(model, labels, steps=computed, seed=1000)
    assert psnr(ours, plain) > 46
    assert psnr(ours, plain) > psnr(fewer, plain) + 8


def test_a_report_shows_the_predicted_and_the_measured_error(tmp_path):
    model = Moving().eval()
    policy, x = AdaptiveCache(tolerance=0.1), torch.randn(2, 4)
    denoiser = fxcache.transform(model, policy, backend="eager", audit=False)
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
    model = Moving().eval()
    denoiser = fxcache.transform(model, FirstBlockCache(threshold=0.0), backend="eager")
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
    model, x = Moving().eval(), torch.randn(1, 4)
    denoiser = fxcache.transform(model, AdaptiveCache(), backend="eager")
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
