"""Small architectures of one kind of block, and what holds for every one that is not refused."""

from collections.abc import Callable
from typing import Any

import torch
from captured import Captured, captured
from comparing import assert_close, assert_identical, tensors
from policies import ALWAYS, NEVER
from torch import nn

WIDTH = 32


class Branch(nn.Module):
    """What a block adds to its stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, t):
        return self.down(torch.tanh(self.up(self.norm(x)) * t[:, None, None]))


class Residual(Branch):
    def forward(self, x, t):
        return x + super().forward(x, t)


class Net(nn.Module):
    """Tokens in, blocks, tokens out."""

    make = Residual

    def __init__(self, make=None, depth=3):
        super().__init__()
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.hold([(make or self.make)() for _ in range(depth)])

    def hold(self, blocks):
        self.blocks = nn.ModuleList(blocks)

    def each(self):
        return self.blocks

    def stack(self, h, t):
        for block in self.each():
            h = block(h, t)
        return h

    def forward(self, x, t):
        return self.out(self.stack(self.embed(x), t))


def tokens(step=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(2, 16, 8, generator=generator) for _ in range(2))
    return x + 0.1 * step * noise, torch.full((2,), 1 - 0.05 * step)


def check(model: nn.Module, at: Callable[..., Any]) -> Captured:
    """The promises that hold for every model that is not refused; what its one capture told."""
    capture = captured(model, *at())
    assert capture.found.audit < 1
    assert capture.default_audit < 1
    never = capture.follow(NEVER)
    for step in range(2):
        assert_identical(never(*at(step)), model(*at(step)))
    always = capture.follow(ALWAYS)
    first = always(*at(0))
    assert_close(always(*at(0)), first)  # a hit on the same input gives the same output
    hit, full = tensors(always(*at(1)))[0], tensors(model(*at(1)))[0]
    assert capture.hits() == [False, True, True]
    assert (hit - full).norm() < (full - tensors(first)[0]).norm()
    return capture
