"""Ready-made policies: what was published for a model, and by whom.

The figures lie in presets.json, which is read when the first preset is asked for:

* `models`: the canonical names, the class names of the denoisers, other names;
* `presets`: by method and model: the policy's `settings`, the number of `steps` that they were
  measured with, the `source` (``repository:file``), published `alternatives`, and a `note` where
  the original decides differently;
* `tables`: magnitude ratios, one a step, by branch where the original ran its branches in turn.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy.base import Origin, Policy
from fxcache.policy.easy_cache import EasyCache
from fxcache.policy.first_block_cache import FirstBlockCache
from fxcache.policy.mag_cache import MagCache
from fxcache.policy.sea_cache import SeaCache
from fxcache.policy.tea_cache import TeaCache

_POLICIES: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (EasyCache, FirstBlockCache, MagCache, SeaCache, TeaCache)
}
_METHOD_ALIASES = {"fbc": "firstblockcache", "fbcache": "firstblockcache"}


def presets() -> dict[str, tuple[str, ...]]:
    """The models for which settings were published, and the methods they were published for.

    Both are sorted, and both are what `preset` takes: ``{"flux-dev": ("firstblockcache",
    "magcache", "teacache"), ...}``. A name in brackets is a variant: another number of steps, or
    the settings of another repository.
    """
    methods = _catalogue()["presets"]
    return {
        model: tuple(method for method in sorted(methods) if model in methods[method])
        for model in sorted(_catalogue()["models"])
    }


def preset(model: str, method: str, **changes: Any) -> Policy:
    """The policy that was published for a model, ready to use.

    The policy's ``origin`` says which preset it is, the class names of the denoisers that it was
    made for, and the file, at its commit, that the figures are from.

    Args:
        model: a name from `presets`, or one of its other names; a Hugging Face id will do
            (``"black-forest-labs/FLUX.1-dev"``). Case, spaces and punctuation do not count.
        method: "easycache", "firstblockcache", "magcache", "seacache" or "teacache".
        changes: fields of the policy that are to differ: ``threshold=0.12``.

    Raises:
        PolicyError: for a model, a method or a field that there is not (names the closest, and
            those there are), or a value outside its range.
    """
    model, method = canonical_name(model), _method(method)
    entries = _catalogue()["presets"][method]
    if model not in entries:
        others = ", ".join(presets()[model])
        raise PolicyError(
            f"no {method} settings were published for {model!r}, only: {others}. "
            f"{_suggestion(model, {_key(name): name for name in entries})}"
        )
    entry, policy = entries[model], _POLICIES[method]
    fields = {field.name: field.name for field in dataclasses.fields(policy)}
    for name in sorted(changes.keys() - fields):
        raise PolicyError(f"{policy.__name__} has no {name!r}. {_suggestion(name, fields)}")
    settings = dict(entry["settings"])
    if "ratios" in settings:
        settings["ratios"] = _catalogue()["tables"][settings["ratios"]]
    repository, file = entry["source"].split(":", 1)
    settings["origin"] = Origin(
        preset=f"{model}, {method}",
        model_classes=classes_of(model),
        source=_catalogue()["repositories"][repository] + file,
    )
    made: Policy = policy(**{**settings, **changes})
    return made


@functools.cache
def _catalogue() -> dict[str, Any]:
    text = resources.files("fxcache.policy").joinpath("presets.json").read_text("utf-8")
    catalogue: dict[str, Any] = json.loads(text)
    return catalogue


@functools.cache
def _names() -> dict[str, str]:
    """Every name of every model, without its case and punctuation, and the canonical name."""
    models = _catalogue()["models"]
    return {
        _key(name): model for model, about in models.items() for name in (model, *about["aliases"])
    }


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def classes_of(model: str) -> tuple[str, ...]:
    """The class names of the denoisers that a model of `presets` has."""
    return tuple(_catalogue()["models"][model]["classes"])


def canonical_name(name: str) -> str:
    """The name in `presets` of the model `name`. Raises PolicyError if there is none."""
    if not isinstance(name, str):
        raise PolicyError(f"model must be a name, got {name!r}")
    key = _key(name.rsplit("/", 1)[-1])
    for candidate in (key, key.removesuffix("diffusers")):
        if candidate in _names():
            return _names()[candidate]
    raise PolicyError(f"no model {name!r}. {_suggestion(name, _names())}")


def _method(name: str) -> str:
    if not isinstance(name, str):
        raise PolicyError(f"method must be a name, got {name!r}")
    key = _METHOD_ALIASES.get(_key(name), _key(name))
    if key not in _POLICIES:
        raise PolicyError(f"no method {name!r}. {_suggestion(name, {m: m for m in _POLICIES})}")
    return key


def _suggestion(name: str, known: Mapping[str, str]) -> str:
    """Of the names that are values of `known`, those with the closest keys, and all."""
    key = _key(name.rsplit("/", 1)[-1])
    close = [known[match] for match in difflib.get_close_matches(key, known, cutoff=0.5)]
    names = ", ".join(dict.fromkeys(known.values()))
    if not close:
        return f"There are: {names}"
    return f"Did you mean {' or '.join(map(repr, dict.fromkeys(close)))}? There are: {names}"
