"""Tiny real components of pipelines: tokenizers, text and image encoders, VAEs, made in memory.

Weights are random but always the same: each component is seeded by itself, so it does not matter
what was built before it. What holds no state of a run is built once a process.
"""

import functools
import string
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

CHARACTERS = [c for c in string.printable if not c.isspace()]
BYTES = sorted(ByteLevel.alphabet())
TOKENS = 24  # the longest prompt, in tokens

LEVELS = 4  # of the video VAEs


def seeded(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """`build(*args, **kwargs)` in eval mode, seeded, with values in what starts as zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(*args, **kwargs)
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return module.eval()


def model(name: str, **config: Any) -> nn.Module:
    """diffusers' class `name`, seeded."""
    return seeded(getattr(diffusers, name), **config)


def of_transformers(name: str, config: str, **options: Any) -> Any:
    """transformers' class `name`, seeded."""
    return seeded(getattr(transformers, name), getattr(transformers, config)(**options))


# Tokenizers: one token a character.


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


@functools.cache
def clip_tokenizer() -> Any:
    vocab = ["<|startoftext|>", "<|endoftext|>", *BYTES, *(f"{c}</w>" for c in BYTES)]
    return transformers.CLIPTokenizer(numbered(vocab), [], model_max_length=TOKENS)


@functools.cache
def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    vocab = [(piece, -float(number > 2)) for number, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab, extra_ids=0, model_max_length=TOKENS)


@functools.cache
def llama_tokenizer() -> Any:
    vocab = ["<unk>", "<s>", "</s>", "<pad>", "▁", *CHARACTERS]
    return transformers.LlamaTokenizer(numbered(vocab), [], pad_token="<pad>", padding_side="right")


@functools.cache
def gemma_tokenizer() -> Any:
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS]
    return transformers.GemmaTokenizer(numbered(vocab), [])


@functools.cache
def qwen_tokenizer() -> Any:
    special = ["<|im_start|>", "<|im_end|>"]
    vocab = ["<|endoftext|>", *special, *BYTES]
    return transformers.Qwen2Tokenizer(numbered(vocab), [], extra_special_tokens=special)


# Encoders. Those of text with their tokenizer, as components of a pipeline: `place` is "" or "_2".

#: What the encoders of transformers share. The large range makes different prompts differ visibly.
SMALL = {
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def named(place: str, encoder: Any, tokenizer: Any) -> dict[str, Any]:
    return {f"text_encoder{place}": encoder, f"tokenizer{place}": tokenizer}


@functools.cache
def clip(place: str = "", projection: bool = False, width: int = 32) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    encoder = of_transformers(
        name, "CLIPTextConfig", **SMALL, vocab_size=len(tokenizer), hidden_size=width,
        projection_dim=width, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return named(place, encoder, tokenizer)


@functools.cache
def t5(place: str = "", cls: str = "T5", width: int = 32) -> dict[str, Any]:
    encoder = of_transformers(
        f"{cls}EncoderModel", f"{cls}Config", vocab_size=len(t5_tokenizer()), d_model=width,
        d_kv=8, d_ff=32, num_layers=2, num_heads=4,
    )  # fmt: skip
    return named(place, encoder, t5_tokenizer())


@functools.cache
def llama() -> dict[str, Any]:
    own = {"hidden_size": 16, "vocab_size": len(llama_tokenizer()), "pad_token_id": 3}
    encoder = of_transformers("LlamaModel", "LlamaConfig", **SMALL, **own)
    return named("", encoder, llama_tokenizer())


@functools.cache
def gemma() -> dict[str, Any]:
    own = {"head_dim": 4, "num_key_value_heads": 2, "vocab_size": len(gemma_tokenizer())}
    encoder = of_transformers("Gemma2Model", "Gemma2Config", **SMALL, hidden_size=8, **own)
    return named("", encoder, gemma_tokenizer())


@functools.cache
def qwen() -> dict[str, Any]:
    rope = {"mrope_section": [1, 1], "rope_type": "default", "type": "default"}
    tokens = {"vocab_size": len(qwen_tokenizer()), "bos_token_id": 0, "eos_token_id": 2}
    text = {**SMALL, **tokens, "hidden_size": 16, "num_key_value_heads": 2, "rope_scaling": rope}
    vision = {"depth": 1, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision["hidden_size"] = 16
    name = "Qwen2_5_VLForConditionalGeneration"
    encoder = of_transformers(name, "Qwen2_5_VLConfig", text_config=text, vision_config=vision)
    return named("", encoder, qwen_tokenizer())


@functools.cache
def vision(cls: str, **options: Any) -> Any:
    own = {"hidden_size": 16, "image_size": 32, **options}
    return of_transformers(f"{cls}VisionModel", f"{cls}VisionConfig", **SMALL, **own)


@functools.cache
def image_processor(cls: str) -> Any:
    size = {"height": 32, "width": 32}
    return getattr(transformers, cls)(size=size, **({"crop_size": 32} if "CLIP" in cls else {}))


# VAEs.


@functools.cache
def image_vae(channels: int = 4, **config: Any) -> nn.Module:
    """Two pixels a latent; without quantization layers, as Flux and SD3 have it."""
    return model(
        "AutoencoderKL", block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5, **{"shift_factor": 0.06, **config},
    )  # fmt: skip


@functools.cache
def wan_vae(cls: str = "AutoencoderKLWan", channels: int = 4) -> nn.Module:
    return model(
        cls, base_dim=3, z_dim=channels, dim_mult=[1] * LEVELS, num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )  # fmt: skip


@functools.cache
def hunyuan_vae() -> nn.Module:
    return model(
        "AutoencoderKLHunyuanVideo", latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * LEVELS,
        up_block_types=("HunyuanVideoUpBlock3D",) * LEVELS, block_out_channels=(4,) * LEVELS,
    )  # fmt: skip


@functools.cache
def ltx_vae() -> nn.Module:
    halves = {
        "block_out_channels": (4,) * LEVELS,
        "layers_per_block": (1,) * (LEVELS + 1),
        "spatio_temporal_scaling": (True, True, False, False),
    }
    config = {f"{half}{k}": v for half in ("", "decoder_") for k, v in halves.items()}
    return model("AutoencoderKLLTXVideo", latent_channels=4, patch_size=1, **config)


@functools.cache
def cogvideox_vae() -> nn.Module:
    return model(
        "AutoencoderKLCogVideoX", down_block_types=("CogVideoXDownBlock3D",) * LEVELS,
        up_block_types=("CogVideoXUpBlock3D",) * LEVELS, block_out_channels=(4,) * LEVELS,
        latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip


@functools.cache
def sana_vae() -> nn.Module:
    halves = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    config = {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in halves.items()}
    return model(
        "AutoencoderDC", latent_channels=4, attention_head_dim=2,
        upsample_block_type="interpolate", downsample_block_type="conv", **config,
    )  # fmt: skip


@functools.cache
def audio_vae() -> nn.Module:
    return model(
        "AutoencoderOobleck", encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
        decoder_input_channels=4, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
