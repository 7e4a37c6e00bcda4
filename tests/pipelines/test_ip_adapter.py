"""Features of a picture, injected in every cross-attention (IP-adapter), on a UNet."""

import pytest
import torch
from helpers import ALWAYS, NEVER, adopt, assert_identical, hits
from zoo import make

import fxcache
from fxcache import FirstBlockCache

pytest.importorskip("diffusers")
IMAGE = 12


def weights(unet):
    """An adapter for `unet`, as its files hold it: a projection, and keys and values a layer."""
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(width * 4, IMAGE),
        "proj.bias": torch.randn(width * 4),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {}
    for number, name in enumerate(n for n in unet.attn_processors if "attn2" in n):
        to_k = unet.get_submodule(name.removesuffix(".processor")).to_k
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{key}.weight"] = torch.randn(to_k.out_features, width)
    return [{"image_proj": projection, "ip_adapter": layers}]


def solve(model, inputs, picture, steps=4):
    given = {**inputs, "added_cond_kwargs": {"image_embeds": [picture]}}
    samples = [inputs["sample"] + 0.1 * step for step in range(steps)]
    times = [torch.tensor(900 - 100 * step) for step in range(steps)]
    return [
        model(**{**given, "sample": x, "timestep": t}) for x, t in zip(samples, times, strict=True)
    ]


def test_features_of_a_picture():
    unet, inputs = make("sd15_unet")
    unet._load_ip_adapter_weights(weights(unet), low_cpu_mem_usage=False)
    picture = torch.randn(inputs["sample"].shape[0], 1, IMAGE)
    expected = solve(unet, inputs, picture)
    assert not torch.allclose(expected[0].sample, solve(unet, inputs, 0 * picture)[0].sample)
    denoiser = fxcache.transform(unet, NEVER, backend="eager")
    assert_identical(solve(denoiser, inputs, picture), expected)
    first = solve(adopt(denoiser, ALWAYS), inputs, picture)
    assert hits(denoiser) == [False, True, True, True]
    assert_identical(first[0], expected[0])
    # Another picture is another trajectory's matter: nothing of the first one is left.
    again = solve(denoiser, inputs, -picture)
    assert_identical(again[0], solve(unet, inputs, -picture)[0])

    # Amid a trajectory, a policy that looks notices it.
    adopt(denoiser, FirstBlockCache(threshold=float("inf"), control_threshold=0.1))
    solve(denoiser, inputs, picture, steps=3)
    moved = {**inputs, "sample": inputs["sample"] + 0.3}
    for number, scale in enumerate((1.05, -1.0, -1.0)):
        given = {"added_cond_kwargs": {"image_embeds": [scale * picture]}}
        denoiser(**{**moved, **given, "timestep": torch.tensor(500 - 100 * number)})
    assert hits(denoiser) == [False, True, True, True, False, True]
    assert denoiser.report().records[4].reason == "control changed"
