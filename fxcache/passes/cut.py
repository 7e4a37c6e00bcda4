"""What a cut is: the head, the span that a hit skips, and the streams that cross.

::

    inputs -> [head: embeddings, head blocks] -> [span: blocks] -> [tail: tail blocks, projection]
                                              ^ head's end       ^ span's end

The streams are what crosses the span's end and a hit does not have anyway; the skeleton of each
decides what it is. A cut on which an output cannot move with the sample is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from fxcache.errors import CaptureError
from fxcache.passes.facts import MAIN, Facts, Mask, mask_of, positions, union
from fxcache.passes.graph import bytes_of, depends_on_data, is_numeric, is_view, tensor_of
from fxcache.passes.skeleton import Skeleton, Skeletons, reads
from fxcache.passes.units import Unit


@dataclass(frozen=True)
class Stream:
    """A tensor that leaves the span, and what of it a hit renews (None: it is kept as it is)."""

    after: fx.Node
    skeleton: Skeleton | None

    @property
    def like(self) -> fx.Node:
        """A node of its shape."""
        if self.skeleton is None or not depends_on_data(self.after):
            return self.after
        return self.skeleton.node

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
    `head_units`, `span_units` and `tail_units` name what lies where, `stack` describes the units of
    the block stack, `notes` say what else was seen. `repeated` are the units of all runs, the
    stack's and others. `input_share` is that of the policy's span.
    """

    facts: Facts
    start: int
    first: int
    head: int
    end: int
    blocks: int
    streams: tuple[Stream, ...]
    is_u_shape: bool = False
    stack: str = ""
    head_units: tuple[str, ...] = ()
    span_units: tuple[str, ...] = ()
    tail_units: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repeated: tuple[Unit, ...] = ()
    input_share: float = 1.0

    @cached_property
    def renewing(self) -> list[fx.Node]:
        """The nodes whose values a hit makes its streams of."""
        skeletons = (s.skeleton for s in self.streams if s.skeleton is not None)
        return [node for skeleton in skeletons for node in reads(skeleton, self.facts)]

    @cached_property
    def hit(self) -> Mask:
        """What a hit runs: back from what is returned to the streams, and what renews these."""
        facts = self.facts
        stop = {facts.position[stream.after] for stream in self.streams}
        todo = [len(facts.nodes) - 1, *(facts.position[node] for node in self.renewing)]
        seen = set(todo)
        while todo:
            for operand in facts.operands[todo.pop()]:
                if operand not in seen and operand not in stop:
                    seen.add(operand)
                    todo.append(operand)
        return mask_of(seen)

    @property
    def skipped_share(self) -> float:
        """Which share of the graph's sample-dependent FLOPs a hit skips, 0 to 1."""
        work = self.facts.flops(self.hit | self.layers)
        return 1 - work / self.facts.total

    @property
    def layers(self) -> Mask:
        """The layers that skeletons go through."""
        return union(s.skeleton.layers for s in self.streams if s.skeleton is not None)

    @property
    def stream_bytes(self) -> int:
        return sum(bytes_of(stream.after) for stream in self.streams)

    def __str__(self) -> str:
        return (
            f"{self.stack}: a hit skips {self.skipped_share:.0%} of the work, "
            f"{len(self.span_units)} of {len(self.head_units + self.span_units + self.tail_units)} "
            f"units"
        )


def try_cut(
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
    head = skeletons.head
    cut = Cut(facts, start, head, head, end, end, streams, is_u_shape)
    largest = max(bytes_of(node) for node in kept)
    if not _are_renewed(streams):
        # No residual: then the tail must read features of the head that are fresh.
        fresh = [n for n in crossing if n not in kept and facts.needs(n) & facts.costly]
        if not is_u_shape or not any(bytes_of(n) >= MAIN * largest for n in fresh):
            return None
    elif not all(map(_are_renewed, _by_output(cut))):
        return None
    return cut if _moves(cut) else None


def _are_renewed(streams: Sequence[Stream]) -> bool:
    """Whether a hit renews half of `streams`, small ones left aside."""
    largest = max((bytes_of(s.after) for s in streams), default=0)
    main = [s for s in streams if bytes_of(s.after) >= MAIN * largest]
    renewed = sum(bytes_of(s.after) * s.share for s in main)
    return 2 * renewed >= sum(bytes_of(s.after) for s in main)


def _by_output(cut: Cut) -> list[list[Stream]]:
    """The streams that each main output is made of on a hit."""
    facts, streams = cut.facts, cut.streams
    if len(streams) == 1:
        return []
    made = {facts.position[s.after]: 1 << i for i, s in enumerate(streams)}
    for p in sorted(positions(cut.hit)):
        made[p] = union(made.get(operand, 0) for operand in facts.operands[p])
    return [
        [streams[i] for i in positions(made.get(facts.position[node], 0))]
        for node in facts.main_outputs
    ]


def _moves(cut: Cut) -> bool:
    """Whether on a hit every main output depends on the sample."""
    facts, streams = cut.facts, cut.streams
    moving = {facts.position[s.after] for s in streams if s.skeleton is not None}
    moving |= {facts.position[sample] for sample in facts.samples}
    still = {facts.position[s.after] for s in streams} - moving
    for p in sorted(positions(cut.hit)):
        if p not in still and not moving.isdisjoint(facts.operands[p]):
            moving.add(p)
    return all(facts.position[node] in moving for node in facts.main_outputs)


def is_on_chain(cut: Cut) -> bool:
    """Whether what is renewed comes out of the head's units: else the run is a side branch."""
    facts = cut.facts
    own = heavy_between(facts, cut.start, cut.head)
    work = facts.flops(own)
    leaves = union(s.skeleton.leaves for s in cut.streams if s.skeleton is not None)
    return work == 0 or facts.flops(own & facts.closure(leaves)) >= 0.3 * work


def heavy_between(facts: Facts, start: int, end: int) -> Mask:
    """The heavy nodes behind `start` up to and with `end`."""
    return mask_of(p for p in facts.heavy if start < p <= end)


def check_writes(cut: Cut) -> None:
    """Raise CaptureError if the span computes what the model writes into an input or a buffer: a
    hit would write something else.
    """
    facts = cut.facts
    afters = facts.mask(stream.after for stream in cut.streams)
    for written, value in facts.inputs.written.items():
        if facts.depends(value) and facts.needs(value) & afters:
            name = facts.inputs.paths.get(written) or facts.inputs.sources.get(written)
            raise CaptureError(
                f"the model writes in place into {name or written.name}, and what it writes comes "
                f"out of the block stack: a hit would write something else. Let the model return "
                f"a new tensor"
            )
