"""Published settings by pipeline: `fxcache.apply(pipe, "magcache")`."""

import json
import logging
from importlib import resources
from types import SimpleNamespace

import pytest
from helpers import seeded
from zoo import SequentialDiT

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, MagCache, PolicyError, TeaCache
from fxcache.policy.presets import preset, presets

diffusers = pytest.importorskip("diffusers")
RULES = json.loads(
    resources.files("fxcache.pipelines").joinpath("pipelines.json").read_text("utf-8")
)


def pipe_of(pipeline, model, *, denoisers=1, own=None, **config):
    """Something that goes by the names of a pipeline and its model, with these configs."""
    components = ("transformer", "transformer_2")[:denoisers]
    made = type(pipeline, (SimpleNamespace,), {})(scheduler=None, config=own or {})
    for component in components:
        denoiser = seeded(type(model, (SequentialDiT,), {}))
        denoiser.config = config
        setattr(made, component, denoiser)
    return made


def chosen(pipeline, model, *, method="magcache", **options):
    with fxcache.apply(pipe_of(pipeline, model, **options), method, backend="eager") as handle:
        return handle.policy


def test_the_rules_name_pipelines_and_presets_that_exist():
    published = presets()
    for rule in RULES:
        assert rule["preset"] in published, rule
        origin = preset(rule["preset"], published[rule["preset"]][0]).origin
        for name in rule["pipelines"]:
            assert hasattr(diffusers, name), name
            assert any(hasattr(diffusers, cls) for cls in origin.model_classes)
    assert {key for rule in RULES for key in rule} == {
        "pipelines", "preset", "config", "denoisers", "is_guess"
    }  # fmt: skip


FLUX, WAN = "FluxTransformer2DModel", "WanTransformer3DModel"
LTX = "LTXVideoTransformer3DModel"


TOLD = [
    ("FluxPipeline", FLUX, {"guidance_embeds": True}, "flux-dev"),
    ("FluxControlNetPipeline", FLUX, {"guidance_embeds": True}, "flux-dev"),
    ("FluxPipeline", FLUX, {"guidance_embeds": False}, "flux-schnell"),
    ("FluxKontextPipeline", FLUX, {"guidance_embeds": True}, "flux-kontext"),
    ("WanPipeline", WAN, {"num_layers": 30}, "wan2.1-t2v-1.3b"),
    ("WanPipeline", WAN, {"num_layers": 40}, "wan2.1-t2v-14b"),
    ("WanPipeline", WAN, {"num_layers": 40, "denoisers": 2}, "wan2.2-t2v-a14b"),
    ("WanPipeline", WAN, {"own": {"expand_timesteps": True}}, "wan2.2-ti2v-5b"),
    ("WanImageToVideoPipeline", WAN, {"denoisers": 2}, "wan2.2-i2v-a14b"),
    ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", {}, "hunyuan-video"),
]


def test_the_model_is_told_by_its_pipeline_and_config(caplog):
    for pipeline, model, options, expected in TOLD:
        policy = chosen(pipeline, model, **options)
        assert isinstance(policy, MagCache)
        assert policy == preset(expected, "magcache"), (pipeline, options)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "fxcache"):
        policy = chosen("WanPipeline", WAN, num_layers=2)  # a guess says so
    assert policy == preset("wan2.1-t2v-1.3b", "magcache")
    assert "cannot be told: its settings are those of wan2.1-t2v-1.3b" in caplog.text


def test_the_name_that_was_loaded_goes_first():
    for name, expected in (
        ("black-forest-labs/FLUX.1-dev", "flux-dev"),
        ("/models/FLUX.1-schnell", "flux-schnell"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "flux-dev"),  # the name of another class of model
    ):
        pipe = {"own": {"_name_or_path": name}, "guidance_embeds": True}
        assert chosen("FluxPipeline", FLUX, **pipe) == preset(expected, "magcache"), name


def test_auto_is_the_default_whatever_was_published():
    assert chosen(pipeline="LTXPipeline", model=LTX, method="auto") == AdaptiveCache()
    assert chosen(pipeline="FluxPipeline", model=FLUX, method=None) == AdaptiveCache()
    assert isinstance(chosen("LTXPipeline", LTX, method="teacache"), TeaCache)
    found = chosen("StableDiffusionXLPipeline", "UNet2DConditionModel", method="firstblockcache")
    assert isinstance(found, FirstBlockCache)


def test_what_was_not_published():
    for pipeline in ("StableAudioPipeline", "StableDiffusion3Pipeline"):
        with pytest.raises(PolicyError, match=f"no settings .* for the model of this {pipeline}"):
            chosen(pipeline, "SD3Transformer2DModel", num_layers=24)
    with pytest.raises(PolicyError, match="no seacache settings were published for 'chroma'"):
        chosen("ChromaPipeline", "ChromaTransformer2DModel", method="seacache")
    with pytest.raises(PolicyError, match=r"Did you mean 'magcache'.*\"auto\" needs no"):
        chosen("ChromaPipeline", "ChromaTransformer2DModel", method="magcahce")


def test_a_method_for_each_denoiser():
    pipe = pipe_of("WanPipeline", WAN, denoisers=2)
    policies = {"transformer": FirstBlockCache(threshold=0.2), "transformer_2": "magcache"}
    with fxcache.apply(pipe, policies, backend="eager") as handle:
        assert handle.policy == {
            "transformer": FirstBlockCache(threshold=0.2),
            "transformer_2": preset("wan2.2-t2v-a14b", "magcache"),
        }
