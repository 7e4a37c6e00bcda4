"""The examples that bring their own sampling loop: they run, and print what is true."""

import re

import pytest
import scripts
import torch
from PIL import Image

from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import sample

# --- the k-diffusion loop ---


@pytest.fixture
def loop():
    return scripts.load("custom_loop")


def test_the_loop_runs_and_says_why_ancestral_sampling_never_hits(
    loop, run_script, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(loop, "load_denoiser", scripts.shallow)
    path = tmp_path / "grid.png"
    printed = run_script("custom_loop", "--steps", 16, "--images", 1, "--output", path)
    figures = re.findall(
        r"(\w+): PSNR to the uncached run ([\d.]+) dB\n +(\d+) hits, (\d+)", printed
    )
    assert [name for name, *_ in figures] == list(loop.SAMPLERS)
    hits = {name: int(number) for name, _, number, _ in figures}
    calls = {name: int(number) + int(misses) for name, _, number, misses in figures}
    near = {name: float(psnr) for name, psnr, *_ in figures}
    assert calls == {"euler": 32, "heun": 2 * (32 - 1), "ancestral": 32}
    assert hits["heun"] > hits["euler"] >= 4
    assert 30 < near["euler"] < 90
    assert 30 < near["heun"] < 90
    assert (hits["ancestral"], near["ancestral"]) == (0, 100)
    messages = [record.message for record in caplog.records]
    assert sum("never hit" in message for message in messages) == 1
    with Image.open(path) as picture:
        assert picture.size == (32, 6 * 32)


@pytest.mark.slow
def test_its_samplers_solve_one_equation_and_heun_is_of_second_order(loop):
    model, _ = loop.load_denoiser()
    labels = torch.tensor([0, 3])

    def solved(name, steps):
        return loop.sample(model, name, labels, steps, seed=0)

    exact = solved("heun", 20)
    coarse, fine, second = solved("euler", 10), solved("euler", 20), solved("heun", 10)
    near = [psnr(each, exact) for each in (coarse, fine, second)]
    assert near[0] + 1 < near[1] < near[2] - 3, near
    assert psnr(fine, sample(model, labels, steps=20, seed=0)) > 20  # the demo's own loop
    assert psnr(fine, sample(model, labels, steps=20, seed=1)) < 15


# --- a DiT by hand ---


@pytest.mark.slow
def test_the_dit_is_trained_and_sampled(run_script):
    """On a trained model forecasts win over fewer steps, and reuse alone loses."""
    printed = run_script(
        "flow_matching_dit", *["--backend", "eager", "--train-steps", "80", "--images", "16"]
    )
    assert float(re.search(r"trained 80 steps, loss ([\d.]+)", printed)[1]) < 0.8
    pattern = (
        r"(\w+): (\d+) of 30 steps are hits, (\d+)% of the blocks are computed: ([\d.]+)x; "
        r"PSNR to uncached ([\d.]+) dB \(plain sampling in (\d+) steps: ([\d.]+) dB\)"
    )
    rows = {name: list(map(float, row)) for name, *row in re.findall(pattern, printed)}
    assert list(rows) == ["reuse", "Taylor"]
    for hits, percent, speedup, near, fewer, rival in rows.values():
        share = 1 - hits / 30 * 5 / 6  # six blocks, of which the first always runs
        assert percent == pytest.approx(100 * share, abs=0.51)
        assert speedup == pytest.approx(1 / share, abs=0.006)
        assert share * 30 <= fewer < share * 30 + 1
        assert 3 <= hits < 30
        assert 15 < near < 90
        assert 15 < rival < 90
    assert rows["reuse"][3] < rows["reuse"][5]
    assert rows["Taylor"][3] > rows["Taylor"][5] + 3


def test_training_learns_and_pictures_are_discs():
    module = scripts.load("flow_matching_dit")
    torch.manual_seed(0)
    with torch.enable_grad():
        first, later = (module.train(module.DiT(depth=2), steps) for steps in (8, 80))
    assert later < 0.8 * first
    shown = module.pictures(16, torch.Generator().manual_seed(0))
    assert shown.shape == (16, module.TOKENS, module.CHANNELS)
    assert shown.abs().max() <= 1
    bright = (shown > 0).flatten(1).float().mean(1)
    assert ((bright > 0.02) & (bright < 0.6)).all()
