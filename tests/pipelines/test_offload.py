"""Models offloaded by accelerate: its hook on the model itself works, its hooks on layers do not.

There is no second device here: float64 stands in for one where weights rest (casting there and back
changes nothing). Hooks of diffusers are in test_offload_layers.py.
"""

import accelerate
import pytest
import torch
from accelerate import hooks
from comparing import assert_identical
from helpers import evaluate, plain, short
from opened import Small
from pipelines import PIPELINES
from policies import ALTERNATE, ALWAYS, NEVER
from torch import nn

import fxcache
from fxcache import CaptureError, StackNotFoundError


class Resting(hooks.ModelHook):
    """Weights are in float64 but during the forward. Dynamo cannot follow it."""

    def __init__(self):
        self.calls = 0

    def init_hook(self, module):
        return module.to(torch.float64)

    def pre_forward(self, module, *args, **kwargs):
        torch._dynamo.graph_break()
        self.calls += 1
        module.to(torch.float32)
        return args, kwargs

    def post_forward(self, module, output):
        module.to(torch.float64)
        return output

    def detach_hook(self, module):
        return module.to(torch.float32)


def dtypes(model):
    return {p.dtype for p in model.parameters()}


PLACES = [
    ("before", "model", plain),
    ("before", "denoiser", short),
    ("on the model", "denoiser", plain),
    ("on the denoiser", "model", plain),
    ("by append", "denoiser", plain),
]


@pytest.mark.parametrize(("put", "take", "make_denoiser"), PLACES)
def test_a_hook_on_the_model_runs_around_the_cache(model, inputs, put, take, make_denoiser):
    expected, hook = model(**inputs), Resting()
    if put == "before":
        hooks.add_hook_to_module(model, hook)
    denoiser = make_denoiser(model)
    if put != "before":
        evaluate(denoiser, inputs, expected)
        target = model if put == "on the model" else denoiser
        if put == "by append":
            hooks.add_hook_to_module(target, hooks.ModelHook())
        hooks.add_hook_to_module(target, hook, append=put == "by append")
    for _ in range(2):
        evaluate(denoiser, inputs, expected)
        assert dtypes(model) == {torch.float64}
    assert hook.calls == 6
    assert_identical(model(**inputs), expected)  # it is the model's hook too
    assert hook.calls == 7
    assert denoiser.report().recompiles == 0

    hooks.remove_hook_from_module({"model": model, "denoiser": denoiser}[take], recurse=True)
    assert dtypes(model) == {torch.float32}
    assert not {"_hf_hook", "_old_forward"} & vars(model).keys()
    assert not hasattr(denoiser, "_old_forward")
    evaluate(denoiser, inputs, expected)
    assert_identical(model(**inputs), expected)
    assert hook.calls == 7
    assert denoiser.report().recompiles == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_hook_outlives_the_denoiser(model, inputs, where):
    expected, hook = model(**inputs), Resting()
    if where == "before":
        hooks.add_hook_to_module(model, hook)
    denoiser = plain(model)
    if where == "after":
        hooks.add_hook_to_module(denoiser, hook)
    evaluate(denoiser, inputs, expected)
    assert fxcache.restore(denoiser) is model
    assert_identical(model(**inputs), expected)
    assert hook.calls == 4
    assert dtypes(model) == {torch.float64}
    other = Resting()
    hooks.add_hook_to_module(model, other)  # in the place of the first
    assert_identical(model(**inputs), expected)
    assert (hook.calls, other.calls) == (4, 1)
    hooks.remove_hook_from_module(model)
    assert_identical(model(**inputs), expected)
    assert model._forward_hooks == {}
    assert other.calls == 1


def test_forwards_of_ones_own_beneath_and_above_the_hook(model, inputs):
    """One on the instance before, and one on the denoiser afterwards."""
    original = model.forward
    model.forward = lambda x, t: original(x * 2, t)
    expected, hook = model(**inputs), Resting()
    denoiser = plain(model)
    hooks.add_hook_to_module(denoiser, hook)
    evaluate(denoiser, inputs, expected)
    cached = denoiser.forward
    denoiser.forward = lambda **given: cached(**given) + 1
    evaluate(denoiser, inputs, expected + 1)
    hooks.remove_hook_from_module(denoiser)
    evaluate(denoiser, inputs, expected + 1)
    assert_identical(model(**inputs), expected)
    assert hook.calls == 6


@pytest.mark.parametrize("options", [{"disable": True}, {"policy": NEVER}])
def test_a_hook_where_nothing_is_cached(model, inputs, options):
    expected, hook = model(**inputs), Resting()
    denoiser = fxcache.transform(model, **{"policy": ALWAYS, "backend": "eager", **options})
    hooks.add_hook_to_module(denoiser, hook)
    for _ in range(2):
        assert_identical(denoiser(**inputs), expected)
    with torch.enable_grad():
        assert_identical(denoiser(**inputs), expected)
    assert hook.calls == 3
    made = type(denoiser)().eval()  # a plain model of the denoiser's class
    expected, hook = made(**inputs), Resting()
    hooks.add_hook_to_module(made, hook)
    assert_identical(made(**inputs), expected)
    hooks.remove_hook_from_module(made)
    assert_identical(made(**inputs), expected)
    assert hook.calls == 1


def test_explain_runs_the_hook(model, inputs):
    hooks.add_hook_to_module(model, Resting())
    assert fxcache.explain(model, **inputs).blocks == tuple(f"blocks.{i}" for i in range(2))
    assert dtypes(model) == {torch.float64}


def test_the_hook_of_model_offloading(model, inputs):
    """What ``pipe.enable_model_cpu_offload()`` puts on, with the handle that it keeps."""
    expected = model(**inputs)
    denoiser = plain(model)
    _, first = accelerate.cpu_offload_with_hook(denoiser, "cpu")
    _, second = accelerate.cpu_offload_with_hook(nn.Linear(2, 2), "cpu", prev_module_hook=first)
    evaluate(denoiser, inputs, expected)
    second.model(torch.ones(2))  # offloads the denoiser
    evaluate(denoiser, inputs, expected)
    first.remove()
    evaluate(denoiser, inputs, expected)
    assert "_hf_hook" not in vars(model)


def test_model_offloading_of_a_pipeline():
    """Before `apply` and after: it takes its hooks off and puts them on again at the end of each
    run.
    """
    pipe = PIPELINES["flux"].build()

    def run():
        return PIPELINES["flux"].call(pipe, "a fox", steps=4, size=32, batch=1)

    def decisions(handle):
        return [record.is_hit for record in handle.report().records]

    uncached, model = run(), pipe.transformer
    for where in ("after", "before"):
        if where == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        handle = fxcache.apply(pipe, ALTERNATE, backend="eager")
        if where == "after":
            expected, wanted = run(), decisions(handle)
            assert any(wanted)
            handle.reset()
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert_identical(run(), expected)
        assert decisions(handle) == wanted * 2
        handle.remove()
        assert pipe.transformer is model
        assert model.forward.args == (model,)  # accelerate's wrapper, around the plain model
        assert_identical(run(), uncached)
        pipe.remove_all_hooks()
        assert_identical(run(), uncached)
        assert not {"_hf_hook", "_old_forward"} & vars(model).keys()


@pytest.mark.parametrize(("where", "fullgraph"), [("before", True), ("after", False)])
def test_sequential_offloading_is_refused(inputs, where, fullgraph):
    model = Small().eval()
    expected = model(**inputs)
    if where == "before":
        accelerate.cpu_offload(model, "cpu")
    denoiser = plain(model, fullgraph=fullgraph)
    if where == "after":
        accelerate.cpu_offload(denoiser, "cpu")
    kind = CaptureError if fullgraph else StackNotFoundError
    with pytest.raises(kind, match=r"on 10 modules .* AlignDevicesHook on 'embed'"):
        denoiser(**inputs)
    assert_identical(model(**inputs), expected)
    if where == "before":
        with pytest.warns(UserWarning, match="uncached"):
            assert_identical(plain(model, fallback=True)(**inputs), expected)
        # What the message says to do works.
        hooks.remove_hook_from_module(model, recurse=True)
        evaluate(plain(model), inputs, expected)


def test_weights_that_are_made_anew_for_each_call_are_refused(model, inputs):
    """Nobody could tell whether they are those of the last call."""
    expected = model(**inputs)
    accelerate.cpu_offload(model, "cpu", preload_module_classes=["Small"])
    with pytest.raises(CaptureError, match="AlignDevicesHook on 'the model itself'"):
        plain(model)(**inputs)
    with pytest.warns(UserWarning, match="uncached"):
        assert_identical(plain(model, fallback=True)(**inputs), expected)
    assert {p.device.type for p in model.parameters()} == {"meta"}
