"""The presets: their figures, names and sources, and what MagCache makes of every table."""

import importlib.util
import json
import math
import re
import zlib
from dataclasses import asdict
from importlib import resources
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fxcache import PolicyError, Taylor
from fxcache.policy.presets import preset, presets
from fxcache.policy.simulate import simulate

FILE = resources.files("fxcache.policy").joinpath("presets.json")
CATALOGUE = json.loads(FILE.read_text("utf-8"))
EVERY = [(model, method) for model, methods in presets().items() for method in methods]

#: Of all 39 published tables: the names there, how many numbers, their sum, and a checksum.
TABLES = """
    flux, flux-dev: 28 28.38278 1FB4A3B9; flux_kontext: 20 20.20313 ABA5339D; chroma: 52 52.43745
    8C7F249F; qwen_image: 80 83.96088 4D168911; hunyuan_video, hunyuan-video 720p: 50 50.73865
    769FF0EB; hunyuan_video1.5: 40 39.55567 F37F3C7E; hunyuan_video1.5_40steps: 80 78.75539
    11967FD3; wan2.1_t2v_1.3B, wan2.1-t2v-1.3B: 100 97.99135 948E1DFE; wan2.1_t2v_14B,
    wan2.1_vace_14B, wan2.1-t2v-14B, wan2.1-vace-14B: 100 98.0394 F0AFC8E2; wan2.1_i2v_480p_14B,
    wan2.1-i2v-480p-14B: 80 77.9879 C423698A; wan2.1_i2v_720p_14B, wan2.1-i2v-720p-14B: 80 78.11605
    EDDE3FCB; wan2.1_vace_1.3B, wan2.1-vace-1.3B: 100 98.37397 C14D3380; wan2.2_t2v_14B,
    wan2.2-t2v-A14B: 80 77.773 046048B3; wan2.2_ti2v_5B, wan2.2-ti2v-5B (t2v): 100 98.30585
    0092A272; wan2.2_i2v_14B, wan2.2-i2v-A14B: 80 77.56108 66308CE1; flux-kontext (28 steps): 28
    28.20309 1DA01CC2; hunyuan-video 544p: 50 50.72147 C1015670; framepack: 25 25.5664 195F1D10;
    framepack-f1: 25 25.26562 74C33DEB; qwen-image (diffusers): 100 102.7969 CCCDD229;
    qwen-image-edit (diffusers): 100 100.49221 BE364249; wan2.2-ti2v-5B (i2v): 100 98.23607
    2E30D12B; omnigen2 t2i_cond: 50 50.0429 EB66DD84; omnigen2 t2i_uncond: 50 50.02727 A966D225;
    omnigen2 edit_cond: 50 49.97652 13E58ECB; omnigen2 edit_uncond: 50 49.93354 6CE7AB62; omnigen2
    edit_ref: 50 49.94529 401434A6
"""

#: Of all 44 published polynomials: the models' names there, the value at 1, and a checksum.
POLYNOMIALS = """
    flux, flux-dev, tangoflux: 267.16948 1E14CE75; flux-kontext: -750.48941 63C7E55B; ltxv,
    ltx-video 0.9.1: 11.783396 90608092; lumina_2: -478.44438 AFB605B8; hunyuan_video,
    hunyuan-video: 396.62734 456DF2D7; hidream_i1_full, hidream-i1-full: -32015.417 1C3E9E2F;
    hidream_i1_dev: 0.8483993 7D9C36AA; hidream_i1_fast: 0.87847135 A3AC2854; wan2.1_t2v_1.3B,
    wan2.1-t2v-1.3B: 1278.8334 083B6B02; wan2.1_t2v_14B, wan2.1-t2v-14B: -1902.9573 C4318425;
    wan2.1_i2v_480p_14B, wan2.1-i2v-480p: -125.25762 48A9F34D; wan2.1_i2v_720p_14B,
    wan2.1-i2v-720p: -63.239373 38E8A73B; wan2.1_t2v_1.3B_ret_mode, wan2.1-t2v-1.3B ret_steps:
    -43470.457 788B2FD3; wan2.1_t2v_14B_ret_mode, wan2.1-t2v-14B ret_steps: -256861.91 AF21F0DD;
    wan2.1_i2v_480p_14B_ret_mode, wan2.1-i2v-480p ret_steps: 223117.92 3057767A;
    wan2.1_i2v_720p_14B_ret_mode, wan2.1-i2v-720p ret_steps: 9884.6374 C2F7FE2B; cosmos t2v, cosmos
    i2v: 183.64838 4B46084F; mochi-1: -2759.2499 1AB4B60E; lumina-next-sft, lumina-image-2.0 v1:
    -22.785372 E21696AA; lumina-image-2.0 v2: 43.849595 F996FA89; consisid, CogVideoX-5b,
    CogVideoX-5b-I2V: -822.04642 9A957B3A; CogVideoX-2b: -9.7623831 72CCD530; CogVideoX1.5-5B:
    120.18362 F2EA4D8F; CogVideoX1.5-5B-I2V: 44.782827 8E8340BB; open-sora 1.2: 126.08552 DE81E7C5;
    open-sora-plan: 191375.14 D20EEC69; latte: -2079.5547 F525C173
"""

#: The settings of all presets as read in the sources: by method the fields, then the figures.
SETTINGS = {
    "magcache threshold retention_ratio max_consecutive_hits": """
    0.24 0.1 5: flux, flux-dev; 0.05 0.2 4: flux_kontext, flux-kontext (28 steps);
    0.1 0.25 2: chroma; 0.1 0.2 2: qwen_image; 0.12 0.2 4: wan2.1_t2v_1.3B;
    0.24 0.2 6: hunyuan_video, hunyuan-video 544p, wan2.1_t2v_14B, wan2.1-i2v-480p, wan2.1-i2v-720p;
    0.03 0.25 2: hunyuan_video1.5; 0.02 0.2 3: wan2.1-vace-1.3B, wan2.1-vace-14B;
    0.06 0.2 2: hunyuan_video1.5_40steps, qwen-image (diffusers), qwen-image-edit (diffusers),
    wan2.2-ti2v-5B (t2v), wan2.2-ti2v-5B (i2v); 0.1 0.2 3: framepack, framepack-f1;
    0.06 0.4 2: wan2.2-t2v-A14B; 0.06 0.1 2: wan2.2-i2v-A14B; 0.12 0.2 3: open-sora;
    0.05 0.2 3: omnigen2, omnigen2 edit; 0.06 0.2 3: flux-schnell
    """,
    "teacache threshold start end warmup_steps final_steps": """
    0.6 0 1 1 1: flux-dev; 0.4 0 1 1 0: flux (comfyui); 0.22 0.2 0.9 1 0: flux-kontext;
    0.05 0 1 1 1: ltx-video 0.9.1; 0.06 0 1 1 0: ltxv (comfyui); 0.38 0.2 1 1 0: lumina2;
    0.3 0 1 1 1: lumina-image-2.0 v1, lumina-image-2.0 v2, lumina-next-sft, wan2.1-i2v-720p,
    cosmos; 0.15 0 1 1 1: hunyuan-video; 0.3 0.1 1 1 0: hidream,
    wan2.1_i2v_480p_14B_ret_mode, wan2.1_i2v_720p_14B_ret_mode; 1 0 1 1 0: hidream_i1_dev;
    0.35 0.1 1 1 0: hidream_i1_full (comfyui); 1.5 0 0.9 1 0: hidream_i1_fast;
    0.08 0 1 1 1: wan2.1-t2v-1.3B; 0.15 0.1 1 1 0: wan2.1_t2v_1.3B_ret_mode;
    0.1 0 1 5 0: wan2.1-t2v-1.3B ret_steps; 0.2 0 1 5 0: wan2.1-t2v-14B ret_steps;
    0.2 0.1 1 1 0: wan2.1_t2v_14B_ret_mode; 0.26 0 1 1 1: wan2.1-i2v-480p;
    0.3 0 1 5 0: wan2.1-i2v-480p ret_steps, wan2.1-i2v-720p ret_steps;
    0.25 0 1 1 0: wan2.1_i2v_720p_14B (comfyui); 0.4 0 1 1 1: cosmos i2v; 0.09 0 1 1 1: mochi-1;
    0.25 0 1 1 1: tangoflux; 0.2 0 1 1 1: wan2.1-t2v-14B, CogVideoX-2b, CogVideoX-5b,
    CogVideoX-5b-I2V, CogVideoX1.5-5B;
    0.1 0 1 1 1: consisid, CogVideoX1.5-5B-I2V, open-sora 1.2, open-sora-plan, latte
    """,
    "firstblockcache threshold": """
    0.08: black-forest-labs/FLUX.1-dev; 0.06: hunyuan-video, mochi; 0.04: CogVideoX-5b;
    0.03: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, wan2.1-t2v-14B; 0.1: ltx_video; 0.12: sd3.5;
    0.2: sdxl, qwen-image, CogView4
    """,
    "easycache threshold warmup_steps final_steps": """
    0.025 5 1: hunyuan-video; 0.05 7 1: wan2.2-ti2v-5B (t2v), wan2.2-ti2v-5B (i2v);
    0.05 10 1: wan2.1-t2v-1.3B, wan2.1-t2v-14B, wan2.1-i2v-480p, wan2.1-i2v-14B-720P;
    0.06 7 1: wan2.2-t2v-A14B, wan2.2-i2v-A14B
    """,
    "seacache threshold power warmup_steps final_steps max_consecutive_hits": """
    0.25 3 1 1 2: nvidia/Cosmos3-Nano, wan2.1-t2v-1.3B, wan2.1-t2v-14B
    """,
}


def checksum(values):
    return f"{zlib.crc32(','.join(map(repr, values)).encode()):08X}"


def rows(text, figures=-1):
    """(name, figures) of each name in `text`; the figures come first (0) or last (-1)."""
    made = []
    for line in " ".join(text.split()).split("; "):
        parts = line.split(": ")
        about = parts.pop(figures).split()
        made += [(name, about) for name in parts[0].split(", ")]
    return made


@pytest.mark.parametrize(("model", "about"), rows(TABLES))
def test_every_published_table_is_there(model, about):
    ratios = preset(model, "magcache").ratios
    if "omnigen2" in model:
        ratios = ratios[model.rsplit("_", 1)[1]]
    elif isinstance(ratios, dict):  # the originals hold cond and uncond of a step in turn
        assert list(ratios) == ["cond", "uncond"]
        ratios = [ratio for pair in zip(*ratios.values(), strict=True) for ratio in pair]
    assert [str(len(ratios)), checksum(ratios)] == about[::2]
    assert sum(ratios) == pytest.approx(float(about[1]), abs=5e-6)


@pytest.mark.parametrize(("model", "about"), rows(POLYNOMIALS))
def test_every_published_polynomial_is_there(model, about):
    policy = preset(model, "teacache")
    assert policy.score(1.0) == pytest.approx(abs(float(about[0])), rel=1e-6)
    assert checksum(policy.coefficients) == about[1]


@pytest.mark.parametrize("fields", SETTINGS)
def test_settings_are_the_published_ones(fields):
    method, *names = fields.split()
    seen = set()
    for model, figures in rows(SETTINGS[fields], figures=0):
        policy = preset(model, method)
        assert [getattr(policy, name) for name in names] == list(map(float, figures)), model
        seen.add(policy.origin)
    assert len(seen) == len(CATALOGUE["presets"][method]), "every preset was checked"


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
    assert (len(rows(TABLES)), len(rows(POLYNOMIALS))) == (39, 44)
    names = presets()
    assert list(names) == sorted(names)
    assert all(methods == tuple(sorted(methods)) and methods for methods in names.values())
    assert names["flux-dev"] == ("firstblockcache", "magcache", "teacache")


def test_no_name_means_two_models():
    owners = {}
    for model, about in CATALOGUE["models"].items():
        for name in (model, *about["aliases"]):
            key = "".join(filter(str.isalnum, name.lower()))
            assert owners.setdefault(key, model) == model, name


def test_names_are_matched_without_case_and_punctuation():
    for name in ("FLUX_DEV", "Flux Dev", "flux", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev"):
        for method in ("magcache", "MagCache", "mag_cache", "Mag Cache"):
            assert preset(name, method) == preset("flux-dev", "magcache")


@pytest.mark.parametrize(
    ("model", "method", "says"),
    [
        ("flux-dv", "magcache", r"no model 'flux-dv'. Did you mean 'flux-dev'.*There are: chroma"),
        ("org/FLUX.1-devs", "magcache", r"Did you mean 'flux-dev'"),
        ("?", "magcache", r"no model '\?'. There are: chroma"),
        ("flux", "magic", r"no method 'magic'. Did you mean 'magcache'.*There are: easycache"),
        ("sdxl", "magcache", r"no magcache settings .* 'sdxl', only: firstblockcache. There are:"),
        (None, "magcache", "model must be a name, got None"),
        ("flux", 1, "method must be a name, got 1"),
    ],
)
def test_unknown_names_raise_and_list_the_valid_ones(model, method, says):
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


def test_classes_exist_in_diffusers_or_are_marked():
    diffusers = pytest.importorskip("diffusers")
    elsewhere = set(CATALOGUE["not_in_diffusers"])
    named = {name for about in CATALOGUE["models"].values() for name in about["classes"]}
    assert elsewhere <= named
    assert elsewhere == {name for name in named if not hasattr(diffusers, name)}


def test_sources_are_at_a_commit():
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
