"""A model with control residuals, and trajectories in which they change."""

from dataclasses import replace

import torch
from helpers import sample, times
from opened import Small


class Controlled(Small):
    """Adds a control residual inside each block, as ControlNet's are, and features before them."""

    def forward(self, x, t, control=None, features=None, strength=None):
        h = self.embed(x) + self.time(t[:, None])[:, None]
        if features is not None:
            h = h + features.mean(1, keepdim=True)
        for block in self.blocks:
            h = block(h)
            if control is not None:
                h = h + (control if strength is None else control * strength)
        return self.out(self.norm(h))


def control(scale=1.0, seed=3):
    return scale * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(seed))


def at(step, steps):
    """The sample and the time of a step."""
    return sample() + 0.01 * step, times(1 - step / steps)


def run(denoiser, controls, announced=True, **given):
    """A trajectory in which step i is given the i-th control; its outputs, and why it missed."""
    start, outputs = len(denoiser.report().records), []

    def call():
        for i, each in enumerate(controls):
            each = each if isinstance(each, dict) else {"control": each}
            outputs.append(denoiser(*at(i, len(controls)), **each, **given))

    if announced:
        with denoiser.trajectory(num_steps=len(controls)):
            call()
    else:
        call()
    return outputs, [r.reason for r in denoiser.report().records[start:]]


def looking(policy, control_threshold=0.1):
    return replace(policy, control_threshold=control_threshold)
