"""Write the pack's example workflows and texts: ``COMFYUI_PATH=... python make_workflows.py``.

Each is described by its nodes and what goes into them; what ComfyUI says of its nodes tells which
inputs are widgets and in which order, so the files are those that its page would save.
"""

import json
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "fxcache" / "comfyui"
PROMPT = "a red fox in the snow, soft morning light"
#: Inputs that are drawn as widgets unless something is linked to them.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def model(unet, text, vae, cache="FxCache", **settings):
    """Loaders, the cache behind the model's, and two prompts."""
    names = [f"clip_name{i + 1}" for i in range(len(text) - 1)]
    loader = ["CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader"][len(names) - 1]
    clips = dict(zip(["clip_name"] if len(names) == 1 else names, text, strict=False))
    if loader != "TripleCLIPLoader":
        clips |= {"type": text[-1], "device": "default"}
    return {
        "load": ("UNETLoader", {"unet_name": unet, "weight_dtype": "default"}),
        "cache": (cache, {"model": "load", **settings}),
        "clip": (loader, clips),
        "vae": ("VAELoader", {"vae_name": vae}),
        "positive": ("CLIPTextEncode", {"clip": "clip", "text": PROMPT}),
        "negative": ("CLIPTextEncode", {"clip": "clip", "text": ""}),
    }


def sampled(latent, cfg, steps=20, model="cache", positive="positive", negative="negative", **more):
    """A sampler, the report behind it, and the decoded picture."""
    return {
        "latent": latent,
        "sample": ("KSampler", {
            "model": model, "positive": positive, "negative": negative, "latent_image": "latent",
            "seed": 0, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0, **more,
        }),
        "report": ("FxCacheReport", {"model": model, "samples": "sample"}),
        "plot": ("PreviewImage", {"images": "report.2"}),
        "decode": ("VAEDecode", {"samples": "report", "vae": "vae"}),
    }  # fmt: skip


PICTURE = {"save": ("SaveImage", {"images": "decode", "filename_prefix": "fxcache"})}
VIDEO = {
    "video": ("CreateVideo", {"images": "decode", "fps": 16.0}),
    "save": ("SaveVideo", {
        "video": "video", "filename_prefix": "video/fxcache", "format": "auto", "codec": "auto",
    }),
}  # fmt: skip
SQUARE = ("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1})
FLUX = ["clip_l.safetensors", "t5xxl_fp16.safetensors", "flux"]
WAN = ["umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"]


def guided(scale=3.5, positive="positive"):
    """Guidance that the model was distilled with: the prompt that is not wanted does nothing."""
    return {
        "guidance": ("FluxGuidance", {"conditioning": positive, "guidance": scale}),
        "nothing": ("ConditioningZeroOut", {"conditioning": "positive"}),
    }


def image(name="input.png"):
    return {"image": ("LoadImage", {"image": name})}


def flux(unet="flux1-dev.safetensors", **cache):
    return model(unet, FLUX, "ae.safetensors", **cache)


def wan(unet, **cache):
    return model(unet, WAN, "wan_2.1_vae.safetensors", **cache)


def shifted(scale):
    return {"shift": ("ModelSamplingSD3", {"model": "cache", "shift": scale})}


FRAMES = {"width": 832, "height": 480, "length": 81, "batch_size": 1}
GUIDED = {"positive": "guidance", "negative": "nothing"}
FROM_LATENT = {"positive": "latent", "negative": "latent.1", "latent_image": "latent.2"}
WORKFLOWS = {
    "flux": flux() | guided() | sampled(SQUARE, 1.0, **GUIDED) | PICTURE,
    "flux_controlnet": flux() | image() | guided() | {
        "control": ("ControlNetLoader", {"control_net_name": "flux-controlnet-union.safetensors"}),
        "kind": ("SetUnionControlNetType", {
            "control_net": "control", "type": "canny/lineart/anime_lineart/mlsd",
        }),
        "controlled": ("ControlNetApplyAdvanced", {
            "positive": "guidance", "negative": "nothing", "control_net": "kind", "image": "image",
            "vae": "vae", "strength": 0.7, "start_percent": 0.0, "end_percent": 0.8,
        }),
    } | sampled(SQUARE, 1.0, positive="controlled", negative="controlled.1") | PICTURE,
    "flux_kontext": flux("flux1-dev-kontext_fp8_scaled.safetensors") | image() | {
        "scaled": ("FluxKontextImageScale", {"image": "image"}),
        "encoded": ("VAEEncode", {"pixels": "scaled", "vae": "vae"}),
        "reference": ("ReferenceLatent", {"conditioning": "positive", "latent": "encoded"}),
    } | guided(2.5, "reference") | sampled(SQUARE, 1.0, **GUIDED) | PICTURE,
    "chroma": model(
        "chroma1-hd.safetensors", ["t5xxl_fp16.safetensors", "chroma"], "ae.safetensors",
    ) | sampled(SQUARE, 4.0, 26) | PICTURE,
    "sd3.5": model("sd3.5_large.safetensors", [
        "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors", "sd3",
    ], "sd3_vae.safetensors") | sampled(SQUARE, 4.5, 28) | PICTURE,
    "sdxl": {
        "load": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "cache": ("FxCache", {"model": "load"}),
        "positive": ("CLIPTextEncode", {"clip": "load.1", "text": PROMPT}),
        "negative": ("CLIPTextEncode", {"clip": "load.1", "text": "blurry"}),
    } | sampled(("EmptyLatentImage", dict(SQUARE[1])), 7.0, 30) | {
        "decode": ("VAEDecode", {"samples": "report", "vae": "load.2"}),
    } | PICTURE,
    "ltxv": {
        "load": ("CheckpointLoaderSimple", {"ckpt_name": "ltx-video-2b-v0.9.5.safetensors"}),
        "cache": ("FxCache", {"model": "load"}),
        "clip": ("CLIPLoader", {
            "clip_name": "t5xxl_fp16.safetensors", "type": "ltxv", "device": "default",
        }),
        "positive": ("CLIPTextEncode", {"clip": "clip", "text": PROMPT}),
        "negative": ("CLIPTextEncode", {"clip": "clip", "text": "worst quality, jittery"}),
        "rate": ("LTXVConditioning", {
            "positive": "positive", "negative": "negative", "frame_rate": 25.0,
        }),
    } | sampled(
        ("EmptyLTXVLatentVideo", {"width": 768, "height": 512, "length": 97, "batch_size": 1}),
        3.0, 30, positive="rate", negative="rate.1",
    ) | {"decode": ("VAEDecode", {"samples": "report", "vae": "load.2"})} | VIDEO,
    "hunyuan_video": model("hunyuan_video_t2v_720p_bf16.safetensors", [
        "clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors", "hunyuan_video",
    ], "hunyuan_video_vae_bf16.safetensors") | shifted(7.0) | guided(6.0) | sampled(
        ("EmptyHunyuanLatentVideo", {"width": 848, "height": 480, "length": 73, "batch_size": 1}),
        1.0, model="shift", **GUIDED,
    ) | VIDEO,
    "wan_t2v": wan("wan2.1_t2v_1.3B_fp16.safetensors") | shifted(8.0) | sampled(
        ("EmptyHunyuanLatentVideo", {**FRAMES, "length": 33}), 6.0, 30, model="shift",
    ) | VIDEO,
    "wan_i2v": wan("wan2.1_i2v_480p_14B_fp16.safetensors") | shifted(8.0) | image() | {
        "look": ("CLIPVisionLoader", {"clip_name": "clip_vision_h.safetensors"}),
        "seen": ("CLIPVisionEncode", {"clip_vision": "look", "image": "image", "crop": "none"}),
    } | sampled(("WanImageToVideo", {
        "positive": "positive", "negative": "negative", "vae": "vae", "clip_vision_output": "seen",
        "start_image": "image", **FRAMES,
    }), 6.0, model="shift", **FROM_LATENT) | VIDEO,
    "wan_vace": wan("wan2.1_vace_1.3B_fp16.safetensors") | shifted(8.0) | image() | sampled(
        ("WanVaceToVideo", {
            "positive": "positive", "negative": "negative", "vae": "vae", "strength": 1.0,
            "reference_image": "image", **FRAMES,
        }), 6.0, 30, model="shift", **FROM_LATENT,
    ) | VIDEO,
    "qwen_image": model(
        "qwen_image_fp8_e4m3fn.safetensors",
        ["qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image"], "qwen_image_vae.safetensors",
    ) | {"shift": ("ModelSamplingAuraFlow", {"model": "cache", "shift": 3.1})} | sampled(
        ("EmptySD3LatentImage", {"width": 1328, "height": 1328, "batch_size": 1}), 2.5,
        model="shift",
    ) | PICTURE,
    "calibration": {
        name: given for name, given in flux().items() if name != "cache"
    } | guided() | {
        "latent": SQUARE,
        "measured": ("FxCacheCalibrate", {
            "model": "load", **GUIDED, "latent_image": "latent",
            "seed": 0, "steps": 28, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "policy": "magcache", "runs": 1, "name": "flux",
        }),
        "shown": ("PreviewAny", {"source": "measured.2"}),
    } | sampled(SQUARE, 1.0, 28, model="measured", **GUIDED) | PICTURE,
}  # fmt: skip


def inputs_of(info):
    """The inputs of a node: name, type, whether it is a widget, and its description."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, more = spec[0], spec[1] if len(spec) > 1 else {}
            kind = "COMBO" if isinstance(kind, list) else kind
            yield name, kind, kind in WIDGETS and not more.get("forceInput"), more, group


def drawn(nodes, info):
    """A workflow as ComfyUI's page saves it, without a prompt that nothing reads."""
    read = {str(v).split(".")[0] for _, given in nodes.values() for v in given.values()}
    nodes = {name: node for name, node in nodes.items() if name != "negative" or name in read}
    names, links, made = list(nodes), [], []
    depth = {}
    for name in names:  # each stands behind what it reads
        read = [
            str(v).split(".")[0] for v in nodes[name][1].values() if str(v).split(".")[0] in nodes
        ]
        depth[name] = 1 + max((depth.get(other, 0) for other in read), default=-1)
    rows = dict.fromkeys(range(len(names)), 0)
    outputs = {name: [[] for _ in info[nodes[name][0]]["output"]] for name in names}
    for number, name in enumerate(names, 1):
        kind, given = nodes[name]
        inputs, widgets = [], []
        for field, type_, is_widget, more, group in inputs_of(info[kind]):
            source, _, slot = str(given.get(field, "")).partition(".")
            if source in nodes and not (is_widget and field in ("text", "name")):
                place = int(slot or 0)
                links.append(
                    [len(links) + 1, names.index(source) + 1, place, number, len(inputs), type_]
                )
                outputs[source][place].append(len(links))
                inputs.append({"name": field, "type": type_, "link": len(links)})
            elif is_widget:
                options = more.get("options") or info[kind]["input"][group][field][0]
                first = options[0] if isinstance(options, list) and options else None
                widgets.append(given.get(field, more.get("default", first)))
                if more.get("control_after_generate") or field in ("seed", "noise_seed"):
                    widgets.append("fixed")
                if more.get("image_upload"):
                    widgets.append("image")
            else:
                inputs.append({"name": field, "type": type_, "link": None})
        height = 60 + 24 * (len(inputs) + len(widgets))
        column = depth[name]
        made.append({
            "id": number, "type": kind, "pos": [40 + 360 * column, 60 + rows[column]],
            "size": [320, height], "flags": {}, "order": column, "mode": 0, "inputs": inputs,
            "outputs": [], "properties": {"Node name for S&R": kind}, "widgets_values": widgets,
        })  # fmt: skip
        rows[column] += height + 60
    for node, name in zip(made, names, strict=True):
        described = info[node["type"]]
        node["outputs"] = [
            {
                "name": title,
                "type": "COMBO" if isinstance(type_, list) else type_,
                "links": found or None,
            }
            for title, type_, found in zip(
                described["output_name"], described["output"], outputs[name], strict=True
            )
        ]
    return {
        "last_node_id": len(made), "last_link_id": len(links), "nodes": made, "links": links,
        "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def texts(info):
    """What the nodes say, as the files of translations have it."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                field: {
                    "name": field,
                    **({"tooltip": more["tooltip"]} if "tooltip" in more else {}),
                }
                for field, _, _, more, _ in inputs_of(node)
            },
        }
        for name, node in info.items()
        if name.startswith("FxCache")
    }


def main():
    sys.path.insert(0, str(Path(__file__).parent))
    from server import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "base")
        server.close()
    write(server.info)


def write(info):
    for name, nodes in WORKFLOWS.items():
        text = json.dumps(drawn(nodes, info), indent=1)
        (FOLDER / "example_workflows" / f"{name}.json").write_text(text + "\n")
    text = json.dumps(texts(info), indent=1)
    (FOLDER / "locales" / "en" / "nodeDefs.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
