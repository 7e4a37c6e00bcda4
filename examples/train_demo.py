"""Train the small denoiser that ships with fxcache and that ``fxcache demo`` samples from, or one
of another kind to compare with: a UNet, or one that predicts the noise.

Data: the colour bitmaps of the Noto Color Emoji font (SIL Open Font License 1.1), as Debian's
package ``fonts-noto-color-emoji`` installs it: about 900 emoji in eight classes, 32 x 32 RGB.
Model: diffusers' ``DiTTransformer2DModel``, 10 blocks, 128 wide, patches of 4 x 4 pixels; with
``--model unet`` a class-conditional ``UNet2DModel`` of three resolutions.
Objective: flow matching (Lipman et al. 2023, arXiv 2210.02747): x_t = (1 - t) x_0 + t n, the
model predicts n - x_0; with ``--predict epsilon`` n, on the schedule of DDPM (Ho et al. 2020, arXiv
2006.11239). A tenth of the labels is dropped for classifier-free guidance.

    apt-get install fonts-noto-color-emoji && pip install fonttools "fxcache[demo]"
    python examples/train_demo.py --minutes 60 --output demo_model
    python examples/train_demo.py --model unet --minutes 40 --batch 32 --output unet
    python examples/train_demo.py --predict epsilon --minutes 30 --output epsilon \
        --resume demo_model/model.safetensors

writes ``demo_model/config.json``, ``demo_model/model.safetensors`` (float16) and a sample sheet.
"""

import argparse
import copy
import io
import json
import math
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from fontTools.ttLib import TTFont
from PIL import Image
from safetensors.torch import load_file, save_file

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLASSES = ("face", "heart", "animal", "food", "plant", "sky", "flag", "vehicle")
NULL_CLASS = len(CLASSES)
SIZE = 32
MODELS = {
    "dit": (
        DiTTransformer2DModel,
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 10,
            "sample_size": SIZE,
            "patch_size": 4,
            "num_embeds_ada_norm": len(CLASSES),
        },
    ),
    "unet": (
        UNet2DModel,
        {
            "sample_size": SIZE,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (24, 48, 72),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "attention_head_dim": 24,
            "num_class_embeds": len(CLASSES) + 1,
        },
    ),
}


def classify(codepoints: tuple[int, ...]) -> str | None:
    """The class of an emoji sequence, or None for those that the demo leaves out."""
    if len(codepoints) == 2 and all(0x1F1E6 <= c <= 0x1F1FF for c in codepoints):
        return "flag"
    if len(codepoints) != 1:
        return None
    code = codepoints[0]
    name = unicodedata.name(chr(code), "")
    if "HEART" in name and "FACE" not in name and "SUIT" not in name:
        return "heart"
    if 0x1F600 <= code <= 0x1F637 or 0x1F641 <= code <= 0x1F644:
        return "face"
    if "FACE" in name and (0x1F910 <= code <= 0x1F97A or 0x1FAE0 <= code <= 0x1FAEF):
        return "face"
    if 0x1F400 <= code <= 0x1F43E or 0x1F980 <= code <= 0x1F9AE or 0x1F638 <= code <= 0x1F640:
        return "animal"
    if 0x1F345 <= code <= 0x1F382 or 0x1F950 <= code <= 0x1F96F or 0x1F9C0 <= code <= 0x1F9CB:
        return "food"
    if 0x1F330 <= code <= 0x1F344 or 0x1FAB4 <= code <= 0x1FABB:
        return "plant"
    if 0x1F30D <= code <= 0x1F320 or 0x1F550 <= code <= 0x1F567:
        return "sky"
    if 0x1F680 <= code <= 0x1F6A4 or 0x1F6F3 <= code <= 0x1F6FC:
        return "vehicle"
    return None


def emoji_sequences(font: TTFont) -> dict[tuple[int, ...], str]:
    """Glyph names by code points: the single ones, and the flags (ligatures of two letters)."""
    cmap = font.getBestCmap()
    sequences = {(code,): glyph for code, glyph in cmap.items()}
    letters = {cmap[code]: code for code in range(0x1F1E6, 0x1F200)}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            ligatures = getattr(getattr(subtable, "ExtSubTable", subtable), "ligatures", {})
            for first in letters.keys() & ligatures.keys():
                for ligature in ligatures[first]:
                    codes = (letters[first], *map(letters.get, ligature.Component))
                    sequences[codes] = ligature.LigGlyph
    return sequences


def load_emoji(path: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the font's bitmaps: images [N, 3, size, size] in [-1, 1] and labels [N] (int64)."""
    font = TTFont(path)
    bitmaps = font["CBDT"].strikeData[0]
    images, labels = [], []
    for codepoints, glyph in emoji_sequences(font).items():
        label = classify(codepoints)
        if label is None or not hasattr(bitmaps.get(glyph), "imageData"):
            continue
        picture = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
        canvas = Image.new("RGBA", (136, 136), "white")
        canvas.alpha_composite(picture, ((136 - picture.width) // 2, (136 - picture.height) // 2))
        small = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1))
        labels.append(CLASSES.index(label))
    return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Shift the batch by at most one pixel, so that the model learns shapes and not pixels."""
    dy, dx = (int(v) for v in torch.randint(-1, 2, (2,)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    height, width = images.shape[-2:]
    return padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


@torch.no_grad()
def sample(model, labels: torch.Tensor, predict: str = "velocity", steps: int = 30, seed: int = 0):
    """Euler (DDIM) sampling with classifier-free guidance of 2, both branches in one batch."""
    x = torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    flow = torch.linspace(1, 0, steps + 1)
    times = scheduler.timesteps if predict == "epsilon" else flow[:-1] * 1000
    for number, time_ in enumerate(times):
        t = time_.expand(len(both))
        out = model(torch.cat([x, x]), timestep=t, class_labels=both)
        cond, uncond = out.sample.chunk(2)
        guided = uncond + 2 * (cond - uncond)
        if predict == "epsilon":
            x = scheduler.step(guided, time_, x).prev_sample
        else:
            x = x + (flow[number + 1] - flow[number]) * guided
    return x


def write_sheet(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write images [N, 3, H, W] in [-1, 1] as one PNG, row by row, four times enlarged."""
    tiles = ((images.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(path)


def save(model, step: int, args: argparse.Namespace) -> None:
    """Write weights (float16), config and a sheet sampled from the weights as written."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    metadata = {
        "data": "Noto Color Emoji bitmaps, SIL Open Font License 1.1",
        "trained_by": "examples/train_demo.py",
        "steps": str(step),
        "seed": str(args.seed),
        "predict": args.predict,
    }
    save_file(state, args.output / "model.safetensors", metadata=metadata)
    kind, config = MODELS[args.model]
    saved = {"_class_name": kind.__name__, **config, "classes": CLASSES, "predict": args.predict}
    (args.output / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    written = kind(**config).eval()
    written.load_state_dict(load_file(args.output / "model.safetensors"))
    sheet = sample(written, torch.arange(8).repeat(8), args.predict)
    write_sheet(sheet, args.output / "samples.png")


def noised(
    x0: torch.Tensor, noise: torch.Tensor, predict: str, scheduler: DDPMScheduler
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's input at random times, these times, and what it is to predict."""
    if predict == "epsilon":
        times = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        return scheduler.add_noise(x0, noise, times), times, noise
    t = torch.sigmoid(torch.randn(len(x0)) * 1.1)
    mix = t[:, None, None, None]
    return (1 - mix) * x0 + mix * noise, t * 1000, noise - x0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="dit")
    parser.add_argument("--predict", choices=("velocity", "epsilon"), default="velocity")
    parser.add_argument("--minutes", type=float, default=60, help="training time (default 60)")
    parser.add_argument("--output", type=Path, default=Path("demo_model"))
    parser.add_argument("--resume", type=Path, help="start from these weights (safetensors)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    images, labels = load_emoji(FONT, SIZE)
    counts = {name: int((labels == i).sum()) for i, name in enumerate(CLASSES)}
    print(f"{len(images)} emoji: {counts}", flush=True)
    # Classes are drawn evenly: the flags alone are a third of the pictures.
    weights = torch.tensor([1 / counts[CLASSES[int(label)]] ** 0.5 for label in labels])

    # eval(): DiT's own label dropout draws anew in every block; labels are dropped here instead.
    kind, config = MODELS[args.model]
    model, scheduler = kind(**config).eval(), DDPMScheduler()
    if args.resume:
        model.load_state_dict(load_file(args.resume))
    ema = copy.deepcopy(model)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    budget, step, started, running, reported = args.minutes * 60, 0, time.time(), 0.0, 0
    while (progress := (time.time() - started) / budget) < 1:
        lr = (
            args.lr
            * min(1, (step + 1) / 300)
            * (0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        picked = torch.multinomial(weights, args.batch, replacement=True)
        x0, y = jitter(images[picked]), labels[picked].clone()
        y[torch.rand(args.batch) < 0.1] = NULL_CLASS
        x, times, goal = noised(x0, torch.randn_like(x0), args.predict, scheduler)
        with torch.autocast("cpu", torch.bfloat16):
            found = compiled(x, timestep=times, class_labels=y).sample
        loss = (found.float() - goal).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        running += loss.item()
        if step % 500 == 0:
            minutes = (time.time() - started) / 60
            print(
                f"{minutes:5.1f} min  step {step}  loss {running / (step - reported):.4f}"
                f"  lr {lr:.1e}",
                flush=True,
            )
            running, reported = 0.0, step
        if step % 1000 == 0:
            save(ema, step, args)
    save(ema, step, args)


if __name__ == "__main__":
    main()
