"""Reports: records, JSON, table and picture."""

import json
import logging
import math

import pytest
import torch
from helpers import plain, seeded
from zoo import SequentialDiT, token_inputs

from fxcache import FirstBlockCache


@pytest.fixture(scope="module")
@torch.no_grad()
def report():
    denoiser, given = plain(seeded(SequentialDiT)), token_inputs()
    for t in (1.0, 0.9):
        for branch in ("cond", "uncond"):
            with denoiser.branch(branch):
                denoiser(given["x"], torch.full((2,), t))
    denoiser(given["x"] * math.nan, torch.full((2,), 0.8))
    return denoiser.report()


def test_counts(report):
    assert (report.hits, report.misses) == (2, 3)
    assert report.hit_rate == pytest.approx(0.4)
    assert (report.graphs, report.recompiles) == (1, 0)
    # Three branches, each a residual and a reference of 2 x 8 x 16 float32.
    assert report.cached_bytes == 3 * 2 * 2 * 8 * 16 * 4


def test_to_dict_is_json(report):
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["hits"] == 2
    assert {"step", "branch", "timestep", "metric", "is_hit", "reason"} <= set(data["records"][0])
    assert [r["branch"] for r in data["records"]] == ["cond", "uncond"] * 2 + [None]
    assert data["records"][0]["reason"] == "nothing cached"
    assert data["records"][2] == data["records"][2] | {"is_hit": True, "reason": None, "step": 1}
    assert data["records"][0]["metric"] is None


def test_the_table_names_every_evaluation(report):
    text = str(report)
    assert text.count("miss (nothing cached)") == 3
    assert "2 hits, 3 misses (40%)" in text


def test_plot_writes_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    path = report.plot(tmp_path / "diff.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_empty_report(denoiser):
    report = denoiser.report()
    assert (report.hits, report.misses, report.hit_rate) == (0, 0, 0.0)
    assert "0 hits" in str(report)


def test_metrics_are_residual_diffs(model):
    denoiser = plain(model, FirstBlockCache(threshold=1e-9))
    first, second = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    t = torch.ones(2)
    residuals = []
    for x in (first, second):
        denoiser(x, t)
        h = model.embed(x) + model.time(t[:, None])[:, None]
        residuals.append((model.blocks[0](h) - h).double())
    before, after = residuals
    expected = (after - before).abs().mean() / before.abs().mean()
    assert denoiser.report().records[1].metric == pytest.approx(float(expected), rel=1e-5)


def test_the_log_says_what_was_found(denoiser, caplog):
    with caplog.at_level(logging.INFO, "fxcache"):
        denoiser(**token_inputs())
    assert "blocks (4): a hit skips 74% of the work, 3 of 4 units" in caplog.text
