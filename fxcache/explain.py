"""Say what the pass finds in a model and what it would do, without compiling anything."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcache.backend import Backend
from fxcache.capture import graph_inputs, tensor_of
from fxcache.errors import FxCacheError, PolicyError, StackNotFoundError
from fxcache.integrations import hooks
from fxcache.passes.branch import state_fakes
from fxcache.passes.cut import Cut
from fxcache.passes.probe import Probe
from fxcache.policy import Policy
from fxcache.runner import Runner, Settings
from fxcache.stack import node_flops


@dataclass(frozen=True)
class StreamInfo:
    """A tensor that leaves the span and is cached: as a residual, or as it is."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    is_residual: bool
    nbytes: int

    def __str__(self) -> str:
        how = "residual" if self.is_residual else "as it is"
        return f"{self.name} {list(self.shape)} {self.dtype}, cached {how}"


@dataclass(frozen=True)
class Explanation:
    """What the pass found in a model.

    Attributes:
        model: class name.
        stack: the block stack, as ``path (blocks)`` joined by ``+``; None if there is none; "the
            whole model" if the policy's span is that.
        blocks, head_blocks, span_blocks, tail_blocks: paths of the blocks, in execution order.
        streams: what leaves the span and is cached.
        probe: what is measured.
        timestep: the name of the time input, None if the graph has none.
        flops: FLOPs of one evaluation; skipped_flops: those that a hit skips.
        refused: for each graph that was not rewritten, why; the largest first.
    """

    model: str
    stack: str | None = None
    head_blocks: tuple[str, ...] = ()
    span_blocks: tuple[str, ...] = ()
    tail_blocks: tuple[str, ...] = ()
    streams: tuple[StreamInfo, ...] = ()
    probe: str | None = None
    timestep: str | None = None
    flops: int = 0
    skipped_flops: int = 0
    refused: tuple[str, ...] = field(default=())

    @property
    def blocks(self) -> tuple[str, ...]:
        return (*self.head_blocks, *self.span_blocks, *self.tail_blocks)

    @property
    def skipped_share(self) -> float:
        """The share of an evaluation's FLOPs that a hit skips, 0 to 1."""
        return self.skipped_flops / self.flops if self.flops else 0.0

    def __str__(self) -> str:
        if self.stack is None:
            return "\n".join([f"{self.model}: no block stack", *self._refusals()])
        cached = sum(stream.nbytes for stream in self.streams)
        lines = [
            f"{self.model}: {len(self.blocks)} blocks in {self.stack}"
            if self.blocks
            else f"{self.model}: the span is {self.stack}",
            f"  head   {_run(self.head_blocks)}",
            f"  span   {_run(self.span_blocks)}",
            f"  tail   {_run(self.tail_blocks)}",
            f"  probe  {self.probe or 'nothing is measured'}",
            *(f"  stream {stream}" for stream in self.streams),
            f"  time   {self.timestep or 'not found: steps are counted by evaluations'}",
            f"  a hit skips {self.skipped_share:.1%} of {self.flops / 1e9:.3g} GFLOP and needs "
            f"{cached / 2**20:.3g} MiB a branch",
            *self._refusals(),
        ]
        return "\n".join(lines)

    def _refusals(self) -> list[str]:
        lines = [f"  refused: {reason}" for reason in self.refused[:2]]
        rest = len(self.refused) - len(lines)
        return [*lines, f"  refused: {rest} smaller graphs"] if rest else lines


def _run(paths: Sequence[str]) -> str:
    if not paths:
        return "-"
    ends = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    return f"{ends} ({len(paths)})"


class _Analyst(Backend):
    """A backend that looks and changes nothing."""

    cut: Cut | None = None
    timestep: str | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.session.graphs += 1
        self.session.evaluations += 1
        inputs = graph_inputs(gm.graph, self.argument_names)
        try:
            self.cut = self.analyse(gm, inputs)
            self.timestep = inputs.data.get(inputs.timestep) if inputs.timestep else None
        except PolicyError:
            raise
        except FxCacheError as error:
            self.refused.append((len(gm.graph.nodes), str(error)))
        return gm.forward


def explain_model(
    model: nn.Module, policy: Policy, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Explanation:
    """Run the model once through Dynamo, look at its graphs and describe what was found."""
    runner = Runner(model, Settings(policy, backend="eager", fullgraph=False))
    names, weights = runner.backend.argument_names, runner.backend.list_weights
    analyst = _Analyst(runner.session, runner.lowering, argument_names=names, list_weights=weights)
    runner.use(analyst)
    with torch.no_grad(), suppress(StackNotFoundError):  # no graph at all
        hooks.around(model, lambda *args, **kwargs: runner.evaluate(args, kwargs), *args, **kwargs)
    refused = tuple(f"{reason} ({nodes} nodes)" for nodes, reason in sorted(analyst.refused)[::-1])
    if analyst.cut is None:
        return Explanation(type(model).__name__, refused=refused)
    return _describe(type(model).__name__, analyst.cut, analyst.timestep, refused)


def _describe(
    model: str, found: Cut, timestep: str | None, refused: tuple[str, ...]
) -> Explanation:
    stack = found.stack
    paths = [block.path for block in stack.blocks] if stack is not None else []
    first = paths.index(found.span_blocks[0].path) if paths else 0
    last = first + len(found.span_blocks)
    nodes = (*found.head, *found.span, *found.tail)
    _, residuals = state_fakes(found)
    streams = [
        StreamInfo(
            stream.after.name,
            tuple(size if isinstance(size, int) else str(size) for size in residual.shape),
            str(residual.dtype).removeprefix("torch."),
            stream.before is not None,
            _nbytes(residual),
        )
        for stream, residual in zip(found.streams, residuals, strict=True)
    ]
    probe = found.probe
    return Explanation(
        model,
        stack="the whole model" if stack is None else str(stack),
        head_blocks=tuple(paths[:first]),
        span_blocks=tuple(paths[first:last]),
        tail_blocks=tuple(paths[last:]),
        streams=tuple(streams),
        probe=None if probe is None else _measured(probe),
        timestep=timestep,
        flops=sum(map(node_flops, nodes)) if stack is None else stack.graph_flops,
        skipped_flops=sum(node_flops(node) for node in found.span),
        refused=refused,
    )


def _measured(probe: Probe) -> str:
    names = " - ".join(node.name for node in probe.nodes)
    return f"{names} {list(tensor_of(probe.after).shape)}"


def _nbytes(fake: torch.Tensor) -> int:
    """The memory of a tensor like `fake`, symbolic sizes at their hints."""
    sizes = (size if isinstance(size, int) else size.node.hint or 1 for size in fake.shape)
    return math.prod(sizes) * fake.element_size()
