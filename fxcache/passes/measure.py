"""Write what a probe needs into the pieces: the metric, and what is kept for the next one.

::

    head:  change = residual_diff(probe, reference)     -> metric
    miss:  reference <- probe                            (and, where compared with the previous
    hit:   reference <- probe                             step, on a hit, too)

The head writes nothing: an evaluation that is begun anew measures the same again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.kernels import reference, spectral
from fxcache.passes.graph import tensor_of
from fxcache.passes.piece_graph import PieceGraph
from fxcache.passes.probe import Probe
from fxcache.passes.renew import renewed
from fxcache.passes.rows import Rows
from fxcache.policy.probe import FilteredInput, ModelInput

REFERENCE = "fxcache_reference"
#: Scratch of the kernel that measures.
TICKETS = "fxcache_tickets"
#: Of a `ModelInput`: float32 [2], the rate k and the size of the last computed output; and the
#: input and output of the last computed step.
STATISTICS, INPUT, OUTPUT = "fxcache_statistics", "fxcache_input", "fxcache_output"
#: What the head made of a `FilteredInput`.
FILTERED = "fxcache_filtered"


@dataclass(frozen=True)
class Measurement:
    """Writes the measurement of `probe` into pieces; `output` is what leaves the span.

    `kernels` is `fxcache.kernels.reference` or `fxcache.kernels.ops`. Ranks of the process `groups`
    share the sums, before any ratio: all of them measure the same, and decide alike. With `rows`,
    each request of a batch is measured by itself, and what is kept has a row's values in each row.
    """

    probe: Probe
    output: fx.Node
    timestep: fx.Node | None
    kernels: Any
    groups: Sequence[str] = ()
    rows: Rows | None = None

    def measure(self, graph: PieceGraph) -> tuple[Any, dict[str, fx.Node]]:
        """In the head: float32 [1] (metric) or [2] (metric, timestep) of each request, and values
        that hit and miss need, by key. One read-back serves metric and timestep.
        """
        time = None if self.timestep is None else graph.proxy(graph.read(self.timestep))
        (after, before), kind = self._values(graph), self.probe.kind
        results: dict[str, fx.Node] = {}
        if isinstance(kind, FilteredInput):
            after = spectral.signal_filter(after, time, list(self.probe.axes), kind.power)
            results[FILTERED] = after.node
        metric = self._metric(graph, self._change(graph, after, before))
        measured = [metric]
        if time is not None:
            time = self._latest(time).to(device=metric.device, dtype=torch.float32)
            measured.append(time.expand_as(metric))
        return torch.stack(measured, dim=1).flatten(), results

    def _latest(self, time: Any) -> Any:
        """The largest time, [1], or of each request."""
        assert self.timestep is not None
        if self.rows is None or self.rows.dimension(tensor_of(self.timestep)) is None:
            return time.reshape(-1).amax().reshape(1)
        return self._by_request(time, self.timestep).flatten(1).amax(1)

    def _by_request(self, value: Any, node: fx.Node) -> Any:
        """`value`, which has the rows of `node`, as [requests, rows, ...]; else as one request."""
        if self.rows is None:
            return value[None]
        return value.unflatten(0, (-1, self.rows.leading(node)))

    def _change(self, graph: PieceGraph, after: Any, before: Any) -> Any:
        """float32 [B, 2]: sum |p - p*| and sum |p*|; of all ranks and a request's rows [1, 2]."""
        dtype = tensor_of(self.probe.node).dtype
        operands = [as_real(each, dtype) for each in (after, before, graph.argument(REFERENCE))]
        if self.kernels is not reference:
            operands.append(graph.argument(TICKETS))
        sums = self.kernels.residual_diff(*operands)
        if not self.groups:
            return sums
        together = self._by_request(sums, self.probe.node).sum(1)  # ranks may have other batches
        return shared(together, self.groups)

    def _metric(self, graph: PieceGraph, change: Any) -> Any:
        """The metric out of the sums, [requests]. NaN and Inf stay."""
        # Sums of ranks are of requests already.
        own = change[:, None] if self.groups else self._by_request(change, self.probe.node)
        if isinstance(self.probe.kind, FilteredInput):
            total, scale = own.unbind(2)
            return (total / (scale + 1e-16)).mean(1)
        total, scale = own.sum(1).unbind(1)
        if isinstance(self.probe.kind, ModelInput):
            kept = graph.argument(STATISTICS)
            rate, size = (kept if self.rows is None else kept[:: self.rows.per_request]).unbind(-1)
            sample = graph.proxy(graph.read(self.probe.node))
            number = self._by_request(sample, self.probe.node)[0].numel()
            if self.groups:
                number = shared(torch.ones_like(total) * number, self.groups)
            return rate * (total / number) / size
        # 0 / 0 of two equal all-zero residuals (zero-initialised gates) is no difference; NaN / NaN
        # is.
        return torch.where(total == 0, total, total / scale)

    def _values(self, graph: PieceGraph) -> tuple[Any, Any]:
        """What is measured, and what is taken away from it to get a residual (None: nothing)."""
        after, skeleton = graph.proxy(graph.read(self.probe.node)), self.probe.skeleton
        if skeleton is None:
            return after, None
        return after, renewed(graph, skeleton, tensor_of(self.probe.node).dtype)

    def on_hit(self, graph: PieceGraph) -> None:
        """Keep what the next evaluation is compared with, if that is the previous step's."""
        if self.probe.kind.reference == "previous":
            self._keep_probe(graph)

    def on_miss(self, graph: PieceGraph) -> None:
        """Keep what the next evaluation is compared with."""
        if isinstance(self.probe.kind, ModelInput):
            self._keep_statistics(graph)
        self._keep_probe(graph)

    def _keep_probe(self, graph: PieceGraph) -> None:
        is_filtered = isinstance(self.probe.kind, FilteredInput)
        values = (graph.argument(FILTERED), None) if is_filtered else self._values(graph)
        self.kernels.refresh(*values, graph.argument(REFERENCE))

    def _means(self, *values: Any) -> Any:
        """The mean size of each value's elements, over all ranks; of a batch, of each request."""
        if not self.groups and self.rows is None:
            return [value.abs().mean() for value in values]
        flat = [value.abs().flatten(1) for value in values]
        if not self.groups:
            return [value.mean(1) for value in flat]
        totals = [value.sum(1) for value in flat]
        counts = [torch.ones_like(totals[0]) * value[0].numel() for value in flat]
        total, count = shared(torch.stack([*totals, *counts]), self.groups).chunk(2)
        return (total / count).unbind(0)

    def _keep_statistics(self, graph: PieceGraph) -> None:
        """How fast the output followed the input between the last two computed steps."""
        x = graph.proxy(graph.read(self.probe.node))
        y = graph.proxy(graph.read(self.output))
        last_x, last_y, statistics = map(graph.argument, (INPUT, OUTPUT, STATISTICS))
        dtype = tensor_of(self.probe.node).dtype
        of_x = as_real(x, dtype).float() - as_real(last_x, dtype).float()
        moved, by, size = self._means(
            self._by_request(y.float() - last_y.float(), self.output),
            self._by_request(of_x, self.probe.node),
            self._by_request(y.float(), self.output),
        )
        now = torch.stack([moved / by, size], dim=-1)
        if self.rows is not None:
            now = now[:, None].expand(-1, self.rows.per_request, -1).flatten(0, 1)
        statistics.copy_(now.reshape(statistics.shape))
        last_x.copy_(x)
        last_y.copy_(y)


def kept_fakes(probe: Probe, output: fx.Node) -> dict[str, FakeTensor]:
    """Fake tensors like those that a measurement keeps between evaluations, by key."""
    after, last = tensor_of(probe.node), tensor_of(output)
    with after.fake_mode, torch.no_grad():
        tensors = {
            REFERENCE: after.new_empty(after.shape),
            TICKETS: after.new_empty(after.shape[:1], dtype=torch.int32),
        }
        if isinstance(probe.kind, ModelInput):
            tensors[STATISTICS] = after.new_empty((2,), dtype=torch.float32)
            tensors[INPUT] = after.new_empty(after.shape)
            tensors[OUTPUT] = last.new_empty(last.shape)
    return cast(dict[str, FakeTensor], tensors)


def as_real(value: Any, dtype: torch.dtype) -> Any:
    """`value` of `dtype` (None: there is none), of a complex one its two parts."""
    if value is None or not dtype.is_complex:
        return value
    return torch.view_as_real(value.resolve_conj())


def shared(sums: Any, groups: Sequence[str]) -> Any:
    """`sums` (a tensor or a proxy) over all ranks of these process groups."""
    for group in groups:
        collectives = torch.ops._c10d_functional
        sums = collectives.wait_tensor.default(collectives.all_reduce.default(sums, "sum", group))
    return sums
