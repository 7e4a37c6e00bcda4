"""Say what the pass finds in a model and what it would do, without compiling anything."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.capture.backend import Backend
from fxcache.capture.rewrite import rewrite
from fxcache.capture.runner import Runner
from fxcache.errors import FxCacheError, PolicyError, StackNotFoundError
from fxcache.passes.cut import Cut, Stream
from fxcache.passes.graph import GraphInputs, bytes_of, shape_of, tensor_of
from fxcache.passes.probe import Probe

#: Some policies need a number of steps, though the first is computed whatever it is.
ANY = 28


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
        is_u_shape: what is skipped lies below a level of skips, whose readers run on every hit.
        sample: names of the noisy inputs.
        streams: what leaves the span and is cached.
        probe: what is measured.
        timestep: the name of the time input, None if the graph has none.
        flops: FLOPs of one evaluation that depend on the sample; skipped_flops: of these, what a
            hit skips.
        audit: how well a hit follows a slightly moved sample: 0 exactly, 1 as returning the old
            output would (None: it could not be tried).
        refused: for each graph that was not rewritten, why; the largest first.
        notes: what else was seen.
    """

    model: str
    stack: str | None = None
    head_blocks: tuple[str, ...] = ()
    span_blocks: tuple[str, ...] = ()
    tail_blocks: tuple[str, ...] = ()
    is_u_shape: bool = False
    sample: tuple[str, ...] = ()
    streams: tuple[StreamInfo, ...] = ()
    probe: str | None = None
    timestep: str | None = None
    flops: int = 0
    skipped_flops: int = 0
    audit: float | None = None
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        shape = ", a U shape" if self.is_u_shape else ""
        audit = "not tried" if self.audit is None else f"{self.audit:.2f} (below 1 it follows)"
        lines = [
            f"{self.model}: {len(self.blocks)} blocks in {self.stack}{shape}"
            if self.blocks
            else f"{self.model}: the span is {self.stack}",
            f"  head   {_run(self.head_blocks)}",
            f"  span   {_run(self.span_blocks)}",
            f"  tail   {_run(self.tail_blocks)}",
            f"  sample {', '.join(self.sample)}",
            f"  probe  {self.probe or 'nothing is measured'}",
            *(f"  stream {stream}" for stream in self.streams),
            f"  time   {self.timestep or 'not found: steps are counted by evaluations'}",
            f"  audit  {audit}",
            f"  a hit skips {self.skipped_share:.1%} of {self.flops / 1e9:.3g} GFLOP and needs "
            f"{cached / 2**20:.3g} MiB a branch",
            *(f"  note   {note}" for note in self.notes),
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
    """A backend that remembers what it found."""

    found: tuple[Cut, Probe | None] | None = None

    def compile_graph(self, gm: fx.GraphModule, inputs: GraphInputs) -> Callable[..., Any]:
        try:
            cut, probe = self.analyse(gm, inputs)
        except PolicyError:
            raise
        except FxCacheError as error:
            self.refused.append((len(gm.graph.nodes), str(error)))
            return gm
        self.found = cut, probe
        return rewrite(gm, cut, probe, self.session, self.compilers)


def explain_model(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """Call `denoiser`, which is fresh and eager, once, and describe what the pass found."""
    runner: Runner = denoiser._fxcache
    model = type(runner.model).__name__
    old = runner.backend
    analyst = _Analyst(
        runner.session,
        runner.compilers,
        argument_names=old.argument_names,
        num_weights=old.num_weights,
    )
    runner.use(analyst)
    with torch.no_grad(), denoiser.trajectory(ANY), suppress(StackNotFoundError):  # no graph at all
        denoiser(*args, **kwargs)
    refused = tuple(f"{reason} ({nodes} nodes)" for nodes, reason in sorted(analyst.refused)[::-1])
    if analyst.found is None:
        return Explanation(model, refused=refused)
    return _describe(model, *analyst.found, runner.session.report().audit, refused)


def _describe(
    model: str, cut: Cut, probe: Probe | None, audit: float | None, refused: tuple[str, ...]
) -> Explanation:
    facts = cut.facts
    inputs = facts.inputs
    return Explanation(
        model,
        stack=cut.stack,
        head_blocks=cut.head_units,
        span_blocks=cut.span_units,
        tail_blocks=cut.tail_units,
        is_u_shape=cut.is_u_shape,
        sample=tuple(inputs.paths.get(node, node.name) for node in facts.samples),
        streams=tuple(map(_stream, cut.streams)),
        probe=None if probe is None else _measured(probe),
        timestep=None if inputs.timestep is None else inputs.data[inputs.timestep],
        flops=facts.total,
        skipped_flops=round(cut.skipped_share * facts.total),
        audit=audit,
        refused=refused,
        notes=cut.notes,
    )


def _stream(stream: Stream) -> StreamInfo:
    value = tensor_of(stream.after)
    return StreamInfo(
        stream.after.name,
        tuple(size if isinstance(size, int) else str(size) for size in value.shape),
        str(value.dtype).removeprefix("torch."),
        stream.skeleton is not None,
        bytes_of(stream.after),
    )


def _measured(probe: Probe) -> str:
    kept = "" if probe.skeleton is None else " - " + ", ".join(n.name for n in probe.reads[1:2])
    return f"{probe.node.name}{kept} {list(shape_of(probe.node) or ())}"
