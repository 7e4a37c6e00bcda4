"""A diffusion transformer by hand, trained in seconds, sampled with and without fxcache.

    python examples/flow_matching_dit.py --steps 30

Nothing but PyTorch: a DiT, flow matching on 8 x 8 pictures of soft discs, an Euler loop. fxcache
needs no adapter: ``fxcache.transform(model, policy)`` finds the blocks itself. Printed is what a
policy computes (as a speed-up: all blocks of all steps to those that were computed), how near its
samples are to the uncached ones, and how near plain sampling with fewer steps comes at that cost.
"""

import argparse
import contextlib
import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fxcache

SIZE, PATCH = 8, 2
TOKENS, CHANNELS = (SIZE // PATCH) ** 2, PATCH**2


class Block(nn.Module):
    """Attention and MLP, each modulated by the time (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))  # fmt: skip

    def forward(self, h: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1 * self.proj(attended)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + gate2 * self.mlp(x)


class DiT(nn.Module):
    """Predicts the velocity, noise minus picture, at ``x_t = (1 - t) picture + t noise``."""

    def __init__(self, depth: int = 6, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(CHANNELS, width), nn.Embedding(TOKENS, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, CHANNELS)
        self.register_buffer("frequencies", torch.logspace(0, 2, width // 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: [N, tokens, channels]; t: [N], from 1 (noise) to 0 (picture)."""
        angles = t[:, None] * self.frequencies
        time = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)))
        h = self.embed(x) + self.place.weight
        for block in self.blocks:
            h = block(h, time)
        return self.out(F.layer_norm(h, h.shape[-1:]))


def pictures(number: int, generator: torch.Generator) -> torch.Tensor:
    """Soft discs somewhere, of some radius, in [-1, 1], as patches [N, tokens, channels]."""
    x, y, radius = torch.rand(3, number, 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, SIZE)
    x, y = axis[None, None] - (1.2 * x - 0.6), axis[None, :, None] - (1.2 * y - 0.6)
    shown = (0.3 + 0.4 * radius - (x**2 + y**2).sqrt()).mul(6).tanh()
    patches = shown.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return patches.reshape(number, TOKENS, CHANNELS)


def train(model: nn.Module, steps: int, batch: int = 64) -> float:
    """Flow matching; the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        picture = pictures(batch, generator)
        noise = torch.randn(picture.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        x = torch.lerp(picture, noise, t[:, None, None])
        loss = F.mse_loss(model(x, t), noise - picture)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def sample(denoiser: Any, number: int, steps: int, seed: int = 1) -> torch.Tensor:
    """Euler from noise to pictures. A cache is told where the trajectory begins and ends."""
    x = torch.randn(number, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))
    is_cached = hasattr(denoiser, "trajectory")
    with denoiser.trajectory(num_steps=steps) if is_cached else contextlib.nullcontext():
        for now, after in pairwise(torch.linspace(1, 0, steps + 1)):
            x = x + (after - now) * denoiser(x, now.expand(number))
    return x


def psnr(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(-10 * torch.log10(F.mse_loss(samples, reference).clamp_min(1e-12) / 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.2, help="of First Block Cache")
    parser.add_argument("--backend", default="inductor", help='"eager" compiles nothing')
    args = parser.parse_args()

    torch.manual_seed(0)
    model = DiT()
    loss = train(model, args.train_steps)
    print(f"trained {args.train_steps} steps, loss {loss:.3f}")
    model.eval()
    uncached = sample(model, args.images, args.steps)

    policies = {
        "reuse": fxcache.FirstBlockCache(threshold=args.threshold),
        "Taylor": fxcache.FirstBlockCache(
            threshold=args.threshold, forecast=fxcache.Taylor(order=1), max_consecutive_hits=1
        ),
    }
    depth = len(model.blocks)
    for name, policy in policies.items():
        denoiser = fxcache.transform(model, policy, backend=args.backend)
        cached = sample(denoiser, args.images, args.steps)
        hits = denoiser.report().hits
        share = 1 - hits * (depth - policy.head_blocks) / (args.steps * depth)
        fewer = math.ceil(share * args.steps)  # the rival: a plain sampler at that cost
        rival = sample(model, args.images, fewer)
        print(
            f"{name}: {hits} of {args.steps} steps are hits, {share:.0%} of the blocks are "
            f"computed: {1 / share:.2f}x; PSNR to uncached {psnr(cached, uncached):.1f} dB "
            f"(plain sampling in {fewer} steps: {psnr(rival, uncached):.1f} dB)"
        )


if __name__ == "__main__":
    main()
