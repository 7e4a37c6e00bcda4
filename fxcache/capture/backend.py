"""The compiler backend: a captured graph in, a step executor out.

It serves `fxcache.transform` (which brings its own session) and
``torch.compile(backend="fxcache")``.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxcache.capture import torch_internals as internals
from fxcache.capture.compile import Compilers
from fxcache.capture.functional import functionalized
from fxcache.capture.rewrite import rewrite
from fxcache.errors import StackNotFoundError
from fxcache.options import Options
from fxcache.passes.choose import find_cut
from fxcache.passes.cut import Cut, check_writes
from fxcache.passes.facts import analyse
from fxcache.passes.graph import COUNTED_AS, GraphInputs, op_name, shape_of, tensor_of
from fxcache.passes.pieces import is_random
from fxcache.passes.probe import Probe, find_probe
from fxcache.passes.rows import Rows
from fxcache.policy import AdaptiveCache, check_policy
from fxcache.runtime.session import Session

log = logging.getLogger("fxcache")

# What the registered backend takes among its options, besides the policy.
_OWN_OPTIONS = ("backend", "outline", "kernel", "cache_dtype", "cache_device", "audit", "sync")
#: A graph of a broken model whose blocks hold less than this of the model's parameters is beside
#: its stack, or a part of it.
MIN_WEIGHTS = 0.4


class Backend:
    """What is handed to torch.compile: one a denoiser, with its session.

    Args:
        session: where state and records are kept.
        compilers: compile the pieces, and graphs without a stack.
        argument_names: the names of the model's positional arguments.
        num_weights: gives how many elements the model's parameters have. None: it is not known.
        rows_per_request: what is captured is called with batches of requests of so many rows.
    """

    def __init__(
        self,
        session: Session,
        compilers: Compilers,
        *,
        argument_names: tuple[str, ...] = (),
        num_weights: Callable[[], int] | None = None,
        rows_per_request: int | None = None,
    ) -> None:
        self.session, self.compilers, self.rows_per_request = session, compilers, rows_per_request
        self.argument_names, self.num_weights = argument_names, num_weights
        #: The model is one graph. If it is not, graphs without the stack are compiled as they are.
        self.fullgraph = True
        #: Graphs without the stack: how many nodes they have, and why they were refused.
        self.refused: list[tuple[int, str]] = []
        #: The shapes that the inputs of a graph had first, by their names.
        self.shapes: dict[tuple[str, ...], list[tuple[int, ...] | None]] = {}

    def summary(self) -> str:
        """What the largest refused graph was refused for."""
        if not self.refused:
            return "None was captured."
        nodes, reason = max(self.refused)
        return f"The largest of them has {nodes} nodes: {reason}"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if torch.is_grad_enabled():
            log.warning("gradients are enabled: this graph is not cached")
            uncached: Callable[..., Any] = self.compilers.whole(gm, example_inputs)
            return uncached
        try:
            compiled = functionalized(gm, example_inputs, self.compile_graph, self.argument_names)
        except _Refused as refused:
            log.info("compiled as it is: %s", refused)
            self.refused.append((refused.nodes, str(refused)))
            compiled = self.compilers.whole(gm, example_inputs)
        # Counted when it is done: Dynamo may begin a graph anew.
        self.session.graphs += 1
        self.session.recompiles += self.session.evaluations > 0
        return compiled

    def compile_graph(self, gm: fx.GraphModule, inputs: GraphInputs) -> Callable[..., Any]:
        """What runs in the place of a functional graph."""
        try:
            cut, probe = self.analyse(gm, inputs)
        except StackNotFoundError as error:
            is_whole = self.fullgraph and not internals.is_part()
            if is_whole and not isinstance(error, _DropoutError):
                raise
            raise _Refused(str(error), len(gm.graph.nodes)) from error
        rows = None
        if self.rows_per_request is not None:
            rows = Rows.of(cut.facts, self.rows_per_request)
        return rewrite(gm, cut, probe, self.session, self.compilers, rows=rows)

    def analyse(self, gm: fx.GraphModule, inputs: GraphInputs) -> tuple[Cut, Probe | None]:
        """Cut `gm` as the policy asks, and find what it measures."""
        policy = self.session.policy
        if policy.span.whole_model and (not self.fullgraph or internals.is_part()):
            raise StackNotFoundError(
                "the model breaks into graphs, and the policy's span is the whole model"
            )
        with self._counting(inputs):
            facts = analyse(gm.graph, inputs)
            cut = find_cut(facts, policy.span)
        # What is dropped before the span, of a text or a lyric, is no hit's matter.
        inside = range(cut.start + 1, cut.end + 1)
        drops = filter(is_dropout, facts.nodes)
        if any(facts.depends(node) or facts.position[node] in inside for node in drops):
            log.warning("a dropout is on (call model.eval()): this graph is not cached")
            raise _DropoutError("a dropout is on in the blocks")
        if not self.fullgraph and self.num_weights is not None:
            held, whole = _num_weights(cut), self.num_weights()
            if held < MIN_WEIGHTS * whole:
                raise StackNotFoundError(
                    f"{cut.stack} has {held} weights, the model {whole}: it lies beside the block "
                    f"stack, or is a part of it"
                )
        check_writes(cut)
        with self._counting(inputs):
            return cut, None if policy.probe is None else find_probe(cut, policy.probe)

    @contextmanager
    def _counting(self, inputs: GraphInputs) -> Iterator[None]:
        """Open sizes count as those of the first capture: what a hit is does not come and go with
        the size of the picture.
        """
        own = list(map(shape_of, inputs.data))
        first = self.shapes.setdefault(tuple(inputs.paths[node] for node in inputs.data), own)
        numbers: dict[Any, int] = {}
        for node, shape in zip(inputs.data, first, strict=True):
            sizes: Sequence[Any] = tensor_of(node).shape
            for size, number in zip(sizes, shape or (), strict=False):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    numbers[size.node.expr] = number
        token = COUNTED_AS.set(numbers)
        try:
            yield
        finally:
            COUNTED_AS.reset(token)


class _DropoutError(StackNotFoundError):
    """In training mode a graph is compiled as it is."""


class _Refused(Exception):  # noqa: N818 - a signal through AOTAutograd
    """This graph is compiled as it is."""

    def __init__(self, reason: str, nodes: int) -> None:
        super().__init__(reason)
        self.nodes = nodes


def _num_weights(cut: Cut) -> int:
    """How many elements the parameters of the stack's blocks have."""
    facts = cut.facts
    inside = facts.nodes[cut.start + 1 : max(cut.end, cut.blocks) + 1]
    read = {operand for node in inside for operand in node.all_input_nodes}
    return sum(tensor_of(node).numel() for node in read & set(facts.inputs.weights))


def repeated_weights(reference: "weakref.ref[nn.Module]") -> int:
    """How many elements those parameters of a model have whose shape is not the only one: others
    are of no stack. Compiled code, which keeps this, must not keep the model.
    """
    model = reference()
    sizes = Counter(p.shape for p in model.parameters()) if model is not None else Counter()
    return sum(n * shape.numel() for shape, n in sizes.items() if n > 1)


def is_dropout(node: fx.Node) -> bool:
    """Whether `node` drops at random, which says that the model is in training mode."""
    name = op_name(node)
    if "scaled_dot_product" in name:
        dropout = next((a for a in node.args[3:] if isinstance(a, float)), 0.0)
        return dropout > 0 and "for_cpu" not in name
    return name in ("native_dropout", "bernoulli") and is_random(node)


def fxcache_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxcache", options={"policy": FirstBlockCache(...)})``.

    `options` may hold ``policy`` (default ``AdaptiveCache()``), ``backend`` (which compiles the
    pieces, default "inductor"), ``outline``, ``kernel``, ``cache_dtype``, ``cache_device``,
    ``audit`` and ``sync`` (as in `fxcache.transform`) and that backend's own options. Each compiled
    graph keeps its own state; trajectories are recognised by their timesteps. A graph without a
    block stack raises.
    """
    rest = dict(options or {})
    policy = rest.pop("policy", None) or AdaptiveCache()
    check_policy(policy)
    own = {name: rest.pop(name) for name in _OWN_OPTIONS if name in rest}
    compilers = Compilers(Options(mode=mode, options=rest or None, **own))
    return Backend(Session(policy), compilers)(gm, example_inputs)
