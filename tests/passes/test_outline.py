"""Equal blocks are compiled once: same numbers, compile time that does not grow with depth."""

import math

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, assert_identical, hits
from torch import nn
from zoo import Block, Denoiser, SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import FirstBlockCache, StepSchedule, Taylor
from fxcache.pipelines.tiny import tiny_model

POLICY = FirstBlockCache(threshold=math.inf, warmup_steps=1)


class Compiler:
    """Compiles nothing, and notes what it was given."""

    def __init__(self):
        self.modules = []

    def __call__(self, gm, example_inputs):
        self.modules.append(gm)
        return gm

    @property
    def num_products(self):
        """Linear layers (with a bias) in each compiled graph."""
        return [sum("addmm" in str(node.target) for node in gm.graph.nodes) for gm in self.modules]


def outlined(model, policy=POLICY, **options):
    compiler = Compiler()
    return fxcache.transform(model, policy, backend=compiler, **options), compiler


def moving(step):
    torch.manual_seed(7)
    given = token_inputs()
    return {"x": given["x"] + 0.1 * step, "t": given["t"] - 0.1 * step}


def assert_like_eager(model, step_inputs, policy=POLICY, steps=3):
    """Outlining changes no bit where nothing is compiled; returns what was compiled."""
    denoiser, compiler = outlined(model, policy)
    eager = fxcache.transform(model, policy, backend="eager")
    for step in range(steps):
        assert_identical(denoiser(**step_inputs(step)), eager(**step_inputs(step)))
    assert hits(denoiser) == hits(eager)
    assert any(hits(denoiser))
    return compiler


def test_as_many_compilations_for_twelve_blocks_as_for_four():
    torch.manual_seed(0)
    counts = [len(assert_like_eager(SequentialDiT(depth).eval(), moving).modules)
              for depth in (4, 12)]  # fmt: skip
    assert counts == [4, 4]  # head, hit, the block, the miss's tail


def test_without_it_the_pieces_are_compiled_whole():
    torch.manual_seed(0)
    denoiser, compiler = outlined(SequentialDiT(6).eval(), outline=False)
    denoiser(**moving(0))
    assert compiler.num_products == [6, 1, 21]  # two embeddings and a block; out; 5 blocks and out


DEEP = {
    "FluxTransformer2DModel": {"num_layers": 4, "num_single_layers": 4},
    "SD3Transformer2DModel": {"num_layers": 5},
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 3, "num_single_dit_layers": 4},
    "HunyuanVideoTransformer3DModel": {"num_layers": 4, "num_single_layers": 4},
    "WanVACETransformer3DModel": {"num_layers": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_deep_models_compute_the_same(name):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = tiny_model(name, **DEEP[name])

    def step_inputs(step):
        moved = dict(inputs)
        moved["hidden_states"] = inputs["hidden_states"] + 0.1 * step
        moved["timestep"] = inputs["timestep"] - 0.1 * step
        return moved

    compiler = assert_like_eager(model, step_inputs)
    shallow = outlined(tiny_model(name)[0])
    shallow[0](**step_inputs(0))
    # What is compiled does not hold more products than a model of two or three blocks does.
    assert sum(compiler.num_products) <= 1.7 * sum(shallow[1].num_products)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_controlnet", "sd15_unet", "sdxl_unet", "structured_dit"])
def test_other_structures_compute_the_same(name):
    pytest.importorskip("diffusers")
    model, inputs = make(name)
    assert_like_eager(model, lambda step: at_step(name, inputs, step))


def test_the_last_flux_block_lacks_an_output_and_is_called_all_the_same():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = tiny_model("FluxTransformer2DModel", num_layers=3, num_single_layers=4)
    denoiser, compiler = outlined(model)
    denoiser(**inputs)
    # head; hit; text FFN of the head block; double block; single block; the miss's tail
    assert len(compiler.modules) == 6


def test_blocks_use_their_own_weights():
    torch.manual_seed(0)
    model = SequentialDiT(6).eval()
    denoiser, _ = outlined(model, NEVER)
    denoiser(**moving(0))
    for block in model.blocks:
        assert_identical(denoiser(**moving(1)), model(**moving(1)))
        block.mlp[0].weight.add_(torch.randn_like(block.mlp[0].weight))
    assert_identical(denoiser(**moving(1)), model(**moving(1)))
    model.blocks[3].mlp[2] = nn.Linear(64, 16)
    assert_identical(denoiser(**moving(2)), model(**moving(2)))


def test_tied_blocks_and_repeated_calls_of_one_block():
    torch.manual_seed(0)
    model = SequentialDiT(6).eval()
    model.blocks[4] = model.blocks[2]
    compiler = assert_like_eager(model, moving)
    assert len(compiler.modules) == 4


class ScaledBlock(Block):
    """Equal modules whose code differs by a number."""

    def __init__(self, width, scale):
        super().__init__(width)
        self.scale = scale

    def forward(self, x):
        return x + self.scale * (super().forward(x) - x)


def test_a_constant_that_differs_makes_another_kind():
    torch.manual_seed(0)
    model = SequentialDiT(7).eval()
    model.blocks = nn.Sequential(*(ScaledBlock(16, 1.0 + (i % 2)) for i in range(7)))
    compiler = assert_like_eager(model.eval(), moving)
    assert len(compiler.modules) == 5


class InPlaceBlock(Block):
    """Adds into the stream it was given."""

    def forward(self, x):
        x += self.mlp(self.norm1(x)) + self.proj(self.norm2(x)) + self.qkv(x)[..., :16]
        return x


def test_a_stream_written_in_place_is_a_value_like_others():
    torch.manual_seed(0)
    model = SequentialDiT(5).eval()
    model.blocks = nn.Sequential(*(InPlaceBlock(16) for _ in range(5)))
    assert len(assert_like_eager(model.eval(), moving).modules) == 4


class InnerWrites(Block):
    """Writes in place into what it made itself."""

    def forward(self, x):
        y = super().forward(x).mul_(2)
        return y - x


def test_writes_inside_a_block_do_not():
    torch.manual_seed(0)
    model = SequentialDiT(5).eval()
    model.blocks = nn.Sequential(*(InnerWrites(16) for _ in range(5)))
    assert len(assert_like_eager(model.eval(), moving).modules) == 4


class AutocastBlock(Block):
    """Switches autocast inside a block."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return x + y.to(x.dtype)


def test_contexts_inside_a_block():
    torch.manual_seed(0)
    model = SequentialDiT(5).eval()
    model.blocks = nn.Sequential(*(AutocastBlock(16) for _ in range(5)))
    assert len(assert_like_eager(model.eval(), moving).modules) == 4


class Modulated(Denoiser):
    """Blocks whose inputs were cut from one tensor outside, and a list inside each."""

    def __init__(self, depth=5, width=16):
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
    assert_like_eager(Modulated().eval(), moving)


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
    model = SequentialDiT(10).eval()
    compiler = assert_like_eager(model, moving, policy, steps=6)
    # Head and tail blocks are those of the span: one graph holds the block, all others the rest.
    assert sum(count >= 4 for count in compiler.num_products) <= 2


@pytest.mark.slow
def test_inductor_computes_the_same_outlined_and_whole():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = tiny_model("FluxTransformer2DModel", num_layers=2, num_single_layers=4)
    whole = fxcache.transform(model, POLICY, outline=False)
    denoiser = fxcache.transform(model, POLICY)
    for step in range(3):
        given = {**inputs, "timestep": inputs["timestep"] - 0.1 * step}
        given["hidden_states"] = inputs["hidden_states"] + 0.1 * step
        assert_close(denoiser(**given), whole(**given))
    assert hits(denoiser) == [False, True, True]


@pytest.mark.slow
def test_inductor_with_dynamic_shapes():
    torch.manual_seed(0)
    model = SequentialDiT(6).eval()
    denoiser = fxcache.transform(model, ALWAYS, dynamic=True)
    for batch, tokens in ((2, 8), (3, 12)):
        given = token_inputs(batch, tokens)
        for _ in range(2):
            assert_close(denoiser(**given), model(**given))
    assert denoiser.report().graphs == 1
