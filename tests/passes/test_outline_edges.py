"""Blocks that write in place, alias, draw numbers or read strides: same numbers, cut or divided."""

import math

import pytest
import torch
from helpers import assert_close, assert_identical, hits
from torch import nn
from torch.utils._pytree import tree_map
from zoo import Block, Denoiser, SequentialDiT

import fxcache
from fxcache import FirstBlockCache, StepSchedule

NEVER = FirstBlockCache(threshold=0.0)
ALTERNATE = FirstBlockCache(threshold=math.inf, max_consecutive_hits=1)


def as_given(gm, example_inputs):
    """A compiler that compiles nothing."""
    return gm


def moving(step, tokens=8):
    torch.manual_seed(7)
    x = torch.randn(2, tokens, 4) + 0.1 * step
    return {"x": x, "t": torch.ones(2) - 0.1 * step}


class DiT(Denoiser):
    """Blocks of one class in a ModuleList."""

    def __init__(self, block, depth=6):
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


CHANGES = [relu_by_keyword, foreach, out_pair, operator, packet, filled, added_out, strided]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("backend", ["eager", as_given])
def test_a_miss_is_the_model_and_a_hit_repeats_it(change, backend):
    model = DiT(make_block(change))
    never = fxcache.transform(model, NEVER, backend=backend)
    for step in range(2):
        assert_identical(never(**moving(step)), model(**moving(step)))
    denoiser = fxcache.transform(model, ALTERNATE, backend=backend, audit=False)
    torch.full((64, 1024), math.nan)  # memory that somebody may be given uninitialised
    for _ in range(4):
        assert_close(denoiser(**moving(0)), model(**moving(0)))
    assert hits(denoiser) == [False, True, False, True]
    assert all(r.metric in (None, 0.0) for r in denoiser.report().records)


@pytest.mark.parametrize("tail_blocks", [0, 2])
@pytest.mark.parametrize("backend", ["eager", as_given])
def test_random_numbers_are_drawn_in_the_order_of_the_model(tail_blocks, backend):
    model = DiT(make_block(lambda y, x: y + torch.rand(y.shape)))
    policy = FirstBlockCache(threshold=0.0, head_blocks=2, tail_blocks=tail_blocks)
    denoiser = fxcache.transform(model, policy, backend=backend)
    for step in range(2):
        given = moving(step)
        torch.manual_seed(3)
        expected = model(**given)
        torch.manual_seed(3)
        assert_identical(denoiser(**given), expected)


class ReturnsViews(DiT):
    def forward(self, x, t):
        h = self.stack(self.embed(x) + self.time(t[:, None])[:, None])
        out = self.out(self.norm(h))
        return out, out[:, :4], h.transpose(1, 2)


@pytest.mark.parametrize("backend", ["eager", as_given, "aot_eager"])
def test_outputs_have_the_strides_of_the_model(backend):
    model = ReturnsViews(Block)
    denoiser = fxcache.transform(model, ALTERNATE, backend=backend)
    for step in range(2):
        expected, returned = model(**moving(step)), denoiser(**moving(step))
        assert [t.stride() for t in returned] == [t.stride() for t in expected]
    assert hits(denoiser) == [False, True]


def transposed(y, x):
    return y.transpose(1, 2).contiguous().transpose(1, 2)


class ReadsTransposed(DiT):
    def forward(self, x, t):
        h = self.stack(self.embed(x) + self.time(t[:, None])[:, None])
        return h.transpose(1, 2).view(len(h), -1)


@pytest.mark.parametrize("backend", ["eager", as_given, "aot_eager"])
def test_a_predicted_stream_lies_in_memory_as_the_computed_one(backend):
    model = ReadsTransposed(make_block(transposed))
    policy = StepSchedule(mask=[False, True])
    denoiser = fxcache.transform(model, policy, backend=backend)
    denoiser(**moving(0))
    later = {**moving(0), "t": torch.full((2,), 1 - 1e-6)}
    assert_close(denoiser(**later), model(**later))
    assert hits(denoiser) == [False, True]


class Quantized(torch.Tensor):
    """Weights in int8 with a scale a row, as quantization libraries wrap them."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype
        )

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return "Quantized"

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Quantized(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantized(args[0].codes, args[0].scale)
        plain = tree_map(lambda a: a.codes * a.scale if isinstance(a, cls) else a, args)
        return func(*plain, **(kwargs or {}))


def test_quantized_weights_of_some_blocks():
    model = DiT(Block, depth=8).requires_grad_(False)
    for block in model.blocks[1:4]:
        for layer in (block.qkv, block.proj, block.mlp[0], block.mlp[2]):
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            codes = (layer.weight / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Quantized(codes, scale), requires_grad=False)
    denoiser = fxcache.transform(model, NEVER, backend="aot_eager")
    assert_close(denoiser(**moving(0)), model(**moving(0)))


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


@pytest.mark.parametrize("model", [DiT(make_block(conjugated)), ConjugateStream(Block)])
def test_conjugates(model):
    denoiser = fxcache.transform(model, NEVER, backend="aot_eager")
    assert_close(denoiser(**moving(0)), model(**moving(0)))


class Patches(DiT):
    """A sequence whose length is a formula of the input's."""

    def forward(self, x, t):
        h = self.embed(x).unflatten(1, (x.shape[1] // 2, 2)).mean(2)
        h = self.stack(h + self.time(t[:, None])[:, None])
        return self.out(self.norm(h)).repeat_interleave(2, 1)


class Longer(DiT):
    """Four times as long inside the stack."""

    def stack(self, h):
        return super().stack(torch.cat([h] * 4, 1))[:, : h.shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize("model", [Patches(Block), Longer(Block)], ids=["half", "four times"])
def test_sizes_that_are_formulas(model):
    denoiser = fxcache.transform(model, ALTERNATE, dynamic=True)
    for tokens in (8, 12, 16):
        for _ in range(2):
            assert_close(denoiser(**moving(0, tokens)), model(**moving(0, tokens)))
    assert hits(denoiser) == [False, True] * 3
    assert denoiser.report().graphs == 1


def test_the_triton_kernels_do_not_keep_a_piece_whole(caplog):
    pytest.importorskip("triton")
    caplog.set_level("INFO", logger="fxcache")
    torch.manual_seed(0)
    model = SequentialDiT(6).eval()
    denoiser = fxcache.transform(model, ALTERNATE, backend=as_given, kernel="triton")
    for step in range(2):
        denoiser(**moving(step))
    assert "6 calls of 2 kinds" in caplog.text
