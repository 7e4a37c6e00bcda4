"""Blocks that write in place, alias, draw numbers or read strides: same numbers, cut or divided."""

import math

import pytest
import torch
from captured import outlining
from helpers import ALTERNATE, NEVER, as_written, assert_close, assert_identical, hits, plain
from torch import nn
from zoo import Block, Denoiser, SequentialDiT

import fxcache
from fxcache import FirstBlockCache


def moving(step):
    torch.manual_seed(7)
    x = torch.randn(2, 8, 4) + 0.1 * step
    return {"x": x, "t": torch.ones(2) - 0.1 * step}


class DiT(Denoiser):
    """Blocks of one class in a ModuleList."""

    def __init__(self, block, depth=5):
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
    model = DiT(make_block(lambda y, x: y + torch.rand(y.shape)))
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
    model = ReturnsViews(make_block(transposed))
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
    for model in (DiT(make_block(conjugated), 4), ConjugateStream(Block, 4)):
        denoiser = fxcache.transform(model, NEVER, backend="aot_eager")
        assert_close(denoiser(**moving(0)), model(**moving(0)))


def test_the_triton_kernels_do_not_keep_a_piece_whole(caplog):
    pytest.importorskip("triton")
    caplog.set_level("INFO", logger="fxcache")
    torch.manual_seed(0)
    model = SequentialDiT(4).eval()
    denoiser = fxcache.transform(model, ALTERNATE, backend=as_written, kernel="triton")
    for step in range(2):
        denoiser(**moving(step))
    assert "4 calls of 2 kinds" in caplog.text
