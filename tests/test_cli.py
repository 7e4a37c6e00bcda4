"""The command line, and the parts of the demo."""

import re
import sys
from dataclasses import replace

import pytest
import scripts
import torch
from helpers import adopt

import fxcache
from fxcache.cli import main
from fxcache.demo.metrics import psnr, ssim
from fxcache.demo.run import take_turns
from fxcache.demo.sampler import load_denoiser, sample
from fxcache.denoiser import DenoiserMethods
from fxcache.policy.forecast import Within


def test_explain(capsys):
    assert main(["explain", "--diffusers", "FluxTransformer2DModel"]) == 0
    out = capsys.readouterr().out
    assert "4 blocks in transformer_blocks (2) + single_transformer_blocks (2)" in out
    assert "a hit skips" in out


def test_explain_with_head_and_tail_blocks(capsys):
    arguments = ["--head-blocks", "1", "--tail-blocks", "1"]
    assert main(["explain", "--diffusers", "DiTTransformer2DModel", *arguments]) == 0
    assert "span   transformer_blocks.1 (1)" in capsys.readouterr().out


def test_mistakes_are_named(capsys):
    for arguments, message in (
        (["explain", "--diffusers", "NoSuchModel"], "no tiny config for 'NoSuchModel'"),
        (["explain", "--diffusers", "DiTTransformer2DModel", "--head-blocks", "9"], "at most 2"),
        (["explain", "--diffusers", "DiTTransformer2DModel", "--head-blocks", "0"], "at least 1"),
        (["demo", "--threshold", "-1"], "threshold must be a number in"),
        (["demo", "--backend", "nonsense"], "unknown backend"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo"]) == 2
    assert 'pip install "fxcache[demo]"' in capsys.readouterr().err


def test_usage_errors_and_help(capsys):
    for arguments in (["demo", "--steps", "2"], [], ["dance"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == (0 if "--help" in arguments else 2)
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("steps", "threshold", "output", "seed"))


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    """With two of its ten blocks; CI runs all of it, as a command of the README."""

    def timed(runs, *rest):
        denoisers = [run.denoiser for run in runs if isinstance(run.denoiser, DenoiserMethods)]
        captured = [denoiser.report().graphs for denoiser in denoisers]
        take_turns(runs, *rest)
        assert [denoiser.report().graphs for denoiser in denoisers] == captured

    monkeypatch.setattr("fxcache.demo.run.take_turns", timed)
    monkeypatch.setattr("fxcache.demo.run.IMAGES", 4)
    monkeypatch.setattr("fxcache.demo.run.load_denoiser", scripts.shallow)
    assert main(["demo", "--steps", "10", "--output", str(tmp_path), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "hits/steps" in out
    assert "fewer steps" in out
    assert re.search(r"adaptive \(default\) .* 9 +1\.11x", out)  # of 10 steps
    assert len(re.findall(r"(wins|loses) by \d+\.\d dB$", out, re.MULTILINE)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"comparison.png", "errors.png"}


@pytest.mark.slow
def test_the_demos_denoiser_is_trained_and_forecasting_wins():
    """Its pictures are those of its data; at the same hits, extrapolation is nearer to the uncached
    ones than reuse.
    """
    model, classes = load_denoiser()
    assert len(classes) == model.config.num_embeds_ada_norm
    labels = torch.tensor([classes.index("flag"), 0, 1, 2])
    reference = sample(model, labels, steps=16, seed=0)
    assert reference.shape == (4, 3, 32, 32)
    assert reference[0, :, :3].mean() > 0.95  # white above
    assert reference[0, :, 10:22, 4:28].std() > 0.15  # colours in the middle
    policy = fxcache.FirstBlockCache(
        threshold=0.5, warmup_steps=4, max_consecutive_hits=1, forecast=fxcache.Taylor(order=1)
    )
    denoiser = fxcache.transform(model, policy, backend="eager")
    quality = []
    reuse = replace(policy, forecast=Within(inner=fxcache.Reuse(), ring=2))
    for each in (policy, reuse):
        pictures = sample(adopt(denoiser, each), labels, steps=16, seed=0)
        quality.append(psnr(pictures, reference))
        assert denoiser.report().hits == 6
    assert denoiser.report().graphs == 1
    assert quality[0] > quality[1] + 3


def test_metrics():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 32, 32)
    assert psnr(image, image) == pytest.approx(100)
    assert psnr(image * 0 + 0.5, image * 0 + 0.6) == pytest.approx(20, abs=1e-3)
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image, 1 - image) < 0
    # Two constants: only the luminance term is left, (2ab + C1) / (a^2 + b^2 + C1).
    a, b = torch.full((1, 1, 16, 16), 0.4), torch.full((1, 1, 16, 16), 0.8)
    assert ssim(a, b) == pytest.approx((2 * 0.32 + 1e-4) / (0.16 + 0.64 + 1e-4), rel=1e-4)
