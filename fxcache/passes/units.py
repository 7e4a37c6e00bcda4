"""Find what repeats: the units of a block stack, whatever holds their modules.

Words are heavy operations with the shapes of their operands. A block stack is a run of equal
phrases::

    mm addmm attn addmm | mm addmm attn addmm | mm addmm attn addmm
    ^ start             ^ edge                ^ edge               ^ end

A unit's edge is the narrowest position between two heavy operations: where the fewest bytes that
depend on the sample are alive. Where a phrase holds the calls of several modules (spatial and
temporal blocks in turn), each call is a unit. Runs that hand all their streams on to each other
(double, then single blocks) are one stack.
"""

import heapq
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, takewhile

from fxcache.passes.facts import Facts, mask_of, word_of
from fxcache.passes.graph import is_tensor, is_view, module_calls

#: Longer phrases are not looked for: no block has more heavy operations.
MAX_PHRASE = 256
#: A run that does less than this of the sample-dependent work is no candidate for the stack.
MIN_SHARE = 0.04
#: An edge is as good as another if it is not wider than this, relative to it.
NARROW = 1.25


@dataclass(frozen=True)
class Unit:
    """The nodes behind position `start` up to and with position `end`; `label` is their module."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Run:
    """Units in a row."""

    units: tuple[Unit, ...]

    @property
    def start(self) -> int:
        return self.units[0].start

    @property
    def end(self) -> int:
        return self.units[-1].end

    def work(self, facts: Facts) -> int:
        return facts.work[self.end] - facts.work[self.start]

    def __str__(self) -> str:
        return describe([unit.label for unit in self.units])


def find_runs(facts: Facts) -> list[Run]:
    """The runs of equal units in `facts`, in recorded order.

    Where there are none, runs of a unit of which a good part comes again (two blocks, of which the
    last has less to do), or of a part of a phrase that needs nothing of the one before (guidance
    inside the model: its whole stack twice).
    """
    longest = min(MAX_PHRASE, len(facts.heavy) // 2)
    found = _runs(facts, 1.0, longest) or _runs(facts, 0.3, longest)
    while not found and longest > 1:
        longest //= 2
        found = _runs(facts, 1.0, longest)
    return found


def _runs(facts: Facts, again: float, longest: int) -> list[Run]:
    runs = []
    for first, period, end in _repeats(facts, again, longest):
        bounds = _bounds(facts, first, period, end)
        units = _by_modules(facts, bounds) if len(bounds) >= 2 else None
        if units is None and end - first >= 2 * period:  # else only modules say where it ends
            units = _units(facts, bounds)
        runs += _split(facts, units) if units else []
    whole = _extended(facts, sorted(runs, key=lambda run: run.start))
    return [run for run in whole if len(run.units) > 1]


def _split(facts: Facts, units: Sequence[Unit]) -> list[Run]:
    """`units` as runs in which each feeds the next (query, key and value do not), of one list each:
    a control branch may be like the blocks. Lists in turn are one run.
    """
    work = [mask_of(p for p in facts.heavy if unit.start < p <= unit.end) for unit in units]
    needs = list(map(facts.closure, work))
    lists = [re.sub(r"\d+", "#", unit.label) for unit in units]
    changes = sum(a != b for a, b in pairwise(lists))
    at = [
        k
        for k in range(1, len(units))
        if not needs[k] & work[k - 1] or (changes <= 2 and lists[k] != lists[k - 1])
    ]
    return [Run(tuple(units[start:end])) for start, end in pairwise([0, *at, len(units)])]


def _repeats(facts: Facts, again: float, longest: int) -> list[tuple[int, int, int]]:
    """Tandem repeats in the string of words, the one with most work first, none overlapping:
    (first word, period, end). At least the share `again` of a phrase comes again behind it; no
    phrase has more than `longest` words.
    """
    numbers: dict[object, int] = {}
    words = [numbers.setdefault(word_of(facts.nodes[p]), len(numbers)) for p in facts.heavy]
    before = [0, *accumulate(facts.cost[p] for p in facts.heavy)]
    heap: list[tuple[int, int, int, int]] = []
    for period in range(1, longest + 1):
        start = 0
        for i in range(len(words) - period + 1):
            if i + period < len(words) and words[i] == words[i + period]:
                continue
            if i - start >= again * period:
                heap.append((before[start] - before[i + period], period, start, i + period))
            start = i + 1
    heapq.heapify(heap)
    taken = [False] * len(words)
    found = []
    while heap:
        work, period, start, end = heapq.heappop(heap)
        if -work < MIN_SHARE * facts.total:
            break
        if any(taken[start:end]):
            parts = groupby(range(start, end), taken.__getitem__)
            free = max((list(part) for used, part in parts if not used), key=len, default=[])
            if len(free) >= (1 + again) * period:
                start, end = free[0], free[-1] + 1
                heapq.heappush(heap, (before[start] - before[end], period, start, end))
            continue
        found.append((start, period, end))
        taken[start:end] = [True] * (end - start)
    return found


def _bounds(facts: Facts, first: int, period: int, end: int) -> list[int]:
    """The edges of the phrases from word `first` to word `end`.

    Where the phrases begin is where their edges are narrowest. A phrase may be several periods long
    (a block with two equal layers): the shortest whose edges are as narrow as any.
    """
    edge = {h: narrowest(facts, h) for h in range(first, end + 1)}
    if end - first < 2 * period:
        return [edge[first], edge[first + period], edge[end]]
    choices = []
    whole = (end - first) // period
    for length in range(period, end - first + 1, period):
        for phase in range(length):
            count = (end - first - phase) // length
            # A phase that loses a unit is none, unless its edges are clearly narrower.
            if count < 2 or (length == period and count < whole - 1):
                break
            bounds = [edge[first + phase + k * length] for k in range(count + 1)]
            inner = bounds[1:-1] or bounds
            width = max(facts.width[b] for b in inner)
            lost = (end - first - phase) % length if length > period else whole - count
            choices.append((width, length, bool(lost), phase, bounds))
        if length // period >= 4:
            break
    if not choices:
        return []
    least = min(width for width, *_ in choices)
    fitting = [c for c in choices if c[0] <= NARROW * least]
    return min(fitting, key=lambda c: (c[1], c[2], c[0], c[3]))[4]


def narrowest(facts: Facts, word: int) -> int:
    """The narrowest position between the heavy operation before number `word` and that one, the
    first of several, and behind the views of what is alive there (a joint sequence taken apart).
    """
    low = facts.heavy[word - 1] if word > 0 else 0
    high = facts.heavy[word] if word < len(facts.heavy) else len(facts.nodes) - 1
    alive = [p for p in range(low, high) if facts.width[p] > 0]
    best = min(alive, key=facts.width.__getitem__, default=low)
    for p in range(best + 1, high):
        if is_tensor(facts.nodes[p]):
            if not is_view(facts.nodes[p]) or not facts.depends(facts.nodes[p]):
                break
            best = p
    return best


def _units(facts: Facts, bounds: Sequence[int]) -> tuple[Unit, ...]:
    labels = [label(facts, start, end) for start, end in pairwise(bounds)]
    if len(set(labels)) < len(labels):  # a module that is called again and again, or no module
        labels = [f"{name}[{k}]" for k, name in enumerate(labels)]
    return tuple(map(Unit, bounds, bounds[1:], labels))


def _by_modules(facts: Facts, bounds: Sequence[int]) -> tuple[Unit, ...] | None:
    """The units between `bounds` as calls of modules, None if these are no better."""
    first = sum(p <= bounds[0] for p in facts.heavy)
    end = sum(p <= bounds[-1] for p in facts.heavy)
    starts = _calls(facts, first, end)
    if len(starts) < 3:  # with the end of the last
        return None
    edges = [bounds[0], *(narrowest(facts, start) for start in starts[1:-1]), bounds[-1]]
    if starts[0] < first:
        edges[0] = narrowest(facts, starts[0])
    if starts[-1] > end:
        edges[-1] = narrowest(facts, starts[-1])
    limit = NARROW * max(facts.width[b] for b in bounds[1:-1] or bounds)
    least = 0.1 * (facts.work[bounds[-1]] - facts.work[bounds[0]]) / (len(bounds) - 1)
    kept = [edges[0]]
    for k, edge in enumerate(edges[1:-1]):
        small = facts.work[edge] - facts.work[kept[-1]] < least
        rest = facts.work[edges[k + 2]] - facts.work[edge] < least
        if facts.width[edge] <= limit and not small and not rest and edge > kept[-1]:
            kept.append(edge)
    kept.append(edges[-1])
    if len(kept) < len(bounds):
        return None
    return _units(facts, kept)


def _calls(facts: Facts, first: int, end: int) -> list[int]:
    """The words from `first` to `end` by the outermost calls of modules that tell them apart: where
    each call begins, and where the last one ends (whole calls, which may reach beyond).
    """
    stacks = [module_calls(facts.nodes[p]) for p in facts.heavy]
    for depth in range(max(map(len, stacks[first:end]), default=0)):
        keys = [stack[depth] if depth < len(stack) else ("", "") for stack in stacks]
        starts = [h for h in range(first, end) if h == first or keys[h] != keys[h - 1]]
        if len(starts) > 1:
            while starts[0] > 0 and keys[starts[0] - 1] == keys[first] != ("", ""):
                starts[0] -= 1
            while end < len(keys) and keys[end] == keys[end - 1] != ("", ""):
                end += 1
            return [*starts, end]
    return []


def label(facts: Facts, start: int, end: int) -> str:
    """The innermost module that does (nearly) all the work behind `start` up to `end`."""
    work: Counter[str] = Counter()
    depth: dict[str, int] = {}
    for node in facts.nodes[start + 1 : end + 1]:
        cost = facts.cost[facts.position[node]]
        for level, (path, _) in enumerate(module_calls(node) if cost else ()):
            work[path] += cost
            depth[path] = level
    enough = 0.9 * (facts.work[end] - facts.work[start])
    covering = [path for path, done in work.items() if done >= enough]
    return max(covering, key=depth.__getitem__, default="")


def _extended(facts: Facts, runs: list[Run]) -> list[Run]:
    """Add to each run the elements of its list that follow it and are not quite like the others
    (a last block without a text stream).
    """
    paths = [[path for path, _ in module_calls(facts.nodes[p])] for p in facts.heavy]
    extended = []
    for k, run in enumerate(runs):
        later = (other.start for other in runs[k + 1 :] if len(other.units) > 1)
        end = next(later, len(facts.nodes) - 1)
        units = list(run.units)
        holder = units[-1].label.rpartition(".")[0]
        word = sum(p <= units[-1].end for p in facts.heavy)
        while units[-1].label[-1:].isdigit() and word < len(facts.heavy):
            kind = re.sub(r"\d+", "#", units[-1].label)
            own = [path for path in paths[word] if path.rpartition(".")[0] == holder]
            own = [path for path in own if re.sub(r"\d+", "#", path) == kind]
            if not own or own[0] in {unit.label for unit in units}:
                break
            while word < len(facts.heavy) and own[0] in paths[word]:
                word += 1
            edge = narrowest(facts, word)
            if not units[-1].end < edge <= end or facts.work[edge] == facts.work[units[-1].end]:
                break
            units.append(Unit(units[-1].end, edge, own[0]))
        extended.append(Run(tuple(units)))
    return extended


def describe(labels: Sequence[str]) -> str:
    """``transformer_blocks (19) + single_transformer_blocks (38)``: lists, with their numbers."""
    kinds: dict[str, list[str]] = {}
    for name in labels:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    parts = []
    for kind, names in kinds.items():
        paths = [name.split(".") for name in names]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        prefix = [parts[0] for parts in common] if len(paths) > 1 else paths[0][:-1]
        shown = ".".join(prefix) or re.sub(r"[#\[\]._]+$", "", kind) or "the model"
        parts.append(f"{shown} ({len(names)})")
    return " + ".join(parts)
