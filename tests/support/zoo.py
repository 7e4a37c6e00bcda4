"""Tiny denoisers for the tests: diffusers' classes built from small configs, and hand-written ones.

Each entry makes a model and its inputs. Random weights, seeded; zero-initialised gates are given
values, so that every block changes its stream.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcache.pipelines.tiny import tiny_model

Inputs = dict[str, Any]

TIMESTEPS = ("timestep", "t")
SAMPLES = ("hidden_states", "sample", "x")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    `head` and `span` are the paths of the head block and of the blocks that a hit must skip; `time`
    is the first timestep. Where the last block returns a tuple (or a dataclass), `image` is the
    place (or name) of the image stream in it. Of a U shape (`is_u_shape`), `span` is a part of what
    is skipped.
    """

    build: Callable[..., tuple[nn.Module, Inputs]]
    head: str
    span: tuple[str, ...]
    time: float = 1000.0
    image: int | str | None = None
    is_u_shape: bool = False


ZOO: dict[str, Entry] = {}


def register(name: str, build: Any, head: str, span: dict[str, range], **options: Any) -> None:
    paths = tuple(f"{path}.{i}" for path, indices in span.items() for i in indices)
    ZOO[name] = Entry(build, head, paths, **options)


def entry(head: str, span: dict[str, range], **options: Any):
    """Register the builder of a zoo entry under its name."""
    return lambda build: register(build.__name__, build, head, span, **options)


def make(name: str, **config: Any) -> tuple[nn.Module, Inputs]:
    """Entry `name` in eval mode, with seeded weights and inputs; some take a `config`."""
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(**config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), inputs


def at_step(name: str, inputs: Inputs, step: int) -> Inputs:
    """The inputs of step `step`: a slowly moving sample and a falling timestep."""
    moved = dict(inputs)
    generator = torch.Generator().manual_seed(step)
    for key, value in inputs.items():
        if key in TIMESTEPS:
            first = ZOO[name].time
            moved[key] = torch.full_like(value, first - 0.05 * step * first)
        elif key in SAMPLES and torch.is_tensor(value):
            moved[key] = value + 0.05 * step * torch.randn(value.shape, generator=generator)
    return moved


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


# --- diffusers -----------------------------------------------------------------------------------

#: Where the head block is, and the blocks that a hit skips.
THREE = "transformer_blocks.0", {"transformer_blocks": range(1, 3)}
SINGLE = {"single_transformer_blocks": range(2)}
FLUX = THREE[0], {"transformer_blocks": range(1, 2), **SINGLE}
JOINT = "joint_transformer_blocks.0", {"joint_transformer_blocks": range(1, 2), **SINGLE}
WAN = "blocks.0", {"blocks": range(1, 3)}
UNET = "down_blocks.0.resnets.0", {"down_blocks": range(1, 2), "up_blocks": range(1)}

#: Those that are built and called as `fxcache.pipelines.tiny` has them.
TINY = {
    "flux": ("FluxTransformer2DModel", FLUX, {"time": 1.0, "image": 1}),
    "chroma": ("ChromaTransformer2DModel", FLUX, {"time": 1.0}),
    "sd3": ("SD3Transformer2DModel", THREE, {"image": 1}),
    "auraflow": ("AuraFlowTransformer2DModel", JOINT, {"time": 1.0}),
    "pixart": ("PixArtTransformer2DModel", THREE, {}),
    "sana": ("SanaTransformer2DModel", THREE, {}),
    "dit": ("DiTTransformer2DModel", THREE, {}),
    "qwenimage": ("QwenImageTransformer2DModel", THREE, {"time": 1.0, "image": 1}),
    "lumina2": ("Lumina2Transformer2DModel", ("layers.0", {"layers": range(1, 3)}), {"time": 1.0}),
    "sd15_unet": ("UNet2DConditionModel", UNET, {"is_u_shape": True}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", FLUX, {"image": 0}),
    "wan_t2v": ("WanTransformer3DModel", WAN, {}),
    "wan_vace": ("WanVACETransformer3DModel", WAN, {}),
    "ltx_video": ("LTXVideoTransformer3DModel", THREE, {}),
    "cogvideox": ("CogVideoXTransformer3DModel", THREE, {"image": 0}),
    "mochi": ("MochiTransformer3DModel", THREE, {"image": 0}),
    "stable_audio": ("StableAudioDiTModel", THREE, {}),
}
for name, (cls, blocks, options) in TINY.items():
    register(name, functools.partial(tiny_model, cls), *blocks, **options)


@entry(*FLUX, time=1.0, image=1)
def flux_kontext():
    # Kontext appends the tokens of the reference image; as many text tokens as image tokens, so
    # that streams cannot be told apart by their shapes. ControlNets add residuals between blocks,
    # and guidance is one more input.
    model, inputs = tiny_model("FluxTransformer2DModel", guidance_embeds=True)
    more = {
        "guidance": torch.tensor([3.5]),
        "hidden_states": randn(1, 24, 4),
        "encoder_hidden_states": randn(1, 24, 32),
        "img_ids": randn(24, 3),
        "txt_ids": randn(24, 3),
        "controlnet_block_samples": [randn(1, 24, 32) for _ in range(2)],
        "controlnet_single_block_samples": [randn(1, 24, 32) for _ in range(2)],
    }
    return model, {**inputs, **more}


@entry(*THREE, image=1)
def sd35_dual_attention():
    config = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    return tiny_model("SD3Transformer2DModel", **config)


@entry(*UNET, is_u_shape=True)
def sdxl_unet():
    model, inputs = tiny_model(
        "UNet2DConditionModel",
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )
    added = {"text_embeds": randn(2, 8), "time_ids": randn(2, 6)}
    return model, {**inputs, "added_cond_kwargs": added}


@entry(*WAN)
def wan_i2v():
    config = {"in_channels": 8, "image_dim": 16, "added_kv_proj_dim": 24}
    model, inputs = tiny_model("WanTransformer3DModel", **config)
    given = {"hidden_states": randn(1, 8, 2, 8, 8), "encoder_hidden_states_image": randn(1, 5, 16)}
    return model, {**inputs, **given}


# --- hand-written --------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm residual block, attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.norm2(x))


class Denoiser(nn.Module):
    """What the hand-written models share: tokens in, a time token, a projection out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.embed(x) + self.time(t[:, None])[:, None]
        return self.out(self.norm(self.stack(h)))


class SequentialDiT(Denoiser):
    """A plain DiT: the blocks stand in a Sequential."""

    def __init__(self, depth: int = 4, width: int = 16) -> None:
        super().__init__(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def stack(self, h: torch.Tensor) -> torch.Tensor:
        return self.blocks(h)


class BreaksBefore(SequentialDiT):
    """A graph break before the stack, behind a list that is none: it does little."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth)
        self.prefix = nn.Sequential(Block(4), Block(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.prefix(x)
        torch._dynamo.graph_break()
        return super().forward(x, t)


class BreaksAfter(SequentialDiT):
    """A graph break after the stack."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = super().forward(x, t)
        torch._dynamo.graph_break()
        return y + 1


class UViT(Denoiser):
    """Long skips: the second half's blocks also read what the first half's left."""

    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__(width)
        self.in_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.mid_block = Block(width)
        self.out_blocks = nn.ModuleList(SkipBlock(width) for _ in range(depth))

    def stack(self, h: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        return h


class SkipBlock(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.skip = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return super().forward(self.skip(torch.cat([x, skip], dim=-1)))


@dataclass
class Streams:
    image: torch.Tensor
    register: torch.Tensor


class DictBlock(Block):
    """Takes and returns a dict of streams."""

    def forward(self, streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        joint = super().forward(torch.cat([streams["register"], streams["image"]], dim=1))
        length = streams["register"].shape[1]
        return {"register": joint[:, :length], "image": joint[:, length:]}


class DataclassBlock(Block):
    """Takes and returns a dataclass of streams."""

    def forward(self, streams: Streams) -> Streams:
        joint = super().forward(torch.cat([streams.register, streams.image], dim=1))
        length = streams.register.shape[1]
        return Streams(joint[:, length:], joint[:, :length])


class StructuredDiT(Denoiser):
    """Blocks that hand on dicts, then blocks that hand on dataclasses."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.register = nn.Parameter(torch.randn(1, 2, width))
        self.dict_blocks = nn.ModuleList(DictBlock(width) for _ in range(2))
        self.blocks = nn.ModuleList(DataclassBlock(width) for _ in range(3))

    def stack(self, h: torch.Tensor) -> torch.Tensor:
        streams = {"image": h, "register": self.register.expand(h.shape[0], -1, -1)}
        for block in self.dict_blocks:
            streams = block(streams)
        state = Streams(streams["image"], streams["register"])
        for block in self.blocks:
            state = block(state)
        return state.image


def token_inputs(batch: int = 2, tokens: int = 8) -> Inputs:
    return {"x": randn(batch, tokens, 4), "t": torch.ones(batch)}


@entry("blocks.0", {"blocks": range(1, 4)}, time=1.0)
def sequential_dit():
    return SequentialDiT(), token_inputs()


@entry("in_blocks.0", {"in_blocks": range(1, 3)}, time=1.0, is_u_shape=True)
def uvit():
    return UViT(), token_inputs()


@entry("dict_blocks.0", {"dict_blocks": range(1, 2), "blocks": range(3)}, time=1.0, image="image")
def structured_dit():
    return StructuredDiT(), token_inputs()
