"""Tiny denoisers of every kind that ComfyUI ships, built and sampled by ComfyUI's own code.

An entry names a class of `comfy.supported_models`, the sizes that make it small, the latent, the
block stack, and what nodes put into its conditioning: a tuple of sizes stands for random numbers, a
list of tuples for a list of tensors, anything else for itself.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]
TEXT, WIDE = 8, 64  # tokens of a prompt, and the width of a text encoder


@dataclass(frozen=True)
class Entry:
    """A denoiser. `stack`: prefixes of its blocks' paths; `weights`: what it reads of a file."""

    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...]
    stack: tuple[str, ...]
    cond: dict[str, Any] = field(default_factory=dict)
    text: tuple[int, ...] = (1, TEXT, WIDE)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    is_masked: bool = False  # the first frame is given
    cfg: float = 4.0


def sizes(*others: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {name: value for other in (*others, values) for name, value in other.items()}


def padded(tokens: int) -> torch.Tensor:
    """The attention mask of a prompt whose last two tokens are padding."""
    return (torch.arange(tokens) < tokens - 2).long()[None]


def unet(depth: list[int], out: list[int], middle: int = 1, **values: Any) -> dict[str, Any]:
    """What `comfy.model_detection` reads from a UNet of the CompVis kind."""
    levels = 4 if len(depth) == 8 else 3
    values.setdefault("adm_in_channels", None)
    if values["adm_in_channels"]:
        values["num_classes"] = "sequential"
    return sizes(UNET, values, num_res_blocks=[len(depth) // levels] * levels,
                 channel_mult=[1, 2, 4, 4][:levels], transformer_depth=depth,
                 transformer_depth_output=out, transformer_depth_middle=middle)  # fmt: skip


# fmt: off
PICTURE, SMALL, FILM = (1, 4, 32, 32), (1, 16, 16, 16), (1, 16, 3, 16, 16)
FRAMES, FRAME = (4, 4, 16, 16), (1, 16, 1, 16, 16)
UNET = sizes(use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False,
             in_channels=4, out_channels=4, model_channels=64, use_linear_in_transformer=True,
             context_dim=WIDE, use_temporal_attention=False, use_temporal_resblock=False)
MOVING = sizes(in_channels=8, extra_ff_mix_layer=True, use_spatial_context=True,
               merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1],
               use_temporal_resblock=True, use_temporal_attention=True,
               disable_temporal_crossattention=False)
SD = ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
XL = ([0, 0, 2, 2, 4, 4], [0, 0, 0, 2, 2, 2, 4, 4, 4])
SSD = ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1)
KOALA = ([0, 2, 4], [0, 0, 2, 2, 4, 4])
REFINER = ([0, 0, 2, 2, 2, 2, 0, 0], [0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0], 2)
ADM = sizes(adm_in_channels=32 + 6 * 256)
HEADS = sizes(hidden_size=WIDE, num_heads=2, mlp_ratio=4.0, depth=4, depth_single_blocks=4,
              qkv_bias=True)
FLUX = sizes(HEADS, in_channels=16, out_channels=16, patch_size=2, vec_in_dim=32, theta=10000,
             context_in_dim=WIDE, axes_dim=[8, 12, 12], guidance_embed=True)
CHROMA = sizes(HEADS, in_channels=64, out_channels=64, patch_size=2, theta=10000, in_dim=64,
               out_dim=WIDE, hidden_dim=32, n_layers=2, context_in_dim=WIDE, axes_dim=[8, 12, 12])
NERF = sizes(in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=8, nerf_mlp_ratio=1,
             nerf_depth=4, nerf_max_freqs=4, nerf_tile_size=32, nerf_final_head_type="conv",
             nerf_embedder_dtype=torch.float32)
HUNYUAN = sizes(FLUX, patch_size=[1, 2, 2], theta=256, byt5=False, meanflow=False)
HIMAGE = sizes(HUNYUAN, patch_size=[1, 1], axes_dim=[16, 16], vec_in_dim=None, byt5=True,
               in_channels=64, out_channels=64)
HREFINER = sizes(HIMAGE, patch_size=[1, 1, 1], axes_dim=[8, 12, 12], in_channels=128, meanflow=True)
WAN = sizes(dim=96, ffn_dim=192, num_heads=4, num_layers=6, in_dim=16, out_dim=16, freq_dim=64,
            text_dim=WIDE, patch_size=(1, 2, 2), qk_norm=True, cross_attn_norm=True, eps=1e-6,
            window_size=(-1, -1))
START = sizes(concat_latent_image=FILM, clip_vision_output=SimpleNamespace(
    penultimate_hidden_states=torch.ones(1, 5, 1280)))
COSMOS = sizes(max_img_h=32, max_img_w=32, max_frames=8, out_channels=16, patch_spatial=2,
               patch_temporal=1, model_channels=96, num_blocks=6, num_heads=4, adaln_lora_dim=16,
               concat_padding_mask=True, crossattn_emb_channels=WIDE, pos_emb_cls="rope3d",
               pos_emb_interpolation="crop", use_adaln_lora=True)
COSMOS1 = sizes(COSMOS, block_config="FA-CA-MLP", pos_emb_learnable=False, block_x_format="THWBD",
                affline_emb_norm=True, extra_per_block_abs_pos_emb=True,
                extra_per_block_abs_pos_emb_type="learnable")
COSMOS2 = sizes(COSMOS, min_fps=1, max_fps=30, pos_emb_learnable=True,
                extra_per_block_abs_pos_emb=False, rope_enable_fps_modulation=False)
SD3 = sizes(in_channels=16, out_channels=16, patch_size=2, depth=4, input_size=None,
            num_patches=256, adm_in_channels=32, pos_embed_max_size=16, x_block_self_attn_layers=[],
            pos_embed_scaling_factor=None, context_embedder_config=sizes(
                target="torch.nn.Linear", params=sizes(in_features=WIDE, out_features=256)))
AURA = sizes(max_seq=256, dim=WIDE, n_heads=2, n_layers=8, n_double_layers=4, global_conddim=WIDE,
             cond_seq_dim=WIDE)
PIXART = sizes(hidden_size=96, depth=6, num_heads=4, patch_size=2, in_channels=4,
               pe_interpolation=1, caption_channels=WIDE, model_max_length=TEXT, input_size=64)
HYDIT = sizes(hidden_size=96, depth=8, num_heads=4, text_states_dim=WIDE, text_len=TEXT,
              text_states_dim_t5=WIDE, text_len_t5=16)
HYDIT_TEXT = sizes(attention_mask=padded(TEXT), conditioning_mt5xl=(1, 16, WIDE),
                   attention_mask_mt5xl=padded(16))
SHAPE = sizes(HEADS, in_channels=64, context_in_dim=WIDE, guidance_embed=False)
SHAPE21 = sizes(in_channels=64, context_dim=WIDE, hidden_size=WIDE, num_heads=2, depth=9,
                qkv_bias=False, guidance_cond_proj_dim=None, num_moe_layers=2)
MOCHI = sizes(depth=6, patch_size=2, num_heads=2, hidden_size_x=64, hidden_size_y=32, use_t5=True,
              mlp_ratio_x=192.0,  # ComfyUI asserts the product
              mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
              out_bias=True, attn_drop=0.0, t5_feat_dim=WIDE, t5_token_length=TEXT)
LTXV = sizes(num_layers=6, attention_head_dim=32, num_attention_heads=3, cross_attention_dim=96,
             caption_channels=WIDE)
NEXT = sizes(patch_size=2, in_channels=16, dim=96, cap_feat_dim=WIDE, n_layers=6, n_heads=4,
             n_kv_heads=2, qk_norm=True, axes_dims=[8, 8, 8], axes_lens=[300, 512, 512])
OMNI = sizes(axes_dim_rope=[8, 8, 8], axes_lens=[300, 512, 512], hidden_size=96, in_channels=16,
             multiple_of=32, num_attention_heads=4, num_kv_heads=2, num_layers=6, patch_size=2,
             num_refiner_layers=2, text_feat_dim=WIDE, timestep_scale=1000.0)
QWEN = sizes(in_channels=64, num_layers=6, attention_head_dim=32, num_attention_heads=2,
             joint_attention_dim=WIDE, axes_dims_rope=(8, 12, 12))
HIDREAM = sizes(attention_head_dim=32, axes_dims_rope=[16, 8, 8], caption_channels=[WIDE, WIDE],
                max_resolution=[32, 32], in_channels=16, out_channels=16, patch_size=2,
                llama_layers=list(range(8)), num_attention_heads=2, num_layers=4, text_emb_dim=32,
                num_single_layers=4)
ACE = sizes(attention_head_dim=32, inner_dim=96, num_attention_heads=3, num_layers=6,
            text_embedding_dim=WIDE, max_position=256, max_width=256, patch_size=[16, 1],
            mlp_ratio=2.5, lyric_encoder_vocab_size=32)
STAGE_C = sizes(c_cond=WIDE, c_hidden=[WIDE, WIDE], nhead=[2, 2], blocks=[[2, 4], [4, 2]],
                c_clip_text=WIDE, c_clip_text_pooled=32)
STAGE_B = sizes(c_cond=WIDE, c_hidden=[32, 32, 64, 64], nhead=[-1, -1, 2, 2], c_clip=32,
                blocks=[[1, 2, 4, 2], [2, 4, 2, 1]], block_repeat=[[1, 1, 1, 1], [2, 2, 2, 2]])
SECONDS = {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}
AUDIO_WEIGHTS = {f"conditioner.conditioners.seconds_{end}.embedder.embedding.{name}": shape
                 for end in ("start", "total") for name, shape in SECONDS.items()}
PROJECTION = {"cc_projection.weight": (WIDE, 20), "cc_projection.bias": (WIDE,)}
POOLED = sizes(pooled_output=(1, 32))
FULL = sizes(attention_mask=torch.ones(1, TEXT, dtype=torch.long))
SOME = sizes(attention_mask=padded(TEXT))
IMAGED = sizes(concat_latent_image=PICTURE)

U, C = ("input_blocks", "middle_block", "output_blocks"), ("down_", "up_")
JOINT, B, T = ("double_blocks", "single_blocks"), ("blocks",), ("transformer_blocks",)
MODELS = {
    "sd15": Entry("SD15", unet(*SD), PICTURE, U),
    "sd15_ip2p": Entry("SD15_instructpix2pix", unet(*SD, in_channels=8), PICTURE, U, IMAGED),
    "sd20": Entry("SD20", unet(*SD), PICTURE, U),
    "unclip_l": Entry("SD21UnclipL", unet(*SD, adm_in_channels=64), PICTURE, U),
    "unclip_h": Entry("SD21UnclipH", unet(*SD, adm_in_channels=64), PICTURE, U),
    "lotus_d": Entry("LotusD", unet(*SD, adm_in_channels=4, num_head_channels=64), PICTURE, U),
    "zero123": Entry("Stable_Zero123", unet(*SD, in_channels=8), PICTURE, U, text=(1, 1, 20),
                     weights=PROJECTION),
    "x4_upscaler": Entry("SD_X4Upscaler", unet(*SD, in_channels=7), PICTURE, U),
    "sdxl": Entry("SDXL", unet(*XL, 4, **ADM), PICTURE, U, POOLED),
    "sdxl_ip2p": Entry("SDXL_instructpix2pix", unet(*XL, 4, in_channels=8, **ADM), PICTURE, U,
                       POOLED | IMAGED),
    "sdxl_refiner": Entry("SDXLRefiner", unet(*REFINER, adm_in_channels=32 + 5 * 256), PICTURE, U,
                          POOLED),
    "ssd_1b": Entry("SSD1B", unet(*SSD, **ADM), PICTURE, U, POOLED),
    "vega": Entry("Segmind_Vega", unet(*SSD, **ADM), PICTURE, U, POOLED),
    "koala_700m": Entry("KOALA_700M", unet(*KOALA, -2, **ADM), PICTURE, U, POOLED),
    "koala_1b": Entry("KOALA_1B", unet(*KOALA, 4, **ADM), PICTURE, U, POOLED),
    "svd": Entry("SVD_img2vid", unet(*SD, adm_in_channels=768, **MOVING), FRAMES, U,
                 sizes(concat_latent_image=FRAMES), (1, 1, WIDE)),
    "sv3d_u": Entry("SV3D_u", unet(*SD, adm_in_channels=256, **MOVING), FRAMES, U,
                    sizes(concat_latent_image=FRAMES), (1, 1, WIDE)),
    "sv3d_p": Entry("SV3D_p", unet(*SD, adm_in_channels=1280, **MOVING), FRAMES, U,
                    sizes(concat_latent_image=FRAMES), (1, 1, WIDE)),
    "cascade_c": Entry("Stable_Cascade_C", STAGE_C, SMALL, C, POOLED),
    "cascade_b": Entry("Stable_Cascade_B", STAGE_B, (1, 4, 64, 64), C,
                       POOLED | sizes(stable_cascade_prior=(1, 16, 6, 6))),
    "sd3": Entry("SD3", SD3, SMALL, ("joint_blocks",), POOLED),
    "sd35_medium": Entry("SD3", sizes(SD3, x_block_self_attn_layers=[0, 1], qk_norm="rms"), SMALL,
                         ("joint_blocks",), POOLED),
    "stable_audio": Entry("StableAudio", sizes(embed_dim=96, depth=6, num_heads=2), (1, 64, 64),
                          ("transformer.layers",), {}, (1, TEXT, 768), AUDIO_WEIGHTS),
    "aura_flow": Entry("AuraFlow", AURA, (1, 4, 16, 16), ("double_layers", "single_layers")),
    "pixart_alpha": Entry("PixArtAlpha", PIXART | sizes(micro_condition=True), (1, 4, 48, 48), B,
                          sizes(width=384, height=384)),
    "pixart_sigma": Entry("PixArtSigma", PIXART | sizes(micro_condition=False), (1, 4, 48, 48), B),
    "hunyuan_dit": Entry("HunyuanDiT", HYDIT, PICTURE, B, HYDIT_TEXT),
    "hunyuan_dit1": Entry("HunyuanDiT1", HYDIT | sizes(size_cond=True, use_style_cond=True),
                          PICTURE, B, HYDIT_TEXT),
    "flux": Entry("Flux", FLUX, SMALL, JOINT, POOLED, cfg=1.0),
    "flux_schnell": Entry("FluxSchnell", FLUX | sizes(guidance_embed=False), SMALL, JOINT, POOLED),
    "flux_inpaint": Entry("FluxInpaint", FLUX | sizes(in_channels=96), SMALL, JOINT,
                          POOLED | sizes(concat_latent_image=SMALL)),
    "flux_kontext": Entry("Flux", FLUX, SMALL, JOINT,
                          POOLED | sizes(reference_latents=[(1, 16, 12, 16)])),
    "chroma": Entry("Chroma", CHROMA, SMALL, JOINT, POOLED),
    "chroma_radiance": Entry("ChromaRadiance", CHROMA | NERF, (1, 3, 128, 128), JOINT, POOLED),
    "mochi": Entry("GenmoMochi", MOCHI, (1, 12, 3, 16, 16), B, SOME),
    "ltxv": Entry("LTXV", LTXV, (1, 128, 3, 8, 8), T, SOME),
    "ltxv_i2v": Entry("LTXV", LTXV, (1, 128, 3, 8, 8), T, SOME, is_masked=True),
    # Where cfg is 1, ComfyUI itself cannot batch the two prompts.
    "hunyuan_video": Entry("HunyuanVideo", HUNYUAN, FILM, JOINT, POOLED | SOME, cfg=1.0),
    "hunyuan_video_i2v": Entry("HunyuanVideoI2V", HUNYUAN | sizes(in_channels=33), FILM, JOINT,
                               POOLED | sizes(concat_latent_image=FILM)),
    "hunyuan_video_replace": Entry("HunyuanVideo", HUNYUAN | sizes(guidance_embed=False), FILM,
                                   JOINT, POOLED | sizes(guiding_frame_index=0), cfg=1.0),
    "hunyuan_video_custom": Entry("HunyuanVideo", HUNYUAN, FILM, JOINT,
                                  POOLED | sizes(ref_latent=FRAME), cfg=1.0),
    "skyreels_i2v": Entry("HunyuanVideoSkyreelsI2V", HUNYUAN | sizes(in_channels=32), FILM, JOINT,
                          POOLED | sizes(concat_latent_image=FILM)),
    "hunyuan_image": Entry("HunyuanImage21", HIMAGE | sizes(guidance_embed=False), (1, 64, 8, 8),
                           JOINT, sizes(conditioning_byt5small=(1, 4, 1472))),
    "hunyuan_image_distilled": Entry("HunyuanImage21", HIMAGE | sizes(meanflow=True, byt5=False),
                                     (1, 64, 8, 8), JOINT, cfg=1.0),
    "hunyuan_image_refiner": Entry("HunyuanImage21Refiner", HREFINER, (1, 64, 2, 8, 8), JOINT,
                                   sizes(concat_latent_image=(1, 64, 2, 8, 8))),
    "cosmos": Entry("CosmosT2V", COSMOS1 | sizes(in_channels=16), FILM, B),
    "cosmos_i2v": Entry("CosmosI2V", COSMOS1 | sizes(in_channels=17), FILM, B),
    "cosmos_predict2": Entry("CosmosT2IPredict2", COSMOS2 | sizes(in_channels=16), FILM, B),
    "cosmos_predict2_i2v": Entry("CosmosI2VPredict2", COSMOS2 | sizes(in_channels=17), FILM, B,
                                 is_masked=True),
    "lumina2": Entry("Lumina2", NEXT, SMALL, ("noise_refiner", "layers"), FULL),
    "wan21": Entry("WAN21_T2V", WAN, FILM, B),
    "wan21_i2v": Entry("WAN21_I2V", WAN | sizes(model_type="i2v", in_dim=36), FILM, B, START),
    "wan21_phantom": Entry("WAN21_T2V", WAN, FILM, B, sizes(time_dim_concat=FRAME)),
    "wan21_control": Entry("WAN21_FunControl2V",
                           WAN | sizes(model_type="i2v", in_dim=48, in_dim_ref_conv=16), FILM, B,
                           START | sizes(concat_latent_image=(1, 32, 3, 16, 16),
                                         reference_latents=[FRAME])),
    "wan21_vace": Entry("WAN21_Vace",
                        WAN | sizes(model_type="vace", vace_layers=3, vace_in_dim=96), FILM,
                        (*B, "vace_blocks"),
                        sizes(vace_frames=[(1, 32, 3, 16, 16)], vace_mask=[(1, 64, 3, 16, 16)],
                              vace_strength=[1.0])),
    "wan21_camera": Entry("WAN21_Camera", WAN | sizes(model_type="camera", in_dim=32), FILM, B,
                          START | sizes(camera_conditions=(1, 24, 3, 128, 128))),
    "wan22_camera": Entry("WAN22_Camera", WAN | sizes(model_type="camera_2.2", in_dim=36), FILM, B,
                          sizes(concat_latent_image=FILM, camera_conditions=(1, 24, 3, 128, 128))),
    "wan21_humo": Entry("WAN21_HuMo", WAN | sizes(model_type="humo"), FILM, B,
                        sizes(audio_embed=(1, 3, 8, 5, 1280), reference_latents=[FRAME])),
    "wan22_s2v": Entry("WAN22_S2V", WAN | sizes(model_type="s2v", audio_dim=32,
                                                audio_inject_layers=[0, 2, 4]), FILM,
                       (*B, "audio_injector", "["),  # a unit of two modules has no path
                       sizes(audio_embed=(1, 25, 32, 12), reference_latents=[FRAME],
                             reference_motion=(1, 16, 19, 16, 16), control_video=FILM)),
    "wan22_animate": Entry("WAN22_Animate", WAN | sizes(model_type="animate", in_dim=36,
                                                        num_layers=10), FILM,
                           (*B, "face_adapter", "["), START | sizes(
                               face_video_pixels=(1, 3, 1, 512, 512), pose_video_latent=FILM)),
    "wan22": Entry("WAN22_T2V", WAN | sizes(in_dim=48, out_dim=48), (1, 48, 3, 16, 16), B),
    "wan22_i2v": Entry("WAN22_T2V", WAN | sizes(in_dim=48, out_dim=48), (1, 48, 3, 16, 16), B,
                       is_masked=True),
    "hunyuan3d": Entry("Hunyuan3Dv2", SHAPE, (1, 64, 48), JOINT),
    "hunyuan3d_mini": Entry("Hunyuan3Dv2mini", SHAPE | sizes(guidance_embed=True), (1, 64, 48),
                            JOINT),
    "hunyuan3d_21": Entry("Hunyuan3Dv2_1", SHAPE21, (1, 64, 48), B),
    "hidream": Entry("HiDream", HIDREAM, SMALL, ("double_stream_blocks", "single_stream_blocks"),
                     POOLED | sizes(conditioning_llama3=(1, 8, TEXT, WIDE))),
    "ace_step": Entry("ACEStep", ACE, (1, 8, 16, 48), T,
                      sizes(conditioning_lyrics=torch.arange(12)[None])),
    "omnigen2": Entry("Omnigen2", OMNI, SMALL, ("noise_refiner", "layers"), FULL),
    "omnigen2_edit": Entry("Omnigen2", OMNI, SMALL, ("noise_refiner", "layers"),
                           FULL | sizes(reference_latents=[(1, 16, 12, 16)])),
    "qwen_image": Entry("QwenImage", QWEN, FRAME, T),
    "qwen_image_edit": Entry("QwenImage", QWEN, FRAME, T,
                             sizes(reference_latents=[(1, 16, 1, 12, 16)])),
}
# fmt: on


def find_comfyui() -> bool:
    """Make the ComfyUI importable that the environment names, if it does."""
    path = os.environ.get("COMFYUI_PATH")
    if path and path not in sys.path:
        sys.path.append(path)
        from comfy.cli_args import args

        args.cpu = True  # read when the rest is imported
        args.use_pytorch_cross_attention = True  # what is used on a GPU, and not on a CPU
    return bool(path)


def tensors(value: Any) -> Any:
    """What an entry's shorthand stands for."""
    if isinstance(value, list):
        return [tensors(item) for item in value]
    return torch.randn(value) if isinstance(value, tuple) else value


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """Entry `name` as a ModelPatcher, and the arguments of `sample` for it."""
    import comfy.model_patcher
    import comfy.supported_models

    entry = MODELS[name]
    torch.manual_seed(0)
    config_class = getattr(comfy.supported_models, entry.config)
    config = config_class(config_class.unet_config | entry.unet)
    config.set_inference_dtype(torch.float32, None)
    with torch.no_grad():
        base = config.get_model({key: torch.randn(shape) for key, shape in entry.weights.items()})
        fill(base.diffusion_model)
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device)
    prompts = [[[torch.randn(entry.text), {k: tensors(v) for k, v in entry.cond.items()}]]
               for _ in range(2)]  # fmt: skip
    call = sizes(noise=torch.randn(entry.latent), latent_image=torch.randn(entry.latent), seed=0)
    call |= sizes(positive=prompts[0], negative=prompts[1], cfg=entry.cfg)
    if entry.is_masked:
        call["noise_mask"] = torch.ones(1, 1, *entry.latent[2:])
        call["noise_mask"][:, :, 0] = 0
    return patcher, call


def fill(model: torch.nn.Module) -> None:
    """Give every weight a value: ComfyUI leaves that to the file, and files have no zero gates."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(weight, torch.nn.Parameter) or name == "pos_embed":
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            is_scale = weight.ndim == 1 and name.endswith(("weight", "scale", "gamma"))
            width = 2500 if weight.ndim == 1 else max(1, weight[0].numel())
            weight.copy_(noise / width**0.5 + float(is_scale))
        elif name.endswith("transformer.rotary_pos_emb.inv_freq"):
            weight.copy_(10000 ** -torch.linspace(0, 1, len(weight)))


@contextlib.contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[Call]]:
    """The arguments of every call of `model`, without what would call the code of other nodes."""
    calls: list[Call] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        options = kwargs["transformer_options"] | {"wrappers": {}, "callbacks": {}}
        calls.append((args, kwargs | {"transformer_options": options}))
        return args, kwargs | {"transformer_options": dict(options)}  # UNets write into it

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def sample(patcher: Any, call: dict[str, Any], steps: int = 6) -> torch.Tensor:
    """Sample as the KSampler node does."""
    import comfy.sample

    settings = sizes(sampler_name="euler", scheduler="simple", disable_pbar=True)
    return comfy.sample.sample(patcher, steps=steps, **settings, **call)
