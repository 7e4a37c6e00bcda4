"""Models that are awkward to capture: graph breaks, in-place writes, views, loops, contexts."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import ALWAYS, adopt, assert_close, assert_identical, hits, plain, seeded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import Block, BreaksAfter, BreaksBefore, Denoiser, SequentialDiT, token_inputs

import fxcache
from fxcache import FirstBlockCache, Taylor

# --- graph breaks ---


@pytest.mark.parametrize("cls", [BreaksBefore, BreaksAfter])
def test_graph_breaks_outside_the_stack(cls, caplog):
    model, given = seeded(cls), token_inputs()
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


class KeywordTime(BreaksBefore):
    def forward(self, x, *, timestep):
        return super().forward(x, timestep)


def test_a_keyword_only_time_input_is_seen_behind_a_graph_break():
    denoiser = plain(KeywordTime().eval(), fullgraph=False)
    for t in (1.0, 0.9, 1.0):
        denoiser(token_inputs()["x"], timestep=torch.full((2,), t))
    assert [r.timestep for r in denoiser.report().records] == pytest.approx([1.0, 0.9, 1.0])
    assert hits(denoiser) == [False, True, False]


class BreaksInTheMiddle(SequentialDiT):
    """Two lists of about the same weight, with a break between: same layouts on both sides."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Block(4) for _ in range(4))
        self.second = nn.ModuleList(Block(4) for _ in range(5))
        del self.blocks

    def forward(self, x):
        for block in self.first:
            x = block(x)
        torch._dynamo.graph_break()
        for block in self.second:
            x = block(x)
        return x


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
        denoiser = plain(BreaksBefore().eval(), fullgraph=False)
        denoiser(**token_inputs())
        denoiser(**token_inputs())
        assert hits(denoiser) == [False, True]


class BreaksInside(SequentialDiT):
    def stack(self, h):
        for block in self.blocks:
            h = block(h)
            torch._dynamo.graph_break()
        return h


def test_graph_breaks_inside_the_stack_are_refused():
    model = BreaksInside(depth=2).eval()
    with pytest.raises(fxcache.StackNotFoundError, match="graph"):
        plain(model, fullgraph=False)(**token_inputs())
    denoiser = fxcache.transform(model, ALWAYS, backend="aot_eager", fallback=True)
    with pytest.warns(UserWarning, match="uncached"):
        denoiser(**token_inputs())


# --- writes, views, loops, contexts ---


class InPlaceBlock(Block):
    def forward(self, x):
        x += self.proj(self.norm1(x))
        x[:, 0] = x[:, 0] + 1
        return x


class InPlace(Denoiser):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock(16) for _ in range(3))

    def stack(self, h):
        for block in self.blocks:
            h = block(h)
        return h


class Autocast(SequentialDiT):
    def stack(self, h):
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                h = block(h)
        return h.float()


class PostNormBlock(Block):
    def forward(self, x):
        return self.norm1(x + self.mlp(x))


class PostNorm(SequentialDiT):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(PostNormBlock(16) for _ in range(3)))


class Looped(SequentialDiT):
    """The same two blocks, three times over."""

    def stack(self, h):
        for _ in range(3):
            for block in self.blocks[:2]:
                h = block(h)
        return h


class ZeroGates(SequentialDiT):
    """Blocks that start as identities: the head residual is 0."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            for layer in (block.proj, block.mlp[2]):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


class MathAttentionBlock(Block):
    def forward(self, x):
        with sdpa_kernel([SDPBackend.MATH]):
            return super().forward(x)


class MathAttention(SequentialDiT):
    """Asks for an attention backend inside its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(MathAttentionBlock(16) for _ in range(3)))


class IntoBuffer(SequentialDiT):
    """The stream is a view of a tensor that is written behind the stack."""

    def stack(self, h):
        buffer = torch.zeros(h.shape[0], h.shape[1] + 2, h.shape[2])
        view = buffer[:, 2:]
        view.copy_(h)
        for block in self.blocks:
            view = block(view)
        buffer[:, 2:] = view
        return buffer


class Tokens(SequentialDiT):
    """Indices run through the blocks beside the stream: they are kept, never extrapolated."""

    def stack(self, h):
        index = torch.arange(h.shape[1])
        for block in self.blocks:
            h = block(h)
            index = (index + 1 + 0 * h.sum().long()) % h.shape[1]
        return h[:, index]


AWKWARD = [InPlace, Autocast, PostNorm, Looped, ZeroGates, MathAttention, IntoBuffer, Tokens]


@pytest.mark.parametrize("cls", AWKWARD)
def test_awkward_models(cls):
    """Through autograd's front end, too, which functionalizes as Inductor does: aliases and
    in-place writes must survive.
    """
    model, given = seeded(cls), token_inputs()
    tolerance = 2e-2 if cls is Autocast else 1e-5
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


class WritingBlock(Block):
    def forward(self, x, log):
        x = super().forward(x)
        log.add_(x)
        return x


class WritesAcross(Denoiser):
    """The span writes into a tensor that the head made and the tail reads."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(WritingBlock(16) for _ in range(3))

    def stack(self, h):
        log = torch.zeros_like(h)
        for block in self.blocks:
            h = block(h, log)
        return h + log


def test_writes_across_the_cut_are_followed():
    """In the functional graph they are values like others."""
    model = seeded(WritesAcross)
    denoiser = plain(model)
    given = token_inputs()
    assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True]


class WritesItsInput(SequentialDiT):
    def forward(self, x, t):
        y = super().forward(x, t)
        x.add_(y)
        return y


def test_a_span_that_computes_what_is_written_into_an_input_is_refused():
    denoiser = plain(WritesItsInput().eval())
    with pytest.raises(fxcache.CaptureError, match="writes in place into x"):
        denoiser(**token_inputs())
