"""A sampling loop like those of pipelines, with real schedulers."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Flow
from helpers import seeded
from opened import Small


class Pipe:
    """Samples as pipelines do: sets the timesteps, calls the denoiser, steps."""

    def __init__(self, scheduler=None):
        self.transformer, self.scheduler = seeded(Small), scheduler or Flow()

    @torch.no_grad()
    def __call__(self, steps=6, *, begin=0, calls=1, names=(), seed=0, stop=None, **custom):
        self.scheduler.set_timesteps(**(custom or {"num_inference_steps": steps}))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(seed))
        for place, t in enumerate(self.scheduler.timesteps[begin:]):
            if place == stop:
                raise KeyboardInterrupt
            outputs = []
            for call in range(calls):
                if names:
                    with self.transformer.branch(names[call]):
                        outputs.append(self.transformer(x + call, t.expand(1) / 1000))
                else:
                    outputs.append(self.transformer(x + call, t.expand(1) / 1000))
            x = self.scheduler.step(sum(outputs) / calls, t, x, return_dict=False)[0]
        return x
