"""Workflows through a real ComfyUI: with our node at tolerance 0, they give the same bits."""

import json

import pytest
import server
import torch
from make_workflows import FOLDER, WORKFLOWS, drawn, inputs_of
from server import PATH, PromptError, Server, graph, node

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="COMFYUI_PATH names no ComfyUI"),
    pytest.mark.xdist_group("comfyui"),
]


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("comfyui") / "base")
    yield started
    started.close()


def ours(tolerance=0.0, **inputs):
    given = {
        "policy": "adaptive", "tolerance": tolerance, "start_percent": 0.0, "end_percent": 1.0,
        "max_consecutive_hits": 4, "forecast": "auto", **inputs,
    }  # fmt: skip
    return "FxCache", given


SKIPPED = {
    "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0,
    "end_percent": 0.6, "rescaling_scale": 0.0,
}  # fmt: skip
EASY = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
#: Core's own nodes that patch a model.
OTHERS = {
    "lora": ("TinyLora", {"strength": 0.7, "seed": 5}),
    "skipped layers": ("SkipLayerGuidanceDiT", SKIPPED),
    "easycache": ("EasyCache", EASY),
    "lazycache": ("LazyCache", EASY),
    "compiled": ("TorchCompileModel", {"backend": "inductor"}),
    "unbatched": ("TinyUnbatched", {}),
}
SAMPLERS = ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "uni_pc", "euler_ancestral", "lcm"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sd3", "wan"])  # the last varies least: a model is loaded once
def test_a_sampler(comfy, kind, sampler):
    plain = comfy.samples(graph(kind, sampler_name=sampler, steps=5))
    assert torch.equal(comfy.samples(graph(kind, [ours()], sampler_name=sampler, steps=5)), plain)


@pytest.mark.parametrize(
    "given",
    [{"seed": 7}, {"denoise": 0.5}, {"cfg": 1.0}, {"steps": 3}, {"scheduler": "karras"}],
    ids=str,
)
def test_a_setting(comfy, given):
    assert torch.equal(comfy.samples(graph(nodes=[ours()], **given)), comfy.samples(graph(**given)))


@pytest.mark.parametrize("size", [{"width": 96}, {"height": 32}, {"batch_size": 3}], ids=str)
def test_a_size(comfy, size):
    name, usual = server.EMPTY["sd3"]
    more = {"other": node(name, **{**usual, **size})}
    plain, cached = (
        comfy.samples(graph(nodes=nodes, latent=["other", 0], more=more))
        for nodes in ([], [ours()])
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", ["sd3", "wan"])
def test_another_node(comfy, other, place, kind):
    if kind == "wan" and other in ("skipped layers", "compiled"):
        pytest.skip("ComfyUI's Wan has no double blocks, and one model is compiled for minutes")
    nodes = [OTHERS[other], ours()] if place == "before" else [ours(), OTHERS[other]]
    plain = comfy.samples(graph(kind, [OTHERS[other]]), seconds=600)
    cached = comfy.samples(graph(kind, nodes), seconds=600)
    if other == "compiled":  # Inductor, on other pieces
        torch.testing.assert_close(cached, plain, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(cached, plain)


def test_a_lora_that_comes_changes_and_goes(comfy):
    for strength in (0.5, 1.0, 0.0, 0.5):
        lora = ("TinyLora", {"strength": strength, "seed": 5})
        plain = comfy.samples(graph(nodes=[lora]))
        assert torch.equal(comfy.samples(graph(nodes=[lora, ours()])), plain)
    assert torch.equal(comfy.samples(graph(nodes=[ours()])), comfy.samples(graph()))


@pytest.mark.parametrize("end", [1.0, 0.5])
def test_a_control(comfy, end):
    more = {"control": node("TinyControl", conditioning=["positive", 0], end_percent=end)}
    given = {"positive": ["control", 0], "more": more}
    assert torch.equal(comfy.samples(graph(nodes=[ours()], **given)), comfy.samples(graph(**given)))


def test_two_halves(comfy):
    def halves(nodes):
        given = graph(nodes=nodes)
        model, negative = given["sample"]["inputs"]["model"], ["negative", 0]
        common = {
            "model": model, "noise_seed": 0, "steps": 8, "cfg": 3.0, "sampler_name": "euler",
            "scheduler": "simple", "positive": ["positive", 0], "negative": negative,
        }  # fmt: skip
        given["first"] = node(
            "KSamplerAdvanced", **common, latent_image=["latent", 0], add_noise="enable",
            start_at_step=0, end_at_step=4, return_with_leftover_noise="enable",
        )  # fmt: skip
        given["sample"] = node(
            "KSamplerAdvanced", **common, latent_image=["first", 0], add_noise="disable",
            start_at_step=4, end_at_step=10000, return_with_leftover_noise="disable",
        )  # fmt: skip
        return given

    assert torch.equal(comfy.samples(halves([ours()])), comfy.samples(halves([])))


@pytest.mark.parametrize("interrupts", [False, True])
def test_a_run_that_ends_half_way_leaves_nothing(comfy, interrupts):
    plain = comfy.samples(graph())
    stop = ("TinyStop", {"evaluation": 4, "interrupts": interrupts})
    with pytest.raises(PromptError, match="interrupted" if interrupts else "stopped by the test"):
        comfy.run(graph(nodes=[ours(1.0), stop]))
    assert torch.equal(comfy.samples(graph()), plain)
    assert torch.equal(comfy.samples(graph(nodes=[ours()])), plain)


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weights_in_eight_bits(comfy, dtype):
    def loaded(nodes):
        made = graph(nodes=nodes)
        made["load"]["inputs"]["weight_dtype"] = dtype
        return made

    assert torch.equal(comfy.samples(loaded([ours()])), comfy.samples(loaded([])))


def test_two_models_in_one_workflow(comfy):
    def both(nodes):
        made, other = graph("sd3", nodes), graph("wan", nodes)
        return made | {
            f"b {name}": node(
                one["class_type"],
                **{
                    field: [f"b {value[0]}", value[1]] if isinstance(value, list) else value
                    for field, value in one["inputs"].items()
                },
            )
            for name, one in other.items()
        }

    plain, cached = both([]), both([ours()])
    for name in ("save", "b save"):
        assert torch.equal(comfy.samples(cached, name), comfy.samples(plain, name))


def with_report(nodes, kind="sd3", **given):
    made = graph(kind, nodes, **given)
    model = made["sample"]["inputs"]["model"]
    made["report"] = node("FxCacheReport", model=model, samples=["sample", 0])
    made["state"] = node("TinyState", model=model, samples=["report", 0])
    return made


def test_memory_stays_and_the_model_is_its_own(comfy):
    held, classes = [], set()
    for seed in range(20):
        outputs = comfy.run(with_report([ours(0.3)], seed=seed))
        held += outputs["state"]["held"]
        classes.add((outputs["state"]["model"][0], outputs["state"]["id"][0]))
    assert max(held[5:]) <= held[4]
    ((name, _),) = classes
    assert name.endswith("mmdit.OpenAISignatureMMDITWrapper")


@pytest.mark.parametrize(
    "nodes",
    [
        [ours(1.0)],
        [ours(1.0, policy="first block")],
        [ours(1.0, policy="easycache")],
        [("FxCacheFirstBlock", {"residual_diff_threshold": 0.9, "start": 0.0, "end": 1.0,
                                "max_consecutive_cache_hits": 1})],
        [("FxCacheEasyCache", {**EASY, "reuse_threshold": 3.0})],
        [("FxCacheSchedule", {"schedule": "every 2"})],
        [("FxCacheSchedule", {"schedule": "0 1 2 5"})],
        [ours(1.0), ("FxCacheCompile", {"mode": "default", "dynamic": "auto", "fullgraph": False,
                                        "options": "", "backend": "inductor", "disable": False})],
    ],
    ids=lambda nodes: " ".join(name for name, _ in nodes),
)  # fmt: skip
def test_every_policy_hits(comfy, nodes):
    plain = comfy.samples(graph(steps=14))
    cached = comfy.samples(graph(nodes=nodes, steps=14), seconds=600)
    table = comfy.run(with_report(nodes, steps=14))["report"]["text"][0]
    hits = int(table.splitlines()[-1].split()[0])
    assert hits >= 2, table
    assert not torch.equal(cached, plain)
    assert (cached - plain).abs().mean() < 0.2 * plain.abs().mean()


def test_the_window_is_that_of_sigmas(comfy):
    nodes = [ours(10.0, start_percent=0.5, end_percent=0.8)]
    table = comfy.run(with_report(nodes, steps=10))["report"]["text"][0]
    steps = [int(line.split()[0]) for line in table.splitlines() if line.endswith(" hit")]
    # SD3's sigmas are shifted by 3: those of the fractions 0.5 and 0.8 are 0.75 and 0.43.
    assert steps == [5, 6, 7]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([ours(start_percent=0.5, end_percent=0.5)], "start must be below the end"),
        ([ours(policy="magcache")], "no magcache settings were published for SD3"),
        ([("FxCacheSchedule", {"schedule": "often"})], "schedule must be"),
        ([("FxCacheCompile", {"mode": "default", "dynamic": "auto", "fullgraph": False,
                              "options": "{", "backend": "inductor", "disable": False})],
         "options must be JSON"),
        ([ours(policy="guess")], "policy must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_said_by_the_node(comfy, nodes, message):
    with pytest.raises(PromptError, match=message):
        comfy.run(graph(nodes=nodes))
    assert comfy.samples(graph(nodes=[ours(0.5)])).isfinite().all()


def test_the_sampler_with_the_cache_in_it(comfy):
    given = {"enabled": True, "policy": "adaptive", "tolerance": 0.0, "warmup_steps": 2}
    made = graph(sampler="FxCacheKSampler", **given)
    assert torch.equal(comfy.samples(made), comfy.samples(graph()))


def test_tune_and_calibrate(comfy):
    for name, more, end, user in (
        ("FxCacheTune", {"target_speedup": 1.5, "name": "s"}, ".json", "FxCacheSchedule"),
        ("FxCacheCalibrate", {"policy": "magcache", "runs": 1, "name": "p"}, ".safetensors", ""),
    ):
        made = graph(steps=8)
        given = {k: v for k, v in made["sample"]["inputs"].items() if k != "denoise"}
        made["measured"] = node(name, **given, **more)
        made["sample"]["inputs"]["model"] = ["measured", 0]
        made["shown"] = node("PreviewAny", source=["measured", 1])
        outputs = comfy.run(made, seconds=400)
        (path,) = outputs["shown"]["text"]
        assert path.endswith(end)
        if user:
            comfy.run(graph(nodes=[(user, {"schedule": path})]))


def prompt_of(workflow, info):
    """What ComfyUI's page sends for a workflow that it loaded."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for one in workflow["nodes"]:
        values, given = list(one["widgets_values"]), {}
        linked = {i["name"]: links[i["link"]] for i in one["inputs"] if i["link"] is not None}
        for field, _, is_widget, more, _ in inputs_of(info[one["type"]]):
            if field in linked:
                given[field] = linked[field]
            elif is_widget:
                given[field] = values.pop(0)
                if more.get("control_after_generate") or field in ("seed", "noise_seed"):
                    values.pop(0)
                if more.get("image_upload"):
                    values.pop(0)
        assert not values, one
        prompt[str(one["id"])] = {"class_type": one["type"], "inputs": given}
    return prompt


FILES = ("unet_name", "clip_name", "vae_name", "ckpt_name", "control_net_name", "image")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_valid(comfy, name):
    """Nothing is wrong with it but that the files of the models are not there."""
    path = FOLDER / "example_workflows" / f"{name}.json"
    workflow = json.loads(path.read_text())
    assert workflow == json.loads(json.dumps(drawn(WORKFLOWS[name], comfy.info)))
    with pytest.raises(PromptError) as refused:
        comfy.run(prompt_of(workflow, comfy.info))
    for found in json.loads(str(refused.value))["node_errors"].values():
        for error in found["errors"]:
            field = error["extra_info"]["input_name"]
            assert error["type"] in ("value_not_in_list", "custom_validation_failed"), error
            assert field.startswith(FILES), error
