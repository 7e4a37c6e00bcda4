"""Tables and picture of `benchmark_frontier.py`; imported by that script."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOW, HIGH = 1.3, 4.0
#: Ours, in the order in which they take part.
COLORS = ["#c5161d", "#1f5fb4", "#1a8a3a", "#e07b00", "#7b3fa0", "#00848c", "#b8357f", "#6b4a2b"]


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("status") == "ok"]


def front(rows: Iterable[Row], distance: str = "psnr", of: str = "mean") -> list[Row]:
    """The rows to which no other is preferable: none is as fast and as near. The slowest first."""
    sign = -1 if distance == "features" else 1
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (-r["speedup"], -sign * r[distance][of])):
        if not best or sign * row[distance][of] > sign * best[-1][distance][of]:
            best.append(row)
    return best[::-1]


def best_at(rows: Iterable[Row], speedup: float, tolerance: float) -> Row | None:
    """The row of the highest PSNR among those that are at least so fast."""
    fast = [row for row in rows if row["speedup"] >= speedup * (1 - tolerance)]
    return max(fast, key=lambda row: row["psnr"]["mean"], default=None)


def tables(rows: list[Row], targets: Sequence[float], tolerance: float) -> str:
    """PSNR by method and speedup, where a peer lies above fxcache, and what failed; Markdown."""
    good = measured(rows)
    methods = list(dict.fromkeys((row["kind"], row["method"]) for row in rows))
    order = ("baseline", "peer", "ours")
    methods.sort(key=lambda pair: order.index(pair[0]))
    head = ["PSNR, mean (worst), dB", *(f"{target:g}x" for target in targets)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for _, method in methods:
        own = [row for row in good if row["method"] == method]
        cells = [cell(best_at(own, target, tolerance)) for target in targets]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    lines += ["", *comparison(good, tolerance), *forecasters(rows, tolerance), *failures(rows)]
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    return "-" if row is None else f"{row['psnr']['mean']:.2f} ({row['psnr']['worst']:.1f})"


def comparison(good: list[Row], tolerance: float) -> list[str]:
    """The rivals' best points, each against ours at no higher cost."""
    ours = [row for row in good if row["kind"] == "ours"]
    rivals = [row for row in good if row["kind"] != "ours" and LOW <= row["speedup"] <= HIGH]
    lines = []
    for row in front(rivals):
        best = best_at(ours, row["speedup"], tolerance)
        verdict = "nothing of ours is as fast"
        if best is not None:
            margin, error = advantage(best, row)
            verdict = f"{margin:+.2f} +- {error:.2f} dB: {best['method']}, {best['setting']}"
        name = f"{row['method']}, {row['setting']}"
        lines.append(f"{row['speedup']:.2f}x {row['psnr']['mean']:.2f} dB {name}; ours {verdict}")
    return lines


def forecasters(rows: list[Row], tolerance: float, speedup: float = 2.0) -> list[str]:
    """By policy of ours, the best PSNR of each forecaster in the screening, at least so fast."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        screened = row.get("screening")
        if row["kind"] != "ours" or not screened:
            continue
        if screened["speedup"] >= speedup * (1 - tolerance):
            own = found.setdefault(row["method"], {})
            name, mean = row["setting"].split(",")[0], screened["psnr"]["mean"]
            own[name] = max(own.get(name, mean), mean)
    return [
        f"screening at {speedup:g}x, {method}: "
        + ", ".join(f"{name} {own[name]:.1f}" for name in sorted(own, key=own.get, reverse=True))  # type: ignore[arg-type]
        for method, own in found.items()
    ]


def advantage(row: Row, other: Row) -> tuple[float, float]:
    """By how many dB `row` is nearer than `other`, and the standard error over the pictures."""
    pairs = zip(row["psnr"]["each"], other["psnr"]["each"], strict=True)
    margins = [a - b for a, b in pairs]
    if len(margins) < 2:
        return margins[0], math.nan
    return statistics.fmean(margins), statistics.stdev(margins) / len(margins) ** 0.5


def failures(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row.get("status", "ok") != "ok"]
    return [f"{r['method']}, {r['setting']}: {r['status'].splitlines()[0]}" for r in failed]


def draw(rows: list[Row], path: Path) -> Path:
    """PSNR and the worst feature distance against the speedup."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = measured(rows)
    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    styles = line_styles(good)
    what = ("psnr", "mean", "PSNR, mean (dB)"), ("features", "worst", "feature distance, worst")
    for panel, (distance, of, label) in zip(panels, what, strict=True):
        for method, style in styles.items():
            own = [
                r for r in good if r["method"] == method and 0.9 * LOW < r["speedup"] < 1.15 * HIGH
            ]
            draw_method(panel, own, distance, of, style)
        panel.set(xscale="log", xlabel="speedup (1 / share of computed blocks)", title=label)
        panel.set_xlim(LOW * 0.96, HIGH * 1.05)
        ticks = (1.3, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)
        panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def line_styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each method; ours last, to be on top."""
    kinds = {row["method"]: row["kind"] for row in rows}
    by_kind = {k: [m for m in kinds if kinds[m] == k] for k in ("baseline", "peer", "ours")}
    styles: dict[str, dict[str, Any]] = {}
    for method in by_kind["baseline"]:
        styles[method] = {"color": "black", "linestyle": ":", "linewidth": 1.6, "marker": ""}
    for method, marker in zip(by_kind["peer"], "o^svDPX*<>" * 9, strict=False):
        grey = "0.45" if method.startswith("diffusers") else "0.65"
        line = "--" if method.startswith("diffusers") else "-."
        styles[method] = {"color": grey, "linestyle": line, "linewidth": 1.2, "marker": marker}
    for method, color in zip(by_kind["ours"], COLORS * 9, strict=False):
        styles[method] = {"color": color, "linestyle": "-", "linewidth": 2.2, "marker": ""}
    return styles


def draw_method(panel: Any, rows: list[Row], distance: str, of: str, style: dict[str, Any]) -> None:
    """All points of a method faintly, and its front as a line."""
    if not rows:
        return
    panel.scatter(
        [row["speedup"] for row in rows], [row[distance][of] for row in rows],
        s=12, color=style["color"], alpha=0.35, linewidths=0,
    )  # fmt: skip
    best = front(rows, distance, of)
    panel.plot(
        [row["speedup"] for row in best], [row[distance][of] for row in best],
        label=rows[0]["method"], markersize=5, **style,
    )  # fmt: skip
