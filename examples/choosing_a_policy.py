"""The figures and pictures of docs/policies.md, made with the demo's trained model.

Every policy where about half of the steps are hits (thresholds, tables and the schedule come from
other pictures), First Block Cache at growing thresholds, few steps, and an ancestral sampler.

    python examples/choosing_a_policy.py [--images 24] [--steps 30] [--output DIR]

Prints the rows of the page's tables; writes choosing.json, choosing_policies.png and
choosing_threshold.png. Takes about five minutes; needs diffusers, safetensors and matplotlib.
"""

import argparse
import functools
import json
import math
import statistics
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import custom_loop
import torch

import fxcache
from fxcache import AdamsBashforth, FirstBlockCache, Hermite, Reuse, StepSchedule, Taylor
from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import load_denoiser, sample
from fxcache.policy.simulate import halving_threshold

#: Of the pictures that are compared; of those that thresholds, tables and the schedule come from.
SEED, OTHER_SEED = 0, 100
SHOWN = 8
NEVER = StepSchedule(mask=[False])
ANCESTRAL = functools.partial(custom_loop.sample, name="ancestral")


class Bench:
    """The demo's denoiser with one sampler, and what policies do to its pictures."""

    def __init__(self, images: int, steps: int, by: Any = sample) -> None:
        self.model, classes = load_denoiser()
        self.labels, self.steps, self.by = torch.arange(images) % len(classes), steps, by
        self.uncached = by(self.model, labels=self.labels, steps=steps, seed=SEED)
        self.rows: list[dict[str, Any]] = []
        self.drawn: list[tuple[torch.Tensor, Any, Any]] = []  # pictures, records, policy

    def sampled(self, policy: Any, steps: int, seed: int = SEED) -> tuple[torch.Tensor, Any]:
        """Pictures and report, with the most that was held: at the end nothing is."""
        denoiser: Any = fxcache.transform(self.model, policy, backend="eager")
        labels = self.labels if seed == SEED else self.labels[:SHOWN]
        held: list[int] = []
        note = denoiser.register_forward_hook(
            lambda *_: held.append(denoiser.report().cached_bytes)
        )
        with denoiser.trajectory(num_steps=steps):
            pictures = self.by(denoiser, labels=labels, steps=steps, seed=seed)
        note.remove()
        return pictures, replace(denoiser.report(), cached_bytes=max(held))

    def try_out(self, policy: Any, name: str = "", **other: Any) -> None:
        """Note what `policy` does to the pictures and what it costs; `other` steps if given."""
        steps = other.get("steps", self.steps)
        pictures, report = self.sampled(policy, steps)
        each = [psnr(*pair) for pair in zip(pictures.split(1), self.uncached.split(1), strict=True)]
        metrics = [r.metric for r in report.records if r.metric is not None]
        skipped = 1 - policy.span.head_blocks / len(self.model.transformer_blocks)
        row = {
            "policy": name or type(policy).__name__,
            "setting": described(policy),
            "hits": round(report.hit_rate * steps),
            "steps": steps,
            "blocks": round((1 - report.hit_rate * skipped) * steps / self.steps, 4),
            "psnr": round(statistics.fmean(each), 2),
            "worst": round(min(each), 2),
            "metric": round(statistics.median(metrics), 4) if metrics else None,
            "cached_bytes": report.cached_bytes,
        }
        self.rows.append({**row, **other})
        self.drawn.append((pictures[:SHOWN], report.records, policy))
        print(line(self.rows[-1]), flush=True)

    def hitting_half(self, policy: Any) -> Any:
        """`policy` with the threshold that the log advises after a run that never hits."""
        report = self.sampled(replace(policy, threshold=0), self.steps, OTHER_SEED)[1]
        changes = [math.nan if r.metric is None else r.metric for r in report.records]
        found = halving_threshold(policy, changes, num_steps=self.steps, branch=None)
        return replace(policy, threshold=found or math.inf)


def described(policy: Any) -> str:
    """Its threshold, what else differs from its defaults (no tables), and its forecaster."""
    texts = []
    for own in fields(policy):
        value = getattr(policy, own.name)
        if isinstance(value, int | float) and (value != own.default or own.name == "threshold"):
            texts.append(f"{own.name}={value:.3g}")
    order = getattr(policy.forecast, "order", None)
    return ", ".join([*texts, type(policy.forecast).__name__ + (f"({order})" if order else "")])


def line(row: dict[str, Any]) -> str:
    """A row of the page's tables."""
    metric = "-" if row["metric"] is None else f"{row['metric']:.3f}"
    cost = [f"{row['hits']}/{row['steps']}", f"{row['blocks']:.0%}"]
    return "| " + " | ".join([row["policy"], row["setting"], *cost, near(row), metric]) + " |"


def near(row: dict[str, Any]) -> str:
    """Mean and worst PSNR."""
    return f"{row['psnr']:.1f} ({row['worst']:.1f})" if row["psnr"] < 99 else "identical"


def policies(bench: Bench) -> None:
    """Each policy with half of the steps hits, with its own forecaster and with the page's."""
    steps, warmup, seen = bench.steps, max(2, bench.steps // 5), list[int]()

    def run(denoiser: Any, seed: int) -> torch.Tensor:
        seen.append(seed)
        return sample(denoiser, bench.labels[:SHOWN], steps=steps, seed=OTHER_SEED + 1 + seed)

    learnt = functools.partial(fxcache.calibrate, bench.model, run, runs=1, progress=False)
    for policy, forecast in (
        (FirstBlockCache(warmup_steps=warmup), Hermite(order=1)),
        (learnt(policy=fxcache.MagCache).policy(), Hermite(order=1)),
        (fxcache.EasyCache(warmup_steps=warmup), AdamsBashforth(order=2)),
        (learnt(policy=fxcache.TeaCache).policy(warmup_steps=warmup), AdamsBashforth(order=2)),
        (fxcache.SeaCache(), AdamsBashforth(order=2)),
    ):
        found = bench.hitting_half(policy)
        bench.try_out(found)
        bench.try_out(replace(found, forecast=forecast))
    for own in (Reuse(), Taylor(order=1), Hermite(order=1)):
        bench.try_out(StepSchedule.every(2, num_steps=steps, forecast=own), "every 2nd step")
    seen.clear()
    budget: Any = {"max_computed_steps": steps // 2, "frontier": (), "progress": False}
    tuned = fxcache.tune(bench.model, run, **budget)
    bench.try_out(tuned.policy, "tune", setting=f"found by sampling {len(seen)} times")
    bench.try_out(NEVER, "fewer steps", setting="uncached", steps=steps // 2)


def thresholds(bench: Bench) -> None:
    """First Block Cache as published, and with limits."""
    for threshold in (0, 0.05, 0.08, 0.12, 0.2, 0.4):
        bench.try_out(FirstBlockCache(threshold=threshold))
    limits: Any = {"warmup_steps": bench.steps // 5, "max_consecutive_hits": 2}
    for forecast in (Reuse(), Hermite(order=1)):
        bench.try_out(FirstBlockCache(threshold=0.2, forecast=forecast, **limits))


def samplers(bench: Bench) -> None:
    """The published threshold and schedules."""
    every = StepSchedule.every(2, num_steps=bench.steps)
    for policy in (FirstBlockCache(), every, replace(every, forecast=Taylor(order=1))):
        bench.try_out(policy)
    if bench.by is sample:  # another number of steps is other noise where it is fresh
        bench.try_out(NEVER, "fewer steps", setting="uncached", steps=bench.steps // 2)


def draw(bench: Bench, path: Path, title: str) -> None:
    """Each row's pictures; beside them how far they are, or else what was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 0.85 * len(bench.rows) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    (first, note), *grid = figure.subplots(len(bench.rows) + 1, 2)
    uncached = bench.uncached[:SHOWN]
    show(first, uncached, "uncached")
    show(note, torch.ones_like(uncached))
    note.set_xlabel(title, fontsize=12)
    for (left, right), row, own in zip(grid, bench.rows, bench.drawn, strict=True):
        pictures, records, policy = own
        text = textwrap.fill(f"{row['policy']}: {row['setting']}", 36)
        text += f"\n{row['hits']}/{row['steps']} hits, {row['blocks']:.0%} of blocks, "
        show(left, pictures, text + near(row).replace(" (", " dB ("))
        if "difference" in title:
            show(right, 1 - 5 * (pictures - uncached).abs().amax(1, True).expand_as(uncached))
        else:
            colors = ["tab:green" if r.is_hit else "tab:red" for r in records]
            right.bar([r.step for r in records], [r.metric or 0 for r in records], color=colors)
            right.axhline(policy.threshold, color="black", linewidth=0.8)
            right.set(ylim=(0, 0.5), xlim=(-1, bench.steps), xticks=[])
    figure.savefig(path, dpi=100)


def show(axes: Any, pictures: torch.Tensor, text: str = "") -> None:
    """Pictures side by side."""
    strip = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=1.0).permute(2, 0, 3, 1)
    axes.imshow(strip.flatten(1, 2).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[], anchor="W")
    axes.spines[:].set_visible(False)
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more would wait for each other: the model is small
    args.output.mkdir(parents=True, exist_ok=True)
    few, fewest = min(args.images, SHOWN), max(4, 2 * round(args.steps / 8))
    results: dict[str, Any] = {"settings": {"images": args.images, "steps": args.steps}}
    results["versions"] = {"fxcache": fxcache.__version__, "torch": str(torch.__version__)}
    for name, part, bench, title in (
        ("policies", policies, Bench(args.images, args.steps), "difference to uncached, times 5"),
        ("threshold", thresholds, Bench(few, args.steps), "residual diff: hits green, misses red"),
        ("few_steps", samplers, Bench(few, fewest), ""),
        ("ancestral", samplers, Bench(few, args.steps, ANCESTRAL), ""),
    ):
        part(bench)
        results[name] = bench.rows
        if title:
            draw(bench, args.output / f"choosing_{name}.png", title)
    (args.output / "choosing.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
