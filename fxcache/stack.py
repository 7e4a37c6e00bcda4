"""Find the block stack of a captured denoiser: no names, no adapters, only structure.

A *block* is one call of a module that stands in a list (``path.<int>`` of a ModuleList or
Sequential). Blocks that hand their streams on to each other form a *chain*; the chain that carries
most of the work is the stack. Lists that continue each other (a double-stream list and the
single-stream list after it, the two sides of a UNet) are one chain; lists that run beside it
(refiners, control branches, per-block projections) are not, since a stream of theirs comes from
elsewhere.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from fxcache.capture import fake_value, is_stream_like, module_calls, same_layout, tensor_of
from fxcache.dataflow import DataFlow, op_name, residual_path, storages
from fxcache.errors import StackNotFoundError

#: A stack does at least this share of the graph's work; less is a list beside the real work.
MIN_SHARE = 0.1
#: A list one of whose elements does more than this wraps the stack and is not the stack.
WRAPPER_SHARE = 0.8


@dataclass(frozen=True)
class Block:
    """One call of a list's module: its path, class name, nodes in recorded order, FLOPs."""

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]
    flops: int
    is_composite: bool

    @property
    def list_path(self) -> str:
        return self.path.rpartition(".")[0]


Owners = dict[fx.Node, Block]  # which block computes a node


@dataclass(frozen=True)
class Stack:
    """The block stack in execution order, and the FLOPs of the whole graph it was found in."""

    blocks: tuple[Block, ...]
    graph_flops: int

    @property
    def flops(self) -> int:
        return sum(block.flops for block in self.blocks)

    @property
    def list_paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.list_path for block in self.blocks))

    def __str__(self) -> str:
        counts = {p: sum(b.list_path == p for b in self.blocks) for p in self.list_paths}
        return " + ".join(f"{path} ({count})" for path, count in counts.items())


_HEAVY = {
    "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "scaled_dot_product_attention", "multi_head_attention_forward", "rms_norm_linear",
}  # fmt: skip


def is_heavy(node: fx.Node) -> bool:
    """Whether `node` is a matrix product, a convolution or an attention."""
    return node.op in ("call_function", "call_method") and op_name(node) in _HEAVY


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node (matrix products, convolutions, attention), counted by torch on fakes."""
    if not is_heavy(node):
        return 0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fake_value)
    mode = next((v.fake_mode for v in _fakes((args, kwargs))), None)
    if mode is None:
        return 0
    args, kwargs = torch.utils._pytree.tree_map(functools.partial(_unwrapped, mode), (args, kwargs))
    target = node.target
    call: Any = getattr(args[0], str(target)) if node.op == "call_method" else target
    args = args[1:] if node.op == "call_method" else args
    try:
        # Counting must not guard: a size that it looked at would not be dynamic any more.
        with mode, _no_guards(mode), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(*args, **kwargs)
        total = counter.get_total_flops()
    except Exception:  # noqa: BLE001 - a node that cannot be counted counts nothing
        return 0
    return total if isinstance(total, int) else int(total.node.hint or 0)


def _unwrapped(mode: torch._subclasses.FakeTensorMode, value: object) -> object:
    """A plain tensor in the place of one that wraps others (quantized weights): torch cannot count
    what the wrapper does instead of a product.
    """
    if not isinstance(value, torch.Tensor) or not is_traceable_wrapper_subclass(value):
        return value
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _no_guards(mode: torch._subclasses.FakeTensorMode) -> AbstractContextManager[None]:
    return mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()


def _fakes(tree: object) -> list[torch._subclasses.FakeTensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch._subclasses.FakeTensor)]


def find_stack(graph: fx.Graph, flow: DataFlow) -> Stack:
    """Find the block stack of `graph`.

    Raises StackNotFoundError, with the lists that were seen and why each is none, if no chain of
    at least two blocks does at least a tenth of the graph's work.
    """
    flops = {node: node_flops(node) for node in graph.nodes}
    total = sum(flops.values())
    lists = _lists_of_blocks(graph, flops)
    chains: list[tuple[Block, ...]] = []
    refused: dict[str, str] = {}
    for path, blocks in lists.items():
        chain = _longest_chain(blocks, flow)
        if len(chain) < len(blocks) and len(chain) < 2:
            refused[path] = f"{len(blocks)} blocks side by side, none of which feeds the next"
        elif not any(block.is_composite for block in chain):
            refused[path] = f"{len(chain)} plain layer(s), not blocks"
        elif wrapped := _wrapped_list(chain, lists):
            refused[path] = f"only wraps {wrapped}"
        else:
            chains.append(chain)
    chains = _outermost(chains)
    candidates = (_extend(chain, chains, flow) for chain in chains)
    for candidate in sorted(candidates, key=_work, reverse=True):
        path = candidate[0].list_path
        if len(candidate) < 2:
            refused[path] = "a single block"
        elif _work(candidate) < MIN_SHARE * total:
            refused[path] = f"{_work(candidate) / total:.0%} of the graph's work"
        else:
            return Stack(candidate, total)
    seen = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "no list of modules"
    raise StackNotFoundError(
        f"no block stack in this graph of {len(flops)} nodes. Seen: {seen}. A stack is a run of at "
        f"least two modules of a ModuleList or Sequential, each fed by the one before, that do at "
        f"least {MIN_SHARE:.0%} of the work."
    )


def _work(blocks: Sequence[Block]) -> int:
    return sum(block.flops for block in blocks)


def _lists_of_blocks(graph: fx.Graph, flops: dict[fx.Node, int]) -> dict[str, list[Block]]:
    """All lists of modules, outermost first, each with its calls in execution order."""
    nodes: dict[tuple[str, str], list[fx.Node]] = {}
    kinds: dict[tuple[str, str], str] = {}
    composite: set[tuple[str, str]] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        calls = module_calls(node)
        for depth, call in enumerate(calls):
            if call.list_path is None:
                continue
            key = call.path, call.call
            nodes.setdefault(key, []).append(node)
            kinds[key] = getattr(call.cls, "__name__", str(call.cls).rpartition(".")[2])
            module = str(getattr(call.cls, "__module__", call.cls))
            if depth + 1 < len(calls) or not module.startswith("torch.nn."):
                composite.add(key)
    lists: dict[str, list[Block]] = {}
    for key, owned in nodes.items():
        block = Block(
            key[0],
            kinds[key],
            tuple(owned),
            sum(flops[node] for node in owned),
            key in composite,
        )
        lists.setdefault(block.list_path, []).append(block)
    return dict(sorted(lists.items(), key=lambda item: item[0].count(".")))


def _longest_chain(blocks: list[Block], flow: DataFlow) -> tuple[Block, ...]:
    """The longest run of `blocks` in which each depends on the one before."""
    best: list[Block] = []
    run: list[Block] = []
    for block in blocks:
        if run and flow.descendants(run[-1].nodes[:]) & set(block.nodes):
            run.append(block)
        else:
            run = [block]
        if len(run) > len(best):
            best = run
    return tuple(best)


def _outermost(chains: list[tuple[Block, ...]]) -> list[tuple[Block, ...]]:
    """The chains that are not part of a block of another one, heaviest first."""
    kept: list[tuple[Block, ...]] = []
    for chain in sorted(chains, key=_work, reverse=True):
        if not any(_nested_in(other)(chain[0]) for other in kept):
            kept.append(chain)
    return kept


def _wrapped_list(chain: tuple[Block, ...], lists: dict[str, list[Block]]) -> str | None:
    """The inner list that holds nearly all of the work of `chain`, if one element holds it."""
    heaviest = max(chain, key=lambda block: block.flops)
    if heaviest.flops <= WRAPPER_SHARE * _work(chain):
        return None
    inner = [
        path
        for path, blocks in lists.items()
        if path.startswith(heaviest.path)
        and len(blocks) > 1
        and any(block.is_composite for block in blocks)
        and _work(blocks) > WRAPPER_SHARE * heaviest.flops
    ]
    return inner[0] if inner else None


def _extend(
    chain: tuple[Block, ...], chains: list[tuple[Block, ...]], flow: DataFlow
) -> tuple[Block, ...]:
    """Add the blocks of sibling lists that hand the same streams on to, or take them from, this."""
    parent = chain[0].list_path.rpartition(".")[0]
    others = [
        block
        for other in chains
        if other is not chain and other[0].list_path.rpartition(".")[0] == parent
        for block in other
        if block.is_composite
    ]
    owners = {node: block for block in (*chain, *others) for node in block.nodes}
    blocks = list(chain)
    while grown := _grow(blocks, others, owners, flow):
        blocks = grown
    return tuple(blocks)


def _nested_in(chain: tuple[Block, ...]) -> Callable[[Block], bool]:
    prefixes = tuple(f"{block.path}." for block in chain)
    return lambda block: block.path.startswith(prefixes)


def _grow(
    blocks: list[Block], others: list[Block], owners: Owners, flow: DataFlow
) -> list[Block] | None:
    """`blocks` with the nearest block that joins them (before, after or between), or None."""

    def start(block: Block) -> int:
        return flow.position[block.nodes[0]]

    def distance(block: Block) -> int:
        return min(abs(start(block) - start(own)) for own in blocks)

    first, last = start(blocks[0]), start(blocks[-1])
    reaching_out = {o.list_path for o in others if not first < start(o) < last}
    for other in sorted((o for o in others if o not in blocks), key=distance):
        # A list with all its blocks between ours (adapters) is what lies between blocks.
        if other.list_path not in reaching_out:
            continue
        earlier = [block for block in blocks if start(block) < start(other)]
        later = [block for block in blocks if start(block) > start(other)]
        follows = not earlier or _continues(earlier, other, owners, flow)
        precedes = not later or _continues([*earlier, other], later[0], owners, flow)
        if follows and precedes:
            return [*earlier, other, *later]
    return None


def _continues(before: list[Block], block: Block, owners: Owners, flow: DataFlow) -> bool:
    """Whether every stream that enters `block` comes out of the last block of `before`."""
    last = set(before[-1].nodes)
    from_last = flow.descendants(last) | last
    chain = _Chain(set(before), flow.descendants(before[0].nodes), owners, flow)
    streams = streams_into(block, flow)
    return bool(streams) and all(s in from_last and chain.carries(s) is True for s in streams)


@dataclass(frozen=True)
class _Chain:
    """Tells whose tokens a tensor holds: walks back over sums and concatenations to blocks."""

    blocks: set[Block]
    after_first: set[fx.Node]
    owners: Owners
    flow: DataFlow

    def carries(self, value: fx.Node) -> bool | None:
        """True: those of this chain. False: (also) those of other blocks. None: of no block.

        A sum belongs to the chain if one term does and none to others (control residuals are added
        to streams), and so does a concatenation of channels; a sequence, only if every part does.
        """
        if value in self.owners:
            return self.owners[value] in self.blocks
        name = op_name(value)
        if name in ("cat", "concat", "stack", "pad_sequence"):
            return self._joined(value)
        if name in ("add", "iadd", "add_"):
            return self._any([part for part in value.args if is_stream_like(part)])
        written = [
            writer.args[-1]
            for storage in storages(value)
            for writer in self.flow.writers.get(storage, ())
            if op_name(writer) in ("setitem", "copy_") and is_stream_like(writer.args[-1])
        ]
        if written:
            return self._all(written)
        return True if value in self.after_first else None

    def _joined(self, value: fx.Node) -> bool | None:
        parts = value.args[0] if isinstance(value.args[0], list | tuple) else [value.args[0]]
        tensors = [part for part in parts if is_stream_like(part)]
        dim = value.kwargs.get("dim", value.args[1] if len(value.args) > 1 else 0)
        is_channels = dim in (-1, tensor_of(value).ndim - 1)
        return self._any(tensors) if is_channels else self._all(tensors)

    def _any(self, values: list[Any]) -> bool | None:
        found = {self.carries(value) for value in values}
        return False if False in found else (True in found or None)

    def _all(self, values: list[Any]) -> bool:
        return all(self.carries(value) is True for value in values)


def block_inputs(block: Block) -> list[fx.Node]:
    """What a block takes from outside that could be a stream, in order of first use."""
    inside = set(block.nodes)
    inputs = dict.fromkeys(
        operand for node in block.nodes for operand in node.all_input_nodes if operand not in inside
    )
    return [node for node in inputs if is_stream_like(node)]


def streams_into(block: Block, flow: DataFlow) -> list[fx.Node]:
    """The inputs of `block` that it changes and hands on, rather than only reads.

    An input is a stream if a value of the same layout that leaves `block` carries it along the
    residual path; where none is (blocks that change the shape), the newest input.
    """
    inside = set(block.nodes)
    inputs = [node for node in block_inputs(block) if node.op not in ("get_attr", "placeholder")]
    outputs = [
        node
        for node in block.nodes
        if is_stream_like(node) and any(user not in inside for user in node.users)
    ]
    carried = [
        stream
        for stream in inputs
        if any(same_layout(stream, out) and residual_path(out, {stream}) for out in outputs)
    ]
    return carried or sorted(inputs, key=flow.position.__getitem__)[-1:]
