"""A denoiser inside a real pipeline of diffusers, with tiny components."""

import json
import logging

import pytest
import torch
from helpers import NEVER, assert_identical

import fxcache
from fxcache.pipelines.tiny import tiny_model

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model, _ = tiny_model("FluxTransformer2DModel")
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    generator = torch.Generator().manual_seed(0)
    prompts = {
        "prompt_embeds": torch.randn(1, 8, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    negative = {f"negative_{key}": -value for key, value in prompts.items()}

    def sample(transformer, *, steps=8, guided=False):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.FluxPipeline(scheduler, vae, transformer=transformer, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **prompts,
            **({**negative, "true_cfg_scale": 2.0} if guided else {}),
            height=16,
            width=16,
            num_inference_steps=steps,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
        ).images

    return model, sample


def test_a_pipeline_takes_it_and_never_hitting_changes_nothing(flux):
    model, sample = flux
    denoiser = fxcache.transform(model, NEVER, backend="eager")
    assert_identical(sample(denoiser), sample(model))
    assert denoiser.report().misses == 8


def test_second_runs_and_branches(flux, caplog):
    model, sample = flux
    policy = fxcache.FirstBlockCache(threshold=0.3)

    def fresh():
        return fxcache.transform(model, policy, backend="eager")

    denoiser = fresh()
    first = sample(denoiser)
    assert denoiser.report().hits > 0
    assert_identical(sample(denoiser), first)
    guided = sample(denoiser, steps=5, guided=True)
    assert {r.branch for r in denoiser.report().records[16:]} == {"cond", "uncond"}
    assert_identical(guided, sample(fresh(), steps=5, guided=True))
    assert not [r for r in caplog.records if r.name == "fxcache" and r.levelno >= logging.WARNING]


def test_lora(flux):
    peft = pytest.importorskip("peft")
    model, sample = flux
    plain = sample(model)
    denoiser = fxcache.transform(model, NEVER, backend="eager")
    assert_identical(sample(denoiser), plain)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    denoiser.add_adapter(config)
    adapted = sample(denoiser)
    assert not torch.allclose(adapted, plain)
    assert_identical(adapted, sample(model))
    denoiser.disable_adapters()
    assert_identical(sample(denoiser), plain)


def test_save_pretrained(flux, tmp_path):
    model, _ = flux
    fxcache.transform(model, NEVER, backend="eager").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
