"""``fxcache demo``: uncached, cached and with fewer steps, side by side.

The honest rival of a cache is the same sampler with fewer steps at the same cost; each setting is
printed next to its rival, and says whether it wins.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxcache.api import explain, transform
from fxcache.demo.metrics import psnr, ssim
from fxcache.demo.sampler import load_denoiser, trajectory, tuned_schedule
from fxcache.policy import AdaptiveCache, FirstBlockCache, Forecast, Policy, Reuse, Taylor

IMAGES = 32
#: A compiler works in the first round.
ROUNDS = 2
#: The residual diff is largest over the first steps, where every cache does most harm.
WARMUP_STEPS = 5
#: The setting whose errors are plotted.
DEFAULT = "adaptive (default)"


@dataclass
class Run:
    """One way to sample, and what came of it. `cost` is its share of the uncached FLOPs."""

    name: str
    denoiser: Any
    steps: int
    hits: int = 0
    cost: float = 1.0
    seconds: list[float] = field(default_factory=list)
    pictures: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    psnr: float = 0.0
    ssim: float = 0.0

    def speedup(self, base: "Run") -> float:
        """Against `base`, the median over rounds of the ratio within a round. Fewer steps of the
        same model are as much faster as they are fewer.
        """
        if self.denoiser is base.denoiser:
            return base.steps / self.steps
        pairs = zip(base.seconds, self.seconds, strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def settings(threshold: float, steps: int) -> dict[str, Policy]:
    """The settings that are shown: the default, what older tools do, without and with a forecast,
    and, where its number of steps is sampled, the schedule that was tuned for this model (with
    other seeds).
    """

    def policy(forecast: Forecast, in_a_row: int) -> FirstBlockCache:
        return FirstBlockCache(
            threshold=threshold,
            forecast=forecast,
            warmup_steps=WARMUP_STEPS,
            max_consecutive_hits=in_a_row,
        )

    shown: dict[str, Policy] = {
        DEFAULT: AdaptiveCache(),
        "First Block, reuse": policy(Reuse(), 2),
        "First Block, Taylor": policy(Taylor(order=1), 1),
    }
    tuned = tuned_schedule()
    return {**shown, "tuned schedule": tuned} if len(tuned.mask) == steps else shown


def run_demo(
    *,
    steps: int = 30,
    threshold: float = 0.2,
    seed: int = 0,
    output: Path = Path("fxcache_demo"),
    backend: str = "eager",
    write: Callable[[str], object] = print,
) -> Path:
    """Sample, compare, print a table and write ``comparison.png`` and ``errors.png``.

    Args:
        steps: sampler steps of the uncached run, at least 8.
        threshold: of First Block Cache, in its two settings.
        seed: of the initial noise.
        output: folder for the pictures, made if it is not there.
        backend: what compiles the pieces; "inductor" takes about a minute more to compile.
        write: gets the table's lines.

    Returns:
        The folder.
    """
    from tqdm import tqdm

    model, classes = load_denoiser()
    labels = torch.arange(IMAGES) % len(classes)
    inputs = {"timestep": torch.ones(2), "class_labels": labels[:2]}
    policies = settings(threshold, steps)
    skipped = {}  # equal spans skip as much
    for span, policy in {policy.span: policy for policy in policies.values()}.items():
        found = explain(model, torch.randn(2, 3, 32, 32), policy=policy, **inputs)
        skipped[span] = found.skipped_share
    cached = [
        Run(name, transform(model, policy, backend=backend, audit=False), steps)
        for name, policy in policies.items()
    ]
    plain = model if backend == "eager" else torch.compile(model, backend=backend)
    base = Run("uncached", plain, steps)

    # The sampler's own calls are what is captured, and that is no part of a trajectory's cost.
    for run in cached:
        next(trajectory(run.denoiser, labels, steps=steps, seed=seed))
        run.denoiser.reset()

    rounds = 1 if backend == "eager" else ROUNDS
    with tqdm(total=rounds * steps * (1 + len(cached)), desc="sampling", unit="step") as bar:
        for _ in range(rounds):
            take_turns([base, *cached], labels, seed, bar.update)
        for run in cached:  # which rival is fair depends on the hits
            run.hits = sum(record.is_hit for record in run.denoiser.report().records[-steps:])
            run.cost = 1 - run.hits / steps * skipped[run.denoiser.policy.span]
        rivals = [Run("", plain, max(1, round(run.cost * steps))) for run in cached]
        bar.total += sum(run.steps for run in rivals)
        take_turns(rivals, labels, seed, bar.update)
    runs = [base, *cached, *rivals]
    for run in runs[1:]:
        run.psnr, run.ssim = psnr(run.pictures, base.pictures), ssim(run.pictures, base.pictures)

    output.mkdir(parents=True, exist_ok=True)
    for line in table(base, cached, rivals):
        write(line)
    draw(base, cached, rivals, output / "comparison.png")
    default = next(run for run in cached if run.name == DEFAULT)
    default.denoiser.report().plot(output / "errors.png")
    write(f"pictures: {output / 'comparison.png'}, {output / 'errors.png'}")
    return output


def take_turns(
    runs: list[Run], labels: torch.Tensor, seed: int, on_step: Callable[[], object]
) -> None:
    """Sample all `runs` in lockstep, step by step, so that a noisy machine is unfair to none."""
    longest = max(run.steps for run in runs)
    paths = [trajectory(run.denoiser, labels, steps=run.steps, seed=seed) for run in runs]
    seconds, done = [0.0] * len(runs), [0] * len(runs)
    for tick in range(1, longest + 1):
        for i, run in enumerate(runs):
            while done[i] < round(tick * run.steps / longest):
                start = time.process_time()  # other programs may keep the machine busy
                run.pictures = next(paths[i])
                seconds[i] += time.process_time() - start
                done[i] += 1
                on_step()
    for run, spent in zip(runs, seconds, strict=True):
        run.seconds.append(spent)


def table(base: Run, cached: list[Run], rivals: list[Run]) -> list[str]:
    """The comparison as lines of text."""
    title = f"{IMAGES} pictures, {base.steps} steps, against the uncached run"
    head = (
        f"{'setting':<19} {'hits/steps':>10} {'speedup':>8} {'PSNR':>8} {'SSIM':>6}   "
        f"{'fewer steps':>11} {'speedup':>8} {'PSNR':>8} {'SSIM':>6}"
    )
    lines = [title, head, f"{base.name:<19} {f'0/{base.steps}':>10} {'1.00x':>8}"]
    for run, rival in zip(cached, rivals, strict=True):
        margin = run.psnr - rival.psnr
        verdict = f"wins by {margin:.1f} dB" if margin > 0 else f"loses by {-margin:.1f} dB"
        lines.append(
            f"{run.name:<19} {f'{run.hits}/{run.steps}':>10} {run.speedup(base):>7.2f}x "
            f"{run.psnr:>5.1f} dB {run.ssim:>6.3f}   {rival.steps:>11} "
            f"{rival.speedup(base):>7.2f}x {rival.psnr:>5.1f} dB {rival.ssim:>6.3f}   {verdict}"
        )
    return lines


def draw(base: Run, cached: list[Run], rivals: list[Run], path: Path, columns: int = 16) -> None:
    """The pictures of each run in a row, the best setting's rival below."""
    from matplotlib.figure import Figure

    best = max(range(len(cached)), key=lambda i: cached[i].psnr - rivals[i].psnr)
    rows = [("uncached", base)]
    rows += [(f"{run.name}\n{run.speedup(base):.2f}x, {run.psnr:.1f} dB", run) for run in cached]
    rival = rivals[best]
    rows.append((f"{rival.steps} steps\n{rival.speedup(base):.2f}x, {rival.psnr:.1f} dB", rival))
    figure = Figure(figsize=(columns * 0.72 + 1.5, len(rows) * 0.76), layout="constrained")
    for axes, (label, run) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        strip = torch.cat(list(run.pictures[:columns]), dim=2).permute(1, 2, 0)
        axes.imshow(strip.numpy(), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
