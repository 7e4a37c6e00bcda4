"""The pass on every model of the zoo, against the plain model, a reference made of hooks, and what
was found before, in files: a change of that is seen in review.

python tests/passes/test_zoo.py        writes the files anew
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from captured import Captured, Compiler, captured, outlining
from comparing import Marked, assert_close, assert_identical, count_products, tensors
from policies import ALWAYS, NEVER
from torch import nn
from zoo import ZOO, Entry, at_step, make

import fxcache
from fxcache.capture import compile as compiling

CAPTURES_ARE_SHARED = True
GOLDEN = Path(__file__).parent / "golden"

#: Like another entry but for an input more or less, or blocks of fewer kinds.
LIKE_OTHERS = ("pixart", "sd3", "wan_t2v")
NAMES = [name for name in ZOO if name not in LIKE_OTHERS]


class Case(NamedTuple):
    """An entry of the zoo and its one capture, which several tests share.

    `compiler` was given what is outlined; `graphs` are the pieces as the backend "eager" runs them.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    capture: Captured
    compiler: Compiler
    graphs: list[torch.fx.Graph]


def make_case(name: str) -> Case:
    torch.set_num_threads(1)  # Dynamo's guards look at it
    torch._dynamo.reset()
    model, inputs = make(name)
    graphs, original = [], compiling.quicken

    def quicken(module):
        graphs.append(original(module).graph)
        return module

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "quicken", quicken)
        compiler = outlining(patch)
        capture = captured(model, policy=fxcache.FirstBlockCache(), **inputs)
    return Case(name, model, inputs, capture, compiler, graphs)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return make_case(request.param)


def test_a_policy_that_never_hits_is_bit_identical(case):
    """And so is each piece whose blocks are outlined to the whole one: `outlining` looks."""
    runner = case.capture.follow(NEVER)
    graphs = runner.session.graphs
    for step in range(4):
        given = at_step(case.name, case.inputs, step)
        assert_identical(runner(**given), case.model(**given))
    report = runner.session.report()
    assert [record.step for record in report.records] == [0, 1, 2, 3]
    assert (report.hits, report.graphs) == (0, graphs)
    assert case.compiler.modules


class HookReference:
    """Module hooks do by hand what a hit does: add the first call's residual to the span's input.

    The reference runs every block and then replaces what the last one of the span returns.
    """

    def __init__(self, entry: Entry, model: torch.nn.Module) -> None:
        self.entry, self.residual, self.replaying = entry, None, False
        model.get_submodule(entry.span[0]).register_forward_pre_hook(self.enter, with_kwargs=True)
        model.get_submodule(entry.span[-1]).register_forward_hook(self.leave)

    def enter(self, module, args, kwargs):
        given = kwargs.get("hidden_states", args[0] if args else None)
        image = self.entry.image
        if isinstance(image, str):
            given = given[image] if isinstance(given, dict) else getattr(given, image)
        self.before = given

    def leave(self, module, args, output):
        image = self.entry.image
        if isinstance(image, str):
            value = getattr(output, image)
        else:
            value = output if image is None else output[image]
        # A joint sequence ends with the image tokens.
        tokens = value[:, -self.before.shape[1] :]
        if not self.replaying:
            self.residual = tokens - self.before
            return None
        replaced = self.before + self.residual
        if tokens.shape != value.shape:
            replaced = torch.cat([value[:, : -self.before.shape[1]], replaced], dim=1)
        if isinstance(image, str):
            return type(output)(**{**vars(output), image: replaced})
        if image is None:
            return replaced
        return tuple(replaced if i == image else v for i, v in enumerate(output))


#: Hooks on the first and last block do not see it as the pass does: hints are added between the
#: blocks, or what is behind them is linear and is renewed, too.
OTHERWISE = ("auraflow", "wan_vace")


def test_a_hit_adds_the_residual(case):
    name, model, inputs, capture, *_ = case
    runner = capture.follow(ALWAYS)
    first, second = at_step(name, inputs, 0), at_step(name, inputs, 1)

    full = runner(**first)
    assert_close(runner(**first), full)  # the residual identity

    hit = runner(**second)
    assert capture.hits() == [False, True, True]
    moved = (tensors(model(**second))[0] - tensors(full)[0]).norm()
    assert 0 < (tensors(hit)[0] - tensors(model(**second))[0]).norm() < 1.1 * moved
    if ZOO[name].is_u_shape or name in OTHERWISE:
        return

    twin, _ = make(name)
    reference = HookReference(ZOO[name], twin)
    twin(**first)
    reference.replaying = True
    assert_close(hit, twin(**second))
    with pytest.raises(AssertionError):  # which is not what the whole model gives
        assert_close(hit, model(**second))


def shown(found: fxcache.Explanation) -> str:
    """What `explain` found, without what another torch may call or round otherwise."""
    text = re.sub(r"(probe|stream) +\w+( - \w+(, \w+)*)?", r"\1", str(found))
    return re.sub(r"audit  [\d.]+", "audit  #", text) + "\n"


def test_only_what_leaves_the_span_is_cached(case):
    name, inputs, capture = case.name, case.inputs, case.capture
    entry, found = ZOO[name], capture.found
    if torch.__version__.startswith("2.13"):  # others count FLOPs otherwise
        assert shown(found) == (GOLDEN / f"{name}.txt").read_text()
    assert entry.head in found.head_blocks
    assert found.is_u_shape is entry.is_u_shape or name == "uvit"
    if entry.is_u_shape:
        assert set(entry.span) <= set(found.span_blocks)
    else:
        assert set(found.span_blocks) == set(entry.span)
    # The default policy skips all blocks, and it still follows the sample.
    assert capture.default.skipped_share >= found.skipped_share - 1e-9  # sums of floats
    assert capture.default_audit < 1
    assert len(found.streams) == 1
    (stream,) = found.streams

    runner = capture.follow(ALWAYS)
    runner(**inputs)
    residual_and_probe = runner.session.report().cached_bytes
    assert stream.nbytes < residual_and_probe <= 2 * stream.nbytes + 65536
    runner.reset()
    assert runner.session.report().cached_bytes == 0


def test_a_hit_skips_the_span(case):
    name, model, inputs, capture, *_ = case
    runner = capture.follow(ALWAYS)
    span = [model.get_submodule(path) for path in ZOO[name].span]
    with Marked(span):
        in_span = count_products(lambda: model(**inputs), inside="span")
    whole = count_products(lambda: model(**inputs))
    runner(**inputs)
    # Each piece runs twice here, see `outlining`.
    hit = count_products(lambda: runner(**inputs)) / 2
    assert in_span > 0
    assert 0 < hit <= whole - in_span


def test_few_operations_are_searched_for(case):
    """Most are torch's own bindings: a call through ``torch.ops`` costs as much as a small one."""
    calls = [n for graph in case.graphs for n in graph.nodes if n.op == "call_function"]
    searched = [n for n in calls if isinstance(n.target, torch._ops.OpOverload)]
    assert len(searched) < 0.15 * len(calls)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        (GOLDEN / f"{name}.txt").write_text(shown(make_case(name).capture.found))
