"""Tiny denoisers for the tests: diffusers' classes built from small configs, and hand-written ones.

Each entry makes a model and its inputs. Random weights, seeded; zero-initialised gates are given
values, so that every block changes its stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]

TIMESTEPS = ("timestep", "t")
SAMPLES = ("hidden_states", "sample", "x")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    `head` and `span` are the paths of the head block and of the blocks that a hit must skip; `time`
    is the first timestep. Where the last block returns a tuple (or a dataclass), `image` is the
    place (or name) of the image stream in it; `as_is` says that the stream continues none.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    head: str
    span: tuple[str, ...]
    time: float = 1000.0
    fullgraph: bool = True
    image: int | str | None = None
    as_is: bool = False


ZOO: dict[str, Entry] = {}


def entry(head: str, span: dict[str, range] | tuple[str, ...], **options: Any):
    """Register the builder of a zoo entry under its name."""

    def register(build: Callable[[], tuple[nn.Module, Inputs]]):
        paths = (
            tuple(f"{path}.{i}" for path, indices in span.items() for i in indices)
            if isinstance(span, dict)
            else span
        )
        ZOO[build.__name__] = Entry(build, head, paths, **options)
        return build

    return register


def make(name: str) -> tuple[nn.Module, Inputs]:
    """Build entry `name` in eval mode with seeded weights and inputs."""
    torch.manual_seed(0)
    model, inputs = ZOO[name].build()
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


# --- image transformers --------------------------------------------------------------------------


def flux_inputs(image: int = 16, text: int = 8) -> Inputs:
    return {
        "hidden_states": randn(1, image, 4),
        "encoder_hidden_states": randn(1, text, 32),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": randn(image, 3),
        "txt_ids": randn(text, 3),
    }


def build_flux(**config: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
            **config,
        }
    )


FLUX_SPAN = {"transformer_blocks": range(1, 2), "single_transformer_blocks": range(2)}


@entry("transformer_blocks.0", FLUX_SPAN, time=1.0, image=1)
def flux():
    return build_flux(), flux_inputs()


@entry("transformer_blocks.0", FLUX_SPAN, time=1.0, image=1)
def flux_guidance():
    return build_flux(guidance_embeds=True), {**flux_inputs(), "guidance": torch.tensor([3.5])}


@entry("transformer_blocks.0", FLUX_SPAN, time=1.0, image=1)
def flux_kontext():
    # Kontext appends the tokens of the reference image; as many text tokens as image tokens, so
    # that streams cannot be told apart by their shapes.
    return build_flux(), flux_inputs(image=24, text=24)


@entry("transformer_blocks.0", FLUX_SPAN, time=1.0, image=1)
def flux_controlnet():
    residuals = {
        "controlnet_block_samples": [randn(1, 16, 32) for _ in range(2)],
        "controlnet_single_block_samples": [randn(1, 16, 32) for _ in range(2)],
    }
    return build_flux(), {**flux_inputs(), **residuals}


@entry("transformer_blocks.0", FLUX_SPAN, time=1.0, image=1)
def chroma():
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    inputs = flux_inputs()
    del inputs["pooled_projections"]
    return model, inputs


def build_sd3(**config: Any) -> tuple[nn.Module, Inputs]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
            **config,
        }
    )
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 12, 32),
        "pooled_projections": randn(2, 64),
        "timestep": torch.tensor([1000.0, 1000.0]),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)}, image=1)
def sd3():
    return build_sd3()


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)}, image=1)
def sd35_dual_attention():
    return build_sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


@entry(
    "joint_transformer_blocks.0",
    {"joint_transformer_blocks": range(1, 2), "single_transformer_blocks": range(2)},
    time=1.0,
)
def auraflow():
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    inputs = {
        "hidden_states": randn(2, 4, 16, 16),
        "encoder_hidden_states": randn(2, 12, 32),
        "timestep": torch.tensor([1.0, 1.0]),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)})
def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([1000, 1000]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)})
def sana():
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
    )
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([1000, 1000]),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)})
def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=8,
    )
    inputs = {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": torch.tensor([1000, 1000]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)}, time=1.0, image=1)
def qwenimage():
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": randn(1, 16, 16),
        "encoder_hidden_states": randn(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
        "timestep": torch.tensor([1.0]),
        "img_shapes": [(1, 4, 4)],
    }
    return model, inputs


@entry("layers.0", {"layers": range(1, 3)}, time=1.0, fullgraph=False)
def lumina2():
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    inputs = {
        "hidden_states": randn(2, 4, 16, 16),
        "encoder_hidden_states": randn(2, 16, 8),
        "timestep": torch.tensor([1.0, 1.0]),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
    }
    return model, inputs


# --- UNets ---------------------------------------------------------------------------------------

UNET_SPAN = {"down_blocks": range(1, 2), "up_blocks": range(2)}


def build_unet(**config: Any) -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            **config,
        }
    )
    inputs = {
        "sample": randn(2, 4, 16, 16),
        "timestep": torch.tensor(1000),
        "encoder_hidden_states": randn(2, 4, 8),
    }
    return model, inputs


@entry("down_blocks.0", UNET_SPAN, as_is=True)
def sd15_unet():
    return build_unet()


@entry("down_blocks.0", UNET_SPAN, as_is=True)
def sdxl_unet():
    model, inputs = build_unet(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )
    added = {"text_embeds": randn(2, 8), "time_ids": randn(2, 6)}
    return model, {**inputs, "added_cond_kwargs": added}


# --- video and audio -----------------------------------------------------------------------------


@entry("transformer_blocks.0", FLUX_SPAN, image=0)
def hunyuan_video():
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    inputs = {
        "hidden_states": randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12, dtype=torch.bool),
        "pooled_projections": randn(1, 8),
        "timestep": torch.tensor([1000]),
        "guidance": torch.tensor([3.5]),
    }
    return model, inputs


@entry("transformer_blocks.0", FLUX_SPAN, image=0)
def hunyuan_framepack():
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    inputs = {
        "hidden_states": randn(1, 4, 3, 4, 4),
        "timestep": torch.tensor([1000]),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12, dtype=torch.bool),
        "pooled_projections": randn(1, 8),
        "image_embeds": randn(1, 3, 16),
        "indices_latents": torch.ones(3),
        "guidance": torch.tensor([3.5]),
        "latents_clean": randn(1, 4, 2, 4, 4),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": randn(1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": randn(1, 4, 4, 4, 4),
        "indices_latents_history_4x": torch.ones(4),
    }
    return model, inputs


def build_wan(cls: str, **config: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, cls)(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 64,
            "ffn_dim": 32,
            "num_layers": 3,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
            **config,
        }
    )


def wan_inputs(channels: int = 4) -> Inputs:
    return {
        "hidden_states": randn(1, channels, 2, 8, 8),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([1000]),
    }


@entry("blocks.0", {"blocks": range(1, 3)})
def wan_t2v():
    return build_wan("WanTransformer3DModel"), wan_inputs()


@entry("blocks.0", {"blocks": range(1, 3)})
def wan_i2v():
    model = build_wan("WanTransformer3DModel", in_channels=8, image_dim=16, added_kv_proj_dim=24)
    return model, {**wan_inputs(8), "encoder_hidden_states_image": randn(1, 5, 16)}


@entry("blocks.0", {"blocks": range(1, 3)})
def wan_vace():
    model = build_wan("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=12)
    return model, {**wan_inputs(), "control_hidden_states": randn(1, 12, 2, 8, 8)}


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)})
def ltx_video():
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": randn(2, 32, 4),
        "encoder_hidden_states": randn(2, 6, 16),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "timestep": torch.tensor([1000, 1000]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)}, image=0)
def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        patch_size_t=None,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    inputs = {
        "hidden_states": randn(2, 1, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([1000, 1000]),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)}, image=0)
def mochi():
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    inputs = {
        "hidden_states": randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": randn(2, 16, 16),
        "timestep": torch.tensor([1000, 1000]),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
    }
    return model, inputs


@entry("transformer_blocks.0", {"transformer_blocks": range(1, 3)})
def stable_audio():
    from diffusers import StableAudioDiTModel

    model = StableAudioDiTModel(
        sample_size=4,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=8,
    )
    inputs = {
        "hidden_states": randn(2, 4, 6),
        "timestep": torch.tensor([1000.0, 1000.0]),
        "encoder_hidden_states": randn(2, 5, 8),
        "global_hidden_states": randn(2, 1, 8),
        "rotary_embedding": (randn(7, 4), randn(7, 4)),
    }
    return model, inputs


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


@entry(
    "in_blocks.0",
    ("in_blocks.1", "in_blocks.2", "mid_block", "out_blocks.0", "out_blocks.1", "out_blocks.2"),
    time=1.0,
)
def uvit():
    return UViT(), token_inputs()


@entry("dict_blocks.0", {"dict_blocks": range(1, 2), "blocks": range(3)}, time=1.0, image="image")
def structured_dit():
    return StructuredDiT(), token_inputs()
