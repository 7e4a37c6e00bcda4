"""What is private of torch in Dynamo's guards, which are asked at every call of a model.

Checked on torch 2.13 and 2.15 (`tests/capture/test_guards.py`).

The tree of guards visits each object of the model. Nearly all that it compares stands in
dictionaries (of modules, processors, classes), and Python counts what is written into these: the
guards below dictionaries that nobody wrote into since they held are not asked again. What goes
unseen is what torch's own recursive tags do not see either, until the next trajectory begins with
all guards: another `__class__` of an object, another code of a function, another layout that was
set through `.data`.
"""

import ast
import gc
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._C._dynamo.guards import DictGuardManager, dict_version

_DICTS = (dict, OrderedDict)
#: What is told by its identity, besides what torch holds to be immutable.
_IDENTICAL = (types.FunctionType, types.ModuleType, type, torch.dtype, frozenset)
#: Of classes and functions, what torch assumes to stay (`assume_dunder_attributes_...`).
_STAYS = {"TypeMRO", "Code", "FuncDefaults", "FuncKwDefaults", "__defaults__", "__kwdefaults__"}
_SAME, _UNKNOWN = object(), object()


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
        #: The guards that do not hang from these.
        self.rest = manager.root
        #: Where something is written at each call, looking again is of no use.
        self.was_of_use = _COUNTS_WRITES

    def __call__(self, given: Mapping[str, Any]) -> bool:
        """Whether the guards hold for a call with `given`, the arguments by name."""
        if self.dicts is not None and list(map(dict_version, self.dicts)) == self.versions:
            self.was_of_use = True
            return bool(self.rest.check(given))
        holds = bool(self.manager.check(given))
        if holds and self.was_of_use:
            self._look(given)
            holds = bool(self.manager.check(given))  # nobody wrote meanwhile
        return holds

    def _look(self, given: Mapping[str, Any]) -> None:
        root, found = self.manager.root, _Found()
        known = {"G": self.scope, "L['model']": given["model"]}
        found.holds(root, types.MappingProxyType(known))
        self.rest = root.clone_manager(lambda node: node.get_source() in found.kept)
        # In the order of their addresses, which the processor's caches like better.
        self.dicts, self.was_of_use = [found.dicts[at] for at in sorted(found.dicts)], False
        self.versions = list(map(dict_version, self.dicts))


class _Found:
    """`dicts`, by identity, and the sources of those guards that may fail (`kept`) where nobody
    wrote into one of these.
    """

    def __init__(self) -> None:
        self.dicts: dict[int, Any] = {}
        self.kept: set[str] = set()

    def holds(self, node: Any, value: Any) -> bool:
        """Whether nothing of `node`, the guards of `value`, need be asked again."""
        if value is _SAME:
            return True
        inside = [self.holds(child, inner) for child, inner in _inside(node, value)]
        if not inside and _is_told_by_identity(node, value):
            return True
        self.dicts.update((id(held), held) for held in _dicts_of(value))
        if all(inside) and (inside or isinstance(value, _DICTS)):
            return True
        self.kept.add(node.get_source())
        return False


def _dicts_of(value: Any) -> list[Any]:
    if isinstance(value, type):  # what `__dict__` of a class gives is a view
        return [held for cls in value.__mro__ for held in gc.get_referents(vars(cls))]
    if isinstance(value, types.ModuleType):
        return [vars(value)]
    return [value] if isinstance(value, _DICTS) else []


def _is_told_by_identity(node: Any, value: Any) -> bool:
    """Whether guards that go no deeper hold for as long as `value` stands where it stood."""
    kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
    return value is not _UNKNOWN and (
        node.is_guarded_value_immutable()
        or isinstance(value, _IDENTICAL)
        or kinds <= {"ID_MATCH", "TYPE_MATCH"}
    )


def _inside(node: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The guards of what is inside `value`, and that."""
    if isinstance(node, DictGuardManager):
        items = [] if value is _UNKNOWN else list(value.items())
        for place, pair in node.get_key_value_managers().items():
            for child, inner in zip(pair, items[place] if items else (_UNKNOWN,) * 2, strict=True):
                if child is not None:
                    yield child, inner
    for accessor, child in zip(node.get_accessors(), node.get_child_managers(), strict=True):
        yield child, _accessed(accessor, child, value)


def _accessed(accessor: Any, child: Any, value: Any) -> Any:
    """What `accessor` finds in `value`, as far as a write into a dictionary would tell that it is
    another.
    """
    kind = type(accessor).__name__.removesuffix("GuardAccessor")
    name = accessor.get_attr_name() if kind == "GetAttr" else ""
    if value is _UNKNOWN:
        return _UNKNOWN
    if kind in ("FrameLocals", "Globals"):
        return value.get(child.get_source(), _UNKNOWN)
    if kind == "GetGenericDict" or name == "__dict__":
        return value.__dict__
    if kind == "Type":
        return type(value)
    if kind == "TypeDict":
        return vars(value)
    if isinstance(value, types.FunctionType | type) and {kind, name} & _STAYS:
        return _SAME
    if kind == "GetAttr" and isinstance(value, types.ModuleType | type):
        return getattr(value, name, _UNKNOWN)
    if kind == "DictGetItem" and isinstance(value, (*_DICTS, types.MappingProxyType)):
        key = accessor.repr().removeprefix("DictGetItemGuardAccessor(").removesuffix(")")
        with suppress(ValueError, SyntaxError):
            return value.get(ast.literal_eval(key), _UNKNOWN)
    return _UNKNOWN


def guards_of(
    function: types.FunctionType, given: Mapping[str, Any], known: Iterable[Any]
) -> Guards | None:
    """Those of the compiled entry of `function` that fits a call with `given`, the arguments by
    name; one of `known` if it is among them. None if there is none.
    """
    managers = (entry.guard_manager for entry in _entries(function))
    fitting = next((manager for manager in managers if manager.check(given)), None)
    if fitting is None:
        return None
    made = (guards for guards in known if guards.manager is fitting)
    return next(made, Guards(fitting, function.__globals__))


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
