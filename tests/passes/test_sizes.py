"""What the model asks of its tensors' shapes needs none of the tensors."""

import pytest
import torch
from comparing import assert_identical, count_products
from helpers import plain, seeded
from nets import WIDTH, Branch, Net, check, tokens
from torch import nn

from fxcache import StepSchedule


class Strided(nn.Module):
    """A U shape along tokens, whose sizes are halved and doubled again."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv1d(8, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, 8, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, 2, 1) for _ in range(2))
        self.up = nn.ModuleList(nn.ConvTranspose1d(WIDTH, WIDTH, 4, 2, 1) for _ in range(2))
        self.deep = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.shallow = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.last = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x, t):
        h = self.embed(x.mT)
        for layer in self.shallow:
            h = h + layer(torch.tanh(nn.functional.group_norm(h, 4)) * t[:, None, None])
        first = h
        for layer in self.down:
            h = layer(h)
        h = h + self.deep(torch.tanh(nn.functional.group_norm(h, 4)))
        for layer in self.up:
            h = layer(h)
        h = h + first
        h = h + self.last(torch.tanh(nn.functional.group_norm(h, 4)))
        return self.out(torch.tanh(nn.functional.group_norm(h, 4))).mT


class TimeToken(Net):
    """A token of the time stands before the patches, which are a product of two sizes."""

    def __init__(self):
        super().__init__(Branch)
        self.embed = nn.Conv2d(8, WIDTH, 2, 2)

    def forward(self, x, t):
        h = self.embed(x.mT.unflatten(2, (4, -1))).flatten(2).mT
        h = torch.cat([t[:, None, None].expand(-1, 1, WIDTH), h], 1)
        for block in self.blocks:
            h = torch.stack([h, block(h, t)]).sum(0)
        return self.out(h[:, 1:]).repeat_interleave(4, 1)


class Attending(Net):
    """What a projection is of the work falls with the number of tokens."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def stack(self, h, t):
        for block in self.blocks:
            h = block(h + nn.functional.scaled_dot_product_attention(h, h.roll(1, 2), h), t)
        return self.project(h).tanh()


def solve(denoiser, tokens_of, *, count=False):
    """What misses and hits give, and how many products a hit computes."""
    outputs, products = [], 0
    with denoiser.trajectory(num_steps=2):
        for step in range(2):
            given = tokens_of(step)
            outputs.append(denoiser(*given))
    if count:
        with denoiser.trajectory(num_steps=2):
            denoiser(*tokens_of(0))
            products = count_products(lambda: denoiser(*tokens_of(1)))
    return outputs, products


@pytest.mark.parametrize("model", [Strided, TimeToken, Attending])
def test_a_second_size_changes_no_hit(model):
    """It opens the sizes of the graph, which serves the first one, too: a hit there computes no
    more, and gives the same bits.
    """

    def small(step):
        return tokens(step)

    def large(step):
        x, t = tokens(step)
        return x.repeat(2, 4, 1), t.repeat(2)

    net = seeded(model)
    denoiser = plain(net, StepSchedule(mask=[False, True]))
    first = solve(denoiser, small, count=True)
    assert 2 * first[1] <= count_products(lambda: net(*small(0)))
    larger, _ = solve(denoiser, large)
    assert_identical(larger[0], net(*large(0)))
    again = solve(denoiser, small, count=True)
    assert_identical(again[0], first[0])
    assert again[1] == first[1]
    assert denoiser.report().graphs == 2


class Masked(Net):
    """The blocks' results count where a mask says so, which is made like the stream, and the stream
    lies in memory channels first.
    """

    def stack(self, h, t):
        h = h.mT.contiguous().mT
        for block in self.blocks:
            everywhere = torch.ones_like(h[..., :1], dtype=torch.bool)
            h = torch.where(everywhere, block(h, t), h) + torch.zeros_like(h)
        return h


def test_a_constant_that_is_made_like_the_stream_does_not_follow_it():
    assert check(seeded(Masked), tokens).default.skipped_share > 0.9
