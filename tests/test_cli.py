"""The command line, and the parts of the demo."""

import re
import sys

import pytest
import torch

import fxcache
from fxcache.cli import main

pytest.importorskip("diffusers")


def test_explain(capsys):
    assert main(["explain", "--diffusers", "FluxTransformer2DModel"]) == 0
    out = capsys.readouterr().out
    assert "4 blocks in transformer_blocks (2) + single_transformer_blocks (2)" in out
    assert "a hit skips" in out


def test_explain_with_head_and_tail_blocks(capsys):
    arguments = ["--head-blocks", "2", "--tail-blocks", "1"]
    assert main(["explain", "--diffusers", "FluxTransformer2DModel", *arguments]) == 0
    assert "span   single_transformer_blocks.0 (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--diffusers", "NoSuchModel"], "no tiny config for 'NoSuchModel'"),
        (["explain", "--diffusers", "FluxTransformer2DModel", "--head-blocks", "9"], "at most 3"),
        (["explain", "--diffusers", "FluxTransformer2DModel", "--head-blocks", "0"], "at least 1"),
        (["demo", "--threshold", "-1"], "threshold must be a number in"),
        (["demo", "--backend", "nonsense"], "unknown backend"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo"]) == 2
    assert 'pip install "fxcache[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["demo", "--steps", "2"], [], ["dance"]])
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("steps", "threshold", "output", "seed"))


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fxcache.demo.run.IMAGES", 4)
    assert main(["demo", "--steps", "10", "--output", str(tmp_path), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "hits/steps" in out
    assert "fewer steps" in out
    assert len(re.findall(r"(wins|loses) by \d+\.\d dB$", out, re.MULTILINE)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"comparison.png", "errors.png"}


def test_the_demos_denoiser_is_trained():
    """It predicts the velocity of real data better than any constant: it was trained."""
    from fxcache.demo.sampler import load_denoiser, sample

    model, classes = load_denoiser()
    assert len(classes) == model.config.num_embeds_ada_norm
    flags = sample(model, torch.full((4,), classes.index("flag")), steps=12, seed=0)
    assert flags.shape == (4, 3, 32, 32)
    assert flags[:, :, :3].mean() > 0.95  # white above
    assert flags[:, :, 10:22, 4:28].std() > 0.15  # colours in the middle


def test_forecasting_wins_on_the_trained_model():
    """At the same hits, extrapolation is nearer to the uncached pictures than reuse."""
    from fxcache.demo.metrics import psnr
    from fxcache.demo.sampler import load_denoiser, sample

    model, _ = load_denoiser()
    labels = torch.arange(4)
    reference = sample(model, labels, steps=16, seed=0)
    quality, hits = {}, {}
    for forecast in (fxcache.Reuse(), fxcache.Taylor(order=1)):
        policy = fxcache.FirstBlockCache(
            threshold=0.5, warmup_steps=4, max_consecutive_hits=1, forecast=forecast
        )
        denoiser = fxcache.transform(model, policy, backend="eager")
        quality[type(forecast)] = psnr(sample(denoiser, labels, steps=16, seed=0), reference)
        hits[type(forecast)] = denoiser.report().hits
    assert hits[fxcache.Taylor] == hits[fxcache.Reuse] == 6
    assert quality[fxcache.Taylor] > quality[fxcache.Reuse] + 3


def test_metrics():
    from fxcache.demo.metrics import psnr, ssim

    torch.manual_seed(0)
    image = torch.rand(2, 3, 32, 32)
    assert psnr(image, image) == pytest.approx(100)
    assert psnr(image * 0 + 0.5, image * 0 + 0.6) == pytest.approx(20, abs=1e-3)
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image, 1 - image) < 0
    # Two constants: only the luminance term is left, (2ab + C1) / (a^2 + b^2 + C1).
    a, b = torch.full((1, 1, 16, 16), 0.4), torch.full((1, 1, 16, 16), 0.8)
    assert ssim(a, b) == pytest.approx((2 * 0.32 + 1e-4) / (0.16 + 0.64 + 1e-4), rel=1e-4)
