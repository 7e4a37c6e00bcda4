"""Choose where to cut: which stack, which boundaries.

A *boundary* is a place where little that depends on the sample is alive. All stacks of repeated
units are tried with all boundaries behind them, and the U shape, if there is one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from fxcache.errors import PolicyError, StackNotFoundError
from fxcache.passes.cut import Cut, heavy_between, is_on_chain, try_cut
from fxcache.passes.facts import MAIN, SAMPLE_NAMES, Facts, positions
from fxcache.passes.graph import (
    bytes_of,
    depends_on_data,
    is_numeric,
    is_tensor,
    is_view,
    place_of,
    shape_of,
)
from fxcache.passes.skeleton import Skeletons
from fxcache.passes.u_shape import is_nested, is_read_by_work, levels, modules, origin
from fxcache.passes.units import Run, describe, find_runs, narrowest
from fxcache.passes.whole import cut_whole
from fxcache.policy.base import Span

#: Cuts that skip as much as the best but for this share of the work are as good.
AS_GOOD = 0.02
#: A hit that skips less than this of the work is not worth its memory.
MIN_SKIPPED = 0.1
#: Nor one that skips less than this part of the blocks that the policy would skip.
PART = 0.3
#: The heaviest stack is taken if it skips this share of what another one does.
MAIN_STACK = 0.6
#: A U shape, whose tail sees fresh features, is taken if it skips this share of what a stack does.
U_SHAPE = 0.4


def find_cut(facts: Facts, span: Span) -> Cut:
    """Where to cut for a policy that skips `span`, which may be the whole model.

    Raises PolicyError if `span` leaves nothing to skip, StackNotFoundError if nothing can be
    skipped such that the outputs follow the sample.
    """
    if span.whole_model:
        return cut_whole(facts)
    stacks: list[Run] = []
    for run in find_runs(facts):
        if stacks and _continues(facts, stacks[-1], run):
            stacks[-1] = Run((*stacks[-1].units, *run.units))
        else:
            stacks.append(run)
    stacks.sort(key=lambda stack: stack.work(facts), reverse=True)
    tried: list[str] = []
    short: list[PolicyError] = []
    found: list[Cut] = []  # the heaviest stack first
    for stack in stacks:
        if len(stack.units) <= span.head_blocks + span.tail_blocks:
            short.append(_too_short(span, str(stack), len(stack.units)))
            continue
        cut = _cut_stack(facts, stack, span)
        if cut is None:
            tried.append(f"{stack}: {_why_not(facts, stack)}")
        elif cut.skipped_share < max(MIN_SKIPPED, PART * _share(facts, stack, span)):
            tried.append(f"{cut}: too little; what leaves the others is no residual")
        else:
            found.append(cut)
    on_chain = list(filter(is_on_chain, found)) or found
    most = max((cut.skipped_share for cut in on_chain), default=0.0)
    worth = [cut for cut in on_chain if cut.skipped_share >= MAIN_STACK * most][:1]
    u_shape = _cut_u_shape(facts, span, tried)
    if u_shape is not None and u_shape.skipped_share >= MIN_SKIPPED:
        is_main = is_nested(facts) and u_shape.skipped_share >= U_SHAPE * most
        worth = [u_shape] if is_main else [*worth, u_shape]
    if not worth:
        if short:
            raise short[0]
        raise StackNotFoundError(
            f"no block stack in this graph of {len(facts.nodes)} nodes can be skipped. Seen: "
            f"{'; '.join(tried) or 'nothing that repeats'}. A stack is a run of equal units whose "
            f"result is their input plus something, or a U shape whose tail reads what its head "
            f"leaves it"
        )
    return replace(_with_notes(_best(worth), stacks), input_share=span.input_share)


def _why_not(facts: Facts, stack: Run) -> str:
    """Why no cut of `stack` is one."""
    inside = facts.nodes[stack.start : stack.end + 1]
    unknown = next((n for n in inside if depends_on_data(n) and facts.depends(n)), None)
    if unknown is not None:
        return f"a size in it depends on data: {place_of(unknown)}"
    return "what leaves it is no residual of what enters it"


def _share(facts: Facts, stack: Run, span: Span) -> float:
    """Which share of the work the blocks of `stack` do that `span` would skip."""
    start, end = _ends(stack, span)
    return (facts.work[end] - facts.work[start]) / facts.total


def _ends(stack: Run, span: Span) -> tuple[int, int]:
    """Where the head's units end, and where those of the tail begin."""
    units = stack.units
    head = units[span.head_blocks - 1].end if span.head_blocks else stack.start
    return head, units[-span.tail_blocks].start if span.tail_blocks else stack.end


def _too_short(span: Span, stack: str, units: int) -> PolicyError:
    return PolicyError(
        f"head_blocks={span.head_blocks} and tail_blocks={span.tail_blocks} leave no span: the "
        f"stack {stack} has {units} blocks, so head_blocks + tail_blocks must be at most "
        f"{units - 1}"
    )


def _best(cuts: Sequence[Cut]) -> Cut:
    """The cut that skips most; of those about as good, the one that keeps the fewest bytes."""
    most = max(cut.skipped_share for cut in cuts)
    as_good = [cut for cut in cuts if cut.skipped_share >= most - AS_GOOD]
    # Rather what the blocks leave than what the last projection makes of it.
    return min(as_good, key=lambda c: (bool(c.layers), c.stream_bytes, -c.skipped_share))


def _continues(facts: Facts, before: Run, after: Run) -> bool:
    """Whether all streams that enter `after` are those that `before` hands on."""
    if after.start < before.end:
        return False
    skeletons = Skeletons(facts, before.end)
    last = heavy_between(facts, before.units[-1].start, before.end)
    entering = [n for n in facts.crossing(after.start) if is_numeric(n)]
    largest = max(map(bytes_of, entering), default=0)
    for node in entering:
        if bytes_of(node) < MAIN * largest:
            continue
        skeleton = skeletons.of(node)
        if skeleton is None or (not skeletons.is_available(node) and skeleton.share < 0.99):
            return False
        if any(not facts.ancestors[p] & last for p in positions(skeleton.leaves)):
            return False
    return bool(entering)


def _cut_stack(facts: Facts, stack: Run, span: Span) -> Cut | None:
    """The best cut that leaves the first and last units of `stack` outside of the span."""
    head, limit = _ends(stack, span)
    limit = limit if span.tail_blocks else len(facts.nodes) - 2
    skeletons = Skeletons(facts, head)
    on_chain: list[Cut] = []
    beside: list[Cut] = []
    for word in range(len(facts.heavy), sum(p <= head for p in facts.heavy), -1):
        last = facts.work[on_chain[0].end] if on_chain else 0
        if last - facts.work[facts.heavy[word - 1]] > AS_GOOD * facts.total:
            break  # what lies before skips less
        for end in _boundaries(facts, word):
            cut = try_cut(facts, skeletons, stack.start, end) if head < end <= limit else None
            if cut is not None:
                (on_chain if is_on_chain(cut) else beside).append(cut)
                break
    cuts = on_chain or beside
    return _named(_best(cuts), stack, span) if cuts else None


def _named(cut: Cut, stack: Run, span: Span) -> Cut:
    labels = [unit.label for unit in stack.units]
    tail = sum(unit.start >= cut.end for unit in stack.units)
    first, last = span.head_blocks, len(labels) - max(tail, span.tail_blocks)
    return replace(
        cut,
        first=stack.units[0].end,
        blocks=stack.end,
        stack=str(stack),
        head_units=tuple(labels[:first]),
        span_units=tuple(labels[first:last]),
        tail_units=tuple(labels[last:]),
    )


def _boundaries(facts: Facts, word: int) -> Iterator[int]:
    """Positions between two heavy operations where the width has just fallen, narrowest first, and
    where a part was taken of what is alive (of a joint sequence the image tokens): that is wider
    only as long as its whole counts.
    """
    best = narrowest(facts, word)
    yield best
    p = best
    while is_view(facts.nodes[p]) or not is_tensor(facts.nodes[p]):
        p -= 1
        yield p
    low = facts.heavy[word - 1] if word > 0 else 0
    high = facts.heavy[word] if word < len(facts.heavy) else len(facts.nodes) - 1
    width, between = facts.width, range(low + 1, high)
    parts = [
        p for p in between if _is_part(facts, p) and bytes_of(facts.nodes[p]) <= 2 * width[best]
    ]
    yield from sorted(parts, key=lambda p: (bytes_of(facts.nodes[p]), -p))[:2]
    fallen = [p for p in between if 0 < width[p] < width[p - 1]]
    fallen = [p for p in fallen if p != best and width[p] <= 2 * width[best]]
    yield from sorted(fallen, key=lambda p: (width[p], -p))[:4]


def _is_part(facts: Facts, p: int) -> bool:
    """Whether at `p` a part is taken of a tensor that depends on the sample."""
    node = facts.nodes[p]
    if not (is_view(node) and is_numeric(node) and facts.depends(node)):
        return False
    whole = node.all_input_nodes[0]
    return is_numeric(whole) and bytes_of(node) < bytes_of(whole)


def _cut_u_shape(facts: Facts, span: Span, tried: list[str]) -> Cut | None:
    """The cut of a U shape: as many levels of skips in the tail as units in the head.

    A level is a tensor of the first part that the last part reads. Where a policy leaves no unit
    in the head, one is left all the same: else nothing that a hit has would follow the sample.
    """
    found = levels(facts)
    wanted = max(span.head_blocks, span.tail_blocks, 1)
    for node in found[wanted - 1 :]:
        skeletons = Skeletons(facts, facts.position[node])
        read = facts.last_read[node]
        if not is_read_by_work(facts, node):
            continue
        word = sum(p < read for p in facts.heavy)
        for near in range(word, max(word - 3, 0), -1):
            for end in _boundaries(facts, near):
                if not facts.position[node] < end < read:
                    continue
                cut = try_cut(facts, skeletons, origin(facts, node), end, is_u_shape=True)
                if cut is not None:
                    return _named_by_modules(cut)
    if found:
        tried.append(f"{len(found)} long skips, of which none leaves its reader fresh features")
    return None


def _named_by_modules(cut: Cut) -> Cut:
    """`cut` with the outermost modules that lie on one side of each boundary as its units."""
    names = modules(cut.facts, (-1, cut.head, cut.end, len(cut.facts.nodes) - 1))
    return replace(
        cut,
        stack=describe([name for part in names for name in part]),
        head_units=names[0],
        span_units=names[1],
        tail_units=names[2],
    )


def _other_samples(facts: Facts) -> list[str]:
    """A note where another input has the layout of an output, too."""
    paths = facts.inputs.paths
    taken = [paths.get(node, node.name) for node in facts.samples]
    shapes = {shape_of(node) for node in facts.samples} & {shape_of(n) for n in facts.outputs}
    others = [
        path for node, path in paths.items()
        if path not in taken and is_numeric(node) and shape_of(node) in shapes
    ]  # fmt: skip
    if not others:
        return []
    return [
        f"{', '.join(others)} could be the sample, too: {', '.join(taken)} was taken. Inputs named "
        f"{', '.join(SAMPLE_NAMES)} go first, in this order"
    ]


def _with_notes(cut: Cut, stacks: Iterable[Run]) -> Cut:
    """`cut`, with notes on a stack that does more work and was not taken, and on the sample."""
    facts = cut.facts
    own = facts.work[cut.end] - facts.work[cut.head]
    notes = [
        f"{stack} does more of the work ({stack.work(facts) / facts.total:.0%}) than the span "
        f"({own / facts.total:.0%})"
        for stack in stacks
        if stack.work(facts) > own and str(stack) != cut.stack
    ]
    notes += _other_samples(facts)
    repeated = sorted((u for stack in stacks for u in stack.units), key=lambda unit: unit.start)
    return replace(cut, notes=tuple(notes), repeated=tuple(repeated))
