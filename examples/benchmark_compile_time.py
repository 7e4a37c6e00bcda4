"""Cold and warm compile times against the number of blocks, each run in a fresh process.

Cold: an empty cache directory; warm: another process with the directory that the cold one left.
Timed are the calls until every path is compiled: for fxcache a miss and a hit, for the others two
calls. Imports, building the model and what a process does once (looking for a C++ compiler, loading
Inductor) come before: every process first compiles a function of one line.

    python examples/benchmark_compile_time.py
    python examples/benchmark_compile_time.py --blocks 6,12 --contestants fxcache,torch.compile

A third of the blocks are double-stream. After that, some calls are timed (of fxcache: misses and
hits), to see what compiling the blocks once costs a call.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_overhead as overhead
import torch

import fxcache

RESULTS = Path(__file__).parent / "results"
#: Others are compared with this one.
YARDSTICK = "compile_repeated_blocks"
LAST_LINE = "RESULT "
ALWAYS = fxcache.FirstBlockCache(threshold=float("inf"))


def repeated_blocks(model: Any) -> Any:
    model.compile_repeated_blocks(fullgraph=True)
    return model


CONTESTANTS: dict[str, Callable[[Any], Any]] = {
    "fxcache": lambda model: fxcache.transform(model, ALWAYS),
    "fxcache whole": lambda model: fxcache.transform(model, ALWAYS, outline=False),
    "torch.compile": lambda model: torch.compile(model, fullgraph=True),
    YARDSTICK: repeated_blocks,
}


# --- in a fresh process ---


@torch.no_grad()
def compile_once(name: str, blocks: int, size: str, calls: int) -> dict[str, Any]:
    """Seconds until `name` has compiled everything, then milliseconds a call."""
    torch.compile(lambda x: x.sin() + 1)(torch.randn(8))
    model = CONTESTANTS[name](overhead.build(size, blocks))
    is_fxcache = name.startswith("fxcache")
    given = overhead.inputs(size, 0)
    with trajectory(model, is_fxcache):
        start = time.perf_counter()
        model(**given)
        first = time.perf_counter()
        model(**given)
        end = time.perf_counter()
    result = {"seconds": end - start, "first_call_s": first - start, "second_call_s": end - first}
    if is_fxcache and [r.is_hit for r in model.report().records] != [False, True]:
        raise RuntimeError(f"expected a miss and a hit:\n{model.report()}")
    times: dict[str, list[float]] = {"call_ms": [], "hit_ms": []}
    for _ in range(calls):
        with trajectory(model, is_fxcache):  # its first call is a miss, its second a hit
            for key in times:
                start = time.perf_counter()
                model(**given)
                times[key].append((time.perf_counter() - start) * 1e3)
    if not is_fxcache:
        times = {"call_ms": times["call_ms"] + times["hit_ms"]}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    figures = {key: overhead.quantiles(own) for key, own in times.items() if own}
    return {**result, "graphs": graphs, **figures}


def trajectory(model: Any, is_fxcache: bool) -> contextlib.AbstractContextManager[Any]:
    return model.trajectory() if is_fxcache else contextlib.nullcontext()


# --- in the parent ---


def run_child(name: str, blocks: int, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """What a fresh process finds with `cache` as its cache directory."""
    command = [sys.executable, __file__, "--child", name, "--blocks", str(blocks)]
    command += ["--size", args.size, "--threads", str(args.threads), "--calls", str(args.calls)]
    folders = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {blocks} blocks: the process failed\n{done.stderr}")
    return parse(done.stdout)


def parse(output: str) -> dict[str, Any]:
    """The result in what a child printed; other lines may be anything."""
    for line in reversed(output.splitlines()):
        if line.startswith(LAST_LINE):
            result: dict[str, Any] = json.loads(line.removeprefix(LAST_LINE))
            return result
    raise ValueError(f"no result in {output!r}")


def measure(name: str, blocks: int, args: argparse.Namespace) -> dict[str, Any]:
    """The run of `args.repeats` with the middle cold time, and the middle warm one.

    A run that failed does not end the others: its row has a status and no figures.
    """
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind, done in runs.items():
                try:
                    done.append(run_child(name, blocks, args, cache))
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    status = f"failed: {str(error).strip().splitlines()[-1]}"
                    return {"name": name, "blocks": blocks, "status": status}
                print(f"{name}, {blocks} blocks, {kind} {repeat + 1} of {args.repeats}: "
                      f"{done[-1]['seconds']:.2f} s", flush=True)  # fmt: skip
    by_time = {k: sorted(done, key=lambda r: r["seconds"]) for k, done in runs.items()}
    middle = {kind: done[len(done) // 2] for kind, done in by_time.items()}
    seconds = {kind: [run["seconds"] for run in done] for kind, done in runs.items()}
    row = {"name": name, "blocks": blocks, "status": "ok"}
    return row | middle | {"all_seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; growth is against the contestant's own smallest model."""
    fewest = min(row["blocks"] for row in rows)
    cold = {(r["name"], r["blocks"]): r["cold"]["seconds"] for r in rows if r["status"] == "ok"}
    names = ["contestant", "blocks", "cold s", "warm s", "warm / cold", f"growth from {fewest}"]
    names += [f"cold / {YARDSTICK}", "call ms", "hit ms"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        name, blocks = row["name"], row["blocks"]
        if row["status"] != "ok":
            lines.append(f"| {name} | {blocks} | {row['status']} |" + " |" * (len(names) - 3))
            continue
        took, warm = row["cold"]["seconds"], row["warm"]["seconds"]
        cells = [name, str(blocks), f"{took:.2f}", f"{warm:.2f}", f"{warm / took:.2f}"]
        for other in ((name, fewest), (YARDSTICK, blocks)):
            cells.append(f"{took / cold[other]:.2f}" if other in cold else "-")
        for key in ("call_ms", "hit_ms"):
            figures = row["cold"].get(key)
            cells.append(f"{figures['p10']:.2f} ({figures['median']:.2f})" if figures else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", default="6,12,24,48", help="numbers with commas")
    parser.add_argument("--contestants", help="names with commas (default: all)")
    parser.add_argument("--repeats", type=int, default=1, help="cold and warm pairs of each")
    parser.add_argument("--calls", type=int, default=50, help="calls timed after compiling")
    parser.add_argument("--size", choices=overhead.SIZES, default="host-bound")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    blocks = [int(number) for number in args.blocks.split(",")]
    if args.child:
        torch.set_num_threads(args.threads)
        result = compile_once(args.child, blocks[0], args.size, args.calls)
        print(LAST_LINE + json.dumps(result))
        return
    names = args.contestants.split(",") if args.contestants else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"unknown contestants {sorted(unknown)}; there are {list(CONTESTANTS)}")
    packages = ("torch", "diffusers", "fxcache")
    versions = {p: importlib.metadata.version(p) for p in packages}
    rows: list[dict[str, Any]] = []
    result = {
        "size": args.size,
        "threads": args.threads,
        "compile_threads": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS"),
        "repeats": args.repeats,
        "versions": versions | {"python": platform.python_version()},
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "compile-time.json"
    for number in blocks:
        for name in names:
            rows.append(measure(name, number, args))
            path.write_text(json.dumps(result, indent=2) + "\n")  # a long run may be stopped
    print(f"\n{args.size}, {args.threads} thread(s), {result['versions']}")
    print("10th percentiles of calls, medians in brackets; a call of fxcache is a miss")
    print(table(rows))
    print(path)


if __name__ == "__main__":
    main()
