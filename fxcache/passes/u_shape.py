"""U shapes: tensors of the first part of a graph that its last part reads, and what lies between.

::

    h0 -> down 0 -> h1 -> down 1 -> ... -> up 1 -> cat(., h1) -> up 0 -> out
                    |__________________________________^
"""

from collections.abc import Sequence

from torch import fx

from fxcache.passes.facts import Facts, positions
from fxcache.passes.graph import is_numeric, module_calls
from fxcache.passes.units import narrowest


def levels(facts: Facts) -> list[fx.Node]:
    """Tensors that live long: behind the first unit, and read after much of the work is done."""
    found = []
    for node, end in facts.last_read.items():
        p = facts.position[node]
        if node.op == "placeholder" or not facts.depends(node) or not is_numeric(node):
            continue
        between = (facts.work[end - 1] - facts.work[p]) / facts.total
        is_early = facts.work[p] <= 0.4 * facts.total
        if is_early and between >= 0.3 and (facts.needs(node) & facts.costly).bit_count() >= 2:
            found.append(node)
    return sorted(found, key=facts.position.__getitem__)


def is_nested(facts: Facts) -> bool:
    """Whether what is made first is read last: a U, and no row of hints for the blocks."""
    reads = [facts.last_read[node] for node in levels(facts)]
    return len(reads) > 1 and reads == sorted(reads, reverse=True)


def is_read_by_work(facts: Facts, node: fx.Node) -> bool:
    """Whether the tail that reads `node` is a unit, too, and not only a sum (of a block with its
    input) before the last projection.
    """
    bit, read = 1 << facts.position[node], facts.last_read[node]
    behind = [p for p in facts.heavy if p > read and facts.cost[p] and facts.ancestors[p] & bit]
    return len(behind) >= 2


def origin(facts: Facts, node: fx.Node) -> int:
    """Where the unit that leaves `node` began: behind the first heavy operation."""
    stem = min(positions(facts.needs(node) & facts.costly))
    return narrowest(facts, sum(p <= stem for p in facts.heavy))


def modules(facts: Facts, bounds: Sequence[int]) -> list[tuple[str, ...]]:
    """The outermost modules whose sample-dependent work lies between two of `bounds`, in order."""
    side: dict[str, set[int]] = {}
    works = [p for p in facts.heavy if facts.cost[p]]
    where = {p: sum(b < p for b in bounds) - 1 for p in works}
    for p in works:
        for path, _ in module_calls(facts.nodes[p]):
            side.setdefault(path, set()).add(where[p])
    parts: list[dict[str, None]] = [{} for _ in bounds[1:]]
    for p in works:
        calls = [path for path, _ in module_calls(facts.nodes[p])]
        own = [path for path in calls if path and len(side[path]) == 1]
        parts[where[p]][own[0] if own else calls[-1] if calls else str(facts.nodes[p])] = None
    return [tuple(part) for part in parts]
