"""Tiny pipelines of diffusers for the tests: real classes, whole from prompt to picture.

Each entry makes a pipeline with weights of its own for its denoisers, and knows what else to pass
to a call and what a report of it must hold.
"""

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import pipeline_parts as parts
from pipeline_family import (
    PIPELINES,
    TOKENS,
    Family,
    denoiser,
    family,
    half,
    picture,
    pipeline,
    square,
    text,
    variant,
    video,
)

from fxcache.pipelines.tiny import tiny_model

__all__ = ["PIPELINES", "Family"]

GUIDED, UNNAMED = ("cond", "uncond"), (None, "call 2")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def flux_parts() -> dict[str, Any]:
    return {
        "scheduler": FLOW(use_dynamic_shifting=True),
        "vae": parts.image_vae(1),
        **parts.clip(),
        **parts.t5("_2"),
        "transformer": denoiser("FluxTransformer2DModel", num_layers=1),
    }


def flux_text(size: int) -> dict[str, Any]:
    return {**text(size), "true_cfg_scale": 2.0}


def redrawn(size: int, **more: Any) -> dict[str, Any]:
    return {**flux_text(size), "image": picture(size), **more}


@family(lambda size, batch: flux_text(size), branches=GUIDED)
def flux():
    return pipeline("FluxPipeline", **flux_parts())


@variant(lambda size, batch: redrawn(size, strength=0.5), branches=UNNAMED, first_step=half)
def flux_img2img():
    return pipeline("FluxImg2ImgPipeline", **flux_parts())


@variant(
    lambda size, batch: redrawn(size, max_area=size**2, _auto_resize=False),
    branches=UNNAMED,
)
def flux_kontext():
    return pipeline("FluxKontextPipeline", **flux_parts())


@variant(lambda size, batch: {**flux_text(size), "control_image": picture(size)}, branches=UNNAMED)
def flux_controlnet():
    given = flux_parts()
    config = {**given["transformer"].config, "num_layers": 1, "num_single_layers": 1}
    config.pop("out_channels")
    net = parts.seeded(diffusers.FluxControlNetModel.from_config, config, seed=1)
    return pipeline("FluxControlNetPipeline", controlnet=net, **given)


@variant(
    lambda size, batch: redrawn(size, mask_image=picture(size, channels=1), strength=0.5),
    branches=UNNAMED,
    first_step=half,
)
def flux_inpaint():
    return pipeline("FluxInpaintPipeline", **flux_parts())


def guided(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "guidance_scale": 2.0}


@family(lambda size, batch: guided(text(size)), branches=UNNAMED)
def chroma():
    return pipeline(
        "ChromaPipeline",
        scheduler=FLOW(use_dynamic_shifting=True),
        vae=parts.image_vae(1),
        **parts.t5(),
        transformer=denoiser("ChromaTransformer2DModel", num_layers=1),
    )


@family(lambda size, batch: guided(text(size)))
def sd35():
    config = {"sample_size": 32, "patch_size": 2, "pooled_projection_dim": 32}
    return pipeline(
        "StableDiffusion3Pipeline",
        scheduler=FLOW(shift=3.0),
        vae=parts.image_vae(),
        **parts.clip("", projection=True, width=16),
        **parts.clip("_2", projection=True, width=16),
        **parts.t5("_3"),
        transformer=denoiser(
            "SD3Transformer2DModel", dual_attention_layers=(0,), qk_norm="rms_norm", **config
        ),
    )


def sdxl_unet(text_width: int, time_ids: int) -> Any:
    return parts.seeded(
        lambda **config: tiny_model("UNet2DConditionModel", **config)[0],
        use_linear_projection=True,
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * time_ids,
    )


@family(lambda size, batch: guided(square(size)))
def sdxl():
    return pipeline(
        "StableDiffusionXLPipeline",
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        vae=parts.image_vae(shift_factor=None),
        **parts.clip(),
        **parts.clip("_2", projection=True),
        unet=sdxl_unet(64, 6),
    )


@variant(
    # The refiner goes on from the base model's latents.
    lambda size, batch: guided(
        {"image": picture(size // 2, batch, channels=4), "denoising_start": 0.5}
    ),
    first_step=half,
)
def sdxl_refiner():
    return pipeline(
        "StableDiffusionXLImg2ImgPipeline",
        scheduler=diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1),
        vae=parts.image_vae(shift_factor=None),
        text_encoder=None,
        tokenizer=None,
        **parts.clip("_2", projection=True),
        unet=sdxl_unet(32, 5),
        requires_aesthetics_score=True,
    )


# No limit to the text: the prompt comes after a long template.
@family(lambda size, batch: {**square(size), "true_cfg_scale": 2.0}, branches=GUIDED)
def qwenimage():
    return pipeline(
        "QwenImagePipeline",
        scheduler=FLOW(use_dynamic_shifting=True),
        vae=parts.wan_vae("AutoencoderKLQwenImage"),
        **parts.qwen(),
        transformer=denoiser("QwenImageTransformer2DModel"),
    )


def unbinned(size: int) -> dict[str, Any]:
    return {**text(size), "use_resolution_binning": False, "clean_caption": False}


@family(lambda size, batch: unbinned(size))
def pixart_sigma():
    return pipeline(
        "PixArtSigmaPipeline",
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=parts.image_vae(shift_factor=None),
        **parts.t5(width=8),
        transformer=denoiser("PixArtTransformer2DModel", out_channels=8),
    )


#: Schedulers of several kinds that solve a flow.
SOLVES_A_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@family(lambda size, batch: {**unbinned(size), "complex_human_instruction": None}, sizes=(32, 64))
def sana():
    return pipeline(
        "SanaPipeline",
        scheduler=diffusers.DPMSolverMultistepScheduler(**SOLVES_A_FLOW),
        vae=parts.sana_vae(),
        **parts.gemma(),
        transformer=denoiser("SanaTransformer2DModel"),
    )


def hunyuan(cls: str, model: str, **components: Any) -> Any:
    return pipeline(
        cls,
        scheduler=FLOW(shift=7.0),
        vae=parts.hunyuan_vae(),
        **parts.llama(),
        **parts.clip("_2"),
        transformer=denoiser(model, num_layers=1, num_single_layers=1, pooled_projection_dim=32),
        **components,
    )


def hunyuan_text(size: int) -> dict[str, Any]:
    template = {"template": "video: {}", "crop_start": 3}
    return {**video(size), "true_cfg_scale": 2.0, "prompt_template": template}


@family(lambda size, batch: hunyuan_text(size), branches=GUIDED)
def hunyuan_video():
    return hunyuan("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel")


@variant(
    lambda size, batch: {
        **hunyuan_text(size),
        "image": picture(size, batch),
        "latent_window_size": 2,
        "num_frames": 10,
    },
    branches=UNNAMED,
    sections=2,
)
def hunyuan_framepack():
    return hunyuan(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        image_encoder=parts.vision("Siglip"),
        feature_extractor=parts.image_processor("SiglipImageProcessor"),
    )


def wan(cls: str, **components: Any) -> Any:
    module = sys.modules[getattr(diffusers, cls).__module__]
    if not hasattr(module, "ftfy"):
        # Some of these modules call it even if it is not installed.
        module.ftfy = SimpleNamespace(fix_text=str)
    return pipeline(
        cls,
        scheduler=diffusers.UniPCMultistepScheduler(**SOLVES_A_FLOW),
        vae=parts.wan_vae(),
        **parts.t5(cls="UMT5", width=16),
        **components,
    )


@family(lambda size, batch: guided(video(size)), branches=GUIDED)
def wan_t2v():
    return wan("WanPipeline", transformer=denoiser("WanTransformer3DModel"))


@variant(lambda size, batch: guided(video(size)), branches=GUIDED)
def wan22():
    return wan(
        "WanPipeline",
        transformer=denoiser("WanTransformer3DModel"),
        transformer_2=denoiser("WanTransformer3DModel", seed=1),
        boundary_ratio=0.8,
    )


@variant(
    # The transformer reckons with that many text tokens.
    lambda size, batch: guided({**video(size), "image": picture(size), "max_sequence_length": 512}),
    branches=GUIDED,
)
def wan_i2v():
    config = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
    return wan(
        "WanImageToVideoPipeline",
        image_encoder=parts.vision("CLIP", patch_size=16),
        image_processor=parts.image_processor("CLIPImageProcessor"),
        transformer=denoiser("WanTransformer3DModel", **config),
    )


@variant(lambda size, batch: guided(video(size)), branches=GUIDED, batch=1)
def wan_vace():
    config = {"vace_layers": [0, 1], "vace_in_channels": 72}
    transformer = denoiser("WanVACETransformer3DModel", **config)
    return wan("WanVACEPipeline", transformer=transformer)


@family(
    lambda size, batch: guided({**video(size), "num_frames": 9}),
    branches=("cond_uncond",),
    sizes=(32, 64),
)
def ltx_video():
    return pipeline(
        "LTXPipeline",
        scheduler=FLOW(use_dynamic_shifting=True),
        vae=parts.ltx_vae(),
        **parts.t5(width=16),
        transformer=denoiser("LTXVideoTransformer3DModel"),
    )


@family(lambda size, batch: guided(video(size)), branches=("cond_uncond",))
def cogvideox():
    config = {"use_rotary_positional_embeddings": True, "max_text_seq_length": TOKENS}
    return pipeline(
        "CogVideoXPipeline",
        scheduler=diffusers.CogVideoXDPMScheduler(),
        vae=parts.cogvideox_vae(),
        **parts.t5(width=8),
        transformer=denoiser("CogVideoXTransformer3DModel", attention_head_dim=16, **config),
    )


@family(lambda size, batch: guided({"audio_end_in_s": size / 16}))
def stable_audio():
    widths = {"text_encoder_dim": 8, "conditioning_dim": 8, "min_value": 0, "max_value": 8}
    return pipeline(
        "StableAudioPipeline",
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        vae=parts.audio_vae(),
        **parts.t5(width=8),
        projection_model=parts.seeded(diffusers.StableAudioProjectionModel, **widths),
        transformer=denoiser("StableAudioDiTModel", sample_size=6, global_states_input_dim=16),
    )
