"""Choose where to cut: the head, the span that a hit skips, and the streams that cross.

::

    inputs -> [head: embeddings, head blocks] -> [span: blocks] -> [tail: tail blocks, projection]
                                              ^ head's end       ^ span's end

A *boundary* is a place where little that depends on the sample is alive. The streams are what
crosses the span's end and a hit does not have anyway; the skeleton of each decides what it is. A
cut on which an output cannot move with the sample is none.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxcache.errors import PolicyError, StackNotFoundError
from fxcache.passes.facts import Facts, Mask, mask_of, positions
from fxcache.passes.graph import (
    bytes_of,
    depends_on_data,
    is_numeric,
    is_tensor,
    is_view,
    tensor_of,
)
from fxcache.passes.skeleton import Skeleton, Skeletons, reads
from fxcache.passes.u_shape import is_read_by_work, last_read, levels, modules, origin
from fxcache.passes.units import Run, Unit, describe, find_runs, join_runs, narrowest
from fxcache.policy.base import Span

#: Cuts that skip as much as the best but for this share of the work are as good.
AS_GOOD = 0.02
#: A hit that skips less than this of the work is not worth its memory.
MIN_SKIPPED = 0.1
#: The heaviest stack is taken if it skips this share of what another one does.
MAIN_STACK = 0.6
#: A tensor with less than this of the largest one's bytes does not tell what a cut is worth.
MAIN = 0.2


@dataclass(frozen=True)
class Stream:
    """A tensor that leaves the span, and what of it a hit renews (None: it is kept as it is)."""

    after: fx.Node
    skeleton: Skeleton | None

    @property
    def like(self) -> fx.Node:
        """A node of its shape."""
        known = depends_on_data(self.after) and self.skeleton is not None
        return self.skeleton.like if known and self.skeleton is not None else self.after

    @property
    def after_dtype(self) -> torch.dtype:
        return tensor_of(self.after).dtype

    @property
    def share(self) -> float:
        """The share of it that is a residual's."""
        return self.skeleton.share if self.skeleton is not None and self.skeleton.is_sum else 0.0


@dataclass(frozen=True)
class Cut:
    """Where a graph is cut.

    `start` is the position behind which the first unit begins, `first` the last of that unit,
    `head` the last of the head, `end` the last of the span, `blocks` the last of the block stack.
    `hit` is what a hit runs of the graph. `head_units`, `span_units` and `tail_units` name what
    lies where, `stack` describes the units of the block stack, `notes` say what else was seen.
    `repeated` are the units of all runs, the stack's and others.
    """

    facts: Facts
    start: int
    first: int
    head: int
    end: int
    blocks: int
    streams: tuple[Stream, ...]
    hit: Mask
    is_u_shape: bool = False
    stack: str = ""
    head_units: tuple[str, ...] = ()
    span_units: tuple[str, ...] = ()
    tail_units: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repeated: tuple[Unit, ...] = ()

    @property
    def skipped_share(self) -> float:
        """Which share of the graph's sample-dependent FLOPs a hit skips, 0 to 1."""
        work = self.facts.flops(self.hit | self.layers)
        return 1 - work / self.facts.total

    @property
    def layers(self) -> Mask:
        """The layers that skeletons go through."""
        layers = 0
        for stream in self.streams:
            layers |= 0 if stream.skeleton is None else stream.skeleton.layers
        return layers

    @property
    def stream_bytes(self) -> int:
        return sum(bytes_of(stream.after) for stream in self.streams)

    def __str__(self) -> str:
        return (
            f"{self.stack}: a hit skips {self.skipped_share:.0%} of the work, "
            f"{len(self.span_units)} of {len(self.head_units + self.span_units + self.tail_units)} "
            f"units"
        )


def find_cut(facts: Facts, span: Span) -> Cut:
    """Where to cut for a policy that skips `span`.

    Raises PolicyError if `span` leaves nothing to skip, StackNotFoundError if nothing can be
    skipped such that the outputs follow the sample.
    """
    runs = find_runs(facts)
    stacks = join_runs(runs, lambda before, after: _continues(facts, before, after))
    stacks.sort(key=lambda stack: stack.work(facts), reverse=True)
    tried: list[str] = []
    short: list[PolicyError] = []
    found: list[tuple[bool, Cut]] = []  # the heaviest stack first
    for stack in stacks:
        if len(stack.units) <= span.head_blocks + span.tail_blocks:
            short.append(_too_short(span, str(stack), len(stack.units)))
            continue
        cut = _cut_stack(facts, stack, span)
        if cut is None:
            tried.append(f"{stack}: what leaves it is no residual of what enters it")
        elif cut.skipped_share < MIN_SKIPPED:
            tried.append(f"{cut}: too little")
        else:
            found.append((_is_on_chain(facts, cut), cut))
    on_chain = [cut for on, cut in found if on] or [cut for _, cut in found]
    most = max((cut.skipped_share for cut in on_chain), default=0.0)
    worth = [cut for cut in on_chain if cut.skipped_share >= MAIN_STACK * most][:1]
    u_shape = _cut_u_shape(facts, span, tried)
    if u_shape is not None and u_shape.skipped_share >= MIN_SKIPPED:
        worth.append(u_shape)
    if not worth:
        if short:
            raise short[0]
        raise StackNotFoundError(
            f"no block stack in this graph of {len(facts.nodes)} nodes can be skipped. Seen: "
            f"{'; '.join(tried) or 'nothing that repeats'}. A stack is a run of equal units whose "
            f"result is their input plus something, or a U shape whose tail reads what its head "
            f"leaves it"
        )
    return _with_notes(facts, _best(worth), stacks)


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
    last = _between(facts, before.units[-1].start, before.end)
    entering = [n for n in facts.crossing(after.start) if is_numeric(n)]
    largest = max(map(bytes_of, entering), default=0)
    for node in entering:
        if bytes_of(node) < MAIN * largest:
            continue
        skeleton = skeletons.of(node)
        if skeleton is None or (not skeleton.is_leaf and skeleton.share < 0.99):
            return False
        if any(not facts.ancestors[p] & last for p in positions(skeleton.leaves)):
            return False
    return bool(entering)


def _between(facts: Facts, start: int, end: int) -> Mask:
    """The heavy nodes behind `start` up to and with `end`."""
    return mask_of(p for p in facts.heavy if start < p <= end)


def _cut_stack(facts: Facts, stack: Run, span: Span) -> Cut | None:
    """The best cut that leaves the first and last units of `stack` outside of the span."""
    units = stack.units
    head = units[span.head_blocks - 1].end if span.head_blocks else stack.start
    limit = units[-span.tail_blocks].start if span.tail_blocks else len(facts.nodes) - 2
    skeletons = Skeletons(facts, head)
    on_chain: list[Cut] = []
    beside: list[Cut] = []
    for word in range(len(facts.heavy), sum(p <= head for p in facts.heavy), -1):
        last = facts.work[on_chain[0].end] if on_chain else 0
        if last - facts.work[facts.heavy[word - 1]] > AS_GOOD * facts.total:
            break  # what lies before skips less
        for end in _boundaries(facts, word):
            cut = _try(facts, skeletons, stack.start, end) if head < end <= limit else None
            if cut is not None:
                (on_chain if _is_on_chain(facts, cut) else beside).append(cut)
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
    """Positions between two heavy operations where the width has just fallen, narrowest first."""
    best = narrowest(facts, word)
    yield best
    p = best
    while is_view(facts.nodes[p]) or not is_tensor(facts.nodes[p]):
        p -= 1
        yield p
    low = facts.heavy[word - 1] if word > 0 else 0
    high = facts.heavy[word] if word < len(facts.heavy) else len(facts.nodes) - 1
    width = facts.width
    fallen = [p for p in range(low + 1, high) if 0 < width[p] < width[p - 1]]
    fallen = [p for p in fallen if p != best and width[p] <= 2 * width[best]]
    yield from sorted(fallen, key=lambda p: (width[p], -p))[:4]


def _try(
    facts: Facts, skeletons: Skeletons, start: int, end: int, *, is_u_shape: bool = False
) -> Cut | None:
    """The cut with the span's end at `end`, None if it is none."""
    crossing = facts.crossing(end)
    kept = [n for n in crossing if not skeletons.is_available(n)]
    # What is a view of another stream is made of it again.
    kept = [n for n in kept if not (is_view(n) and n.args[0] in kept)]
    streams = tuple(Stream(node, skeletons.of(node)) for node in kept)
    if not kept or not all(map(is_numeric, kept)) or any(depends_on_data(s.like) for s in streams):
        return None
    largest = max(bytes_of(node) for node in kept)
    main = [s for s in streams if bytes_of(s.after) >= MAIN * largest]
    renewed = sum(bytes_of(s.after) * s.share for s in main)
    is_residual = 2 * renewed >= sum(bytes_of(s.after) for s in main)
    if not is_residual:
        # Then the tail must read features of the head that are fresh.
        fresh = [n for n in crossing if n not in kept and facts.needs(n) & facts.costly]
        if not is_u_shape or not any(bytes_of(n) >= MAIN * largest for n in fresh):
            return None
    hit = _hit(facts, streams)
    if not _moves(facts, streams, hit):
        return None
    head = skeletons.head
    return Cut(facts, start, head, head, end, end, streams, hit, is_u_shape)


def _hit(facts: Facts, streams: Sequence[Stream]) -> Mask:
    """What a hit runs: back from what is returned to the streams, and what renews these."""
    stop = {facts.position[stream.after] for stream in streams}
    renewing = [s.skeleton for s in streams if s.skeleton is not None]
    read = [node for part in renewing for node in reads(part, facts)]
    todo = [len(facts.nodes) - 1, *(facts.position[node] for node in read)]
    seen = set(todo)
    while todo:
        for operand in facts.operands[todo.pop()]:
            if operand not in seen and operand not in stop:
                seen.add(operand)
                todo.append(operand)
    return mask_of(seen)


def _moves(facts: Facts, streams: Sequence[Stream], hit: Mask) -> bool:
    """Whether on a hit every main output depends on the sample."""
    moving = {facts.position[s.after] for s in streams if s.skeleton is not None}
    moving |= {facts.position[sample] for sample in facts.samples}
    still = {facts.position[s.after] for s in streams} - moving
    for p in sorted(positions(hit)):
        if p not in still and not moving.isdisjoint(facts.operands[p]):
            moving.add(p)
    outputs = [node for node in facts.outputs if facts.depends(node)]
    largest = max(map(bytes_of, outputs), default=0)
    return all(facts.position[n] in moving for n in outputs if bytes_of(n) >= MAIN * largest)


def _is_on_chain(facts: Facts, cut: Cut) -> bool:
    """Whether what is renewed comes out of the head's units: else the run is a side branch."""
    own = _between(facts, cut.start, cut.head)
    work = facts.flops(own)
    needs = 0
    for stream in cut.streams:
        for p in positions(stream.skeleton.leaves if stream.skeleton is not None else 0):
            needs |= facts.ancestors[p]
    return work == 0 or facts.flops(own & needs) >= 0.3 * work


def _cut_u_shape(facts: Facts, span: Span, tried: list[str]) -> Cut | None:
    """The cut of a U shape: as many levels of skips in the tail as units in the head.

    A level is a tensor of the first part that the last part reads. Where a policy leaves no unit
    in the head, one is left all the same: else nothing that a hit has would follow the sample.
    """
    found = levels(facts)
    wanted = max(span.head_blocks, span.tail_blocks, 1)
    for node in found[wanted - 1 :]:
        skeletons = Skeletons(facts, facts.position[node])
        read = last_read(facts, node)
        if not is_read_by_work(facts, node, read):
            continue
        word = sum(p < read for p in facts.heavy)
        for near in range(word, max(word - 3, 0), -1):
            for end in _boundaries(facts, near):
                if not facts.position[node] < end < read:
                    continue
                cut = _try(facts, skeletons, origin(facts, node), end, is_u_shape=True)
                if cut is not None:
                    return _named_bymodules(cut)
    if found:
        tried.append(f"{len(found)} long skips, of which none leaves its reader fresh features")
    return None


def _named_bymodules(cut: Cut) -> Cut:
    """`cut` with the outermost modules that lie on one side of each boundary as its units."""
    names = modules(cut.facts, (-1, cut.head, cut.end, len(cut.facts.nodes) - 1))
    return replace(
        cut,
        stack=describe([name for part in names for name in part]),
        head_units=names[0],
        span_units=names[1],
        tail_units=names[2],
    )


def _with_notes(facts: Facts, cut: Cut, stacks: Iterable[Run]) -> Cut:
    """`cut`, with a note on a stack that does more work and was not taken."""
    own = facts.work[cut.end] - facts.work[cut.head]
    notes = [
        f"{stack} does more of the work ({stack.work(facts) / facts.total:.0%}) than the span "
        f"({own / facts.total:.0%})"
        for stack in stacks
        if stack.work(facts) > own and str(stack) != cut.stack
    ]
    repeated = sorted((u for stack in stacks for u in stack.units), key=lambda unit: unit.start)
    return replace(cut, notes=tuple(notes), repeated=tuple(repeated))


__all__ = ["Cut", "Stream", "find_cut"]
