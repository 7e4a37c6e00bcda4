"""What is private of torch in Dynamo's guards, which are asked at every call of a model.

Checked on torch 2.13 and 2.15 (`tests/capture/test_guards.py`).

The tree of guards visits each object of the model. Nearly all that it compares stands in
dictionaries (of modules, processors, classes), and Python counts what is written into these: the
guards below dictionaries are asked again only where somebody wrote into one. What goes unseen until
the next trajectory, which begins with all guards: another `__class__` or `__dict__` of an object,
other `__bases__` of a class, another code or other defaults of a function, and a weight that hits
do not read and whose layout is set through `.data`.
"""

import ast
import gc
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._C._dynamo.guards import DictGuardManager, TensorGuards, dict_version

_DICTS = (dict, OrderedDict)
#: Guards that ask which object it is, those that ask what it is equal to or holds, and a weight's.
_OF_IDENTITY = {"TYPE_MATCH", "ID_MATCH", "NOT_NONE"}
_OF_VALUES = _OF_IDENTITY | {
    *("EQUALS_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH"),
    *("LENGTH_CHECK", "DICT_LENGTH", "DICT_CONTAINS", "MAPPING_KEYS_MATCH"),
}
_OF_WEIGHTS = _OF_VALUES | {"TENSOR_MATCH", "DIMENSION_DYNAMIC_MARKING_GUARD"}
_OF_FUNCTIONS = {
    "Code": "__code__",
    "FuncDefaults": "__defaults__",
    "FuncKwDefaults": "__kwdefaults__",
}
#: What the guards hang from is looked for once in so many calls, and at first so often besides.
_PAUSE, _AT_ONCE = 32, 4
_UNKNOWN = object()


def _counts_writes() -> bool:
    """Whether a module's attributes are written into its dictionary (since Python 3.13: beside)."""
    module = torch.nn.Module()
    before = dict_version(module.__dict__)
    module.training = False
    return bool(dict_version(module.__dict__) != before)


_COUNTS_WRITES = _counts_writes()


class Guards:
    """Whether what Dynamo compiled still fits a call. `manager` holds its guards, `scope` are the
    globals of what was compiled, whose argument `model` is the model.
    """

    def __init__(self, manager: Any, scope: Mapping[str, Any]) -> None:
        self.manager, self.scope = manager, scope
        #: What the tree hangs from (None: all of it is asked), and the counts when it held.
        self.dicts: list[Any] | None = None
        self.versions: list[int] = []
        #: The guards that do not hang from these, and those of the weights that hits, misses read.
        self.rest = manager.root
        self.layouts: tuple[Any, Any] = (None, None)
        #: Calls since it was looked for, as far as they count.
        self.calls = _PAUSE * _AT_ONCE

    def hold(self, given: Mapping[str, Any]) -> bool:
        """Whether what was compiled fits a call with `given`, the arguments by name, but for the
        weights that only misses read. Not where somebody wrote into what the guards hang from: that
        may be another weight.
        """
        self.calls = min(self.calls + 1, _PAUSE * _AT_ONCE)
        if self.dicts is None:
            return bool(self.manager.check(given))
        return self._is_unwritten() and bool(self.rest.check(given)) and self.fit(is_miss=False)

    def fit(self, *, is_miss: bool = True) -> bool:
        """Whether the weights that a miss reads, or a hit, have the layouts that they had."""
        guards, tensors = self.layouts[is_miss] or (None, ())
        return guards is None or bool(guards.check(*tensors))

    def look(self, given: Mapping[str, Any], weights: Sequence[Sequence[Any]]) -> None:
        """Find what the guards hang from, unless that is known or was written into a moment ago.
        `weights` are those that hits read, and those that misses read.
        """
        if self._is_unwritten() or self.calls < _PAUSE or not _COUNTS_WRITES:
            return
        found, self.calls = _Found(weights[1]), self.calls - _PAUSE
        scopes = {"G": self.scope, "L['model']": given["model"]}
        found.holds(self.manager.root, types.MappingProxyType(scopes))
        self.rest = self.manager.root.clone_manager(lambda node: node.get_source() in found.kept)
        self.layouts = _layouts(weights[0]), _layouts(weights[1])
        # In the order of their addresses, which the processor's caches like better.
        self.dicts = [found.dicts[at] for at in sorted(found.dicts)]
        self.versions = self._count()
        if not self.manager.check(given):  # somebody wrote meanwhile
            self.dicts, self.layouts = None, (None, None)

    def _is_unwritten(self) -> bool:
        """Whether it is known what the guards hang from, and nobody wrote into it. If somebody did,
        nothing is kept of it: it may be gone from the model.
        """
        if self.dicts is not None and self._count() == self.versions:
            return True
        self.dicts, self.layouts = None, (None, None)
        return False

    def _count(self) -> list[int]:
        return list(map(dict_version, self.dicts or ()))


def _layouts(tensors: Sequence[Any]) -> Any:
    """What tells whether `tensors` have the layouts that they have now, and they."""
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return (guards, tensors) if tensors else None


class _Found:
    """`dicts`, by identity, and the sources of those guards that may fail (`kept`) where nobody
    wrote into one of these or set another layout of `weights`.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self.weights = {id(weight) for weight in weights}
        self.dicts: dict[int, Any] = {}
        self.kept: set[str] = set()

    def holds(self, node: Any, value: Any) -> bool:
        """Whether nothing of `node`, the guards of `value`, need be asked again."""
        inside = [self.holds(child, inner) for child, inner in _inside(node, value)]
        kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
        if all(inside) and value is not _UNKNOWN and kinds <= self._known_kinds(node, value):
            if inside or not kinds <= _OF_IDENTITY:
                self.dicts.update((id(held), held) for held in _dicts_of(value))
            return True
        self.kept.add(node.get_source())
        # What leads to it: another value would be found there.
        self.dicts.update((id(held), held) for held in _dicts_of(value))
        return False

    def _known_kinds(self, node: Any, value: Any) -> set[str]:
        """The kinds of guards that hold for as long as `value` stands where it stood, and nobody
        wrote into it.
        """
        if issubclass(type(value), torch.Tensor):
            return _OF_WEIGHTS if id(value) in self.weights else set()
        is_told = node.is_guarded_value_immutable() or type(value) in (torch.dtype, frozenset)
        if is_told or type(value) in (*_DICTS, types.MappingProxyType):
            return _OF_VALUES
        return _OF_IDENTITY | {"LENGTH_CHECK"} if type(value) is tuple else _OF_IDENTITY


def _dicts_of(value: Any) -> list[Any]:
    if issubclass(type(value), type):  # what `__dict__` of a class gives is a view
        return [held for cls in value.__mro__ for held in gc.get_referents(vars(cls))]
    if type(value) is types.ModuleType:
        return [vars(value)]
    return [value] if type(value) in _DICTS else []


def _inside(node: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The guards of what is inside `value`, and that."""
    if isinstance(node, DictGuardManager):
        items = list(value.items()) if type(value) in _DICTS else []
        for place, pair in node.get_key_value_managers().items():
            found = items[place] if place < len(items) else (_UNKNOWN, _UNKNOWN)
            yield from ((child, inner) for child, inner in zip(pair, found, strict=True) if child)
    for accessor, child in zip(node.get_accessors(), node.get_child_managers(), strict=True):
        yield child, _UNKNOWN if value is _UNKNOWN else _accessed(accessor, child, value)


def _accessed(accessor: Any, child: Any, value: Any) -> Any:
    """What `accessor` finds in `value`, as far as a write into a dictionary would tell that it is
    another.
    """
    kind = type(accessor).__name__.removesuffix("GuardAccessor")
    name = accessor.get_attr_name() if kind == "GetAttr" else _OF_FUNCTIONS.get(kind, "")
    key: Any = None
    if kind.endswith("GetItem"):
        with suppress(ValueError, SyntaxError):
            key = ast.literal_eval(accessor.repr().partition("(")[2].removesuffix(")"))
    if kind in ("FrameLocals", "Globals"):
        return value.get(child.get_source(), _UNKNOWN)
    if kind == "GetGenericDict" or name == "__dict__":
        return object.__getattribute__(value, "__dict__")
    if kind == "Type":
        return type(value)
    if type(value) is types.FunctionType:
        return getattr(value, name) if name in _OF_FUNCTIONS.values() else _UNKNOWN
    if issubclass(type(value), type):
        if kind in ("TypeDict", "TypeMRO"):
            return vars(value) if kind == "TypeDict" else value.__mro__
        found = getattr(value, name, _UNKNOWN) if name else _UNKNOWN
        return (
            found if any(vars(c).get(name, _UNKNOWN) is found for c in value.__mro__) else _UNKNOWN
        )
    if type(value) is types.ModuleType:
        return vars(value).get(name, _UNKNOWN)
    if type(value) in (*_DICTS, types.MappingProxyType) and kind == "DictGetItem":
        return _UNKNOWN if key is None else value.get(key, _UNKNOWN)
    if type(value) is tuple and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    return _UNKNOWN


def guards_of(
    function: types.FunctionType,
    given: Mapping[str, Any],
    weights: Sequence[Sequence[Any]],
    known: Iterable[Guards | None],
) -> Guards | None:
    """Those of the compiled entry of `function` that fits a call with `given`, the arguments by
    name; one of `known` if it is among them. None if there is none. `weights` as in `look`.
    """
    managers = (entry.guard_manager for entry in _entries(function))
    fitting = next((manager for manager in managers if manager.check(given)), None)
    if fitting is None:
        return None
    made = (guards for guards in known if guards is not None and guards.manager is fitting)
    guards: Guards = next(made, Guards(fitting, function.__globals__))
    guards.look(given, weights)
    return guards


def failed_guard(function: types.FunctionType, given: Mapping[str, Any]) -> str | None:
    """What the newest compiled entry of `function` depends on and `given` does not fulfil."""
    for entry in _entries(function):
        parts = entry.guard_manager.check_verbose(given).verbose_code_parts
        if parts:
            return str(parts[0]).split("#")[0].strip()
    return None


def _entries(function: types.FunctionType) -> list[Any]:
    entries: list[Any] = _debug_get_cache_entry_list(function.__code__)
    return entries
