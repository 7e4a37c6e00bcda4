"""Write what a probe needs into the pieces: the metric, and what is kept for the next one.

::

    head:  change = residual_diff(probe, reference)     -> metric
    miss:  reference <- probe                            (and, where compared with the previous
    hit:   reference <- probe                             step, on a hit, too)

The head writes nothing: an evaluation that is begun anew measures the same again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.kernels import reference, spectral
from fxcache.passes.graph import tensor_of
from fxcache.passes.probe import Probe
from fxcache.policy.probe import FilteredInput, ModelInput

if TYPE_CHECKING:
    from fxcache.passes.piece_graph import PieceGraph

REFERENCE = "fxcache_reference"
#: Scratch of the kernel that measures.
TICKETS = "fxcache_tickets"
#: Of a `ModelInput`: float32 [2], the rate k and the size of the last computed output; and the
#: input and output of the last computed step.
STATISTICS, INPUT, OUTPUT = "fxcache_statistics", "fxcache_input", "fxcache_output"
#: What the head made of a `FilteredInput`.
FILTERED = "fxcache_filtered"


class Measurement:
    """Writes the measurement of `probe` into pieces; `output` is what leaves the span.

    `kernels` is `fxcache.kernels.reference` or `fxcache.kernels.ops`. Ranks of the process `groups`
    share the sums, before any ratio: all of them measure the same, and decide alike.
    """

    def __init__(
        self,
        probe: Probe,
        output: fx.Node,
        timestep: fx.Node | None,
        kernels: Any,
        groups: Sequence[str] = (),
    ) -> None:
        self.probe, self.output, self.timestep = probe, output, timestep
        self.kernels, self.groups = kernels, tuple(groups)

    def kept(self) -> dict[str, FakeTensor]:
        """Fake tensors like those that are kept between evaluations, by key."""
        after = tensor_of(self.probe.node)
        with after.fake_mode, torch.no_grad():
            probe = after.new_empty(after.shape)
            tensors = {
                REFERENCE: probe,
                TICKETS: probe.new_empty(probe.shape[:1], dtype=torch.int32),
            }
            if isinstance(self.probe.kind, ModelInput):
                tensors[STATISTICS] = probe.new_empty((2,), dtype=torch.float32)
                tensors[INPUT] = probe.new_empty(probe.shape)
                output = tensor_of(self.output)
                tensors[OUTPUT] = output.new_empty(output.shape)
        return cast(dict[str, FakeTensor], tensors)

    def measure(self, graph: "PieceGraph") -> tuple[Any, dict[str, fx.Node]]:
        """In the head: float32 [1] (metric) or [2] (metric, timestep), and values that hit and miss
        need, by key. One read-back serves metric and timestep.
        """
        time = None if self.timestep is None else graph.proxy(graph.read(self.timestep))
        values = self._values(graph)
        results: dict[str, fx.Node] = {}
        if isinstance(self.probe.kind, FilteredInput):
            values = [self._filtered(values[0], time, self.probe.kind)]
            results[FILTERED] = values[0].node
        metric = self._metric(graph, self._change(graph, *values))
        if time is None:
            return torch.stack([metric]), results
        time = time.reshape(-1).amax().to(device=metric.device, dtype=torch.float32)
        return torch.stack([metric, time]), results

    def _change(self, graph: "PieceGraph", after: Any, before: Any = None) -> Any:
        """float32 [B, 2]: sum |p - p*| and sum |p*|; of all samples and ranks [1, 2]."""
        operands = [after, before, graph.proxy(graph.argument(REFERENCE))]
        operands = [None if each is None else self._real(each) for each in operands]
        if self.kernels is not reference:
            operands.append(graph.proxy(graph.argument(TICKETS)))
        sums = self.kernels.residual_diff(*operands)
        if not self.groups:
            return sums
        return shared(sums.sum(0, keepdim=True), self.groups)  # ranks may have other batches

    def _real(self, value: Any) -> Any:
        """The parts of what is measured, if it is complex."""
        is_complex = tensor_of(self.probe.node).is_complex()
        return torch.view_as_real(value.resolve_conj()) if is_complex else value

    def _metric(self, graph: "PieceGraph", change: Any) -> Any:
        """The metric out of the sums. NaN and Inf stay."""
        if isinstance(self.probe.kind, FilteredInput):
            total, scale = change.unbind(1)
            return (total / (scale + 1e-16)).mean()
        total, scale = change.sum(0).unbind(0)
        if isinstance(self.probe.kind, ModelInput):
            rate, size = graph.proxy(graph.argument(STATISTICS)).unbind(0)
            number = graph.proxy(graph.read(self.probe.node)).numel()
            if self.groups:
                number = shared(torch.ones_like(total) * number, self.groups)
            return rate * (total / number) / size
        # 0 / 0 of two equal all-zero residuals (zero-initialised gates) is no difference; NaN / NaN
        # is.
        return torch.where(total == 0, total, total / scale)

    def _filtered(self, value: Any, time: Any, kind: FilteredInput) -> Any:
        return spectral.signal_filter(value, time, list(self.probe.axes), kind.power)

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """What is measured is made of these."""
        return self.probe.reads

    def _values(self, graph: "PieceGraph") -> list[Any]:
        """What is measured: [p], or [after, before] of a residual."""
        after, skeleton = graph.proxy(graph.read(self.probe.node)), self.probe.skeleton
        if skeleton is None:
            return [after]
        before = graph.proxy(graph.skeletons.write(skeleton))
        dtype = tensor_of(self.probe.node).dtype
        return [after, before if skeleton.dtype == dtype else before.to(dtype)]

    def on_hit(self, graph: "PieceGraph") -> None:
        """Keep what the next evaluation is compared with, if that is the previous step's."""
        if self.probe.kind.reference == "previous":
            self._keep_probe(graph)

    def on_miss(self, graph: "PieceGraph") -> None:
        """Keep what the next evaluation is compared with."""
        if isinstance(self.probe.kind, ModelInput):
            self._keep_statistics(graph)
        self._keep_probe(graph)

    def _keep_probe(self, graph: "PieceGraph") -> None:
        filtered = isinstance(self.probe.kind, FilteredInput)
        values = [graph.proxy(graph.argument(FILTERED))] if filtered else self._values(graph)
        kept = graph.proxy(graph.argument(REFERENCE))
        self.kernels.refresh(values[0], values[1] if len(values) > 1 else None, kept)

    def _means(self, *values: Any) -> Any:
        """The mean size of each value's elements, over all ranks."""
        if not self.groups:
            return [value.abs().mean() for value in values]
        totals = [value.abs().sum() for value in values]
        counts = [torch.ones_like(totals[0]) * value.numel() for value in values]
        total, count = shared(torch.stack([*totals, *counts]), self.groups).chunk(2)
        return (total / count).unbind(0)

    def _keep_statistics(self, graph: "PieceGraph") -> None:
        """How fast the output followed the input between the last two computed steps."""
        x = graph.proxy(graph.read(self.probe.node))
        y = graph.proxy(graph.read(self.output))
        last_x, last_y, statistics = (
            graph.proxy(graph.argument(key)) for key in (INPUT, OUTPUT, STATISTICS)
        )
        of_x = self._real(x).float() - self._real(last_x).float()
        moved, by, size = self._means(y.float() - last_y.float(), of_x, y.float())
        statistics.copy_(torch.stack([moved / by, size]))
        last_x.copy_(x)
        last_y.copy_(y)


def shared(sums: Any, groups: Sequence[str]) -> Any:
    """`sums` (a tensor or a proxy) over all ranks of these process groups."""
    for group in groups:
        collectives = torch.ops._c10d_functional
        sums = collectives.wait_tensor.default(collectives.all_reduce.default(sums, "sum", group))
    return sums
