"""Every denoiser that ComfyUI ships, as ComfyUI calls it (COMFYUI_PATH names its folder)."""

import copy
from itertools import pairwise

import models
import pytest
import torch
from models import MODELS, Call
from torch import nn

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, StepSchedule
from fxcache.policy import Policy

STEPS = 6
NEVER = AdaptiveCache(tolerance=0)
ALWAYS = [FirstBlockCache(threshold=float("inf")), StepSchedule(mask=[False] + [True] * 5)]

#: What a hit skips at least, of an evaluation's FLOPs; of a model without an entry, nine
#: tenths, or six of a UNet, whose outer blocks run on every hit.
SHARES = {
    "ace_step": 0.6,  # its patches are embedded by wide convolutions
    "cascade_c": 0.75,
    "chroma_radiance": 0.85,
}

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not models.find_comfyui(), reason="COMFYUI_PATH names no ComfyUI"),
    pytest.mark.filterwarnings("ignore"),  # ComfyUI's own, and advice on thresholds of inf
]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """The name of a model, the model, and the calls of a sampling run."""
    patcher, call = models.build(request.param)
    with models.recorded(patcher.model.diffusion_model) as calls:
        models.sample(patcher, call, STEPS)
    return request.param, patcher.model.diffusion_model, calls


def evaluate(model: nn.Module, call: Call) -> torch.Tensor:
    """What `model` gives for a recorded call, with tensors of its own, as ComfyUI makes them."""
    args, kwargs = copy.deepcopy(call)
    torch.manual_seed(0)  # the lyric encoder of ACE-Step drops at random
    return model(*args, **kwargs)


def run(model: nn.Module, policy: Policy, calls: list[Call]):
    """The outputs of a trajectory of these calls, and the report."""
    denoiser = fxcache.transform(model, policy, backend="eager")
    try:
        with denoiser.trajectory(num_steps=len(calls)):
            outputs = [evaluate(denoiser, call) for call in calls]
        return outputs, denoiser.report()
    finally:
        fxcache.restore(denoiser)


def test_all_are_here():
    import comfy.supported_models

    names = {config.__name__ for config in comfy.supported_models.models}
    assert {entry.config for entry in MODELS.values()} == names


def test_finds_the_stack(case):
    name, model, calls = case
    args, kwargs = copy.deepcopy(calls[0])  # UNets write into their options
    found = fxcache.explain(model, *args, **kwargs)
    blocks = [block for block in found.span_blocks if block.startswith(MODELS[name].stack)]
    assert found.sample == ("x",) or found.refused  # a part of a graph has names of its own
    assert list(found.span_blocks) == blocks != []
    assert found.skipped_share >= SHARES.get(name, 0.6 if found.is_u_shape else 0.9)
    assert found.audit < 1.05


def test_a_miss_is_the_model(case):
    _, model, calls = case
    outputs, report = run(model, NEVER, calls)
    for output, call in zip(outputs, calls, strict=True):
        assert torch.equal(output, evaluate(model, call))
    assert (report.hits, report.recompiles) == (0, 0)


@pytest.mark.parametrize("policy", ALWAYS, ids=["measured", "scheduled"])
def test_a_hit_follows_the_sample(case, policy):
    _, model, calls = case
    outputs, report = run(model, policy, calls)
    assert (report.hits, report.recompiles) == (STEPS - 1, 0)
    for before, after in pairwise(outputs):
        assert not torch.equal(before, after)
    wanted = evaluate(model, calls[1])
    assert (outputs[1] - wanted).norm() < (outputs[0] - wanted).norm()
