"""What tuning found: the chosen policy, the table of quality against cost, and its picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy import AdaptiveCache, StepSchedule
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.schedule_file import save_schedule


@dataclass(frozen=True)
class Point:
    """A policy and what was measured with it.

    `mask` says which steps were hits (with a tolerance: of the last seed); `speedup` is
    uncached FLOPs over cached FLOPs, `measured_speedup` the median ratio of seconds on this
    machine; the PSNR, in dB, is of samples against uncached ones, over `seeds`.
    """

    policy: StepSchedule | AdaptiveCache
    forecast: str
    computed_steps: int
    num_steps: int
    speedup: float
    measured_speedup: float
    psnr_mean: float
    psnr_min: float
    seeds: tuple[int, ...]
    mask: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite PSNR (equal samples, or numbers that are not) becomes None."""
        own = vars(self) | {"seeds": list(self.seeds), "mask": list(self.mask)}
        del own["policy"]
        for name in ("psnr_mean", "psnr_min"):
            own[name] = own[name] if math.isfinite(own[name]) else None
        return own


@dataclass(frozen=True)
class TuneResult:
    """The tuned policy, its measured point, and the frontier (by computed steps).

    The number of computed steps is guaranteed by a schedule, and follows from the trajectory with a
    tolerance. PSNR is what was measured with the seeds that are named; with others it will be
    another.
    """

    policy: StepSchedule | AdaptiveCache
    target: str
    point: Point
    frontier: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target": self.target,
            "chosen": self.point.to_dict(),
            "frontier": [point.to_dict() for point in self.frontier],
        }

    def __str__(self) -> str:
        lines = [
            f"{'computed':>8}  {'speedup':>7}  {'measured':>8}  {'PSNR mean':>9}  {'min':>6}  "
            f"forecast, schedule"
        ]
        for point in self.frontier:
            drawn = "".join("." if hit else "#" for hit in point.mask)
            chosen = " <- chosen" if point is self.point else ""
            lines.append(
                f"{point.computed_steps:>5}/{point.num_steps:<2}  {point.speedup:>6.2f}x  "
                f"{point.measured_speedup:>7.2f}x  {point.psnr_mean:>9.2f}  "
                f"{point.psnr_min:>6.2f}  {point.forecast}, {drawn}{chosen}"
            )
        seeds = ", ".join(map(str, self.point.seeds))
        if any(point.seeds != self.point.seeds for point in self.frontier):
            seeds += f" (the other rows with {self.point.seeds[0]})"
        promise = ", guaranteed by the schedule" * isinstance(self.policy, StepSchedule)
        lines.append(
            f"{self.target}. Speedup in FLOPs{promise}; PSNR in dB against the uncached "
            f"samples, measured with seeds {seeds}, not guaranteed for others."
        )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the schedule to `path` as JSON; `fxcache.load_schedule` reads it. Raises
        PolicyError for a tolerance, which is one number.
        """
        if not isinstance(self.policy, StepSchedule):
            tolerance = self.policy.tolerance
            raise PolicyError(
                f"there is no schedule to save: AdaptiveCache(tolerance={tolerance:g}) is all of it"
            )
        return save_schedule(self.policy, path)

    def plot(self, path: str | Path) -> Path:
        """Draw PSNR (mean and minimum) over speedup and write it to `path`.

        Needs matplotlib (``pip install "fxcache[demo]"``), raises ImportError without it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        points = [point for point in self.frontier if math.isfinite(point.psnr_mean)]
        costs = [point.speedup for point in points]
        means, least = [p.psnr_mean for p in points], [p.psnr_min for p in points]
        axes.plot(costs, means, "o-", color="tab:blue", label="mean")
        axes.fill_between(costs, least, means, color="tab:blue", alpha=0.15, label="to the minimum")
        if math.isfinite(self.point.psnr_mean):
            axes.scatter([self.point.speedup], [self.point.psnr_mean], s=120, zorder=3,
                         facecolors="none", edgecolors="tab:red", label="chosen")  # fmt: skip
        for point in points:
            axes.annotate(f"{point.computed_steps}", (point.speedup, point.psnr_mean),
                          textcoords="offset points", xytext=(4, 5), fontsize="small")  # fmt: skip
        axes.set(xlabel="speedup (FLOPs)", ylabel="PSNR to the uncached sample, dB",
                 title=f"{self.target}: {self.point.computed_steps} of {self.point.num_steps} "
                       f"steps computed")  # fmt: skip
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        return Path(path)


def check_target(targets: dict[str, Any]) -> str:
    """Raise PolicyError unless exactly one target is given, in its range; its name and value."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise PolicyError(f"exactly one of {', '.join(targets)} must be given, got {given or None}")
    ((name, value),) = given.items()
    if name == "max_computed_steps":
        check_integer(name, value, 1)
    else:
        intervals = {"tolerance": "[0.001, 10]", "target_speedup": "[1, 1000]"}
        check_number(name, value, intervals.get(name, "[0, 1000]"))
    return f"{name}={value}"
