"""Train a tiny denoiser of SD3's kind, sample it in a real ComfyUI, and draw what fxcache changes.

ComfyUI's own class is trained for twenty minutes on emoji (Noto Color Emoji, SIL Open Font License
1.1) and saved as a file that "Load Diffusion Model" takes for SD3. Workflows over HTTP sample it:
without a cache, with the node fxcache, and in as many steps as that computed. A prompt is a number
(the node TinyText of tests/comfyui), and a latent is the picture itself, its pixels moved into
channels, so neither a text encoder nor a VAE is needed.

It needs a checkout of ComfyUI, a Python that has its requirements and fxcache, and the font:

    apt-get install fonts-noto-color-emoji && pip install fonttools "fxcache[demo]"
    python examples/train_comfyui.py --output out  # writes the data alone
    PYTHON_OF_COMFYUI examples/train_comfyui.py --output out --comfyui PATH/TO/ComfyUI

writes ``emoji_sd3.safetensors`` (trained if it is not there), ``figures.json`` and the picture.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch.nn import functional

KINDS = ("face", "heart", "animal", "food", "plant", "vehicle")
DEPTH, PER_KIND, PER_PROMPT, PROMPTS, BATCH, RATE = 4, 16, 2, 48, 32, 1e-3
SCALE, SHIFT = 1.5305, 0.0609  # of ComfyUI's `latent_formats.SD3`
NOTHING = 10000  # the prompt of the guidance's other branch
STEPS, CFG, TILE, MARGIN = 30, 2.5, 98, 112


def write_data(path: Path) -> None:
    """Write latents as the model sees them [N, 16, 16, 16], and the number of each one's prompt."""
    from train_demo import CLASSES, FONT, load_emoji

    images, labels = load_emoji(FONT, 32)
    kept = torch.cat([(labels == CLASSES.index(k)).nonzero()[:PER_KIND, 0] for k in KINDS])
    latents = functional.pad(functional.pixel_unshuffle(images[kept], 2), (0, 0, 0, 0, 0, 4))
    # Emoji that are next to each other in the font share a prompt: the noise decides.
    prompts = torch.arange(len(kept)) // PER_PROMPT
    save_file({"latents": (latents - SHIFT) * SCALE, "prompts": prompts}, path)


def prompt(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The text and its pooled form, as the tests' node TinyText makes them."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, 4096, generator=noise), torch.randn(1, 2048, generator=noise)


def build(comfyui: Path) -> torch.nn.Module:
    """ComfyUI's SD3 with weights to train: ComfyUI itself leaves these to the file."""
    sys.path.append(str(comfyui))
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True  # read when the rest is imported
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    sizes = {"in_features": 4096, "out_features": 64 * DEPTH}
    model = OpenAISignatureMMDITWrapper(
        patch_size=2, in_channels=16, depth=DEPTH, adm_in_channels=2048, operations=torch.nn,
        context_embedder_config={"target": "torch.nn.Linear", "params": sizes}, dtype=torch.float32,
    )  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_zero = "adaLN_modulation" in name or name == "final_layer.linear"
            torch.nn.init.xavier_uniform_(module.weight, 0.0 if is_zero else 1.0)
            torch.nn.init.zeros_(module.bias)
    return model


def train(args: argparse.Namespace, path: Path) -> None:
    """Flow matching: of x = (1 - s) x_0 + s n and 1000 s the model makes n - x_0."""
    torch.manual_seed(0)
    latents, prompts = map(load_file(args.output / "emoji.safetensors").get, ("latents", "prompts"))
    texts, pooled = map(torch.cat, zip(*map(prompt, [*range(PROMPTS), NOTHING]), strict=True))
    model = build(args.comfyui)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    ema, started, step = copy.deepcopy(model), time.time(), 0
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        decay = 0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * decay
        picked = torch.randint(len(latents), (BATCH,))
        given = torch.where(torch.rand(BATCH) < 0.1, PROMPTS, prompts[picked])
        x0, noise = latents[picked], torch.randn(BATCH, *latents.shape[1:])
        s = torch.sigmoid(1.1 * torch.randn(BATCH) + 0.4)
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.lerp(x0, noise, s[:, None, None, None])
            found = model(x, s * 1000, texts[given], pooled[given])
        loss = (found.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(ema.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, max(0.002, 19 / (step + 20)))
        step += 1
        if step % 100 == 0:
            print(f"step {step}  loss {loss:.4f}", flush=True)
    save_file(ema.state_dict(), path)


def sample(comfy, number: int, nodes, steps: int) -> tuple[torch.Tensor, int]:
    """The picture [3, 32, 32] of prompt and seed `number`, and how many steps were reused."""
    import server

    made = server.graph("sd3", nodes, seed=number, steps=steps, cfg=CFG)
    made["load"]["inputs"]["unet_name"] = "emoji_sd3.safetensors"
    made["positive"]["inputs"]["seed"], made["negative"]["inputs"]["seed"] = number, NOTHING
    made["latent"]["inputs"] |= {"width": 128, "height": 128}
    if nodes:
        made["report"] = server.node("FxCacheReport", model=["n0", 0], samples=["sample", 0])
    outputs = comfy.run(made, 600)
    (saved,) = outputs["save"]["latents"]
    latents = load_file(comfy.base / "output" / saved["subfolder"] / saved["filename"])
    picture = functional.pixel_shuffle(latents["latent_tensor"][0, :12], 2).clamp(-1, 1) / 2 + 0.5
    table = outputs["report"]["text"][0] if nodes else ""
    return picture, sum(line.endswith(" hit") for line in table.splitlines())


def compare(args: argparse.Namespace, path: Path) -> None:
    """Sample each prompt in the three ways; write the figures of all, the picture of some."""
    os.environ |= {"COMFYUI_PATH": str(args.comfyui), "OMP_NUM_THREADS": "1"}
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "comfyui"))
    from server import Server

    with tempfile.TemporaryDirectory() as folder, closing(Server(Path(folder) / "base")) as comfy:
        shutil.copy(path, comfy.base / "models" / "diffusion_models")
        inputs = comfy.info["FxCache"]["input"]["required"].items()
        node = {name: more[0]["default"] for name, (kind, *more) in inputs if kind != "MODEL"}

        def pictures(steps: int, nodes=()) -> list[tuple]:
            found = [sample(comfy, n, nodes, steps) for n in range(PROMPTS)]
            return list(zip(*found, strict=True))

        full = pictures(STEPS)[0]
        cached, hits = pictures(STEPS, [("FxCache", node)])
        reused = sum(hits) // len(hits)  # and as many steps computed, or one too many
        short, _ = pictures(STEPS - reused)
    figures = {"steps": STEPS, "cfg": CFG, "node": node, "hits": hits}
    rows = [([f"{STEPS} steps"], full)]
    for name, images, about in (
        ("fxcache", cached, f"{sum(hits) / len(hits):.1f} of {STEPS} reused"),
        (f"{STEPS - reused} steps", short, "(the same cost)"),
    ):
        pairs = list(zip(images, full, strict=True))
        found = [-10 * math.log10(functional.mse_loss(*pair) + 1e-10) for pair in pairs]
        figures[name] = {"mean": sum(found) / len(found), "worst": min(found), "all": found}
        apart = [(1 - 20 * (a - b).abs().mean(0)).relu().expand(3, -1, -1) for a, b in pairs]
        label = [name, about, f"PSNR {figures[name]['mean']:.1f} dB"]
        rows += [(label, images), (["", "difference x 20"], apart)]
    draw([(text, images[3::6]) for text, images in rows], args.output)
    (args.output / "figures.json").write_text(json.dumps(figures) + "\n")


def draw(rows: list[tuple[list[str], list[torch.Tensor]]], folder: Path) -> None:
    """Write rows of pictures, each behind its lines of text."""
    sheet = Image.new("RGB", (MARGIN + len(rows[0][1]) * TILE, len(rows) * TILE), "white")
    pen, fonts = ImageDraw.Draw(sheet), [ImageFont.load_default(size) for size in (15, 12)]
    for number, (lines, images) in enumerate(rows):
        for line, text in enumerate(lines):
            place = 8, TILE * (number + 0.5) + 18 * (line - len(lines) / 2)
            pen.text(place, text, "#555" if line else "black", fonts[line > 0])
        for column, image in enumerate(images):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((TILE - 2, TILE - 2), Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + column * TILE, number * TILE))
    sheet.quantize(256).save(folder / "side_by_side.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, help="a checkout; without it data alone is written")
    parser.add_argument("--output", type=Path, default=Path("comfyui_emoji"))
    parser.add_argument("--minutes", type=float, default=20, help="training time (default 20)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data, path = args.output / "emoji.safetensors", args.output / "emoji_sd3.safetensors"
    if not data.exists():
        write_data(data)
    if args.comfyui and not path.exists():
        train(args, path)
    if args.comfyui:
        compare(args, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
