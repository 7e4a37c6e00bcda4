"""The benchmarks of examples/: what they compute from figures, and short runs of them."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from multiprocessing.connection import Connection
from threading import Thread
from types import SimpleNamespace

import diffusers
import pytest
import scripts
import torch
from opened import Small
from safetensors.torch import save_file
from torch import nn

import fxcache
from fxcache.runtime.device import CudaDevice


@pytest.fixture
def peers():
    return scripts.load("benchmark_peers")


@pytest.fixture
def compile_time():
    return scripts.load("benchmark_compile_time")


@pytest.fixture
def uncompiled(monkeypatch):
    """Nothing is compiled: that Inductor compiles such models is tested elsewhere."""
    transform, compiled = fxcache.transform, torch.compile

    def eager(model, policy, mode=None, **options):
        return transform(model, policy, **{"backend": "eager", **options})

    def as_it_is(model, **options):
        return compiled(model, **options) if "backend" in options else model

    monkeypatch.setattr(fxcache, "transform", eager)
    monkeypatch.setattr(torch, "compile", as_it_is)


class Flux(Small):
    """Stands in for diffusers' model of that name, which takes long to capture."""

    def __init__(self, num_layers, num_single_layers, in_channels, **_):
        super().__init__(depth=num_layers + num_single_layers)
        self.embed, self.out = nn.Linear(in_channels, 16), nn.Linear(16, in_channels)

    def forward(self, hidden_states, timestep, **_):
        return super().forward(hidden_states, timestep)


@pytest.fixture
def tiny(tmp_path):
    """A folder as train_demo.py writes it, with a model of two blocks."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
              "sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3,
              "num_embeds_ada_norm": 8}  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    names = {
        "_class_name": "DiTTransformer2DModel",
        "predict": "velocity",
        "classes": [*"abcdefgh"],
    }
    (folder / "config.json").write_text(json.dumps(config | names))
    save_file(diffusers.DiTTransformer2DModel(**config).state_dict(), folder / "model.safetensors")
    return folder


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
    with pytest.raises(FileNotFoundError, match="peers-"):
        peers.draw(tmp_path)
    (tmp_path / "peers-small.json").write_text(json.dumps(race_result))
    path = peers.draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_package_is_a_row_and_no_error(peers, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda name: None)
    rows = peers.race(["cache-dit eager"], "host-bound", 1, 1, 3)
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


# --- short runs ---


@pytest.mark.slow
def test_short_race_hits_where_it_must(peers, run_script, monkeypatch, tmp_path):
    """Of a contestant in a thread, in the place of a process of its own, and of one in this."""

    def process(target, args):
        pipe, *others = args  # of which the caller closes its copy
        return Thread(target=target, args=(Connection(os.dup(pipe.fileno())), *others))

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    arguments = ("--size", "host-bound", "--trajectories", 1, "--blocks", 6, "--output", tmp_path)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        printed = run_script("benchmark_peers", "--contestants", "fxcache eager", *arguments)
    result = json.loads((tmp_path / "peers-host-bound.json").read_text())
    ((name, ours),) = result["contestants"].items()
    assert name == "fxcache eager"
    assert result["versions"]["torch"] == torch.__version__
    assert ours["cached_bytes"] > 0
    theirs, _ = peers.get_ready("diffusers eager", "host-bound", 3)
    for row in (ours, theirs):
        assert row["status"] == "ok", printed
        assert row["hits"] == peers.HITS
        assert row["error"] < peers.TOLERANCE
    assert ours["loop_ms"]["p10"] > ours["hit_ms"]["p10"] > 0


@pytest.mark.slow
def test_short_compile_time_run(compile_time, uncompiled, run_script, monkeypatch, tmp_path):
    """Its processes are run in this one: each is given a cache, the warm one that of the cold."""
    caches = []

    def in_this_process(command, env, **_):
        assert command[:2] == [sys.executable, compile_time.__file__]
        caches.append(env["TORCHINDUCTOR_CACHE_DIR"])
        said = run_script("benchmark_compile_time", *command[2:])
        return SimpleNamespace(returncode=0, stdout=said, stderr="")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(compile_time.overhead, "FluxTransformer2DModel", Flux)
    names = ("fxcache", "torch.compile")
    arguments = ("--blocks", 3, "--contestants", ",".join(names), "--calls", 3)
    printed = run_script("benchmark_compile_time", *arguments, "--output", tmp_path)
    ours, plain = json.loads((tmp_path / "compile-time.json").read_text())["rows"]
    for row in (ours, plain):
        assert row["status"] == "ok"
        assert row["cold"]["seconds"] > 0
        assert row["warm"]["seconds"] > 0
    assert ours["cold"]["hit_ms"]["p10"] > 0
    assert "hit_ms" not in plain["cold"]
    assert printed.count("| fxcache | 3 |") == printed.count("| torch.compile | 3 |") == 1
    cold, warm, other, _ = caches
    assert cold == warm != other


@pytest.mark.slow
def test_the_gpu_benchmark_can_be_tried_without_one(uncompiled, run_script, monkeypatch, tmp_path):
    """It checks by itself that each contestant hit, or missed, as its name says."""
    monkeypatch.setattr(CudaDevice, "read", CudaDevice.read)  # which it replaces
    gpu, cpu = scripts.load("benchmark_gpu"), torch.device("cpu")
    assert gpu.build(gpu.TINY, cpu)(**gpu.inputs(gpu.TINY, 16, 0, cpu)).sample.isfinite().all()
    monkeypatch.setattr(gpu, "FluxTransformer2DModel", Flux)
    path = tmp_path / "gpu.json"
    options = ("--tiny", "--sizes", "512px", "--repeats", 2, "--output", path)
    printed = run_script("benchmark_gpu", *options)
    figures = json.loads(path.read_text())["evaluations"]["512px"]
    assert figures["scheduled hit, graphs"]["ms_median"] > 0
    assert {name.split(",")[0] for name in figures} == {
        "uncached", "floor", "miss", "hit", "scheduled hit"
    }  # fmt: skip
    assert "miss, graphs / uncached: " in printed


@pytest.mark.slow
def test_the_overhead_is_measured(run_script, monkeypatch, tmp_path):
    """As the README says, but uncompiled; it checks hits and recompiles by itself."""
    overhead, path = scripts.load("benchmark_overhead"), tmp_path / "overhead.json"
    monkeypatch.setattr(overhead, "FluxTransformer2DModel", Flux)
    options = ("--backend", "eager", "--blocks", 2, "--calls", 3, "--whole", "--output", path)
    printed = run_script("benchmark_overhead", *options)
    assert re.search(r"^miss / uncached +[\d.]+ median", printed, re.MULTILINE)
    assert re.search(r"^hit, guards a trajectory / floor", printed, re.MULTILINE)
    result = json.loads(path.read_text())
    assert len(result["ratios"]) == len(result["ms"]) - 2 == 8


@pytest.mark.slow
def test_the_frontier_is_measured_and_drawn(run_script, tiny, tmp_path):
    path, task = tiny / "config.json", scripts.load("frontier_measure").Task(8, model=tiny)
    flow = task.sample(task.load(), torch.arange(2), seed=0)
    path.write_text(path.read_text().replace("velocity", "epsilon"))
    task = scripts.load("frontier_measure").Task(8, model=tiny)
    assert not torch.equal(flow, task.sample(task.load(), torch.arange(2), seed=0))  # by DDIM
    assert 0 < task.noise_share(torch.tensor(1)) < 0.1 < 0.9 < task.noise_share(torch.tensor(990))
    script = ["benchmark_frontier", "--images", 2, "--seeds", 0, "--steps", 8, "--model", tiny]
    few = ["--screening-images", 2, "--output", tmp_path]
    printed = run_script(*script, *few, "--contestants", "fxcache tune:^3 computed")
    rows = json.loads((tmp_path / "frontier.json").read_text())["rows"]
    assert {row.get("status", "ok") for row in rows} <= {"ok", "no hits: every block was computed"}
    measured = [row for row in rows if "psnr" in row]
    assert {row["method"] for row in measured} >= {"fxcache tune"}
    assert all(0 < row["share"] <= 1 and row["speedup"] >= 1 for row in measured)
    assert "fxcache tune" in printed
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_tolerance_is_measured(run_script, monkeypatch):
    monkeypatch.setattr(scripts.load("benchmark_adaptive"), "load_denoiser", scripts.shallow)
    options = ("--steps", 8, "--tolerances", 0, 0.3, "--batches", 1)
    exact, loose = run_script("benchmark_adaptive", *options).strip().splitlines()[-2:]
    assert "1.00x 100.0 dB" in exact
    assert "8 plain steps 100.0 dB" in exact
    assert float(re.search(r": ([\d.]+)x", loose)[1]) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of what it copies
def test_export_and_run(run_script, monkeypatch, tmp_path):
    """The package runs in a process that has neither this library nor the model's code."""
    monkeypatch.setattr("fxcache.demo.sampler.load_denoiser", scripts.shallow)
    options = ("--steps", 12, "--tolerance", 0.2, "--output", tmp_path)
    with scripts.compiled_fast():
        printed = run_script("export_and_run", *options)
    hits, quality = map(float, re.search(r"(\d+) of 12 .*; ([0-9.]+) dB", printed).groups())
    assert hits > 0
    assert quality > 35
