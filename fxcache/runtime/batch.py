"""Several requests in one call: each decides by itself, and the pieces run on the rows of many.

::

    head(all rows) -> what each request measured
    hit(rows of those that hit)       miss(rows of those that miss)

A request keeps the state that it has when it is called alone. What the pieces read of it is put
together for a call; what they write is put back. A forecast is made before, request by request, as
each has weights of its own: the hit adds it as it is.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from fxcache.errors import BatchError
from fxcache.kernels import reference
from fxcache.passes.store import largest_kept, saturated
from fxcache.runtime import apart
from fxcache.runtime.executor import Hit, Miss, Read, StepExecutor, Steps, Work
from fxcache.runtime.regions import Begins, Evaluation, Missed, Wiring
from fxcache.runtime.rows import Layout, Values
from fxcache.runtime.session import Outdated
from fxcache.runtime.state import Buffers

#: One entry a stream, for many requests.
Rings = tuple[tuple[torch.Tensor], ...]


@dataclass(eq=False, repr=False)
class Batch:
    """The compiled pieces of one graph, for any number of requests.

    Args:
        head: all the pieces, of which the head is used.
        body: hit and miss, which take what crosses among their inputs.
        writes_on_hit: whether a hit changes what is kept.
        make_regions: runs the pieces of a wiring as CUDA graphs.
        buckets: where these, which want buffers that stay, keep those of so many rows; then only
            1, 2, 4, 8, ... requests run together, the last one several times.
        is_checked: it is known that requests are computed apart, or nobody can tell (the graph
            draws random numbers).
    """

    head: Wiring
    body: Wiring
    layout: Layout
    writes_on_hit: bool
    make_regions: Callable[[Wiring], Begins] | None = None
    buckets: dict[Any, Any] | None = None
    is_checked: bool = False

    def begin_all(self, inputs: Values, buffers: Sequence[Buffers]) -> "Together":
        """Run the head, for requests with these buffers."""
        ids = self.padded(range(len(buffers)))
        values, measured = self.layout.take(inputs, ids, len(buffers)), []
        if self.head.compiled.head is not None:
            evaluation = self.run(self.head, values, [buffers[i] for i in ids], ())
            values, measured = list(evaluation.values), evaluation.read()
        width = len(measured) // len(ids)
        each = [measured[i * width : (i + 1) * width] for i in range(len(buffers))]
        return Together(self, values, list(buffers), len(ids), each)

    def begin(self, inputs: Values, buffers: Buffers) -> Evaluation:
        """Run the head, for one request: in the place of `Wiring`."""
        return _Alone(self.begin_all(inputs, [buffers]))

    def run(
        self,
        wiring: Wiring,
        values: Values,
        requests: Sequence[Buffers],
        rings: Rings,
    ) -> Evaluation:
        """Begin to run the pieces of `wiring` on rows that were put together, of these requests."""
        given = Buffers(self.merged_kept(requests), rings)
        if self.make_regions is None or self.buckets is None:
            return wiring.begin(tuple(values), given)
        key = (wiring, tuple(values[at] for at in self.layout.sizes))
        if key not in self.buckets:
            self.buckets[key] = self.make_regions(wiring), given
        regions, buffers = self.buckets[key]
        for own, now in zip(buffers.all(), given.all(), strict=True):
            own.copy_(now)
        evaluation: Evaluation = regions.begin(tuple(values), buffers)
        return evaluation

    def padded(self, ids: Sequence[int]) -> list[int]:
        """`ids`, of buckets as many as fill one: the last again."""
        number = len(ids) if self.buckets is None else 1 << (len(ids) - 1).bit_length()
        return [*ids, *[ids[-1]] * (number - len(ids))]

    # --- what requests keep, put together and put back ---

    def merged_kept(self, buffers: Sequence[Buffers]) -> dict[str, torch.Tensor]:
        """What is measured, of these requests; what has no rows is repeated for each row."""
        rows = self.layout.per_request

        def of_rows(tensor: torch.Tensor, dimension: int | None) -> torch.Tensor:
            return tensor.expand(rows, *tensor.shape) if dimension is None else tensor

        return {
            key: torch.cat([of_rows(own.kept[key], dim) for own in buffers], dim or 0)
            for key, dim in self.layout.kept.items()
        }

    def put_back(self, kept: Mapping[str, torch.Tensor], buffers: Sequence[Buffers]) -> None:
        """Give each request what was written of it."""
        for key, dimension in self.layout.kept.items():
            parts = kept[key].chunk(len(buffers), dimension or 0)
            for own, part in zip(buffers, parts, strict=True):
                own.kept[key].copy_(part[0] if dimension is None else part)

    def forecasts(self, works: Sequence[Hit], buffers: Sequence[Buffers]) -> Rings:
        """For each stream, what the requests' rings forecast."""
        merged = []
        for stream, (dimension, dtype, device) in enumerate(self.layout.streams):
            each = [
                _forecast(own.rings[stream], work.weights, dtype, device)
                for work, own in zip(works, buffers, strict=True)
            ]
            merged.append((torch.cat(each, dimension),))
        return tuple(merged)

    def fresh(self, buffers: Sequence[Buffers]) -> Rings:
        """For each stream, memory for the residuals of these requests."""
        merged = []
        for stream, (dimension, dtype, device) in enumerate(self.layout.streams):
            shape = list(buffers[0].rings[stream][0].shape)
            shape[dimension] *= len(buffers)
            merged.append((torch.empty(shape, dtype=dtype, device=device),))
        return tuple(merged)


@dataclass(eq=False)
class Together:
    """One evaluation of several requests between its head and their decisions.

    `values` are those of `padded` requests, of which the first have `buffers` and `measured`.
    """

    batch: Batch
    values: list[Any]
    buffers: list[Buffers]
    padded: int
    measured: list[list[float]]

    def hit(self, asked: Mapping[int, Hit]) -> dict[int, Values]:
        """The outputs of requests that hit."""
        batch, ids = self.batch, self.batch.padded(list(asked))
        buffers, values = self._rows(ids)
        rings = batch.forecasts([asked[i] for i in ids], buffers)
        evaluation = batch.run(batch.body, values, buffers, rings)
        outputs = evaluation.hit((1.0,))
        if batch.writes_on_hit:
            batch.put_back(evaluation.buffers.kept, buffers)
        return dict(zip(asked, self._split(outputs, len(ids)), strict=False))

    def miss(self, asked: Mapping[int, Miss]) -> dict[int, Missed]:
        """The outputs and the sums of the error of requests that miss."""
        batch, ids = self.batch, self.batch.padded(list(asked))
        buffers, values = self._rows(ids)
        rings = batch.fresh(buffers)
        evaluation = batch.run(batch.body, values, buffers, rings)
        outputs, _ = evaluation.miss(0)
        own = evaluation.buffers
        batch.put_back(own.kept, buffers)
        streams = zip(own.rings, batch.layout.streams, strict=True)
        parts = [ring[0].chunk(len(ids), dimension) for ring, (dimension, *_) in streams]
        fresh = list(zip(*parts, strict=True))
        split = self._split(outputs, len(ids))
        stored = (
            _store(asked[i], own, self.buffers[i]) for i, own in zip(asked, fresh, strict=False)
        )
        return dict(zip(asked, zip(split, stored, strict=False), strict=False))

    def _rows(self, ids: Sequence[int]) -> tuple[list[Buffers], list[Any]]:
        return [self.buffers[i] for i in ids], self.batch.layout.take(self.values, ids, self.padded)

    def _split(self, outputs: Values, number: int) -> list[list[Any]]:
        """Each request's outputs."""
        parts = [
            [out] * number if dimension is None else out.chunk(number, dimension)
            for out, dimension in zip(outputs, self.batch.layout.outputs, strict=True)
        ]
        return [[each[i] for each in parts] for i in range(number)]


class _Alone:
    """The evaluation of one request. See `Evaluation`."""

    def __init__(self, together: Together) -> None:
        self.together = together
        self.values, self.buffers = tuple(together.values), together.buffers[0]

    def read(self) -> list[float]:
        return self.together.measured[0]

    def hit(self, weights: Sequence[float]) -> Values:
        return self.together.hit({0: Hit(weights)})[0]

    def miss(self, slot: int, weights: Sequence[float] = ()) -> Missed:
        return self.together.miss({0: Miss(slot, weights)})[0]


class BatchExecutor:
    """Callable in the place of a captured graph, for a batch of requests.

    Args:
        executor: evaluates one of them.
        batch: runs the pieces for all of them.
    """

    def __init__(self, executor: StepExecutor, batch: Batch) -> None:
        self.executor, self.batch = executor, batch
        #: Two threads must not use the same buckets.
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Values:
        calls = self.executor.session.calls.get() or []
        try:
            with self._lock:
                own = self.batch.layout.split(inputs)
                for call, given in zip(calls, own, strict=True):
                    self.executor.prepare(call.state, given)
                buffers = [call.state.allocated for call in calls]
                if not self.batch.is_checked:
                    self.batch.is_checked = apart.check(self.batch, inputs, buffers)
                together = self.batch.begin_all(inputs, buffers)
                current = self.executor.weights.now(inputs)
                each = map(self.executor.steps, calls, own, repeat(current))
                outputs = _driven(list(each), together)
        except (Outdated, BatchError):  # nothing was written
            raise
        except BaseException:
            for call in calls:
                call.state.forget()  # whatever was half written is never read
            raise
        return [
            parts[0] if dimension is None else torch.cat(parts, dimension)
            for parts, dimension in zip(
                zip(*outputs, strict=True), self.batch.layout.outputs, strict=True
            )
        ]


def _driven(steps: Sequence[Steps], together: Together) -> list[Values]:
    """The outputs of evaluations that are run together: whoever asks for the same, at once."""
    outputs: dict[int, Values] = {}
    asked: dict[int, Work] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(steps)))
    while replies:
        for i, reply in replies.items():
            try:
                asked[i] = steps[i].send(reply)
            except StopIteration as end:
                outputs[i] = end.value
        reads = {i: together.measured[i] for i, work in asked.items() if isinstance(work, Read)}
        hits = {i: work for i, work in asked.items() if isinstance(work, Hit)}
        misses = {i: work for i, work in asked.items() if isinstance(work, Miss)}
        # Who hits may find late that it must miss: it does so with the others.
        replies = reads or (together.hit(hits) if hits else {})
        replies = replies or (together.miss(misses) if misses else {})
        asked = {i: work for i, work in asked.items() if i not in replies}
    return [outputs[i] for i in range(len(steps))]


def _forecast(
    ring: Sequence[torch.Tensor],
    weights: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What the weighted entries of a ring forecast, in the `dtype` that they were computed in."""
    used = [(weight, entry) for weight, entry in zip(weights, ring, strict=True) if weight != 0]
    if [weight for weight, _ in used] == [1.0]:
        return used[0][1].to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    terms = [weight * entry.to(device, wide) for weight, entry in used]
    return sum(terms[1:], terms[0]).to(dtype)


def _store(work: Miss, fresh: Values, buffers: Buffers) -> torch.Tensor:
    """Put the fresh residuals of a request into its ring: the sums of the forecast's error, if
    there is one to compare with.
    """
    total = torch.zeros(2, device=fresh[0].device)
    for ring, residual in zip(buffers.rings, fresh, strict=True):
        slot = ring[work.slot]
        limit = largest_kept(residual.dtype, slot.dtype)
        value = residual if limit is None else saturated(residual, limit, slot.dtype)
        if not any(work.weights):
            slot.copy_(value)
            continue
        others = (entry for at, entry in enumerate(ring) if at != work.slot)
        past = [_real(entry.to(residual.device, residual.dtype)) for entry in others]
        weights = torch.tensor(work.weights).to(residual.device, non_blocking=True)
        total += reference.refresh_error(_real(value), None, _real(slot), past, weights)
    return total


def _real(value: torch.Tensor) -> torch.Tensor:
    """The parts of `value`, if it is complex."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
