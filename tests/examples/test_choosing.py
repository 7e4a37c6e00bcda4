"""The page on choosing a policy: its figures, what it concludes from them, and its script."""

import json
import math
import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import adopt, seeded
from scripts import EXAMPLES, load
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from zoo import SequentialDiT

import fxcache
from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import load_denoiser, sample

PAGE = (EXAMPLES.parent / "docs" / "policies.md").read_text()
RESULTS = json.loads((EXAMPLES / "results" / "choosing.json").read_text())
SECTIONS = ("policies", "threshold", "few_steps", "ancestral")
HEAD = "| policy | setting | hits/steps | blocks computed | PSNR (worst), dB | median metric |"
PNG = b"\x89PNG"


@dataclass
class Output:
    sample: torch.Tensor


class Small(SequentialDiT):
    """Stands in for the demo's model, with random weights: what it captures is captured often."""

    config = SimpleNamespace(in_channels=3, sample_size=8, num_embeds_ada_norm=4)

    def __init__(self):
        super().__init__(depth=2)
        self.transformer_blocks, self.labels = self.blocks, nn.Embedding(5, 16)
        self.embed, self.out = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x, timestep, class_labels):
        known = self.time(timestep[:, None] / 1000) + self.labels(class_labels)
        h = self.embed(pixel_unshuffle(x, 2).flatten(2).mT) + known[:, None]
        patches = self.out(self.norm(self.stack(h))).mT.unflatten(2, (4, 4))
        return Output(pixel_shuffle(patches, 2))


@pytest.fixture
def script(monkeypatch):
    module, model = load("choosing_a_policy"), seeded(Small)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    monkeypatch.setattr(module, "load_denoiser", lambda: (model, tuple("abcd")))
    return module


def tables(text):
    """The tables of a page, as lists of lines."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


# --- the page and its figures ---


def test_the_table_is_what_the_script_printed():
    line = load("choosing_a_policy").line
    (printed,) = (rows[2:] for rows in tables(PAGE) if rows[0] == HEAD)
    assert printed == [line(row) for row in RESULTS["policies"]]
    assert RESULTS["settings"] == {"images": 24, "steps": 30}


def test_the_forecasters_are_those_of_the_frontier():
    figure = load("frontier_figure")
    rows = json.loads((EXAMPLES / "results" / "frontier.json").read_text())["rows"]
    expected = {}
    for text in figure.forecasters(rows, 0.01):
        name, values = re.fullmatch(r".*, fxcache (\w+): (.*)", text).groups()
        expected[f"`{name}`"] = dict(re.findall(r"([\w()]+) ([\d.]+)", values))
    (head, _, *lines), *_ = (rows for rows in tables(PAGE) if rows[0].startswith("| at 2x"))
    names = [name.strip(" `") for name in head.strip("|").split("|")][1:]
    for text in lines:
        policy, *cells = (cell.strip() for cell in text.strip("|").split("|"))
        assert dict(zip(names, cells, strict=True)) == expected.pop(policy)
    assert not expected


def section(title):
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return " ".join(text.split())


def row_of(part, policy, setting):
    (row,) = (r for r in RESULTS[part] if (r["policy"], r["setting"]) == (policy, setting))
    return row


def test_the_figures_of_the_text_are_those_of_the_script():
    every = row_of("threshold", "FirstBlockCache", "threshold=0, Reuse")
    few, noisy = (row_of(p, "FirstBlockCache", "threshold=0.08, Reuse") for p in SECTIONS[2:])
    fewer, taylor = RESULTS["few_steps"][-1], row_of("few_steps", "StepSchedule", "Taylor(1)")
    assert few["hits"] == noisy["hits"] == 0
    assert section("Few steps").startswith(
        f"With {few['steps']} steps instead of {every['steps']}, the median residual diff is "
        f"{few['metric']:.3f} instead of {every['metric']:.3f}: the published threshold never "
        f"hits. Every 2nd step with `Taylor(1)` is at {taylor['psnr']:.1f} dB, and simply taking "
        f"{fewer['steps']} steps at {fewer['psnr']:.1f} dB"
    )
    schedules = [
        row_of(part, policy, forecast)["psnr"]
        for part, policy in (("ancestral", "StepSchedule"), ("policies", "every 2nd step"))
        for forecast in ("Reuse", "Taylor(1)")
    ]
    quoted = re.findall(r"([\d.]+) dB", section("Samplers that add noise"))
    assert quoted == [f"{value:.1f}" for value in schedules]


def rows_of(policy):
    return [row for row in RESULTS["policies"] if row["policy"] == policy]


def test_what_the_page_concludes_is_in_the_figures():
    (tuned,), (fewer,) = rows_of("tune"), rows_of("fewer steps")
    others = [row for row in RESULTS["policies"] if row not in (tuned, fewer)]
    assert tuned["worst"] > 2 + max(row["worst"] for row in others)
    assert tuned["psnr"] > max(row["psnr"] for row in others) + 1
    assert "sampling 11 times" in tuned["setting"]
    assert "It samples 11 times" in " ".join(PAGE.split())
    assert all(abs(row["hits"] - 15) <= 1 for row in others)  # the advice of the log holds
    reusing = [row for row in others if row["setting"].endswith("Reuse")]
    assert all(abs(row["psnr"] - fewer["psnr"]) < 4 for row in reusing)
    assert row_of("policies", "every 2nd step", "Taylor(1)")["worst"] < fewer["worst"]
    for name in ("FirstBlockCache", "MagCache", "EasyCache", "TeaCache", "SeaCache"):
        own, advised = rows_of(name)
        assert own["psnr"] + 1 < advised["psnr"], name
        assert 6 < advised["psnr"] - fewer["psnr"] < 16 or name == "FirstBlockCache"


def test_what_the_page_says_of_thresholds_is_in_the_figures():
    *plain, reused, forecast = RESULTS["threshold"]
    by_threshold = {row["setting"].split(",")[0]: row for row in plain}
    assert by_threshold["threshold=0"]["hits"] == 0
    assert by_threshold["threshold=0.05"]["hits"] == 6
    assert reused["hits"] == forecast["hits"] == by_threshold["threshold=0.12"]["hits"]
    assert by_threshold["threshold=0.12"]["psnr"] + 10 < reused["psnr"] < forecast["psnr"]


def test_memory_is_as_the_page_says():
    """In residuals: MagCache keeps one."""
    (one, two), (probe, _) = map(rows_of, ("MagCache", "FirstBlockCache"))
    residual, (easy, _) = one["cached_bytes"], rows_of("EasyCache")
    config = load_denoiser()[0].config
    inputs = RESULTS["settings"]["images"] * 2 * config.in_channels * config.sample_size**2 * 4
    assert two["cached_bytes"] == probe["cached_bytes"] == 2 * residual
    assert rows_of("TeaCache")[0]["cached_bytes"] == 2 * residual
    assert rows_of("SeaCache")[0]["cached_bytes"] == 2 * residual + inputs  # Taylor(1)
    assert easy["cached_bytes"] == pytest.approx(4 * inputs, rel=1e-3)
    assert rows_of("every 2nd step")[0]["cached_bytes"] == residual


# --- its code and its messages ---


def test_reasons_and_messages_are_those_of_the_library():
    files = (EXAMPLES.parent / "fxcache").rglob("*.py")
    source = "".join(" ".join(re.sub(r'"\n\s*f?"', "", file.read_text()).split()) for file in files)
    (reasons,) = (rows[2:] for rows in tables(PAGE) if rows[0].startswith("| reason |"))
    quoted = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in reasons))
    assert len(quoted) > 10
    for reason in quoted:
        assert f'"{reason}"' in source, reason
    messages = re.findall(r"(?<!\*)\*([a-z ]+)\*", section("Reading the report"))
    assert len(messages) == 4
    for message in messages:
        assert message in source, message


class FluxPipeline:
    """Stands in for a pipeline of diffusers; 8 steps are enough, whatever it is asked."""

    def __init__(self, model):
        self.transformer = model
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.config = {"guidance_embeds": True}

    @torch.no_grad()
    def __call__(self, prompt, *, num_inference_steps, generator=None):
        assert num_inference_steps == 30
        self.scheduler.set_timesteps(8)
        x = torch.randn(2, 3, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(x, timestep=t.expand(2), class_labels=torch.arange(2))
            x = self.scheduler.step(velocity.sample, t, x).prev_sample
        return SimpleNamespace(images=x.clamp(-1, 1) / 2 + 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MagCache of 'flux-dev, magcache' was made for")
def test_the_code_of_the_page_runs(script, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("apply", "transform"):  # its code compiles with Inductor, which takes minutes
        plain = getattr(fxcache, name)
        monkeypatch.setattr(fxcache, name, lambda *a, plain=plain: plain(*a, backend="eager"))
    model, labels = load_denoiser()[0], torch.arange(8)

    def sample_once(denoiser):
        return sample(denoiser, labels, steps=30, seed=0)

    pipe = FluxPipeline(script.load_denoiser()[0])
    names = {"fxcache": fxcache, "torch": torch, "pipe": pipe, "prompts": ["a", "b"],
             "model": model, "sample": sample_once}  # fmt: skip
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    default, tuned, measured, limited = blocks
    exec(textwrap.dedent(default), names)
    assert names["handle"].policy == fxcache.AdaptiveCache()
    assert "miss" in capsys.readouterr().out
    exec(textwrap.dedent(tuned), names)
    assert names["handle"].policy == names["result"].policy
    assert names["result"].point.speedup >= 2
    assert fxcache.load_schedule("schedule.json") == names["result"].policy
    caplog.clear()
    exec(textwrap.dedent(measured), names)
    assert Path("residual_diff.png").read_bytes().startswith(PNG)
    check_quoted_message(caplog.text)
    exec(textwrap.dedent(limited), names)
    with names["denoiser"].trajectory(num_steps=30):
        sample_once(names["denoiser"])
        check_quoted_report(str(names["denoiser"].report()))


def numbers_apart(text):
    """`text` without its numbers, and they."""
    pattern = r"\d+(?:\.\d+)?"
    return re.sub(pattern, "#", " ".join(text.split())), [*map(float, re.findall(pattern, text))]


def check_quoted_message(log):
    """The message is what fxcache says, with about these numbers."""
    (quoted,) = re.findall(r"`(FirstBlockCache\(threshold=0\) never hit [^`]*)`", PAGE)
    words, numbers = numbers_apart(quoted)
    said, found = numbers_apart(next(row for row in log.splitlines() if "never hit" in row))
    assert words in said
    assert found[-len(numbers) :] == pytest.approx(numbers, rel=0.02)


def check_quoted_report(report):
    """The excerpt's lines are lines of the report."""
    (excerpt,) = re.findall(r"^```\n(step .*?)```", PAGE, re.MULTILINE | re.DOTALL)
    quoted = [row for row in excerpt.splitlines() if row != "..."]
    lines = {numbers_apart(row)[1][0]: row for row in report.splitlines()[1:]}
    assert quoted[0] == report.splitlines()[0]
    for row in quoted[1:]:
        words, numbers = numbers_apart(row)
        said, found = numbers_apart(lines[numbers[0]])
        assert said == words
        assert found == pytest.approx(numbers, rel=0.02, abs=2e-4)


# --- the script ---


@pytest.fixture
def few_captures(monkeypatch):
    """Policies that differ in numbers only follow each other in one denoiser, as in `tune`."""
    made, transform = {}, fxcache.transform

    def shared(model, policy, **options):
        key = policy.probe, policy.span, policy.forecast.ring
        if key not in made:
            made[key] = transform(model, policy, **options)
        return adopt(made[key], policy)

    monkeypatch.setattr(fxcache, "transform", shared)


@pytest.mark.slow
def test_the_script_writes_what_it_prints(script, few_captures, tmp_path, capsys):
    script.main(["--images", "2", "--steps", "8", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "choosing.json").read_text())
    rows = [row for section in SECTIONS for row in results[section]]
    printed = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert printed == [script.line(row) for row in rows]
    assert [len(results[section]) for section in SECTIONS] == [len(RESULTS[s]) for s in SECTIONS]
    for row in rows:
        is_uncached = row["policy"] == "fewer steps"
        skipped = 0.5 if row["policy"] == "FirstBlockCache" else 1.0  # one of two blocks
        whole = row["steps"] if not is_uncached else 2 * row["steps"]
        share = (row["steps"] - row["hits"] * skipped) / whole
        assert row["blocks"] == pytest.approx(share, abs=1e-4), row
        assert row["worst"] <= row["psnr"]
        assert is_uncached or row["cached_bytes"] > 0
    (tuned,) = (row for row in rows if row["policy"] == "tune")
    assert tuned["hits"] >= 4
    assert results["threshold"][0]["hits"] == 0
    assert [row["hits"] for row in results["ancestral"]][1:] == [4, 4]
    for name in ("choosing_policies.png", "choosing_threshold.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_a_row_is_measured(script):
    """Hits, PSNR and cost against pictures and evaluations of the test's own."""
    bench = script.Bench(3, 6)
    bench.try_out(fxcache.StepSchedule(mask=[False, False, True, True, False, True]))
    (row,), ((pictures, records, _),) = bench.rows, bench.drawn
    assert [r.is_hit for r in records] == [False, False, True, True, False, True]
    assert (row["hits"], row["steps"], row["blocks"], row["metric"]) == (3, 6, 0.5, None)
    uncached = sample(bench.model, bench.labels, steps=6, seed=script.SEED)
    each = [psnr(pictures[i : i + 1], uncached[i : i + 1]) for i in range(3)]
    assert row["psnr"] == pytest.approx(statistics.fmean(each), abs=0.006)
    assert row["worst"] == pytest.approx(min(each), abs=0.006)
    assert max(each) < 90
    bench.try_out(script.NEVER, "fewer steps", setting="uncached", steps=3)
    assert bench.rows[1] | {"psnr": 0, "worst": 0, "cached_bytes": 0} == {
        "policy": "fewer steps", "setting": "uncached", "hits": 0, "steps": 3, "blocks": 0.5,
        "psnr": 0, "worst": 0, "metric": None, "cached_bytes": 0,
    }  # fmt: skip


def test_the_advised_threshold_hits_half(script):
    bench = script.Bench(2, 12)
    found = bench.hitting_half(fxcache.FirstBlockCache(warmup_steps=2))
    assert 0 < found.threshold < math.inf
    hits = bench.sampled(found, 12, script.OTHER_SEED)[1].hits
    assert 4 <= hits <= 9  # random weights do not move evenly
    assert script.described(found) == f"threshold={found.threshold:.3g}, warmup_steps=2, Reuse"
