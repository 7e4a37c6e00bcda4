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

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """examples/name.py; examples/ is no package, and scripts import their siblings."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


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
