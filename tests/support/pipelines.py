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

# --- Flux -----------------------------------------------------------------------------------------


def flux_parts() -> dict[str, Any]:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": parts.image_vae(1),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.t5_tokenizer(),
        "transformer": denoiser("FluxTransformer2DModel", num_layers=1),
    }


def flux_text(size: int) -> dict[str, Any]:
    return {**text(size), "true_cfg_scale": 2.0}


@family(lambda size, batch: flux_text(size), branches=GUIDED)
def flux():
    return pipeline("FluxPipeline", **flux_parts())


@variant(
    lambda size, batch: {**flux_text(size), "image": picture(size), "strength": 0.5},
    branches=UNNAMED,
    first_step=half,
)
def flux_img2img():
    return pipeline("FluxImg2ImgPipeline", **flux_parts())


@variant(
    lambda size, batch: {
        **flux_text(size),
        "image": picture(size),
        "max_area": size**2,
        "_auto_resize": False,
    },
    branches=UNNAMED,
)
def flux_kontext():
    return pipeline("FluxKontextPipeline", **flux_parts())


@variant(
    lambda size, batch: {**flux_text(size), "control_image": picture(size)},
    branches=UNNAMED,
)
def flux_controlnet():
    given = flux_parts()
    config = {**given["transformer"].config, "num_layers": 1, "num_single_layers": 1}
    config.pop("out_channels")
    net = parts.seeded(diffusers.FluxControlNetModel.from_config, config, seed=1)
    return pipeline("FluxControlNetPipeline", controlnet=net, **given)


@variant(
    lambda size, batch: {
        **flux_text(size),
        "image": picture(size),
        "mask_image": picture(size, channels=1),
        "strength": 0.5,
    },
    branches=UNNAMED,
    first_step=half,
)
def flux_inpaint():
    return pipeline("FluxInpaintPipeline", **flux_parts())


@family(lambda size, batch: {**text(size), "guidance_scale": 2.0}, branches=UNNAMED)
def chroma():
    return pipeline(
        "ChromaPipeline",
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.image_vae(1),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=denoiser("ChromaTransformer2DModel", num_layers=1),
    )


# --- other pictures -------------------------------------------------------------------------------


@family(lambda size, batch: {**text(size), "guidance_scale": 2.0})
def sd35():
    return pipeline(
        "StableDiffusion3Pipeline",
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(),
        text_encoder=parts.clip_text(projection=True, width=16),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_text(projection=True, width=16),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(),
        tokenizer_3=parts.t5_tokenizer(),
        transformer=denoiser(
            "SD3Transformer2DModel",
            sample_size=32,
            patch_size=2,
            pooled_projection_dim=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    )


def tiny_unet(**config: Any) -> Any:
    return tiny_model("UNet2DConditionModel", **config)[0]


def sdxl_unet(text_width: int, time_ids: int) -> Any:
    return parts.seeded(
        tiny_unet,
        use_linear_projection=True,
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * time_ids,
    )


@family(lambda size, batch: {**square(size), "guidance_scale": 2.0})
def sdxl():
    return pipeline(
        "StableDiffusionXLPipeline",
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        vae=parts.image_vae(shift_factor=None),
        text_encoder=parts.clip_text(),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_text(projection=True),
        tokenizer_2=parts.clip_tokenizer(),
        unet=sdxl_unet(64, 6),
    )


@variant(
    lambda size, batch: {
        # The refiner goes on from the base model's latents.
        "image": picture(size // 2, batch, channels=4),
        "denoising_start": 0.5,
        "guidance_scale": 2.0,
    },
    first_step=half,
)
def sdxl_refiner():
    return pipeline(
        "StableDiffusionXLImg2ImgPipeline",
        scheduler=diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1),
        vae=parts.image_vae(shift_factor=None),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=parts.clip_text(projection=True),
        tokenizer_2=parts.clip_tokenizer(),
        unet=sdxl_unet(32, 5),
        requires_aesthetics_score=True,
    )


# No limit to the text: the prompt comes after a long template.
@family(lambda size, batch: {**square(size), "true_cfg_scale": 2.0}, branches=GUIDED)
def qwenimage():
    return pipeline(
        "QwenImagePipeline",
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.wan_vae("AutoencoderKLQwenImage"),
        text_encoder=parts.qwen(),
        tokenizer=parts.qwen_tokenizer(),
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
        text_encoder=parts.t5(width=8),
        tokenizer=parts.t5_tokenizer(),
        transformer=denoiser("PixArtTransformer2DModel", out_channels=8),
    )


@family(lambda size, batch: {**unbinned(size), "complex_human_instruction": None}, sizes=(32, 64))
def sana():
    return pipeline(
        "SanaPipeline",
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=parts.sana_vae(),
        text_encoder=parts.gemma(),
        tokenizer=parts.gemma_tokenizer(),
        transformer=denoiser("SanaTransformer2DModel"),
    )


# --- video and audio ------------------------------------------------------------------------------


def hunyuan_parts(cls: str) -> dict[str, Any]:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": parts.hunyuan_vae(),
        "text_encoder": parts.llama(),
        "tokenizer": parts.llama_tokenizer(),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.clip_tokenizer(),
        "transformer": denoiser(cls, num_layers=1, num_single_layers=1, pooled_projection_dim=32),
    }


def hunyuan_text(size: int) -> dict[str, Any]:
    template = {"template": "video: {}", "crop_start": 3}
    return {**video(size), "true_cfg_scale": 2.0, "prompt_template": template}


@family(lambda size, batch: hunyuan_text(size), branches=GUIDED)
def hunyuan_video():
    return pipeline("HunyuanVideoPipeline", **hunyuan_parts("HunyuanVideoTransformer3DModel"))


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
    return pipeline(
        "HunyuanVideoFramepackPipeline",
        image_encoder=parts.siglip(),
        feature_extractor=parts.image_processor("SiglipImageProcessor"),
        **hunyuan_parts("HunyuanVideoFramepackTransformer3DModel"),
    )


def wan(cls: str, **components: Any) -> Any:
    module = sys.modules[getattr(diffusers, cls).__module__]
    if not hasattr(module, "ftfy"):
        # Some of these modules call it even if it is not installed.
        module.ftfy = SimpleNamespace(fix_text=str)
    return pipeline(cls, **wan_parts(), **components)


def wan_parts() -> dict[str, Any]:
    return {
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": parts.wan_vae(),
        "text_encoder": parts.t5("UMT5", 16),
        "tokenizer": parts.t5_tokenizer(),
    }


@family(lambda size, batch: {**video(size), "guidance_scale": 2.0}, branches=GUIDED)
def wan_t2v():
    return wan("WanPipeline", transformer=denoiser("WanTransformer3DModel"))


@variant(lambda size, batch: {**video(size), "guidance_scale": 2.0}, branches=GUIDED)
def wan22():
    return wan(
        "WanPipeline",
        transformer=denoiser("WanTransformer3DModel"),
        transformer_2=denoiser("WanTransformer3DModel", seed=1),
        boundary_ratio=0.8,
    )


@variant(
    lambda size, batch: {
        **video(size),
        "image": picture(size),
        "guidance_scale": 2.0,
        "max_sequence_length": 512,  # the transformer reckons with that many text tokens
    },
    branches=GUIDED,
)
def wan_i2v():
    return wan(
        "WanImageToVideoPipeline",
        image_encoder=parts.clip_vision(),
        image_processor=parts.image_processor("CLIPImageProcessor"),
        transformer=denoiser(
            "WanTransformer3DModel", in_channels=12, image_dim=16, added_kv_proj_dim=24
        ),
    )


@variant(
    lambda size, batch: {**video(size), "guidance_scale": 2.0},
    branches=GUIDED,
    batch=1,
)
def wan_vace():
    return wan(
        "WanVACEPipeline",
        transformer=denoiser("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=72),
    )


@family(
    lambda size, batch: {**video(size), "num_frames": 9, "guidance_scale": 2.0},
    branches=("cond_uncond",),
    sizes=(32, 64),
)
def ltx_video():
    return pipeline(
        "LTXPipeline",
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=parts.ltx_vae(),
        text_encoder=parts.t5(width=16),
        tokenizer=parts.t5_tokenizer(),
        transformer=denoiser("LTXVideoTransformer3DModel"),
    )


@family(lambda size, batch: {**video(size), "guidance_scale": 2.0}, branches=("cond_uncond",))
def cogvideox():
    return pipeline(
        "CogVideoXPipeline",
        scheduler=diffusers.CogVideoXDPMScheduler(),
        vae=parts.cogvideox_vae(),
        text_encoder=parts.t5(width=8),
        tokenizer=parts.t5_tokenizer(),
        transformer=denoiser(
            "CogVideoXTransformer3DModel",
            attention_head_dim=16,
            use_rotary_positional_embeddings=True,
            max_text_seq_length=TOKENS,
        ),
    )


@family(lambda size, batch: {"audio_end_in_s": size / 16, "guidance_scale": 2.0})
def stable_audio():
    return pipeline(
        "StableAudioPipeline",
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        vae=parts.audio_vae(),
        text_encoder=parts.t5(width=8),
        tokenizer=parts.t5_tokenizer(),
        projection_model=parts.seeded(
            diffusers.StableAudioProjectionModel,
            text_encoder_dim=8,
            conditioning_dim=8,
            min_value=0,
            max_value=8,
        ),
        transformer=denoiser("StableAudioDiTModel", sample_size=6, global_states_input_dim=16),
    )
