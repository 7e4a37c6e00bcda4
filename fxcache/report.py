"""What happened: one record an evaluation, as a table, as JSON and as a picture."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One evaluation.

    `step` counts steps of the trajectory from 0; `timestep` is the model's time input (None if it
    has none); `metric` is the policy's (residual diff; None if nothing was measured); `reason` says
    why a miss was one; `score` is what was compared with the policy's threshold. With error
    control, `predicted` is the error that was expected of a forecast for this step (None: not known
    yet), and `error`, at a miss, the measured one, mean|p - r| / mean|r| (None: not measured). In
    reports of `fxcache.apply`, `component` is the pipeline's denoiser ("transformer", ...).
    """

    step: int
    branch: Hashable
    timestep: float | None
    metric: float | None
    is_hit: bool
    reason: str | None
    trajectory: int = 0
    slot: Hashable = None
    component: str | None = None
    score: float = 0.0
    predicted: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """The evaluations since the denoiser was made or reset (the last 10,000 of them).

    `cached_bytes` is the memory that the state holds now (`cached_by_device`: on which device how
    much), `graphs` the number of graphs compiled, `recompiles` those compiled after the first
    evaluation was through. `audit` is how well a hit followed a slightly moved sample, at worst: 0
    exactly, 1 as returning the old output would, None not tried. `advice` names a forecast that
    would have been nearer at the computed steps of the first trajectory, with both errors.
    """

    records: tuple[Record, ...]
    cached_bytes: int
    graphs: int
    recompiles: int
    cached_by_device: Mapping[str, int] = field(default_factory=dict)
    audit: float | None = None
    advice: str | None = None

    @classmethod
    def merged(cls, reports: Mapping[str, "Report"]) -> "Report":
        """One report of several denoisers, by component: trajectory by trajectory, step by step."""
        records = [
            replace(record, component=name)
            for name, report in reports.items()
            for record in report.records
        ]
        totals = [(r.cached_bytes, r.graphs, r.recompiles) for r in reports.values()]
        in_order = sorted(records, key=lambda record: (record.trajectory, record.step))
        devices = sum((Counter(r.cached_by_device) for r in reports.values()), Counter[str]())
        cached, graphs, recompiles = (sum(column) for column in zip(*totals, strict=True))
        audits = [report.audit for report in reports.values() if report.audit is not None]
        worst = max(audits, default=None)
        advice = [f"{name}: {r.advice}" for name, r in reports.items() if r.advice is not None]
        said = "; ".join(advice) or None
        return cls(tuple(in_order), cached, graphs, recompiles, dict(devices), worst, said)

    @property
    def hits(self) -> int:
        return sum(record.is_hit for record in self.records)

    @property
    def misses(self) -> int:
        return len(self.records) - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits a evaluation, 0 where there was none."""
        return self.hits / len(self.records) if self.records else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: NaN and infinite numbers become None, keys that are no text become text."""
        known = asdict(self)
        records = list(known.pop("records"))
        for entry in records:
            entry.update({k: str(entry[k]) for k in ("branch", "slot") if entry[k] is not None})
        for entry in (known, *records):
            numbers = [k for k, value in entry.items() if isinstance(value, float)]
            entry.update({k: None for k in numbers if not math.isfinite(entry[k])})
        totals = {"hits": self.hits, "misses": self.misses, "hit_rate": self.hit_rate}
        return {"records": records, **totals, **known}

    def __str__(self) -> str:
        columns = self._columns()
        names = " ".join(f"{name:>10}" for name in columns)
        lines = [f"{'step':>4}  {'branch':<10} {'timestep':>10} {names}  decision"]
        for r in self.records:
            timestep = "-" if r.timestep is None else f"{r.timestep:.4g}"
            values = (getattr(r, name) for name in columns)
            numbers = " ".join(f"{'-' if v is None else f'{v:.4f}':>10}" for v in values)
            decision = "hit" if r.is_hit else f"miss ({r.reason})"
            branch = "-" if r.branch is None else str(r.branch)
            lines.append(f"{r.step:>4}  {branch:<10} {timestep:>10} {numbers}  {decision}")
        if self.advice is not None:
            lines.append(self.advice)
        lines.append(
            f"{self.hits} hits, {self.misses} misses ({self.hit_rate:.0%}), "
            f"{_size(self.cached_bytes)} cached{self._places()}, {self.graphs} graph(s), "
            f"{self.recompiles} recompile(s)"
            + ("" if self.audit is None else f", audit {self.audit:.2f}")
        )
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        """Which numbers are known; the metric if none is."""
        names = ("metric", "predicted", "error")
        return [name for name in names if _points(self.records, name)[0]] or ["metric"]

    def _places(self) -> str:
        """How much is cached where, if that is not one device."""
        if len(self.cached_by_device) < 2:
            return ""
        places = (f"{_size(held)} on {name}" for name, held in self.cached_by_device.items())
        return f" ({', '.join(places)})"

    def plot(self, path: str | Path) -> Path:
        """Draw the metric over the steps, hits and misses marked, and write it to `path`. With
        error control, draw the predicted errors, and the measured ones as crosses.

        Needs matplotlib (``pip install "fxcache[demo]"``), raises ImportError without it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        columns = self._columns()
        drawn = next((name for name in ("predicted", "metric") if name in columns), "metric")
        branches = dict.fromkeys((r.slot, r.branch, r.trajectory) for r in self.records)
        for number, key in enumerate(branches):
            own = [r for r in self.records if (r.slot, r.branch, r.trajectory) == key]
            label = None if key[1] is None else str(key[1])
            axes.plot(*_points(own, drawn), color=f"C{number % 10}", alpha=0.5, label=label)
        for is_hit, marker, color in ((True, "o", "tab:green"), (False, "s", "tab:red")):
            own = [r for r in self.records if r.is_hit == is_hit]
            label = "hit" if is_hit else "miss"
            axes.scatter(
                *_points(own, drawn), s=22, marker=marker, color=color, zorder=3, label=label
            )
        if "error" in columns:
            steps, errors = _points(self.records, "error")
            axes.scatter(steps, errors, s=40, marker="x", color="black", zorder=4, label="measured")
            if any(0 < error < math.inf for error in errors):
                axes.set_yscale("log")
        name = "relative error" if drawn == "predicted" else "metric"
        axes.set(xlabel="step", ylabel=name,
                 title=f"{self.hits} hits, {self.misses} misses")  # fmt: skip
        axes.legend(fontsize="small", ncols=2)
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        return Path(path)


def _size(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"


def _points(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what the records hold by `name`."""
    pairs = [(r.step, getattr(r, name)) for r in records]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]
