"""Tensors that lie in memory otherwise than the model's own, and parts of them, cross the cut."""

import torch
from nets import WIDTH, Branch, Net, check, tokens
from torch import nn


class Frames(Net):
    """A patch embedding leaves tokens that lie channel by channel; what a block makes of them does
    not, and is viewed by frames (of a picture: one).
    """

    def __init__(self):
        super().__init__(Branch)
        self.patches = nn.Conv1d(8, WIDTH, 1)

    def stack(self, h, t):
        for block in self.blocks:
            h = block(h, t) + h
            frames = h.view(2, 1, 16, WIDTH).permute(0, 2, 1, 3).view(-1, 1, WIDTH)
            h = frames.view(2, 16, 1, WIDTH).permute(0, 2, 1, 3).view(2, 16, WIDTH)
        return h

    def forward(self, x, t):
        return self.out(self.stack(self.patches(x.transpose(1, 2)).transpose(1, 2), t))


def test_what_is_renewed_is_viewed_as_it_lies():
    assert check(Frames().eval(), tokens).default.skipped_share > 0.9


class Caption(Net):
    """A joint sequence with three times as many text tokens as there are of the sample, which are
    taken from it behind the last block and normalized.
    """

    def __init__(self):
        super().__init__()
        self.text, self.mix = nn.Parameter(torch.randn(1, 48, WIDTH)), Branch()
        self.norm = nn.LayerNorm(WIDTH)

    def stack(self, h, t):
        joint = torch.cat([self.text.expand(2, -1, -1), h], 1)
        for block in self.blocks:
            joint = block(joint + joint.mean(1, keepdim=True), t)
        return self.norm(joint[:, 48:])


def test_of_a_joint_sequence_the_part_that_is_used_is_kept():
    capture = check(Caption().eval(), tokens)
    (stream,) = capture.default.streams
    assert stream.after.meta["val"].shape == (2, 16, WIDTH)
    assert capture.default.skipped_share > 0.9
