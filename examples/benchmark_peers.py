"""The race: fxcache against diffusers' First Block Cache and cache-dit, same model and steps.

Each contestant has a process of its own (some patch globally), all are alive at the same time, and
the parent hands out turns: one trajectory each, in an order shuffled every round, so that a noisy
machine is noisy for all. Everybody gets the same latents, which jump at 11 steps and hardly move at
9, and the same threshold far from both; a contestant that did not hit at exactly those 9 steps, or
whose outputs differ from those of an independent reference, is reported as failed.

    python examples/benchmark_peers.py --size all --trajectories 30
    python examples/benchmark_peers.py --contestants "fxcache eager,diffusers eager"
    python examples/benchmark_peers.py --draw  # the picture again, from the JSON files

Needs diffusers (for the model); cache-dit takes part where it is installed (``pip install
cache-dit``). Every call is made inside ``cache_context``, as diffusers' pipelines do. A loop is
what a pipeline pays a trajectory: forgetting the last one, and 20 steps.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import benchmark_overhead as overhead
import contestants as field
import torch
from contestants import CONTESTANTS, HITS, PATTERN, Contestant

SIZES = ("host-bound", "small", "compute-bound")
TOLERANCE = 1e-3
RESULTS = Path(__file__).parent / "results"
#: The picture's unit: bars are relative to this one.
BASELINE = "uncached compiled"


# --- in a contestant's process ---


@torch.no_grad()
def compete(pipe: Connection, name: str, size: str, blocks: int, threads: int) -> None:
    """A contestant's process: get ready, then run a trajectory whenever the parent says so."""
    try:
        torch.set_num_threads(threads)
        # The limits that cache-dit recommends, for all: hooked blocks recompile more than 8 times.
        torch._dynamo.config.recompile_limit = 96
        torch._dynamo.config.accumulated_recompile_limit = 2048
        logging.disable(logging.WARNING)
        facts, contestant = get_ready(name, size, blocks)
        pipe.send(facts)
        while (number := pipe.recv()) is not None:
            steps = field.latents(size, number)
            for given in steps[:3]:  # until now the processor's caches belonged to others
                with contestant.call.cache_context("cond"):
                    contestant.call(**given)
            before = field.count_compiled()["graphs"]
            result = run_trajectory(contestant, steps)
            del result["outputs"]
            recompiles = field.count_compiled()["graphs"] - before
            pipe.send({**result, "recompiles": recompiles})
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
        pipe.send({"status": "failed: " + traceback.format_exc(limit=-2)})


def get_ready(name: str, size: str, blocks: int) -> tuple[dict[str, Any], Contestant]:
    """Build the contestant, warm it up until nothing more is compiled, and check what it gives."""
    make, how, _ = CONTESTANTS[name]
    model, steps = overhead.build(size, blocks), field.latents(size, 0)
    if make is field.uncached:
        expected = [model(**given).sample for given in steps]
    else:
        expected = field.reference(model, steps)
    contestant = make(model, how)
    start = time.perf_counter()
    for _ in range(6):
        before = field.count_compiled()
        result = run_trajectory(contestant, steps)
        if field.count_compiled() == before:
            break
    facts = {"status": "ok", "warm_up_s": time.perf_counter() - start, **field.count_compiled()}
    facts |= {"hits": result["hits"], "cached_bytes": result["bytes"]}
    facts["error"] = largest_error(result["outputs"], expected)
    facts |= field.count_regions(contestant, steps)
    if make is not field.uncached and result["hits"] != HITS:
        facts["status"] = "failed: other hits"
    elif not facts["error"] < TOLERANCE:
        facts["status"] = "failed: wrong outputs"
    return facts, contestant


def run_trajectory(contestant: Contestant, steps: list[Any]) -> dict[str, Any]:
    """Milliseconds of each step and of the whole, outputs, decisions, and bytes held at the end."""
    outputs, decisions, times = [], [], []
    gc.collect()
    gc.disable()  # as timeit does
    start = time.perf_counter()
    with contestant.trajectory():
        begin = time.perf_counter() - start
        for given in steps:
            start = time.perf_counter()
            with contestant.call.cache_context("cond"):
                output = contestant.call(**given)
            times.append((time.perf_counter() - start) * 1e3)
            outputs.append(output.sample)
            decisions.append(contestant.was_hit())
        held = field.held_bytes(contestant.state())
        start = time.perf_counter()
    end = time.perf_counter() - start
    gc.enable()
    loop = sum(times) + (begin + end) * 1e3
    return {"steps": times, "loop": loop, "outputs": outputs, "hits": decisions, "bytes": held}


def largest_error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest expected value of its step."""
    pairs = zip(outputs, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# --- in the parent ---


def race(
    names: list[str], size: str, trajectories: int, threads: int, blocks: int
) -> dict[str, Any]:
    """Run all contestants of one size, one trajectory a turn; the figures by name."""
    # No pool of compiler processes beside the contestants, and no threads but those asked for.
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    rows: dict[str, Any] = {}
    asks: dict[str, Callable[[int], dict[str, Any]]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            if version(CONTESTANTS[name][2]) is None:
                rows[name] = {"status": f"{CONTESTANTS[name][2]} is not installed"}
            else:
                rows[name], asks[name] = start_contestant(stack, name, size, blocks, threads)
            print(f"{size}: {name}: {rows[name]['status']}", flush=True)
        running = {name for name in names if rows[name]["status"] == "ok"}
        order = random.Random(0)
        for number in range(1, trajectories + 1):
            for name in order.sample(sorted(running), len(running)):
                answer = asks[name](number)
                if "status" not in answer and answer["hits"] != rows[name]["hits"]:
                    answer = {"status": f"failed: other hits in trajectory {number}"}
                if "status" in answer:
                    rows[name] |= answer
                    running.remove(name)
                else:
                    samples.setdefault(name, []).append(answer)
            print(f"{size}: trajectory {number} of {trajectories}", flush=True)
    for name in running:
        rows[name] |= summary(samples[name])
    return rows


def start_contestant(
    stack: contextlib.ExitStack, name: str, size: str, blocks: int, threads: int
) -> tuple[dict[str, Any], Callable[[int], dict[str, Any]]]:
    """Start a process, wait until it is ready, and return what it says and how to ask it."""
    # A disk cache of its own: nobody's warm-up profits from another's.
    cache = stack.enter_context(tempfile.TemporaryDirectory())
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=compete, args=(theirs, name, size, blocks, threads))
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(pipe.close)  # before the join: it ends when the pipe does

    def ask(number: int | None = None) -> dict[str, Any]:
        try:
            if number is not None:
                pipe.send(number)
            answer: dict[str, Any] = pipe.recv()
        except (EOFError, OSError):
            process.join()
            return {"status": f"failed: its process ended with code {process.exitcode}"}
        return answer

    return ask(), ask


def version(distribution: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and 10th percentiles over all trajectories of one contestant."""
    steps = [pair for s in samples for pair in zip(HITS, s["steps"], strict=True)]
    return {
        "recompiles": sum(s["recompiles"] for s in samples),
        "miss_ms": overhead.quantiles([ms for is_hit, ms in steps if not is_hit]),
        # Of those without a cache, the steps at which others hit.
        "hit_ms": overhead.quantiles([ms for is_hit, ms in steps if is_hit]),
        "loop_ms": overhead.quantiles([s["loop"] for s in samples]),
    }


def is_timed(row: dict[str, Any]) -> bool:
    return row["status"] == "ok" and "loop_ms" in row


# --- what it prints and draws ---


def table(result: dict[str, Any]) -> str:
    """One size as a Markdown table: 10th percentiles, medians in brackets."""
    rows = result["contestants"]
    timed = [row["loop_ms"] for row in rows.values() if is_timed(row)]
    best = {key: min((t[key] for t in timed), default=1.0) for key in ("p10", "median")}
    names = ["contestant", "miss ms", "hit ms", "loop ms", "loop / best", "breaks", "graphs"]
    names += ["regions a miss / hit", "recompiles", "warm-up s", "cached KiB", "error"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in rows.items():
        if not is_timed(row):
            lines.append(f"| {name} | {reason(row)} |" + " |" * (len(names) - 2))
            continue
        ratio = {key: row["loop_ms"][key] / best[key] for key in best}
        cached = row["cached_bytes"]
        cells = [name]
        cells += [pair(row[key]) for key in ("miss_ms", "hit_ms", "loop_ms")] + [pair(ratio)]
        cells += [str(row["graph_breaks"]), str(row["graphs"])]
        cells += [f"{row['regions_miss']} / {row['regions_hit']}", str(row["recompiles"])]
        cells += [f"{row['warm_up_s']:.1f}", "-" if cached is None else f"{cached / 1024:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.0e}"]) + " |")
    return "\n".join(lines)


def reason(row: dict[str, Any]) -> str:
    """Why there are no figures, in one line: of a traceback the last."""
    return str(row["status"]).strip().splitlines()[-1].replace("|", "/")


def pair(figures: dict[str, float]) -> str:
    return f"{figures['p10']:.2f} ({figures['median']:.2f})"


def draw(folder: Path) -> Path:
    """The picture of all sizes that `folder` has figures of; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = [path for size in SIZES if (path := folder / f"peers-{size}.json").exists()]
    if not paths:
        raise FileNotFoundError(f"no peers-<size>.json in {folder}")
    results = [json.loads(path.read_text()) for path in paths]
    order = [n for n in CONTESTANTS if any(n in result["contestants"] for result in results)]
    size = (1.6 + 3.7 * len(results), 1.4 + 0.5 * len(order))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, result in zip(axes, results, strict=True):
        draw_panel(panel, result, order)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].invert_yaxis()
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("fxcache") else "normal")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    path = folder / "peers.png"
    figure.savefig(path, dpi=130)
    return path


def draw_panel(panel: Any, result: dict[str, Any], order: list[str]) -> None:
    """Horizontal bars, three a contestant: its miss, its hit, its loop."""
    timed = {name: row for name, row in result["contestants"].items() if is_timed(row)}
    unit = BASELINE if BASELINE in timed else next(iter(timed), None)
    colors = {"miss": "#c44e52", "hit": "#55a868", "loop": "#4c72b0"}
    labels = {"loop": f"loop of {len(PATTERN)} steps, {sum(HITS)} of them hits"}
    for place, (what, color) in enumerate(colors.items()):
        places, widths = [], []
        for index, name in enumerate(order):
            if name not in timed or (what == "hit" and not any(timed[name]["hits"])):
                continue
            own, base = timed[name], timed[unit]
            # A hit takes the place of a call that would have computed: the baseline's miss.
            divisor = base["loop_ms"] if what == "loop" else base["miss_ms"]
            places.append(index + (place - 1) * 0.27)
            widths.append(own[f"{what}_ms"]["p10"] / divisor["p10"])
        label = labels.get(what, what)
        bars = panel.barh(places, widths, height=0.25, color=color, label=label)
        backdrop = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the line
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=7, bbox=backdrop)
    for index, name in enumerate(order):
        if name not in timed:
            row = result["contestants"].get(name, {"status": "not run"})
            panel.text(0.02, index, reason(row)[:45], fontsize=7, color="gray", va="center")
    panel.axvline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    panel.margins(x=0.14, y=0.01)
    panel.set_xlim(left=0)
    panel.set_title(f"{result['size']}, {result['threads']} thread(s)", fontsize=10)
    panel.set_xlabel(f"time relative to {unit}", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=(*SIZES, "all"), default="host-bound")
    parser.add_argument("--blocks", type=int, default=overhead.BLOCKS)
    parser.add_argument("--trajectories", type=int, default=30, help="of each contestant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--contestants", help="names with commas (default: all)")
    parser.add_argument("--draw", action="store_true", help="only draw, from the JSON files")
    args = parser.parse_args()
    names = args.contestants.split(",") if args.contestants else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"unknown contestants {sorted(unknown)}; there are {list(CONTESTANTS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "diffusers", "cache-dit", "fxcache")
    for size in () if args.draw else SIZES if args.size == "all" else (args.size,):
        result = {
            "size": size,
            "pattern": PATTERN,
            "trajectories": args.trajectories,
            "threads": args.threads,
            "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
            "contestants": race(names, size, args.trajectories, args.threads, args.blocks),
        }
        (args.output / f"peers-{size}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"\n{size}, {args.blocks} blocks, {args.threads} thread(s), {result['versions']}")
        print(table(result) + "\n", flush=True)
    if args.draw or version("matplotlib"):
        print(draw(args.output))


if __name__ == "__main__":
    main()
