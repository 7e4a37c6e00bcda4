"""What a hit renews of a stream, and what is added on the way and is none."""

import math

import pytest
import torch
from helpers import assert_close, hits, plain, seeded
from nets import WIDTH, Net, Residual, check, tokens
from torch import nn

from fxcache import MagCache, StepSchedule
from fxcache.passes.graph import bytes_of


class Hinted(Net):
    """A control's hint is added behind each block: no residual path begins at it."""

    def __init__(self):
        super().__init__()
        self.zero = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

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
        self.table = nn.Parameter(torch.randn(5, 2, 16, WIDTH))

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
        return self.out(torch.stack(skips).sum(0) / math.sqrt(5))


def test_sums_of_skips():
    check(seeded(SkipSum), tokens)


# --- several streams ---


class Joint(nn.Module):
    """Text and image beside each other, then in one sequence; the text does not see the sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.text = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.doubles = nn.ModuleList(Residual() for _ in range(3))
        self.singles = nn.ModuleList(Residual() for _ in range(4))
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
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x, t):
        z = torch.fft.fft(self.embed(x) * (1 + t[:, None, None]), dim=1)
        for real, imaginary in zip(self.blocks, self.more, strict=True):
            z = z + torch.complex(real(z.real).tanh(), imaginary(z.imag).tanh())
        return self.out(torch.fft.ifft(z, dim=1).real)


def test_complex_streams():
    check(seeded(Complex), tokens)
