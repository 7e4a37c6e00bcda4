"""Models with their trajectories, that the tests of the policies share."""

import math

import torch
from helpers import sample, seeded, times
from torch import nn
from zoo import StructuredDiT, make

STEPS = 14


def moving(x, step):
    """A sample that moves fast, and then slowly."""
    generator = torch.Generator().manual_seed(5)
    noise, jitter = (torch.randn(x.shape, generator=generator) for _ in range(2))
    pace = math.exp(-step / 4)
    return x * (1 - pace) + noise * pace + 0.05 * math.sin(step * step) * jitter


def case(name):
    """A model, a function of a step that gives its inputs, and where its blocks are.

    The blocks: the first, the last, the first layer that reads the image, the image's place in
    what the last returns.
    """
    if isinstance(name, type):
        model, x = seeded(name), sample()
        stacks = [m for m in model.children() if isinstance(m, nn.ModuleList | nn.Sequential)]
        first, last = stacks[0][0], stacks[-1][-1]
        return (
            model,
            lambda i: {"x": moving(x, i), "t": times(1 - i / STEPS)},
            (first, last, first.qkv, "image" if name is StructuredDiT else None),
        )
    model, inputs = make(name)
    x, time = inputs["hidden_states"], inputs["timestep"].float()

    def at(i):
        return {**inputs, "hidden_states": moving(x, i), "timestep": time * (1 - i / STEPS)}

    if name == "flux":
        first = model.transformer_blocks[0]
        return model, at, (first, model.single_transformer_blocks[-1], first.attn.to_q, 1)
    blocks = model.blocks if name == "wan_t2v" else model.transformer_blocks
    layer = blocks[0].attn.to_q if name == "sd3" else blocks[0].attn1.to_q
    return model, at, (blocks[0], blocks[-1], layer, 1 if name == "sd3" else None)
