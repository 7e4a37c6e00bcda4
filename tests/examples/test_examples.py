"""The benchmarks of examples/: what they compute from figures, and short runs of them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("diffusers")


def load(name: str):
    """An example script as a module; examples/ is no package, and scripts import their siblings."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def peers():
    return load("benchmark_peers")


@pytest.fixture(scope="module")
def compile_time():
    return load("benchmark_compile_time")


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def timed_row(peers, loop: float, hits: list[bool]) -> dict:
    def figure(ms: float) -> dict[str, float]:
        return {"median": 1.1 * ms, "p10": ms}

    return {
        "status": "ok",
        "warm_up_s": 1.5,
        "graphs": 3,
        "graph_breaks": 2,
        "regions_miss": 12,
        "regions_hit": 1,
        "recompiles": 0,
        "hits": hits,
        "cached_bytes": 2048 if any(hits) else None,
        "error": 1e-7,
        "miss_ms": figure(loop / 15),
        "hit_ms": figure(loop / 60),
        "loop_ms": figure(loop),
    }


@pytest.fixture
def race_result(peers):
    rows = {
        "uncached compiled": timed_row(peers, 40.0, [False] * 20),
        "diffusers compiled": timed_row(peers, 30.0, peers.HITS),
        "cache-dit compiled": {"status": "cache-dit is not installed"},
        "diffusers eager": {"status": "failed: Traceback\n  File ...\nValueError: no\n"},
        "fxcache inductor": timed_row(peers, 20.0, peers.HITS),
    }
    return {"size": "small", "threads": 1, "contestants": rows}


def test_the_race_has_nine_hits_in_twenty_steps(peers):
    assert len(peers.HITS) == 20
    assert sum(peers.HITS) == 9
    assert not any(peers.HITS[:2])


def test_race_table_ranks_and_names_failures(peers, race_result):
    lines = peers.table(race_result).splitlines()
    assert len(lines) == 2 + len(race_result["contestants"])
    assert len({line.count("|") for line in lines}) == 1
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "1.00 (1.00)" in rows["fxcache inductor"]
    assert "1.50 (1.50)" in rows["diffusers compiled"]
    assert "2.0" in rows["fxcache inductor"].split("|")[-3]
    assert "not installed" in rows["cache-dit compiled"]
    assert "ValueError: no" in rows["diffusers eager"]


def test_race_summary_splits_misses_from_hits(peers):
    sample = {"steps": [1.0 if h else 5.0 for h in peers.HITS], "loop": 64.0, "recompiles": 1}
    row = peers.summary([sample, sample])
    assert row["miss_ms"] == {"median": 5.0, "p10": 5.0}
    assert row["hit_ms"] == {"median": 1.0, "p10": 1.0}
    assert row["loop_ms"]["median"] == 64.0
    assert row["recompiles"] == 2


def test_race_picture_needs_only_the_json_files(peers, race_result, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="peers-"):
        peers.draw(tmp_path)
    (tmp_path / "peers-small.json").write_text(json.dumps(race_result))
    path = peers.draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_package_is_a_row_and_no_error(peers, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda name: None)
    rows = peers.race(["cache-dit eager"], "host-bound", 1, 1)
    assert rows == {"cache-dit eager": {"status": "cache-dit is not installed"}}


def test_held_bytes_counts_each_storage_once(peers):
    tensor = torch.zeros(8, 4)
    state = {"a": [tensor, tensor[:1]], "b": (torch.zeros(2), None)}
    assert peers.field.held_bytes(state) == 8 * 4 * 4 + 2 * 4
    assert peers.field.held_bytes(None) is None
    assert peers.field.held_bytes(7) == 7


def test_reference_tells_a_cache_from_a_model_that_computes(peers):
    model = peers.overhead.build("host-bound", 3)
    steps = peers.field.latents("host-bound", 0)
    computed = [model(**given).sample for given in steps]
    cached = peers.field.reference(model, steps)
    for is_hit, a, b in zip(peers.HITS, computed, cached, strict=True):
        assert (peers.largest_error([a], [b]) > peers.TOLERANCE) == is_hit


def test_compile_time_parses_the_last_result(compile_time):
    assert compile_time.parse('noise\nRESULT {"a": 1}\nRESULT {"a": 2}\nmore\n') == {"a": 2}
    with pytest.raises(ValueError, match="no result"):
        compile_time.parse("noise")


def test_compile_time_table_has_growth_and_ratios(compile_time):
    call = {"median": 2.0, "p10": 1.0}
    rows = []
    for blocks, seconds in ((6, 10.0), (48, 20.0)):
        for name, factor in (("fxcache", 1.5), (compile_time.YARDSTICK, 1.0)):
            cold = {"seconds": factor * seconds, "call_ms": call}
            warm = {"seconds": seconds / 10}
            row = {"name": name, "blocks": blocks, "status": "ok", "cold": cold, "warm": warm}
            rows.append(row)
    rows.append({"name": "torch.compile", "blocks": 48, "status": "failed: no"})
    lines = compile_time.table(rows).splitlines()
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells == ["fxcache", "48", "30.00", "2.00", "0.07", "2.00", "1.50", "1.00 (2.00)", "-"]
    assert "failed: no" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_short_race_hits_where_it_must(peers, tmp_path):
    names = ["fxcache eager", "diffusers eager"]
    arguments = ("--size", "host-bound", "--trajectories", 1, "--contestants", ",".join(names))
    output = run_script("benchmark_peers.py", *arguments, "--output", tmp_path)
    result = json.loads((tmp_path / "peers-host-bound.json").read_text())
    rows = result["contestants"]
    assert list(rows) == names
    assert [row["status"] for row in rows.values()] == ["ok"] * 2, output
    assert rows["fxcache eager"]["hits"] == rows["diffusers eager"]["hits"] == peers.HITS
    assert all(row["error"] < peers.TOLERANCE for row in rows.values())
    assert rows["fxcache eager"]["cached_bytes"] > 0
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_short_compile_time_run(tmp_path):
    arguments = ("--blocks", 3, "--contestants", "fxcache", "--calls", 3, "--output", tmp_path)
    output = run_script("benchmark_compile_time.py", *arguments)
    (row,) = json.loads((tmp_path / "compile-time.json").read_text())["rows"]
    assert row["status"] == "ok", output
    assert row["cold"]["seconds"] > 0
    assert row["warm"]["seconds"] > 0
    assert row["cold"]["hit_ms"]["p10"] > 0


@pytest.mark.slow
def test_the_gpu_benchmark_can_be_tried_without_one(tmp_path):
    path = tmp_path / "gpu.json"
    options = ("--tiny", "--sizes", "512px", "--repeats", 2, "--output", path)
    run_script("benchmark_gpu.py", *options)
    result = json.loads(path.read_text())
    assert result["evaluations"]["512px"]["scheduled hit, graphs"]["ms_median"] > 0


@pytest.mark.slow
def test_the_frontier_is_measured_and_drawn(tmp_path):
    script = ["benchmark_frontier.py", "--images", 2, "--seeds", 0, "--steps", 8]
    few = ["--screening-images", 2, "--output", tmp_path]
    printed = run_script(*script, *few, "--contestants", "fxcache tune:^[36] computed")
    rows = json.loads((tmp_path / "frontier.json").read_text())["rows"]
    assert {row.get("status", "ok") for row in rows} <= {"ok", "no hits: every block was computed"}
    measured = [row for row in rows if "psnr" in row]
    assert {row["method"] for row in measured} >= {"fxcache tune"}
    assert all(0 < row["share"] <= 1 and row["speedup"] >= 1 for row in measured)
    assert "fxcache tune" in printed
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_tolerance_is_measured():
    options = ("--steps", 12, "--tolerances", 0, 0.3, "--batches", 1)
    exact, loose = run_script("benchmark_adaptive.py", *options).strip().splitlines()[-2:]
    assert "1.00x 100.0 dB" in exact
    assert "12 plain steps 100.0 dB" in exact
    assert float(re.search(r": ([\d.]+)x", loose)[1]) > 1
