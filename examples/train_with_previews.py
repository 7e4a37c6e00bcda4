"""Train a diffusion transformer, and meanwhile sample cached previews from its moving average.

    python examples/train_with_previews.py --output previews.png

What to copy: the model is trained through its denoiser (in training mode nothing is cached, and
gradients are the model's own), the moving average has a denoiser of its own, and every preview is a
trajectory, announced as such, which starts clean whatever happened to the weights before.

Printed are the loss and how near each cached preview is to the same without cache. The model and
its pictures (soft discs) are those of ``flow_matching_dit.py`` beside this file.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flow_matching_dit import PATCH, SIZE, DiT, pictures, psnr, sample
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fxcache

BATCH, SHOWN = 64, 8
POLICY = fxcache.FirstBlockCache(threshold=0.2, warmup_steps=3, forecast=fxcache.Taylor(order=1))


@dataclass
class Preview:
    """What was seen after `step` training steps: `psnr` compares with the same without cache."""

    step: int
    loss: float
    psnr: float
    hits: int
    samples: torch.Tensor


def loss_of(denoiser: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Flow matching on a fresh batch, at random noise levels."""
    picture = pictures(BATCH, generator)
    noise, t = torch.randn(picture.shape, generator=generator), torch.rand(BATCH)
    x = torch.lerp(picture, noise, t[:, None, None])
    return F.mse_loss(denoiser(x, t), noise - picture)


def update(average: nn.Module, model: nn.Module, step: int) -> None:
    """An exponential moving average of the weights, short at first."""
    decay = min(0.99, step / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def preview_of(
    cached: nn.Module, average: nn.Module, step: int, losses: list[float], steps: int
) -> Preview:
    """Sample from the moving average through its denoiser `cached`, and without it to compare."""
    before = cached.report().hits
    samples = sample(cached, SHOWN, steps)  # under no_grad, as a trajectory
    return Preview(
        step,
        sum(losses) / len(losses),
        psnr(samples, sample(average, SHOWN, steps)),
        cached.report().hits - before,
        samples,
    )


def train(
    *, steps: int, every: int, preview_steps: int = 30, backend: str = "eager"
) -> tuple[nn.Module, list[Preview]]:
    """Train, with a preview after each `every` steps, and print as it goes.

    Returns the denoiser and the previews.
    """
    model = DiT()
    denoiser = fxcache.transform(model, POLICY, backend=backend)
    average = copy.deepcopy(model).eval()
    cached = fxcache.transform(average, POLICY, backend=backend)  # reads the average's weights
    optimizer = torch.optim.AdamW(denoiser.parameters(), 2e-3)
    generator, started = torch.Generator().manual_seed(0), time.time()
    previews, losses = [], []
    for step in range(1, steps + 1):
        denoiser.train()
        loss = loss_of(denoiser, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update(average, model, step)
        losses.append(loss.item())
        if step % every and step < steps:
            continue
        seen = preview_of(cached, average, step, losses, preview_steps)
        previews.append(seen)
        losses.clear()
        print(
            f"{time.time() - started:5.0f} s  step {step:5}  loss {seen.loss:.3f}  preview: "
            f"{seen.hits}/{preview_steps} hits, {seen.psnr:.1f} dB to uncached",
            flush=True,
        )
    return denoiser, previews


def gradients_are_equal(denoiser: nn.Module, model: nn.Module) -> bool:
    """Whether the gradients of all weights are those of the plain model, bit for bit."""
    found = []
    for module in (denoiser, model):
        module.train().zero_grad()
        torch.manual_seed(1)
        loss_of(module, torch.Generator().manual_seed(1)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return all(map(torch.equal, *found))


def write(previews: list[Preview], path: Path) -> None:
    """One PNG, a row a preview, eight times enlarged."""
    from PIL import Image

    rows = torch.stack([preview.samples for preview in previews])
    places = rows.unflatten(2, (SIZE // PATCH, -1)).unflatten(4, (PATCH, PATCH))
    # previews, samples, rows and columns of patches, rows and columns in them
    sheet = places.permute(0, 2, 4, 1, 3, 5).reshape(len(rows) * SIZE, -1)
    image = Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).byte().numpy())
    image.resize((8 * image.width, 8 * image.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--every", type=int, default=100, help="training steps between previews")
    parser.add_argument("--preview-steps", type=int, default=30)
    parser.add_argument("--backend", default="eager", help='"inductor" compiles the previews')
    parser.add_argument("--output", type=Path, help="write the previews here (PNG)")
    parser.add_argument("--threads", type=int, default=1, help="more do not help so small a model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    denoiser, previews = train(
        steps=args.steps,
        every=args.every,
        preview_steps=args.preview_steps,
        backend=args.backend,
    )
    is_equal = gradients_are_equal(denoiser, fxcache.restore(denoiser))
    print(f"gradients through the denoiser {'are' if is_equal else 'ARE NOT'} the model's own")
    if args.output:
        write(previews, args.output)
        print(f"previews: {args.output}")


if __name__ == "__main__":
    main()
