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
from helpers import (
    ALWAYS,
    NEVER,
    Marked,
    assert_close,
    assert_identical,
    count_products,
    follow,
    hits,
    tensors,
)
from torch import nn
from zoo import ZOO, Entry, at_step, make

import fxcache

pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    """An entry of the zoo and its denoiser, which several tests share: capturing is what takes
    time.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    denoiser: Any


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    torch._dynamo.reset()
    model, inputs = make(request.param)
    denoiser = fxcache.transform(model, NEVER, backend="eager", audit=False)
    yield Case(request.param, model, inputs, denoiser)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def clean_dynamo():
    """In place of what other tests do: compiled code stays as long as its case."""
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def test_a_policy_that_never_hits_is_bit_identical(case):
    name, model, inputs, denoiser = case
    follow(denoiser, NEVER)
    for step in range(4):
        given = at_step(name, inputs, step)
        assert_identical(denoiser(**given), model(**given))
    report = denoiser.report()
    assert hits(denoiser) == [False] * 4
    assert [record.step for record in report.records] == [0, 1, 2, 3]
    assert report.recompiles == 0


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
    name, model, inputs, denoiser = case
    follow(denoiser, ALWAYS)
    first, second = at_step(name, inputs, 0), at_step(name, inputs, 1)

    full = denoiser(**first)
    assert_close(denoiser(**first), full)  # the residual identity

    hit = denoiser(**second)
    assert hits(denoiser) == [False, True, True]
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


def test_a_hit_skips_the_span(case):
    name, model, inputs, denoiser = case
    follow(denoiser, ALWAYS)
    span = [model.get_submodule(path) for path in ZOO[name].span]
    with Marked(span):
        in_span = count_products(lambda: model(**inputs), inside="span")
    whole = count_products(lambda: model(**inputs))
    denoiser(**inputs)
    hit = count_products(lambda: denoiser(**inputs))
    assert in_span > 0
    assert 0 < hit <= whole - in_span


def shown(found: fxcache.Explanation) -> str:
    """What `explain` found, without what another torch may call or round otherwise."""
    text = re.sub(r"(probe|stream) +\w+( - \w+(, \w+)*)?", r"\1", str(found))
    return re.sub(r"audit  [\d.]+", "audit  #", text) + "\n"


def test_only_what_leaves_the_span_is_cached(case):
    name, model, inputs, denoiser = case
    entry = ZOO[name]
    found = fxcache.explain(model, policy=fxcache.FirstBlockCache(), **inputs)
    if torch.__version__.startswith("2.13"):  # others count FLOPs otherwise
        assert shown(found) == (GOLDEN / f"{name}.txt").read_text()
    assert entry.head in found.head_blocks
    assert found.is_u_shape is entry.is_u_shape or name == "uvit"
    if entry.is_u_shape:
        assert set(entry.span) <= set(found.span_blocks)
    else:
        assert set(found.span_blocks) == set(entry.span)
    default = fxcache.explain(model, **inputs)  # all blocks, and it still follows the sample
    assert default.skipped_share >= found.skipped_share
    assert default.audit < 1
    assert len(found.streams) == 1
    (stream,) = found.streams

    follow(denoiser, ALWAYS)
    denoiser(**inputs)
    residual_and_probe = denoiser.report().cached_bytes
    assert stream.nbytes < residual_and_probe <= 2 * stream.nbytes + 65536
    denoiser.reset()
    assert denoiser.report().cached_bytes == 0


if __name__ == "__main__":
    for name in sys.argv[1:] or ZOO:
        torch._dynamo.reset()
        model, inputs = make(name)
        with torch.no_grad():
            found = fxcache.explain(model, policy=fxcache.FirstBlockCache(), **inputs)
        (GOLDEN / f"{name}.txt").write_text(shown(found))
