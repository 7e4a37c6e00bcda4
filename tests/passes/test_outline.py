"""Equal blocks are compiled once: same numbers, compile time that does not grow with depth; also of
blocks that write in place, alias, draw numbers or read strides.

That outlined pieces give the bits of whole ones, `captured.outlining` asserts at each call.
"""

import math

import pytest
import torch
from captured import Compiler, outlining
from comparing import assert_close, assert_identical
from helpers import as_written, hits, plain
from policies import ALTERNATE, NEVER
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


def of_blocks(make_block, depth=4):
    torch.manual_seed(0)
    model = SequentialDiT(depth)
    model.blocks = nn.Sequential(*(make_block(i) for i in range(depth)))
    return model


def test_as_many_compilations_for_six_blocks_as_for_three():
    counts = [len(compiled(SequentialDiT(depth)).modules) for depth in (3, 6)]
    assert counts == [4, 4]  # head, hit, the block, the miss's tail


def test_without_it_the_pieces_are_compiled_whole():
    compiler = Compiler()
    model = SequentialDiT(4).eval()
    fxcache.transform(model, POLICY, backend=compiler, outline=False)(**moving(0))
    assert compiler.num_products == [6, 1, 13]  # two embeddings and a block; out; 3 blocks and out


def test_double_and_single_blocks_and_a_last_one_that_lacks_an_output():
    """Of other models' blocks `test_zoo` outlines as many as it has."""
    torch.manual_seed(0)
    config = {"num_layers": 3, "num_single_layers": 3}
    model, inputs = tiny_model("FluxTransformer2DModel", **config)

    def at(step):
        moved = {"hidden_states": inputs["hidden_states"] + 0.1 * step}
        return {**inputs, **moved, "timestep": inputs["timestep"] - 0.1 * step}

    compiler = compiled(model, at=at, steps=2)
    # head; hit; text FFN of the head block; double block; single block; the miss's tail
    assert len(compiler.modules) == 6
    assert sum(compiler.num_products) == 25  # as many as for two blocks of each


def test_blocks_use_their_own_weights():
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
    assert len(compiled(of_blocks(ScaledBlock, 5)).modules) == 5


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
        blocks = [Block(16) for _ in range(4)]
        model = of_blocks(lambda i: blocks[1 if i == 3 else i])
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
    assert sum(compiled(Modulated()).num_products) < 20


@pytest.mark.parametrize(
    "policy",
    [
        FirstBlockCache(threshold=math.inf, head_blocks=2, tail_blocks=2, warmup_steps=1),
        FirstBlockCache(threshold=math.inf, forecast=Taylor(order=2), max_consecutive_hits=1),
        StepSchedule(mask=[False, True, False, True]),
    ],
)
def test_any_policy(policy):
    compiler = compiled(SequentialDiT(6), policy, steps=6)
    # Head and tail blocks are those of the span: one graph holds the block, all others the rest.
    assert sum(count >= 4 for count in compiler.num_products) <= 2


class DiT(Denoiser):
    """Blocks of one class in a ModuleList."""

    def __init__(self, block, depth=4):
        super().__init__(16)
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(16) for _ in range(depth))
        self.eval()

    def stack(self, h):
        for block in self.blocks:
            h = block(h)
        return h


def make_block(change):
    """A block class: `change(inner, x)` makes its output of the plain block's output and input."""

    class Changed(Block):
        def forward(self, x):
            return change(super().forward(x), x)

    return Changed


def relu_by_keyword(y, x):
    nn.functional.relu(input=y, inplace=True)
    return y + x


def foreach(y, x):
    z = torch.zeros_like(y)
    torch._foreach_add_([z], [y])
    return x + z


def out_pair(y, x):
    values, indices = torch.empty(y.shape[:-1]), torch.empty(y.shape[:-1], dtype=torch.int64)
    torch.max(y, -1, out=(values, indices))
    return y + values[..., None].tanh()


def operator(y, x):
    z = torch.zeros_like(y)
    torch.ops.fxcache_test.accumulate.default(y, z)
    return x + z


def packet(y, x):
    z = torch.zeros_like(y)
    torch.ops.fxcache_test.accumulate(y, z)
    return x + z


def filled(y, x):
    out = torch.empty_like(y)
    out[:, :4] = y[:, :4]
    out[:, 4:] = y[:, 4:]
    return out


def added_out(y, x):
    z = torch.empty_like(y)
    torch.add(y, x, out=z)
    return z


def strided(y, x):
    if x.stride(1) == 32:
        y = y + torch.as_strided(x, (2, 8, 16), (x.stride(0) // 2, x.stride(1) // 2, 1))
    return torch.cat([y, y * 2], -1)[..., :16]


@torch.library.custom_op("fxcache_test::accumulate", mutates_args={"y"})
def accumulate(x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes its second argument."""
    y.add_(x)


@accumulate.register_fake
def _(x, y):
    return None


def chained(*changes):
    """All `changes`, one after the other."""

    def change(y, x):
        for each in changes:
            y = each(y, x)
        return y

    return change


#: By what each does to its piece: blocks are called as they are, or are too small, or stay whole.
CHANGES = {
    "operators of torch": chained(relu_by_keyword, foreach, out_pair, filled, added_out),
    "operators of others": chained(operator, packet),
    "strides that are read": strided,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_miss_is_the_model_and_a_hit_repeats_it(change, monkeypatch):
    compiler = outlining(monkeypatch)
    model = DiT(make_block(CHANGES[change]))
    denoiser = plain(model, ALTERNATE, audit=False)
    torch.full((64, 1024), math.nan)  # memory that somebody may be given uninitialised
    for step in (0, 0, 1, 1):
        output, is_hit = denoiser(**moving(step)), denoiser.report().records[-1].is_hit
        (assert_close if is_hit else assert_identical)(output, model(**moving(step)))
    assert hits(denoiser) == [False, True, False, True]
    metrics = [r.metric for r in denoiser.report().records]
    assert metrics[1::2] == [0.0, 0.0]
    assert (len(compiler.modules) == 3) is (change == "strides that are read")  # nothing is divided


@pytest.mark.parametrize(("backend", "tail"), [("eager", 0), (as_written, 0), (as_written, 2)])
def test_random_numbers_are_drawn_in_the_order_of_the_model(tail, backend):
    model = DiT(make_block(lambda y, x: y + torch.rand(y.shape)), 5)
    policy = FirstBlockCache(threshold=0.0, head_blocks=2, tail_blocks=tail)
    denoiser = fxcache.transform(model, policy, backend=backend)
    for step in range(2):
        given = moving(step)
        torch.manual_seed(3)
        expected = model(**given)
        torch.manual_seed(3)
        assert_identical(denoiser(**given), expected)


def transposed(y, x):
    return y.transpose(1, 2).contiguous().transpose(1, 2)


class ReturnsViews(DiT):
    """Some of what is returned are views; one exists for streams of these strides only."""

    def forward(self, x, t):
        h = self.stack(self.embed(x) + self.time(t[:, None])[:, None])
        out = self.out(self.norm(h))
        return out, out[:, :4], h.transpose(1, 2), h.transpose(1, 2).view(len(h), -1)


@pytest.mark.parametrize("backend", ["eager", as_written, "aot_eager"])
def test_outputs_and_predicted_streams_lie_in_memory_as_those_of_the_model(backend):
    model = ReturnsViews(make_block(transposed), 3)
    denoiser = fxcache.transform(model, ALTERNATE, backend=backend)
    for t in (1.0, 1 - 1e-6):
        given = {**moving(0), "t": torch.full((2,), t)}
        expected, returned = model(**given), denoiser(**given)
        assert_close(returned, expected)
        assert [t.stride() for t in returned] == [t.stride() for t in expected]
    assert hits(denoiser) == [False, True]


def conjugated(y, x):
    half = torch.view_as_complex(y.unflatten(-1, (8, 2)).contiguous()).conj()
    return x + torch.view_as_real(half.resolve_conj()).flatten(-2)


class ConjugateStream(DiT):
    """Blocks that hand on a conjugated complex stream."""

    def stack(self, h):
        z = torch.view_as_complex(h.unflatten(-1, (8, 2)).contiguous())
        for block in self.blocks:
            real = torch.view_as_real(z.resolve_conj()).flatten(-2)
            z = torch.view_as_complex(block(real).unflatten(-1, (8, 2)).contiguous()).conj()
        return torch.view_as_real(z.resolve_conj()).flatten(-2)


def test_conjugates():
    for model in (DiT(make_block(conjugated), 3), ConjugateStream(Block, 3)):
        denoiser = fxcache.transform(model, NEVER, backend="aot_eager")
        assert_close(denoiser(**moving(0)), model(**moving(0)))


def test_the_triton_kernels_do_not_keep_a_piece_whole(caplog):
    pytest.importorskip("triton")
    caplog.set_level("INFO", logger="fxcache")
    model = SequentialDiT(3).eval()
    denoiser = fxcache.transform(model, ALTERNATE, backend=as_written, kernel="triton")
    for step in range(2):
        denoiser(**moving(step))
    assert "3 calls of 2 kinds" in caplog.text
