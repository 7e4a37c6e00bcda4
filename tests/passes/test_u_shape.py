"""U shapes: what lies below a level of skips is skipped, and their readers run on every hit."""

import pytest
import torch
from helpers import seeded
from nets import check
from torch import nn
from torch.nn import functional


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
