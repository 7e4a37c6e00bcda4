"""Models that are awkward to capture: graph breaks, in-place writes, views, loops, contexts."""

import math
from dataclasses import replace

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import adopt, hits, plain, seeded
from opened import Small, SmallBlock
from policies import ALWAYS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import Block, BreaksAfter, BreaksBefore, token_inputs

import fxcache
from fxcache import FirstBlockCache, Taylor


@pytest.mark.parametrize("cls", [BreaksBefore, BreaksAfter])
def test_graph_breaks_outside_the_stack(cls, caplog):
    model, given = seeded(lambda: cls(3)), token_inputs()
    assert fxcache.explain(model, **given).skipped_share > 0.9
    assert "midst of its block stack" not in caplog.text
    denoiser = plain(model, fullgraph=False)
    assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True]
    denoiser(given["x"], given["t"] + 1)  # the timestep is seen, wherever the graph broke
    assert hits(denoiser) == [False, True, False]
    with pytest.raises(fxcache.CaptureError, match="could not be captured in one graph"):
        plain(model, fullgraph=True)(**given)


def test_a_keyword_only_time_input_is_seen_behind_a_graph_break():
    class KeywordTime(BreaksBefore):
        def forward(self, x, *, timestep):
            return super().forward(x, timestep)

    denoiser = plain(KeywordTime(2).eval(), fullgraph=False)
    for t in (1.0, 0.9, 1.0):
        denoiser(token_inputs()["x"], timestep=torch.full((2,), t))
    assert [r.timestep for r in denoiser.report().records] == pytest.approx([1.0, 0.9, 1.0])
    assert hits(denoiser) == [False, True, False]


def test_a_stack_has_most_of_the_weights_that_repeat():
    """The others are a table of words."""

    class Vocabulary(BreaksBefore):
        def __init__(self):
            super().__init__(2)
            self.words = nn.Embedding(4096, 4)

        def forward(self, x, t):
            return super().forward(x + self.words.weight[7], t)

    denoiser = plain(Vocabulary().eval(), fullgraph=False)
    for _ in range(2):
        denoiser(**token_inputs())
    assert hits(denoiser) == [False, True]


class BreaksInTheMiddle(nn.Module):
    """Two lists of about the same weight, with a break between: same layouts on both sides."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*(SmallBlock(4) for _ in range(4)))
        self.second = nn.Sequential(*(SmallBlock(4) for _ in range(5)))

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_the_parts_of_a_broken_stack_never_share_a_residual(caplog):
    model = seeded(BreaksInTheMiddle)
    denoiser = plain(model, fullgraph=False)
    x = token_inputs()["x"]
    for _ in range(3):
        assert_close(denoiser(x), model(x))
    assert not any(hits(denoiser))
    assert "in the midst of its block stack" in caplog.text


@torch._dynamo.config.patch(recompile_limit=2)
def test_denoisers_behind_graph_breaks_do_not_use_up_each_others_compilations():
    """Dynamo allows so many recompiles of a code object, and of what goes on after a break."""
    for _ in range(3):
        denoiser = plain(BreaksBefore(2).eval(), fullgraph=False)
        denoiser(**token_inputs())
        denoiser(**token_inputs())
        assert hits(denoiser) == [False, True]


def test_graph_breaks_inside_the_stack_are_refused():
    class BreaksInside(Small):
        def stack(self, h):
            for block in self.blocks:
                h = block(h)
                torch._dynamo.graph_break()
            return h

    model = BreaksInside().eval()
    with pytest.raises(fxcache.StackNotFoundError, match="graph"):
        plain(model, fullgraph=False)(**token_inputs())
    denoiser = fxcache.transform(model, ALWAYS, backend="aot_eager", fallback=True)
    with pytest.warns(UserWarning, match="uncached"):
        denoiser(**token_inputs())


def test_what_fails_while_it_is_compiled_is_named(model, monkeypatch):
    def fails(*given):
        raise ValueError("strides")

    given = token_inputs()
    monkeypatch.setattr("fxcache.capture.rewrite.compile_pieces", fails)
    with pytest.raises(fxcache.CaptureError, match=r"could not be compiled: ValueError: strides"):
        plain(model)(**given)
    with pytest.warns(UserWarning, match="uncached"):
        assert_identical(plain(model, fallback=True)(**given), model(**given))


class Blocks(Small):
    """Three of a kind."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.Sequential(*(block(16) for _ in range(3)))


class InPlaceBlock(SmallBlock):
    def forward(self, x):
        x += self.proj(self.up(self.norm(x)))
        x[:, 0] = x[:, 0] + 1
        return x


class PostNormBlock(SmallBlock):
    def forward(self, x):
        return self.norm(super().forward(x))


class ZeroGate(SmallBlock):
    """Starts as an identity: the head residual is 0."""

    def __init__(self, width):
        super().__init__(width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


class MathAttentionBlock(Block):
    """Asks for an attention backend."""

    def forward(self, x):
        with sdpa_kernel([SDPBackend.MATH]):
            return super().forward(x)


class Autocast(Small):
    def stack(self, h):
        with torch.autocast("cpu", torch.bfloat16):
            h = super().stack(h)
        return h.float()


class Looped(Small):
    """The same two blocks, three times over."""

    def stack(self, h):
        for _ in range(3):
            h = super().stack(h)
        return h


class IntoBuffer(Small):
    """The stream is a view of a tensor that is written behind the stack."""

    def stack(self, h):
        buffer = torch.zeros(h.shape[0], h.shape[1] + 2, h.shape[2])
        view = buffer[:, 2:]
        view.copy_(h)
        buffer[:, 2:] = super().stack(view)
        return buffer


class Tokens(Small):
    """Indices run through the blocks beside the stream: they are kept, never extrapolated."""

    def stack(self, h):
        index = torch.arange(h.shape[1])
        for block in self.blocks:
            h = block(h)
            index = (index + 1 + 0 * h.sum().long()) % h.shape[1]
        return h[:, index]


BLOCKS = [InPlaceBlock, PostNormBlock, ZeroGate, MathAttentionBlock]
MODELS = [Autocast, Looped, IntoBuffer, Tokens]


@pytest.mark.parametrize("cls", BLOCKS + MODELS)
def test_awkward_models(cls):
    """Through autograd's front end, too, which functionalizes as Inductor does: aliases and
    in-place writes must survive.
    """
    model = seeded(lambda: Blocks(cls) if cls in BLOCKS else cls(3))
    given, tolerance = token_inputs(), 2e-2 if cls is Autocast else 1e-5
    policy = FirstBlockCache(threshold=math.inf, forecast=Taylor(order=1))
    denoiser = plain(model, replace(policy, threshold=0.0))
    for t in (1.0, 0.9, 0.8):
        moved = {"x": torch.randn(2, 8, 4), "t": torch.full((2,), t)}
        assert_identical(denoiser(**moved), model(**moved))
    assert not any(hits(denoiser))
    adopt(denoiser, policy)
    for each in (denoiser, fxcache.transform(model, ALWAYS, backend="aot_eager")):
        for _ in range(2):
            assert_close(each(**given), model(**given), tolerance)
        assert hits(each) == [False, True]


class WritesAcross(Small):
    """The span writes into a tensor that the head made and the tail reads."""

    def stack(self, h):
        log = torch.zeros_like(h)
        for block in self.blocks:
            h = block(h)
            log.add_(h)
        return h + log


def test_writes_across_the_cut_are_followed():
    """In the functional graph they are values like others."""
    model, given = seeded(lambda: WritesAcross(3)), token_inputs()
    denoiser = plain(model)
    assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True]


def test_a_span_that_computes_what_is_written_into_an_input_is_refused():
    class WritesItsInput(Small):
        def forward(self, x, t):
            y = super().forward(x, t)
            x.add_(y)
            return y

    with pytest.raises(fxcache.CaptureError, match="writes in place into x"):
        plain(WritesItsInput().eval())(**token_inputs())
