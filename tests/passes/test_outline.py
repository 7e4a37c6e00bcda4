"""Equal blocks are compiled once: same numbers, compile time that does not grow with depth.

That outlined pieces give the bits of whole ones, `captured.outlining` asserts at each call.
"""

import math

import pytest
import torch
from captured import Compiler, outlining
from helpers import NEVER, assert_identical, hits, plain
from torch import nn
from zoo import Block, Denoiser, SequentialDiT, token_inputs

import fxcache
from fxcache import FirstBlockCache, StepSchedule, Taylor
from fxcache.pipelines.tiny import tiny_model

POLICY = FirstBlockCache(threshold=math.inf, warmup_steps=1)


def moving(step):
    torch.manual_seed(7)
    given = token_inputs()
    return {"x": given["x"] + 0.1 * step, "t": given["t"] - 0.1 * step}


def compiled(model, policy=POLICY, at=moving, steps=3):
    """What is compiled for `model`, in a trajectory of misses, which are the model, and hits."""
    with pytest.MonkeyPatch.context() as patch:
        compiler = outlining(patch)
        denoiser = plain(model.eval(), policy)
        outputs = [denoiser(**at(step)) for step in range(steps)]
    assert any(hits(denoiser))
    for step, is_hit in enumerate(hits(denoiser)):
        if not is_hit:
            assert_identical(outputs[step], model(**at(step)))
    return compiler


def of_blocks(make_block, depth=5):
    torch.manual_seed(0)
    model = SequentialDiT(depth)
    model.blocks = nn.Sequential(*(make_block(i) for i in range(depth)))
    return model


def test_as_many_compilations_for_eight_blocks_as_for_four():
    torch.manual_seed(0)
    counts = [len(compiled(SequentialDiT(depth)).modules) for depth in (4, 8)]
    assert counts == [4, 4]  # head, hit, the block, the miss's tail


def test_without_it_the_pieces_are_compiled_whole():
    torch.manual_seed(0)
    compiler = Compiler()
    model = SequentialDiT(6).eval()
    fxcache.transform(model, POLICY, backend=compiler, outline=False)(**moving(0))
    assert compiler.num_products == [6, 1, 21]  # two embeddings and a block; out; 5 blocks and out


def test_double_and_single_blocks_and_a_last_one_that_lacks_an_output():
    """Of other models' blocks `test_zoo` outlines as many as it has."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = {"num_layers": 3, "num_single_layers": 4}
    model, inputs = tiny_model("FluxTransformer2DModel", **config)

    def at(step):
        moved = {"hidden_states": inputs["hidden_states"] + 0.1 * step}
        return {**inputs, **moved, "timestep": inputs["timestep"] - 0.1 * step}

    compiler = compiled(model, at=at, steps=2)
    # head; hit; text FFN of the head block; double block; single block; the miss's tail
    assert len(compiler.modules) == 6
    assert sum(compiler.num_products) == 25  # as many as for two blocks of each


def test_blocks_use_their_own_weights():
    torch.manual_seed(0)
    model = SequentialDiT(4).eval()
    denoiser = fxcache.transform(model, NEVER, backend=Compiler())
    denoiser(**moving(0))
    for block in model.blocks:
        assert_identical(denoiser(**moving(1)), model(**moving(1)))
        block.mlp[0].weight.add_(torch.randn_like(block.mlp[0].weight))
    assert_identical(denoiser(**moving(1)), model(**moving(1)))
    model.blocks[3].mlp[2] = nn.Linear(64, 16)
    assert_identical(denoiser(**moving(2)), model(**moving(2)))


class ScaledBlock(Block):
    """Equal modules whose code differs by a number."""

    def __init__(self, number):
        super().__init__(16)
        self.scale = 1.0 + number % 2

    def forward(self, x):
        return x + self.scale * (super().forward(x) - x)


def test_a_constant_that_differs_makes_another_kind():
    assert len(compiled(of_blocks(ScaledBlock, 7)).modules) == 5


class InPlaceBlock(Block):
    """Adds into the stream it was given."""

    def forward(self, x):
        x += self.mlp(self.norm1(x)) + self.proj(self.norm2(x)) + self.qkv(x)[..., :16]
        return x


class InnerWrites(Block):
    """Writes in place into what it made itself."""

    def forward(self, x):
        y = super().forward(x).mul_(2)
        return y - x


class AutocastBlock(Block):
    """Switches autocast inside a block."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return x + y.to(x.dtype)


@pytest.mark.parametrize("block", [InPlaceBlock, InnerWrites, AutocastBlock, "tied"])
def test_writes_contexts_and_tied_blocks_make_no_other_kind(block):
    if block == "tied":
        blocks = [Block(16) for _ in range(5)]
        model = of_blocks(lambda i: blocks[2 if i == 4 else i])
    else:
        model = of_blocks(lambda i: block(16))
    assert len(compiled(model).modules) == 4


class Modulated(Denoiser):
    """Blocks whose inputs were cut from one tensor outside, and a list inside each."""

    def __init__(self, depth=3, width=16):
        super().__init__(width)
        self.modulate = nn.Linear(1, depth * width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"inner": nn.ModuleList([Block(width), Block(width)])})
            for _ in range(depth)
        )

    def forward(self, x, t):
        shifts = self.modulate(t[:, None])[:, None].chunk(len(self.blocks), dim=-1)
        h = self.embed(x)
        for block, shift in zip(self.blocks, shifts, strict=True):
            h = h + shift
            for inner in block["inner"]:
                h = inner(h)
        return self.out(self.norm(h))


def test_elements_of_a_tuple_made_outside():
    torch.manual_seed(0)
    assert sum(compiled(Modulated()).num_products) < 20


@pytest.mark.parametrize(
    "policy",
    [
        FirstBlockCache(threshold=math.inf, head_blocks=3, tail_blocks=3, warmup_steps=1),
        FirstBlockCache(threshold=math.inf, forecast=Taylor(order=2), max_consecutive_hits=1),
        StepSchedule(mask=[False, True, False, True]),
    ],
)
def test_any_policy(policy):
    torch.manual_seed(0)
    compiler = compiled(SequentialDiT(8), policy, steps=6)
    # Head and tail blocks are those of the span: one graph holds the block, all others the rest.
    assert sum(count >= 4 for count in compiler.num_products) <= 2
