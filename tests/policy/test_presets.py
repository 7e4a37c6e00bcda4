"""The presets: figures, names and sources, what MagCache makes of every table, and pipelines."""

import importlib.util
import json
import logging
import math
import re
import zlib
from dataclasses import asdict, fields
from importlib import resources
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import seeded
from opened import Small

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, MagCache, PolicyError, Taylor, TeaCache
from fxcache.policy.presets import preset, presets
from fxcache.policy.simulate import simulate

FILE = resources.files("fxcache.policy").joinpath("presets.json")
CATALOGUE = json.loads(FILE.read_text("utf-8"))
EVERY = [(model, method) for model, methods in presets().items() for method in methods]

#: What was read in the sources, of tables and polynomials a checksum: a change is seen in review.
#: ``python tests/policy/test_presets.py`` writes it anew.
PUBLISHED = Path(__file__).parent / "published_presets.txt"


def told(value):
    """A figure, or of many how many and a checksum; the originals hold cond and uncond in turn."""
    if isinstance(value, dict) and list(value) == ["cond", "uncond"]:
        value = [ratio for pair in zip(*value.values(), strict=True) for ratio in pair]
    if isinstance(value, dict):
        return {name: told(own) for name, own in value.items()}
    if not isinstance(value, list | tuple):
        return value
    return f"{len(value)} {zlib.crc32(','.join(map(repr, value)).encode()):08X}"


def shown():
    """Every preset, by each of its names."""
    for model, method in EVERY:
        names = (model, *CATALOGUE["models"][model]["aliases"])
        (policy,) = {preset(name, method) for name in names}
        figures = ((f.name, told(getattr(policy, f.name))) for f in fields(policy))
        own = ", ".join(f"{name}={value}" for name, value in figures if name != "origin")
        yield f"{method} | {' | '.join(names)}\n    {own}\n"


def test_presets_are_the_published_ones():
    assert "".join(shown()) == PUBLISHED.read_text("utf-8")


def test_signals_are_what_the_polynomials_were_fitted_to():
    signals = {}
    for model in CATALOGUE["presets"]["teacache"]:
        signals.setdefault(preset(model, "teacache").signal, []).append(model)
    assert all("ret_" in model for model in signals["time_projection"])
    assert len(signals["time_projection"]) == 8
    families = {re.split(r"[-\d ]", model)[0] for model in signals["time_embedding"]}
    assert families == {"wan", "cogvideox", "consisid", "hidream", "lumina"}
    assert len(signals["time_embedding"]) == 5 + 5 + 1 + 2 + 1
    assert preset("cosmos3", "seacache").forecast == Taylor(order=1)


@pytest.mark.parametrize(("model", "method"), EVERY)
def test_every_preset_is_a_policy_with_its_origin(model, method):
    policy, entry = preset(model, method), CATALOGUE["presets"][method][model]
    assert type(policy).__name__.lower() == method
    assert policy.origin.preset == f"{model}, {method}"
    assert policy.origin.model_classes == tuple(CATALOGUE["models"][model]["classes"]) != ()
    assert policy.origin.source.startswith("https://github.com/")
    if method == "magcache":
        assert len(policy.table(None)) == entry["steps"]
    for alternative in entry.get("alternatives", []):
        changes = {k: v for k, v in alternative.items() if k not in ("source", "note")}
        changed = preset(model, method, **changes)
        assert asdict(changed) == asdict(policy) | changes
        assert changed != policy


def test_presets_are_sorted_and_canonical():
    names = presets()
    assert list(names) == sorted(names)
    assert all(methods == tuple(sorted(methods)) and methods for methods in names.values())
    assert names["flux-dev"] == ("firstblockcache", "magcache", "teacache")


def test_names_are_matched_without_case_and_punctuation_and_none_means_two_models():
    owners = {}
    for model, about in CATALOGUE["models"].items():
        for name in (model, *about["aliases"]):
            key = "".join(filter(str.isalnum, name.lower()))
            assert owners.setdefault(key, model) == model, name
    for name in ("FLUX_DEV", "Flux Dev", "flux", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev"):
        for method in ("magcache", "MagCache", "mag_cache", "Mag Cache"):
            assert preset(name, method) == preset("flux-dev", "magcache")


def test_unknown_names_raise_and_list_the_valid_ones():
    for model, method, says in (
        ("flux-dv", "magcache", r"no model 'flux-dv'. Did you mean 'flux-dev'.*There are: chroma"),
        ("org/FLUX.1-devs", "magcache", r"Did you mean 'flux-dev'"),
        ("?", "magcache", r"no model '\?'. There are: chroma"),
        ("flux", "magic", r"no method 'magic'. Did you mean 'magcache'.*There are: easycache"),
        ("sdxl", "magcache", r"no magcache settings .* 'sdxl', only: firstblockcache. There are:"),
        (None, "magcache", "model must be a name, got None"),
        ("flux", 1, "method must be a name, got 1"),
    ):
        with pytest.raises(PolicyError, match=says):
            preset(model, method)


def test_any_field_can_be_changed():
    policy = preset("flux", "fbcache", threshold=0.12, max_consecutive_hits=3)
    assert (policy.threshold, policy.max_consecutive_hits) == (0.12, 3)
    assert policy.origin == preset("flux", "fbc").origin
    with pytest.raises(PolicyError, match=r"threshold must be a number in \[0, inf\], got -1"):
        preset("flux", "magcache", threshold=-1)
    with pytest.raises(PolicyError, match=r"has no 'treshold'. Did you mean 'threshold'"):
        preset("flux", "magcache", treshold=0.1)


def test_classes_exist_in_diffusers_or_are_marked_and_sources_are_at_a_commit():
    diffusers = pytest.importorskip("diffusers")
    elsewhere = set(CATALOGUE["not_in_diffusers"])
    named = {name for about in CATALOGUE["models"].values() for name in about["classes"]}
    assert elsewhere <= named
    assert elsewhere == {name for name in named if not hasattr(diffusers, name)}
    entries = [entry for own in CATALOGUE["presets"].values() for entry in own.values()]
    others = [other for entry in entries for other in entry.get("alternatives", ())]
    sources = {about["source"] for about in entries + others if "source" in about}
    assert {source.split(":")[0] for source in sources} == set(CATALOGUE["repositories"])


def test_importing_does_not_read_the_file(monkeypatch):
    """The first preset that is asked for does, and only that."""
    read, read_text = [], Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: read.append(self) or read_text(self, *a)
    )
    spec = importlib.util.find_spec("fxcache.policy.presets")
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert not read
    anew.presets(), anew.preset("flux", "magcache"), anew.preset("sdxl", "fbc")
    assert [path.name for path in read] == ["presets.json"]


def original(ratios, threshold, retention, longest, num_steps):
    """The hits of MagCache's scripts, in their own words."""
    at = np.round(np.arange(num_steps) * ((len(ratios) - 1) / (num_steps - 1))).astype(int)
    source, made = np.array(ratios)[at], []
    ratio, error, skipped = 1.0, 0.0, 0
    for step in range(num_steps):
        is_hit = False
        if step >= max(1, int(retention * num_steps + 0.5)):  # nothing can be reused at step 0
            ratio *= source[step]
            error += abs(1 - ratio)
            skipped += 1
            is_hit = bool(error < threshold and skipped <= longest)
        if not is_hit:
            ratio, error, skipped = 1.0, 0.0, 0
        made.append(is_hit)
    return made


@pytest.mark.parametrize("model", CATALOGUE["presets"]["magcache"])
def test_magcache_decides_as_the_original_on_every_table(model):
    published, entry = preset(model, "magcache"), CATALOGUE["presets"]["magcache"][model]
    loose = preset(model, "magcache", threshold=0.5, max_consecutive_hits=9)
    tables = CATALOGUE["tables"][entry["settings"]["ratios"]]
    tables = tables if isinstance(tables, dict) else {None: tables, "cond": tables}
    lengths = (entry["steps"], 2, 4, 8, 13, 20, 28, 30, 50, 77)
    for (branch, ratios), steps, policy in product(tables.items(), lengths, (published, loose)):
        decisions = simulate(policy, [math.nan] * steps, num_steps=steps, branch=branch)
        limits = (policy.threshold, policy.retention_ratio, policy.max_consecutive_hits)
        wanted = original(ratios, *limits, steps)
        assert [decision.is_hit for decision in decisions] == wanted, (branch, steps, limits)
    assert any(wanted), "loose limits are hit"


RULES = json.loads(
    resources.files("fxcache.pipelines").joinpath("pipelines.json").read_text("utf-8")
)


def pipe_of(pipeline, model, *, denoisers=1, own=None, **config):
    """Something that goes by the names of a pipeline and its model, with these configs."""
    components = ("transformer", "transformer_2")[:denoisers]
    made = type(pipeline, (SimpleNamespace,), {})(scheduler=None, config=own or {})
    for component in components:
        denoiser = seeded(type(model, (Small,), {}))
        denoiser.config = config
        setattr(made, component, denoiser)
    return made


def chosen(pipeline, model, *, method="magcache", **options):
    with fxcache.apply(pipe_of(pipeline, model, **options), method, backend="eager") as handle:
        return handle.policy


def test_the_rules_name_pipelines_and_presets_that_exist():
    diffusers = pytest.importorskip("diffusers")
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


def test_auto_is_the_default_whatever_was_published_or_not():
    assert chosen(pipeline="LTXPipeline", model=LTX, method="auto") == AdaptiveCache()
    assert chosen(pipeline="FluxPipeline", model=FLUX, method=None) == AdaptiveCache()
    assert isinstance(chosen("LTXPipeline", LTX, method="teacache"), TeaCache)
    found = chosen("StableDiffusionXLPipeline", "UNet2DConditionModel", method="firstblockcache")
    assert isinstance(found, FirstBlockCache)
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


if __name__ == "__main__":
    PUBLISHED.write_text("".join(shown()), "utf-8")
