"""Capturing a model is what takes time: here all that is asked of a model comes from one capture.

`captured` runs `fxcache.explain` and keeps the runner that it made, which can be called like a
denoiser. `Compiler` and `outlining` watch how pieces are divided.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from policies import ALWAYS
from torch import nn

import fxcache
from fxcache import AdaptiveCache, Explanation
from fxcache.capture import rewrite
from fxcache.capture.compile import Compilers, compile_pieces
from fxcache.capture.runner import Runner
from fxcache.options import Options
from fxcache.passes.choose import find_cut
from fxcache.passes.cut import Cut
from fxcache.policy import Policy
from fxcache.runtime.regions import Compiled
from fxcache.runtime.session import Session

explaining = importlib.import_module("fxcache.explain")  # fxcache.explain is the function


@dataclass
class Captured:
    """What one capture tells.

    Attributes:
        found: what `explain` says.
        runner: calls the model through the cache; None if the model was refused.
        default: how the default policy, whose span is all blocks, cuts the same graph.
        default_audit: how a hit of that cut follows a moved sample.
    """

    found: Explanation
    runner: Runner
    default: Cut | None = None
    default_audit: float | None = None

    def follow(self, policy: Policy) -> Runner:
        """The runner, anew and with another policy of the same probe, span and forecast."""
        self.runner.reset()
        self.runner.session.follow(policy)
        return self.runner

    def hits(self) -> list[bool]:
        return [record.is_hit for record in self.runner.session.report().records]


def captured(model: nn.Module, *args: Any, policy: Policy = ALWAYS, **kwargs: Any) -> Captured:
    """Explain `model` for `policy`, and try on the same graph how the default policy cuts it."""
    runners: list[Runner] = []
    beside = Session(AdaptiveCache())
    cuts: list[Cut] = []

    class Kept(Runner):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            runners.append(self)

    def rewrite_both(
        gm: Any, cut: Cut, probe: Any, session: Session, *how: Any, **more: Any
    ) -> Any:
        run = rewrite.rewrite(gm, cut, probe, session, *how, **more)
        cuts.append(find_cut(cut.facts, beside.policy.span))
        other = rewrite.rewrite(gm, cuts[-1], None, beside, *how, **more)

        def call(*inputs: Any) -> Any:
            if not beside.records:
                other(*inputs)
            return run(*inputs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcache.denoiser.Runner", Kept)
        if not policy.span.whole_model:
            patch.setattr(explaining, "rewrite", rewrite_both)
        found = fxcache.explain(model, *args, policy=policy, **kwargs)
    runners[0].reset()
    return Captured(found, runners[0], *cuts[:1], beside.report().audit if cuts else None)


class Compiler:
    """Compiles nothing, and notes what it was given."""

    def __init__(self) -> None:
        self.modules: list[Any] = []

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.modules.append(gm)
        return gm

    @property
    def num_products(self) -> list[int]:
        """Linear layers (with a bias) in each compiled graph."""
        return [sum("addmm" in str(node.target) for node in gm.graph.nodes) for gm in self.modules]


def outlining(patch: pytest.MonkeyPatch) -> Compiler:
    """From here on every piece is made twice: outlined, and whole as the backend "eager" runs it.
    Each call runs both on equal arguments and asserts that neither a result nor what is written
    into an argument differs in a bit. Not for models that draw random numbers.
    """
    compiler = Compiler()
    others = Compilers(Options(backend=compiler)), Compilers(Options(backend="eager"))

    def compile_both(*given: Any) -> Compiled:
        divided, whole = (compile_pieces(*given[:-1], compilers) for compilers in others)
        both = ((getattr(divided, n), getattr(whole, n)) for n in ("head", "hit", "miss"))
        return Compiled(*(None if a is None else _compared(a, b) for a, b in both))

    patch.setattr(rewrite, "compile_pieces", compile_both)
    return compiler


def _compared(divided: Any, whole: Any) -> Any:
    def run(*args: Any) -> Any:
        twins = [_copy(arg) for arg in args]
        results, expected = divided(*args), whole(*twins)
        for pair in zip((*results, *args), (*expected, *twins), strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)
        return results

    return run


def _copy(value: Any) -> Any:
    """What may be written into, with memory of its own."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return value
    if 0 in value.stride():
        return value.clone()
    twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return twin.copy_(value)
