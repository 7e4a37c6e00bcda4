"""Train the small denoiser that ships with fxcache and that ``fxcache demo`` samples from.

Data: the colour bitmaps of the Noto Color Emoji font (SIL Open Font License 1.1), as Debian's
package ``fonts-noto-color-emoji`` installs it: about 900 emoji in eight classes, 32 x 32 RGB.
Model: diffusers' ``DiTTransformer2DModel``, 10 blocks, 128 wide, patches of 4 x 4 pixels.
Objective: flow matching (Lipman et al. 2023, arXiv 2210.02747): x_t = (1 - t) x_0 + t n, the
model predicts n - x_0; a tenth of the labels is dropped for classifier-free guidance.

    apt-get install fonts-noto-color-emoji && pip install fonttools "fxcache[demo]"
    python examples/train_demo.py --minutes 60 --output demo_model

writes ``demo_model/config.json``, ``demo_model/model.safetensors`` (float16) and a sample sheet.
"""

import argparse
import copy
import io
import json
import math
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from fontTools.ttLib import TTFont
from PIL import Image
from safetensors.torch import load_file, save_file

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLASSES = ("face", "heart", "animal", "food", "plant", "sky", "flag", "vehicle")
NULL_CLASS = len(CLASSES)
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 10,
    "sample_size": 32,
    "patch_size": 4,
    "num_embeds_ada_norm": len(CLASSES),
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
def sample(model, labels: torch.Tensor, steps: int = 30, guidance: float = 2.0, seed: int = 0):
    """Euler sampling with classifier-free guidance, both branches in one batch."""
    x = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    times = torch.linspace(1, 0, steps + 1)
    for now, after in pairwise(times):
        out = model(torch.cat([x, x]), timestep=(now * 1000).expand(len(both)), class_labels=both)
        cond, uncond = out.sample.chunk(2)
        x = x + (after - now) * (uncond + guidance * (cond - uncond))
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
    }
    save_file(state, args.output / "model.safetensors", metadata=metadata)
    config = {"_class_name": "DiTTransformer2DModel", **CONFIG, "classes": CLASSES}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    written = DiTTransformer2DModel(**CONFIG).eval()
    written.load_state_dict(load_file(args.output / "model.safetensors"))
    sheet = sample(written, torch.arange(8).repeat(8))
    write_sheet(sheet, args.output / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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

    images, labels = load_emoji(FONT, CONFIG["sample_size"])
    counts = {name: int((labels == i).sum()) for i, name in enumerate(CLASSES)}
    print(f"{len(images)} emoji: {counts}", flush=True)
    # Classes are drawn evenly: the flags alone are a third of the pictures.
    weights = torch.tensor([1 / counts[CLASSES[int(label)]] ** 0.5 for label in labels])

    # eval(): DiT's own label dropout draws anew in every block; labels are dropped here instead.
    model = DiTTransformer2DModel(**CONFIG).eval()
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
        t = torch.sigmoid(torch.randn(args.batch) * 1.1)
        noise = torch.randn_like(x0)
        mix = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = compiled(
                (1 - mix) * x0 + mix * noise, timestep=t * 1000, class_labels=y
            ).sample
        loss = (velocity.float() - (noise - x0)).square().mean()
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
