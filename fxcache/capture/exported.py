"""An exported step and its state: made here, packaged, loaded, and driven."""

import ast
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxcache.capture import torch_internals as internals
from fxcache.capture.exporting import Captured, capture
from fxcache.capture.host_step import HostStep
from fxcache.capture.programs import Head, Side, Step, entry_name
from fxcache.errors import CaptureError, OptionError
from fxcache.policy import Policy
from fxcache.policy import tensor_rules as rules
from fxcache.policy.base import pieces_of

#: Of the state's layout. Another one is another state.
VERSION = 1
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """What an exported step expects: which model, policy and state."""

    version: int
    model: str
    stack: str
    policy: str
    #: The model's arguments, in order.
    inputs: list[str]
    limit: float
    streams: int
    ring: int
    needs_num_steps: bool
    device: str
    #: Of each tensor of the state that is as large as the sample: its shape and dtype. A size is a
    #: number, or a formula of symbols.
    shapes: dict[str, tuple[list[Any], str]]
    #: Of which input each symbol is a size, and of which dimension: ``hidden_states.1``.
    symbols: dict[str, str]
    kept: list[str]
    #: A hit changes these, too.
    keeps_on_hits: bool
    pieces: str = ""  #: What of the policy is compiled in.

    @property
    def key(self) -> int:
        """Tells states of one layout from those of another."""
        text = json.dumps(asdict(self), sort_keys=True)
        return int.from_bytes(sha256(text.encode()).digest()[:7], "big")


class Exported:
    """A denoiser as a program with explicit state. See `fxcache.export` and `load_exported`."""

    def __init__(
        self,
        layout: Layout,
        run: Callable[..., Any],
        programs: Mapping[str, ExportedProgram] | None = None,
    ) -> None:
        self.layout, self._run = layout, run
        #: By name: "model", or "head", "hit" and "miss". Of a loaded package: none.
        self.programs = dict(programs or {})

    @property
    def program(self) -> ExportedProgram:
        """``step(inputs, state) -> outputs, changed``. Raises OptionError if there is none."""
        if "model" not in self.programs:
            raise OptionError(
                f"there is no one ExportedProgram here, but {', '.join(self.programs) or 'none'}: "
                f'form="cond" makes it, and a loaded package is compiled already'
            )
        return self.programs["model"]

    def initial_state(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        threshold: float | None = None,
        num_steps: int | None = None,
    ) -> State:
        """A state before the first step of a trajectory: one for each branch of guidance.

        `inputs` are those of the first step (None: of the sizes that the step was exported with).
        `threshold` (of `AdaptiveCache`: the tolerance) is that of the policy unless it is given.

        Raises OptionError if the policy needs `num_steps` and it is not given, or for a threshold
        that is no number from 0 on.
        """
        layout = self.layout
        if layout.needs_num_steps and num_steps is None:
            raise OptionError(
                f"num_steps must be the number of the trajectory's steps: {layout.policy} needs it"
            )
        limit = layout.limit if threshold is None else threshold
        if not limit >= 0:
            raise OptionError(f"threshold must be in [0, inf], got {threshold!r}")
        settings = torch.tensor([limit, num_steps or 0, -1], dtype=torch.float64)
        state = {
            "key": torch.tensor(layout.key),
            "numbers": rules.initial_numbers(layout.ring).to(layout.device),
            "settings": settings.to(layout.device),
        }
        for name, (shape, dtype) in layout.shapes.items():
            sizes = [self._size(size, inputs) for size in shape]
            state[name] = torch.zeros(sizes, dtype=getattr(torch, dtype), device=layout.device)
        return state

    def _size(self, size: Any, inputs: Mapping[str, Any] | None) -> int:
        """A size of the state for these inputs."""
        if isinstance(size, int):
            return size
        if inputs is None:
            raise OptionError(
                f"inputs must be those of the first step: sizes of the state depend on "
                f"{', '.join(sorted(set(self.layout.symbols.values())))}"
            )
        known = {name: _dimension(path, inputs) for name, path in self.layout.symbols.items()}
        return _evaluated(ast.parse(size, mode="eval").body, known)

    def step(
        self, inputs: Mapping[str, Any], state: State, *, decision: bool | None = None
    ) -> tuple[Any, State]:
        """One evaluation: what the model returns, and the state after it. `state` is left alone.

        `inputs` are the model's arguments by name. `decision` is that of the branch which decides
        for this one (`is_hit` of its state), None: this one decides.

        Raises OptionError for the state of another model, policy or layout, and for other inputs
        than those that the step was exported with.
        """
        self._check(inputs, state)
        given = {name: state[name] for name in ("numbers", "settings", *self.layout.shapes)}
        if decision is not None:
            given["settings"] = given["settings"].clone()
            given["settings"][rules.LED] = float(decision)
        outputs, changed = self._run({name: inputs[name] for name in self.layout.inputs}, given)
        slot, after = int(changed["slot"]), dict(state)
        after["numbers"] = changed["numbers"]
        names = self.layout.kept if slot >= 0 or self.layout.keeps_on_hits else []
        after |= {name: changed[name] for name in names}
        if slot >= 0:
            fresh = {entry_name(s, slot): changed[f"fresh_{s}"] for s in range(self.layout.streams)}
            after |= fresh
        return outputs, after

    def _check(self, inputs: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        if set(inputs) != set(self.layout.inputs):
            raise OptionError(
                f"inputs must be {', '.join(self.layout.inputs)} (those that the step was exported "
                f"with), got {', '.join(inputs)}"
            )
        if "key" not in state or int(state["key"]) != self.layout.key:
            raise OptionError(
                f"the state is not one of this program ({self.layout.policy} on "
                f"{self.layout.model}, version {VERSION}): take its own initial_state()"
            )

    def package(self, path: str | Path) -> Path:
        """Compile the programs with AOTInductor into the archive `path` (.pt2).

        They run without this library and without the model's code
        (``torch._inductor.aoti_load_package(path)``); `fxcache.load_exported` reads the
        archive, too.

        Raises OptionError for a loaded package, which is compiled already.
        """
        if not self.programs:
            raise OptionError("a loaded package is compiled already: copy its file")
        metadata = {"fxcache": json.dumps(asdict(self.layout))}
        internals.write_package(Path(path), self.programs, metadata)
        return Path(path)


def is_hit(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
    """Whether the step between two states was a hit."""
    row = rules.HITS_IN_A_ROW
    return bool(after["numbers"][row] > before["numbers"][row])


def load_exported(path: str | Path, policy: Policy | None = None) -> Exported:
    """The step that `Exported.package` wrote. Of ``form="pieces"``, `policy` decides: the one that
    it was exported with, or one of its class.

    Raises OptionError for a package that `Exported.package` did not write, and where a policy is
    missing, or another one than the pieces were made for.
    """
    programs, metadata = internals.read_package(Path(path))
    if "fxcache" not in metadata:
        raise OptionError(f"{path} was not written by Exported.package")
    layout = Layout(**json.loads(metadata["fxcache"]))
    if "model" in programs:
        return Exported(layout, programs["model"])
    made_for = [layout.policy, layout.pieces]
    if policy is None or [type(policy).__name__, repr(pieces_of(policy))] != made_for:
        raise OptionError(
            f"policy must be the {layout.policy} that these pieces were exported for, or one with "
            f"the same span, probe, entries and checks, {layout.pieces}, got {policy!r}"
        )
    return Exported(layout, HostStep(policy, **programs))


def export_model(
    model: nn.Module, policy: Policy, inputs: dict[str, Any], dynamic_shapes: Any, form: str
) -> Exported:
    """See `fxcache.export`."""
    if form == "cond":
        rules.check_has_tensor_rule(policy)
    if dynamic_shapes is not None:
        unknown = sorted(dynamic_shapes.keys() - inputs.keys())
        if unknown:
            raise OptionError(
                f"dynamic_shapes has {', '.join(unknown)}, and the arguments of the example are "
                f"{', '.join(inputs)}"
            )
        dynamic_shapes = {name: dynamic_shapes.get(name) for name in inputs}
    captured = capture(model, policy, inputs, dynamic_shapes)
    layout = _layout(model, policy, captured, inputs)
    step = Step(model, policy, captured).eval()
    state = Exported(layout, step).initial_state(inputs, num_steps=1)
    del state["key"]
    shapes = _shapes(layout, state, dynamic_shapes)
    if form == "cond":
        program = _exported(step, (inputs, state), shapes)
        return Exported(layout, program.module(check_guards=False), {"model": program})
    with torch.no_grad():
        _, crossing = Head(model, policy, captured)(inputs, state)
    given = (inputs, state, crossing, torch.zeros(layout.ring, device=layout.device))
    automatic = torch.export.Dim.AUTO
    crossing_shapes = [dict.fromkeys(range(value.ndim), automatic) for value in crossing]
    more = None if shapes is None else (*shapes, crossing_shapes, None)
    programs = {
        "head": _exported(Head(model, policy, captured), (inputs, state), shapes),
        "hit": _exported(Side(step, is_hit=True), given, more),
        "miss": _exported(Side(step, is_hit=False), given, more),
    }
    modules = {name: program.module(check_guards=False) for name, program in programs.items()}
    return Exported(layout, HostStep(policy, **modules), programs)


def _exported(module: nn.Module, given: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), given, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture the rewritten {type(module).__name__.lower()} (with "
            f'dynamic shapes, fewer of them or form="pieces" may do): {error}'
        ) from error


def _shapes(layout: Layout, state: State, dynamic_shapes: Any) -> tuple[Any, ...] | None:
    """Which sizes of inputs and state may be others, as torch.export wants it."""
    if dynamic_shapes is None:
        return None
    large = {
        name: {d: torch.export.Dim.AUTO for d, size in enumerate(shape) if isinstance(size, str)}
        for name, (shape, _) in layout.shapes.items()
    }
    return dynamic_shapes, {**dict.fromkeys(state), **large}


def _layout(model: nn.Module, policy: Any, captured: Captured, inputs: Mapping[str, Any]) -> Layout:
    shapes = {
        entry_name(stream, j): _shape(fake)
        for stream, fake in enumerate(captured.residuals)
        for j in range(policy.forecast.ring)
    }
    shapes |= {name: _shape(fake) for name, fake in captured.kept.items()}
    return Layout(
        VERSION,
        type(model).__name__,
        str(captured.cut),
        type(policy).__name__,
        list(inputs),
        rules.limit_of(policy),
        len(captured.residuals),
        policy.forecast.ring,
        getattr(policy, "needs_num_steps", False),
        str(captured.residuals[0].device),
        shapes,
        _symbols(captured),
        list(captured.kept),
        policy.probe is not None and policy.probe.reference == "previous",
        repr(pieces_of(policy)),
    )


def _symbols(captured: Captured) -> dict[str, str]:
    """Of each symbol that is a dimension of an input, which one."""
    found: dict[str, str] = {}
    for node in captured.cut.facts.inputs.data:
        path = captured.cut.facts.inputs.paths[node]
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size), f"{path}.{dim}")
    return found


def _shape(fake: torch.Tensor) -> tuple[list[Any], str]:
    dtype = str(fake.dtype).removeprefix("torch.")
    return [size if isinstance(size, int) else str(size) for size in fake.shape], dtype


def _dimension(path: str, inputs: Mapping[str, Any]) -> int:
    """That size of the inputs which `path` names."""
    *path_of_tensor, dim = path.split(".")
    value: Any = inputs
    for part in path_of_tensor:
        value = value[part] if isinstance(value, Mapping) else value[int(part)]
    return int(value.shape[int(dim)])


def _evaluated(formula: ast.AST, known: Mapping[str, int]) -> int:
    """A formula of sizes, as torch writes them."""
    match formula:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluated(left, known), _evaluated(right, known))
    raise CaptureError(
        f"a cached tensor has the size {ast.unparse(formula)}, which does not follow from the "
        f"sizes of the inputs: export with fewer dynamic shapes"
    )


_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
