"""What a hit renews of a stream, what is added on the way, and what lies below a level of skips."""

import math
from types import SimpleNamespace

import pytest
import torch
from comparing import assert_close
from helpers import hits, plain, seeded
from nets import WIDTH, Branch, Net, Residual, check, tokens
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxcache import MagCache, StepSchedule
from fxcache.passes.graph import bytes_of
from fxcache.passes.piece_graph import PieceGraph


class Hinted(Net):
    """A control's hint is added behind each block: no residual path begins at it."""

    def __init__(self):
        super().__init__()
        self.zero = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, t):
        control = torch.linspace(-2, 2, WIDTH).expand(len(x), 16, -1)
        h = self.embed(x)
        for block, zero in zip(self.blocks, self.zero, strict=True):
            h = block(h, t) + zero(control)
        return self.out(h)


class Tabled(Net):
    """A position table of its own for every block."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 2, 16, WIDTH))

    def stack(self, h, t):
        for block, positions in zip(self.blocks, self.table, strict=True):
            h = block(h + positions, t)
        return h


@pytest.mark.parametrize("cls", [Hinted, Tabled])
def test_a_hit_continues_the_stream_and_not_what_is_added_to_it(cls):
    model = seeded(cls)
    x, t = tokens()
    moved = x + 1.0
    denoiser = plain(model, StepSchedule(mask=[False, True]))
    for policy in (denoiser.policy, MagCache(ratios=[1.0, 1.0], retention_ratio=0.0)):
        denoiser.policy = policy
        with denoiser.trajectory(num_steps=2):
            first = denoiser(x, t)
            hit = denoiser(moved, 0.9 * t)
        assert_close(hit - first, model.out(model.embed(moved)) - model.out(model.embed(x)), 1e-4)
    assert hits(denoiser) == [False, True] * 2
    assert denoiser.report().graphs == 1


class SkipSum(Net):
    """WaveNet: each block hands a stream on and leaves a skip; what is read is the skips' sum."""

    def forward(self, x, t):
        h, skips = self.embed(x), []
        for block in self.blocks:
            both = block.down(torch.tanh(block.up(h) * t[:, None, None]))
            h, skips = (h + both) / math.sqrt(2), [*skips, torch.sigmoid(both)]
        return self.out(torch.stack(skips).sum(0) / math.sqrt(3))


class Joint(nn.Module):
    """Text and image beside each other, then in one sequence; the text does not see the sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.text = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.doubles = nn.ModuleList(Residual() for _ in range(3))
        self.singles = nn.ModuleList(Residual() for _ in range(3))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x, t):
        image, text = self.embed(x), self.text(torch.ones(2, 4, 8))
        for block, mix in zip(self.doubles, self.mix, strict=True):
            both = block(torch.cat([text, image], 1), t)
            added = torch.tanh(mix(both.mean(1, keepdim=True)))
            text, image = text + both[:, :4] * added, image + both[:, 4:] * added
        joint = torch.cat([text, image], 1)
        for block in self.singles:
            joint = block(joint, t)
        return self.out(joint[:, 4:])


def test_double_and_single_blocks_are_one_stack():
    capture = check(seeded(Joint), tokens)
    (stream,), (default,) = capture.found.streams, capture.default.streams
    assert stream.nbytes == bytes_of(default.after) == 4 * 2 * 16 * WIDTH  # of the image alone


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, t):
        z = torch.fft.fft(self.embed(x) * (1 + t[:, None, None]), dim=1)
        for real, imaginary in zip(self.blocks, self.more, strict=True):
            z = z + torch.complex(real(z.real).tanh(), imaginary(z.imag).tanh())
        return self.out(torch.fft.ifft(z, dim=1).real)


@pytest.mark.parametrize("cls", [SkipSum, Complex])
def test_sums_of_skips_and_complex_streams(cls):
    check(seeded(cls), tokens)


class Block2d(nn.Module):
    def __init__(self, given, made):
        super().__init__()
        self.first = nn.Conv2d(given, made, 3, padding=1)
        self.second = nn.Conv2d(made, made, 3, padding=1)
        self.skip = nn.Conv2d(given, made, 1)

    def forward(self, x, t):
        return self.skip(x) + self.second(torch.tanh(self.first(x) + t[:, None, None, None]))


class UNet(nn.Module):
    """Levels in lists of lists, skips joined before each block."""

    mode = "nearest"

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)
        sizes = [(16, 16), (16, 32), (32, 32)]
        self.downs = nn.ModuleList(
            nn.ModuleList([Block2d(a, a), Block2d(a, a), nn.Conv2d(a, b, 4, 2, 1)])
            for a, b in sizes
        )
        self.middle = Block2d(32, 32)
        self.ups = nn.ModuleList(
            nn.ModuleList([Block2d(b + a, b), Block2d(b + a, a)]) for a, b in reversed(sizes)
        )

    def forward(self, x, t):
        h, skips = self.embed(x), []
        for first, second, down in self.downs:
            h = first(h, t)
            skips.append(h)
            h = second(h, t)
            skips.append(h)
            h = down(h)
        h = self.middle(h, t)
        for first, second in self.ups:
            h = functional.interpolate(h, scale_factor=2, mode=self.mode)
            h = first(torch.cat([h, skips.pop()], 1), t)
            h = second(torch.cat([h, skips.pop()], 1), t)
        return self.out(h)


def pictures(step=0):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    return x + 0.1 * step * noise, torch.full((2,), 1 - 0.05 * step)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_u_shape_is_cut_where_its_hits_follow(mode):
    """`check` asks for the same bits: a trace would replace resampling by formulas."""
    model = seeded(UNet)
    model.mode = mode
    capture = check(model, pictures)
    assert capture.found.skipped_share > 0.5
    assert capture.default.skipped_share > 0.5
    assert capture.default.is_u_shape


def test_a_size_that_the_model_asks_of_its_inputs():
    """What is halved and doubled again is as long as the input, or the two could not be put
    together.
    """

    def doubled(x):
        return torch.cat([x[:, ::2].repeat_interleave(2, 1), x], 2)

    gm = make_fx(doubled, tracing_mode="symbolic")(torch.ones(2, 8, 4))
    (cat,) = (node for node in gm.graph.nodes if "cat" in node.name)
    again, x = cat.args[0]
    assert str(again.meta["val"].shape) != str(x.meta["val"].shape)
    graph = PieceGraph(gm, SimpleNamespace(facts=None, repeated=()))
    piece = graph.finish([graph.zeros(again, is_broadcast=False)])
    (zeros,) = piece.module(torch.ones(3, 12, 4))
    assert zeros.shape == (3, 12, 4)


def wide(step=0):
    x, t = tokens(step)
    return x.repeat(1, 1, WIDTH // 8), t


class Copied(Net):
    """The sample is the stream, and each block writes into a copy of what it read."""

    def forward(self, x, t):
        for block in self.blocks:
            added = block(x, t)
            x = x.clone()
            x += added
        return self.out(x)


def test_a_copy_of_the_sample_is_the_sample():
    assert check(seeded(lambda: Copied(Branch)), wide).default.skipped_share > 0.9


class Beside(Net):
    """A small layer takes the sample past the blocks."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Linear(8, 8)

    def forward(self, x, t):
        return self.last(super().forward(x, t)) + self.beside(x)


@pytest.mark.parametrize("last", [nn.Identity(), nn.Tanh()], ids=repr)
def test_what_feeds_no_block_is_no_stream(last):
    """It is renewed beside one."""
    model = seeded(Beside)
    model.last = last
    for block in model.blocks:  # so that the stream is nearly all of what follows the sample
        nn.init.normal_(block.down.weight, std=1e-3)
    capture = check(model, tokens)
    assert capture.default_audit < 0.05
    assert capture.default.skipped_share > 0.9
