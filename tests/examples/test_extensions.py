"""A policy of somebody else's, and calibration and tuning from the command line."""

import ast
import functools
import json
import math
import re
from pathlib import Path

import pytest
import scripts
import torch
from helpers import adopt, assert_close, assert_identical, hits, plain, seeded, solve
from zoo import SequentialDiT

import fxcache
from fxcache import ProfileError
from fxcache.cli import main
from fxcache.policy import Policy

ROOT = Path(__file__).parents[2]

SETUP = """
import torch, fxcache
from zoo import SequentialDiT

def setup():
    torch.manual_seed(0)
    denoiser = fxcache.transform(SequentialDiT().eval(), backend="eager")

    def run(seed):
        x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), denoiser.trajectory(num_steps=8):
            for i in range(8):
                x = x - 0.05 * denoiser(x, torch.full((2,), 1 - i / 8))
        return x

    return denoiser, run

def half():
    return setup()[0]

def broken():
    def run(seed):
        raise ValueError("no weights here")
    return setup()[0], run
"""


@pytest.fixture
def setup_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    path = tmp_path / "mine.py"
    path.write_text(SETUP)
    return path


def custom_policy():
    """The class of the example, and the lines it takes."""
    source = (ROOT / "examples" / "custom_policy.py").read_text()
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    return scripts.load("custom_policy").CalmSteps, node.end_lineno - node.lineno + 1


def test_a_policy_of_ones_own_is_short_and_known_nowhere_else():
    cls, lines = custom_policy()
    assert lines < 30
    assert isinstance(cls(), Policy)
    used = [p for p in ROOT.glob("fxcache/**/*.py") if cls.__name__ in p.read_text()]
    assert used == []


def test_a_policy_of_ones_own_runs(model):
    cls, _ = custom_policy()
    expected, denoiser = solve(model, steps=6), plain(model, cls())
    for budget in (0.0, 0.5, 1e9):
        outputs = solve(adopt(denoiser, cls(budget=budget)), steps=6)
        if budget == 0:
            assert_identical(outputs, expected)
        assert any(hits(denoiser)) == (budget > 0), budget
        assert not any(hits(denoiser)[:3])
    assert denoiser.report().graphs == 1


def test_the_example_runs(run_script):
    printed = run_script("custom_policy")
    assert re.search(r"[1-9]\d* hits", printed)
    assert "sampled [2, 3, 32, 32]" in printed


def test_calibrate_on_the_command_line(setup_file, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    assert main(["calibrate", f"{setup_file}:setup", "--output", str(path)]) == 0
    assert "MagCache profile of SequentialDiT, 8 steps" in capsys.readouterr().out
    assert len(fxcache.Profile.load(path).policy().ratios) == 8


def test_tune_on_the_command_line(setup_file, tmp_path, capsys):
    path, plot = tmp_path / "s.json", tmp_path / "t.png"
    arguments = ["tune", f"{setup_file}:setup", "--max-computed-steps", "4", "--verify-runs", "1"]
    assert main([*arguments, "--output", str(path), "--plot", str(plot)]) == 0
    assert "<- chosen" in capsys.readouterr().out
    assert fxcache.load_schedule(path).num_computed <= 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bad_targets_are_refused_and_nothing_is_written(setup_file, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    for name, said in (
        ("nothing", "must define a function"),
        ("half", "must return (denoiser or pipeline, run)"),
        ("broken", "run raised ValueError"),
    ):
        assert main(["calibrate", f"{setup_file}:{name}", "--output", str(path)]) == 2
        assert said in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]
    assert main(["tune", "nowhere.py:setup", "--min-psnr", "30"]) == 2
    assert "FILE.py:FUNCTION or demo" in capsys.readouterr().err


class Writes(SequentialDiT):
    def forward(self, x, t):
        x.mul_(0.5)
        return super().forward(x, t)


class Returns(SequentialDiT):
    """Two outputs, one of another shape than the sample, and one that is the time input."""

    def forward(self, x, t):
        y = super().forward(x, t)
        return y, y.mean(-1), t


def test_a_whole_model_that_writes_into_its_input_is_refused():
    with pytest.raises(fxcache.StackNotFoundError, match="into x"):
        plain(seeded(Writes), fxcache.EasyCache(final_steps=0))(torch.randn(2, 8, 4), torch.ones(2))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_whole_model_with_several_outputs(backend):
    policy = fxcache.EasyCache(threshold=1e9, warmup_steps=2, final_steps=0)
    model = seeded(lambda: Returns(depth=2))
    denoiser = fxcache.transform(model, policy, backend=backend)
    given = [(torch.randn(2, 8, 4) + 0.1 * i, torch.full((2,), 1 - i / 10)) for i in range(3)]
    outputs, expected = ([net(*each) for each in given] for net in (denoiser, model))
    assert hits(denoiser) == [False, False, True]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(outputs[1], expected[1])
    close(outputs[2][0], given[2][0] + (expected[1][0] - given[1][0]))
    close(outputs[2][1], expected[1][1])
    assert torch.equal(outputs[2][2], expected[2][2])


def test_explain_says_that_the_span_is_the_whole_model(model):
    found = fxcache.explain(model, torch.ones(2, 8, 4), torch.ones(2), policy=fxcache.EasyCache())
    assert "the span is the whole model" in str(found)
    assert found.skipped_share == 1


@pytest.mark.slow
def test_the_demos_sampler_is_a_target(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    assert main(["calibrate", "demo", "--runs", "1", "--output", str(path)]) == 0
    assert "DiTTransformer2DModel, 30 steps" in capsys.readouterr().out


def test_schedules_are_saved_and_loaded(tmp_path):
    for forecast in (
        fxcache.Reuse(),
        fxcache.Taylor(order=2),
        fxcache.Hermite(order=2, scale=0.6),
        fxcache.AdamsBashforth(order=3),
        fxcache.Chebyshev(order=2, ridge=0.3),
    ):
        options = {"warmup_steps": 2, "forecast": forecast, "input_share": 0.25}
        policy = fxcache.StepSchedule.every(3, num_steps=9, **options)
        assert fxcache.load_schedule(fxcache.save_schedule(policy, tmp_path / "s.json")) == policy


def test_files_that_are_no_schedules_are_refused(tmp_path):
    path = fxcache.save_schedule(fxcache.StepSchedule(mask=[0, 1]), tmp_path / "s.json")
    text = path.read_text()
    before = {name: value for name, value in json.loads(text).items() if name != "input_share"}
    path.write_text(json.dumps(before))  # a file of before there were shares
    assert fxcache.load_schedule(path).input_share == 1
    bad = {"format": "other", "mask": [], "forecast": {"name": "Oracle"}}
    changed = [json.dumps({**json.loads(text), name: value}) for name, value in bad.items()]
    for content in (*changed, text[:40], None):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(ProfileError, match=r"s\.json"):
            fxcache.load_schedule(path)


def test_every_nth_step():
    policy = fxcache.StepSchedule.every(2, num_steps=6)
    assert policy.mask == (False, True, False, True, False, True)
    assert policy.num_computed == 3
    third = fxcache.StepSchedule.every(3, num_steps=9, warmup_steps=3)
    assert [step for step, hit in enumerate(third.mask) if not hit] == [0, 1, 2, 5, 8]
    with pytest.raises(fxcache.PolicyError, match="n must be an integer at least 1, got 0"):
        fxcache.StepSchedule.every(0, num_steps=4)


def test_only_instances_are_policies(model):
    for bad in (fxcache.EasyCache, fxcache.FirstBlockCache, object(), "magcache"):
        with pytest.raises(fxcache.PolicyError, match="policy must be a policy like"):
            fxcache.transform(model, bad)
    with pytest.raises(fxcache.PolicyError, match="forecast must be a forecaster"):
        fxcache.FirstBlockCache(forecast=fxcache.Taylor)


def test_a_second_evaluation_of_a_step_replaces_the_first_in_the_ring(model):
    """Of Heun's two evaluations at one time, a forecast goes on from the later one."""
    forecast = fxcache.Taylor(order=1)
    policy = fxcache.FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=forecast)
    denoiser = plain(model, policy)
    given = [(torch.randn(2, 8, 4), torch.full((2,), t)) for t in (1.0, 0.6, 0.6, 0.3)]
    with denoiser.trajectory(num_steps=3):
        outputs = [denoiser(*each) for each in given]
    assert hits(denoiser) == [False, False, False, True]
    after_head = [
        model.blocks[0](model.embed(x) + model.time(t[:, None])[:, None]) for x, t in given
    ]
    first, _, second, _ = (model.blocks[1:](h) - h for h in after_head)
    expected = model.out(model.norm(after_head[-1] + 2 * second - first))
    assert_close(outputs[-1], expected)


class Frames(SequentialDiT):
    """A video [B, frames, channels, H, W], whose patches are a convolution a frame."""

    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, t):
        b, f, c, h, w = x.shape
        tokens = self.patch(x.flatten(0, 1)).unflatten(0, (b, f)).permute(0, 1, 3, 4, 2)
        return super().forward(tokens.reshape(b, f * h * w, c), t)


def test_sea_cache_filters_frames_and_not_channels(monkeypatch):
    from fxcache.passes import probe

    seen, original = [], probe._frequency_axes
    monkeypatch.setattr(
        probe, "_frequency_axes", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    denoiser = plain(Frames().eval(), fxcache.SeaCache(final_steps=0))
    denoiser(torch.randn(1, 3, 4, 2, 5), torch.ones(1))
    assert seen == [(1, 3, 4)]
