"""diffusers' denoisers built tiny, with random weights and inputs that fit.

The configs are data (``tiny_models.json``). They serve ``python -m fxcache explain`` and the tests;
the pass itself knows no model.
"""

import json
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from fxcache.errors import OptionError


def tiny_model(name: str, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build diffusers' class `name` tiny, in eval mode, and keyword arguments to call it with.

    Args:
        name: a class name, e.g. "FluxTransformer2DModel".
        config: overrides of the tiny config.

    Raises:
        OptionError: if there is no tiny config for `name`. ImportError without diffusers.
    """
    import diffusers

    table = json.loads((files("fxcache.pipelines") / "tiny_models.json").read_text())
    if name not in table:
        raise OptionError(
            f"no tiny config for {name!r}; there is one for {', '.join(sorted(table))}. For other "
            f"models call fxcache.explain(model, **inputs)"
        )
    model = getattr(diffusers, name)(**{**table[name]["config"], **config})
    return model.eval(), {key: _input(spec) for key, spec in table[name]["inputs"].items()}


def _input(spec: Any) -> Any:
    """An input from its description: tensors are filled with `value`, or with normal noise."""
    if isinstance(spec, list):
        parts = [_input(part) for part in spec]
        return tuple(parts) if all(isinstance(part, int) for part in parts) else parts
    if not isinstance(spec, dict):
        return spec
    if "tensor" not in spec:
        return {key: _input(part) for key, part in spec.items()}
    tensor = spec["tensor"]
    dtype = getattr(torch, tensor["dtype"])
    if "value" in tensor:
        return torch.full(tensor["shape"], tensor["value"], dtype=dtype)
    if "values" in tensor:
        return torch.tensor(tensor["values"], dtype=dtype).reshape(tensor["shape"])
    return torch.randn(tensor["shape"], dtype=dtype)
