"""Layers that diffusers offloads by groups or keeps in another dtype, before and after `transform`.

"meta" stands in for a second device, where a captured graph computes: nothing is read back there,
so a schedule decides.
"""

import diffusers
import pytest
import torch
from comparing import assert_identical
from diffusers.hooks import HookRegistry, ModelHook, group_offloading
from helpers import evaluate, graphed, hits, plain, seeded
from opened import Small
from policies import ALWAYS
from torch.profiler import ProfilerActivity, profile
from zoo import BreaksAfter, at_step, make

import fxcache
from fxcache import CaptureError, StepSchedule

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def model():
    return seeded(lambda: Small(3))


LEAF = {"offload_type": "leaf_level"}
BLOCK = {"offload_type": "block_level", "num_blocks_per_group": 1}
PAIRS = {"offload_type": "block_level", "num_blocks_per_group": 2}


def offload(model, kind, onload_device=CPU):
    diffusers.hooks.apply_group_offloading(model, CPU, **kind)
    for _, hook in group_hooks(model):
        hook.group.onload_device = onload_device


def cast(model, dtype=torch.float32):
    diffusers.hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, dtype)


def group_hooks(model):
    registries = [(m, vars(m).get("_diffusers_hook")) for m in model.modules()]
    hooked = [(m, r.get_hook("group_offloading")) for m, r in registries if r is not None]
    return [(m, hook) for m, hook in hooked if hook is not None]


class Loads:
    """While open, counts the groups that are brought to the device by diffusers itself."""

    def __init__(self, monkeypatch):
        self.count, original = 0, group_offloading.ModuleGroup.onload_

        def counted(group):
            self.count += 1
            original(group)

        monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", counted)


def identities(model):
    return {name: id(w) for name, w in [*model.named_parameters(), *model.named_buffers()]}


PLACES = [("before", LEAF), ("on the model", BLOCK), ("on the denoiser", LEAF)]


@pytest.mark.parametrize(("put", "kind"), [*PLACES, ("on the denoiser", PAIRS)])
def test_group_offloading(model, inputs, put, kind, monkeypatch):
    expected, weights = model(**inputs), identities(model)
    if put == "before":
        offload(model, kind)
    denoiser = plain(model)
    if put != "before":
        evaluate(denoiser, inputs, expected)
        offload(model if put == "on the model" else denoiser, kind)
    loads = Loads(monkeypatch)
    evaluate(denoiser, inputs, expected)
    around = put == "on the denoiser" and kind is not LEAF  # the hook of what is in no block
    assert loads.count == (3 if around else 0)
    assert identities(model) == weights
    assert denoiser.report().recompiles == (0 if put == "before" else 1)

    loads.count = 0
    assert_identical(fxcache.restore(denoiser)(**inputs), expected)
    assert loads.count == len({id(hook.group) for _, hook in group_hooks(model)}) > 1
    assert all(hook.fn_ref.pre_forward == hook.pre_forward for _, hook in group_hooks(model))
    registry = HookRegistry.check_if_exists_or_initialize(model)
    assert registry._module_ref is model
    if put == "on the model":
        evaluate(plain(model), inputs, expected)
    registry.remove_hook("group_offloading", recurse=True)
    loads.count = 0
    assert_identical(model(**inputs), expected)
    assert loads.count == 0


def copies(call):
    """How many tensors `call` copies to another dtype or device."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(event.name == "aten::_to_copy" for event in profiler.events())


@pytest.mark.parametrize("kind", [LEAF, PAIRS], ids=["leaf", "pairs"])
def test_a_hit_leaves_the_weights_of_the_span_where_they_rest(model, inputs, kind):
    offload(model, kind, META)
    weights = identities(model)
    given = {name: value.to(META) for name, value in inputs.items()}
    denoiser = plain(model, StepSchedule(mask=[False, True, True]))  # reads nothing back
    with denoiser.trajectory(3):
        denoiser(**given)  # is traced
        counts = [copies(lambda: denoiser(**given)) for _ in range(2)]
    assert hits(denoiser) == [False, True, True]
    count = len(list(model.parameters()))
    outside = count - len(list(model.blocks.parameters()))
    # A block has norms beside its layers: where those are in no group, their weights are loose.
    assert counts == [outside, outside]
    assert identities(model) == weights
    assert {p.device for p in model.parameters()} == {CPU}


def test_inputs_are_brought_to_where_a_layer_computes(model, inputs):
    offload(model, BLOCK, META)
    denoiser = plain(model, StepSchedule(mask=[False, True]))
    with denoiser.trajectory(2):
        outputs = [denoiser(inputs["x"], inputs["t"] - 0.1 * step) for step in range(2)]
    assert [out.device for out in outputs] == [META, META]
    assert hits(denoiser) == [False, True]


ENABLE = {
    "groups": lambda model: model.enable_group_offload(CPU, **BLOCK),
    "casting": lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}


@pytest.mark.parametrize("enable", ENABLE.values(), ids=ENABLE)
def test_a_model_of_diffusers(enable):
    model, inputs = make("wan_t2v", num_layers=2)
    # torch takes another way through some products if a weight requires gradients.
    model.requires_grad_(False)
    enable(model)
    expected, weights = model(**inputs), identities(model)
    denoiser = plain(model)
    assert_identical(denoiser(**inputs), expected)
    for step in (1, 2):
        denoiser(**at_step("wan_t2v", inputs, step))
    assert hits(denoiser) == [False, True, True]
    assert identities(model) == weights
    assert_identical(model(**inputs), expected)


def test_group_offloading_to_disk_is_refused(model, inputs, tmp_path):
    expected = model(**inputs)
    diffusers.hooks.apply_group_offloading(model, CPU, offload_to_disk_path=str(tmp_path), **BLOCK)
    with pytest.raises(CaptureError, match=r"'group_offloading'.*without offload_to_disk_path"):
        plain(model)(**inputs)
    assert_identical(model(**inputs), expected)


@pytest.mark.parametrize(("put", "dtype"), [("before", torch.bfloat16), ("after", torch.float32)])
def test_layerwise_casting(model, inputs, put, dtype):
    model, given = model.to(dtype), {name: value.to(dtype) for name, value in inputs.items()}
    denoiser = plain(model)
    if put == "after":
        evaluate(denoiser, given, model(**given))
    cast(model if put == "before" else denoiser, dtype)
    weights, expected = identities(model), model(**given)
    for _ in range(2):
        evaluate(denoiser, given, expected)
    assert identities(model) == weights
    assert model.blocks[1].up.weight.dtype == torch.float8_e4m3fn
    later = {**given, "t": given["t"] - 0.5}
    hit, miss = (copies(lambda at=at: denoiser(**at)) for at in (later, given))
    in_span = [m for block in model.blocks[1:] for m in block.modules() if "forward" in vars(m)]
    assert miss - hit >= 2 * len(in_span) > 0
    assert fxcache.restore(denoiser)(**given).dtype == dtype
    assert_identical(model(**given), expected)


def test_hooks_on_a_model_that_is_captured_in_pieces(inputs):
    model = seeded(BreaksAfter)
    model.blocks = model.blocks[:2]
    denoiser = plain(model, fullgraph=False)
    evaluate(denoiser, inputs, model(**inputs))
    cast(denoiser)
    evaluate(denoiser, inputs, model(**inputs))


def test_casting_under_inductor(inputs):
    model = Small().eval()
    cast(model)
    expected = model(**inputs)
    denoiser = fxcache.transform(model, ALWAYS)
    torch.testing.assert_close(denoiser(**inputs), expected)
    given = {**inputs, "t": inputs["t"] - 0.1}
    assert denoiser(**given).isfinite().all()
    assert hits(denoiser) == [False, True]
    assert model.blocks[1].up.weight.dtype == torch.float8_e4m3fn


def test_graphs_are_not_captured_of_weights_elsewhere(device, model, inputs, caplog):
    offload(model, LEAF, META)
    given = {name: value.to(META) for name, value in inputs.items()}
    denoiser = graphed(model, StepSchedule(mask=[False, True, False, True, False, True]))
    with denoiser.trajectory(6):
        for _ in range(6):
            denoiser(**given)
    assert device.captures == 0
    assert "no CUDA graphs: 26 weights are on cpu" in caplog.text


class Breaking(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        torch._dynamo.graph_break()
        return args, kwargs


def test_an_unknown_hook_is_named(model, inputs):
    registry = HookRegistry.check_if_exists_or_initialize(model.blocks[2].proj)
    registry.register_hook(Breaking(), "breaking")
    with pytest.raises(CaptureError, match=r"'breaking' \(Breaking\) on 'blocks\.2\.proj'"):
        plain(model)(**inputs)


def test_diffusers_own_cache_is_named():
    model, inputs = make("flux", num_layers=1)
    denoiser = plain(model)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CaptureError, match=r"model\.disable_cache\(\)"), \
            model.cache_context("cond"):  # fmt: skip
        denoiser(**inputs)


def test_a_hook_on_the_denoiser_is_the_models_after_restoring(model, inputs):
    calls = []

    class Noting(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            calls.append(module)
            return self.fn_ref.original_forward(*args, **kwargs) + 1

    expected = model(**inputs)
    denoiser = plain(model)
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(Noting(), "noting")
    registry.register_hook(Breaking(), "breaking")
    evaluate(denoiser, inputs, expected + 1)
    assert calls == [denoiser] * 3
    calls.clear()
    fxcache.restore(denoiser)
    assert_identical(model(**inputs), expected + 1)
    assert calls == [model]
    registry.remove_hook("noting")
    registry.remove_hook("breaking")
    assert_identical(model(**inputs), expected)
