"""The scripts of examples/, imported and run in the tests' own process: importing torch anew takes
longer than what they are asked to do here.
"""

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fxcache.demo.sampler import load_denoiser

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """examples/name.py; examples/ is no package, and scripts import their siblings."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def shallow() -> tuple[Any, tuple[str, ...]]:
    """The demo's denoiser with two of its ten blocks: it is captured soon."""
    model, classes = load_denoiser()
    model.transformer_blocks = model.transformer_blocks[:2]
    return model, classes


def compiled_fast() -> Any:
    """While open, the code around AOTInductor's kernels is not optimised, which takes long."""
    return torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})


def run(monkeypatch: Any, capsys: Any, name: str, *arguments: object) -> str:
    """What ``python examples/name.py ARGUMENTS`` prints; what it sets for its process is undone."""
    module, environment = load(name), dict(os.environ)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            module.main()
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(environment)
    return capsys.readouterr().out
