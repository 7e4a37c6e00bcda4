"""The frontier: how near cached pictures come to the uncached ones, against what they cost.

The trained denoiser that ships with fxcache is sampled with every policy and forecaster of fxcache,
with diffusers' and cache-dit's caches, and with fewer steps. The cost is the share of block calls
that is really computed, counted the same way for all; the speedup is its inverse. Quality is PSNR,
SSIM and a feature distance to the uncached sampler's picture from the same noise.

Every method is tried with many settings on a few pictures of a seed of their own (screening). For
each speedup of `TARGETS`, the setting that did best there at no higher cost is then measured on all
pictures. All of a method's settings are measured if there are few, and all numbers of fewer steps.

    python examples/benchmark_frontier.py                                  # about an hour a core
    python examples/benchmark_frontier.py --contestants "diffusers|cache-dit"
    python examples/benchmark_frontier.py --contestants "fewer:^(12|15) steps"  # METHOD:SETTING
    python examples/benchmark_frontier.py --draw  # tables and picture again, from the JSON file

Results are written to frontier.json as they come; a run that was stopped goes on where it was, and
several may share a file. Needs diffusers, matplotlib and tqdm; cache-dit where it is installed.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import logging
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_peers import version
from frontier_cache_dit import CACHE_DIT
from frontier_diffusers import DIFFUSERS
from frontier_figure import draw, tables
from frontier_measure import (
    SCREENING_SEED,
    BlockCounter,
    Judge,
    Sampler,
    Settings,
    Task,
    dispatched_share,
    measure,
    silence,
)
from frontier_policies import OURS, ours
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
TARGETS = (1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0)
FEWER_STEPS = "fewer steps"
#: Methods that have no settings to choose from.
UNSCREENED = {FEWER_STEPS, "fxcache tune"}
#: A setting counts for a speedup that it misses by this much.
TOLERANCE = 0.01

Row = dict[str, Any]


def fewer_steps(task: Task) -> Settings:
    """The sampler without a cache; from 8 of 30 steps to 24, and as much of other numbers."""

    def make(count: int) -> Sampler:
        model = task.load()
        counter = BlockCounter(model, task.steps)

        def run(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
            return task.sample(model, labels, seed, steps=count), counter.take()

        return run

    for count in range(round(task.steps * 8 / 30), round(task.steps * 24 / 30) + 1):
        yield f"{count} steps", functools.partial(make, count)


def contestants() -> Iterator[tuple[str, str, Callable[[Task], Settings]]]:
    """Method, kind ("baseline", "peer" or "ours") and settings of each."""
    yield FEWER_STEPS, "baseline", fewer_steps
    for name, make in (DIFFUSERS | CACHE_DIT).items():
        yield name, "peer", make
    for name, policies in OURS.items():
        yield name, "ours", functools.partial(ours, policies)


class Store:
    """The JSON file: what was asked for, and a row a setting. Several processes may write to it."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        with self._locked() as content:
            if content["settings"] != asked:
                raise ValueError(f"{path} was made with {content['settings']}, not {asked}")
            content["commands"].append(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
            self.rows = content["rows"]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The file's content, written back afterwards."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            empty = {"settings": self.asked, "commands": [], "rows": []}
            content = json.loads(self.path.read_text()) if self.path.exists() else empty
            yield content
            draft = self.path.with_suffix(".json.part")
            draft.write_text(dump(content))
            draft.replace(self.path)
        finally:
            os.close(folder)  # and unlocked

    def find(self, method: str, setting: str) -> Row | None:
        same = (r for r in self.rows if r["method"] == method and r["setting"] == setting)
        return next(same, None)

    def put(self, row: Row) -> None:
        """Write a row, in place of an older one of the same setting."""
        with self._locked() as content:
            key = row["method"], row["setting"]
            kept = [r for r in content["rows"] if (r["method"], r["setting"]) != key]
            content["rows"] = [*kept, row]
            self.rows = content["rows"]

    def forget(self, is_meant: Callable[[str, str], bool]) -> None:
        with self._locked() as content:
            rows = content["rows"]
            content["rows"] = [r for r in rows if not is_meant(r["method"], r["setting"])]
            self.rows = content["rows"]


def dump(content: dict[str, Any]) -> str:
    """JSON with a row a line."""
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    rest = [f"{json.dumps(key)}: {json.dumps(content[key])}" for key in ("settings", "commands")]
    return "{" + ",\n".join([*rest, f'"rows": [\n{rows}\n]']) + "}\n"


class Race:
    """Screens and measures the settings of one method after the other."""

    def __init__(self, task: Task, store: Store, screening_images: int, bar: Any) -> None:
        self.task, self.store, self.bar = task, store, bar
        self.judge = Judge(task)
        self.chunks = task.chunks()
        self.few = task.chunks((SCREENING_SEED,), screening_images)

    def run(self, method: str, kind: str, makers: dict[str, Callable[[], Sampler]]) -> None:
        rows = [
            self.store.find(method, name) or {"method": method, "kind": kind, "setting": name}
            for name in makers
        ]
        if method not in UNSCREENED and len(rows) > len(TARGETS):
            self.bar.total += sum("screening" not in row and "status" not in row for row in rows)
            for row in rows:
                if "screening" not in row and "status" not in row:
                    self._fill(row, makers[row["setting"]], "screening")
            rows = chosen(rows)
        self.bar.total += sum("status" not in row for row in rows)
        for row in rows:
            if "status" not in row:
                self._fill(row, makers[row["setting"]], "figures")

    def _fill(self, row: Row, make: Callable[[], Sampler], what: str) -> None:
        """Do the screening or the measurement of a setting; an error is a result, too."""
        self.bar.set_description(f"{row['method']}: {row['setting']}"[:50])
        chunks = self.few if what == "screening" else self.chunks
        start = time.process_time()
        try:
            with silence():
                run = make()
                figures = measure(run, self.judge, chunks, lambda: self.bar.update(0))
                if what == "screening":
                    del figures["psnr"]["each"]
                    row["screening"] = {k: figures[k] for k in ("share", "speedup", "psnr")}
                else:
                    row |= {"status": "ok", **figures, **self._check(run, row["method"])}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            text = traceback.format_exc(limit=-1).strip()
            row |= {"status": f"failed: {type(error).__name__}: {error}", "traceback": text}
        if row.get(what, row).get("share") == 1:
            row["status"] = "no hits: every block was computed"
        row[f"{what}_cpu_seconds"] = round(time.process_time() - start, 1)
        self.store.put(row)
        self.bar.update()

    def _check(self, run: Sampler, method: str) -> Row:
        """Once a method: is what was counted what torch dispatched?"""
        if any(r["method"] == method and "profiled_share" in r for r in self.store.rows):
            return {}
        counted, seen = dispatched_share(run, self.chunks[0], self.task)
        if abs(counted - seen) > 1e-6:
            raise RuntimeError(f"counted a share of {counted:.4f}, dispatched were {seen:.4f}")
        return {"profiled_share": round(seen, 6)}


def chosen(rows: list[Row]) -> list[Row]:
    """For each target the row that did best in the screening and is at least so fast."""
    screened = [row for row in rows if "screening" in row and row.get("status", "ok") == "ok"]
    found = []
    for target in TARGETS:
        fast = [r for r in screened if r["screening"]["speedup"] >= target * (1 - TOLERANCE)]
        if fast:
            # Of those that decided alike, the first.
            found.append(max(fast, key=lambda row: row["screening"]["psnr"]["mean"]))
    return [row for row in rows if any(row is other for other in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=64, help="pictures a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="of the uncached sampler")
    parser.add_argument("--batch", type=int, default=4, help="pictures that share their decisions")
    parser.add_argument("--model", type=Path, help="folder of a DiT, written by train_demo.py")
    parser.add_argument("--screening-images", type=int, default=8)
    parser.add_argument(
        "--contestants", default="", help="regular expression for methods, or METHOD:SETTING"
    )
    parser.add_argument("--again", action="store_true", help="forget what is known of these")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--draw", action="store_true", help="only tables and picture")
    args = parser.parse_args()
    path = args.output / "frontier.json"
    if not args.draw:
        args.output.mkdir(parents=True, exist_ok=True)
        run(args, path, parser)
    rows = json.loads(path.read_text())["rows"]
    print(tables(rows, TARGETS, TOLERANCE))
    print(draw(rows, args.output / "frontier.png"))


def run(args: argparse.Namespace, path: Path, parser: argparse.ArgumentParser) -> None:
    """Everything that `args` asks for and `path` does not hold yet."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    torch.set_num_threads(1)  # the order of additions, too, is the same every time
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    task = Task(args.steps, args.images, tuple(args.seeds), args.batch, args.model)
    packages = ("torch", "diffusers", "cache-dit", "fxcache")
    asked = {
        "weights": task.weights(),
        "steps": task.steps,
        "images": task.images,
        "seeds": list(task.seeds),
        "batch": task.batch,
        "screening": {"images": args.screening_images, "seed": SCREENING_SEED},
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
    }
    method_pattern, _, setting_pattern = args.contestants.partition(":")

    def is_meant(method: str, setting: str) -> bool:
        return bool(re.search(method_pattern, method) and re.search(setting_pattern, setting))

    try:
        store = Store(path, asked)
    except ValueError as error:
        parser.error(f"{error}: choose another --output")
    if args.again:
        store.forget(is_meant)
    meant = [item for item in contestants() if re.search(method_pattern, item[0])]
    with tqdm(total=0, unit="setting", file=sys.stderr) as bar:
        race = Race(task, store, args.screening_images, bar)
        for method, kind, settings in meant:
            try:
                with silence():
                    makers = {s: make for s, make in settings(task) if is_meant(method, s)}
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                text = f"failed: {type(error).__name__}: {error}"
                store.put({"method": method, "kind": kind, "setting": "", "status": text})
                continue
            if store.find(method, ""):  # that it could not be made ready is past
                store.forget(lambda m, s: (m, s) == (method, ""))  # noqa: B023
            race.run(method, kind, makers)


if __name__ == "__main__":
    main()
