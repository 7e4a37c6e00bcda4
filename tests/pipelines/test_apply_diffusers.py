"""What else is done with pipelines and their models goes on working when fxcache was applied."""

import copy
import json
import logging

import diffusers
import pytest
import torch
from comparing import assert_identical
from helpers import adopt, hits
from pipelines import PIPELINES
from policies import ALTERNATE, ALWAYS, NEVER
from zoo import make

import fxcache
from fxcache import FirstBlockCache

FLUX = PIPELINES["flux"]


def run(pipe, seed=0):
    return FLUX.call(pipe, "a fox", steps=4, size=32, batch=1, seed=seed)


@pytest.fixture
def pipe():
    return FLUX.build()


def test_components_config_and_attributes(pipe):
    config, model = pipe.config, pipe.transformer
    written = dict(config)
    handle = fxcache.apply(pipe, NEVER, backend="eager")
    assert pipe.components["transformer"] is pipe.transformer is handle.denoisers["transformer"]
    assert pipe.config is config
    assert dict(config) == written
    assert isinstance(pipe.transformer, type(model))
    assert type(pipe.transformer).__name__ == "FluxTransformer2DModel"
    made = type(pipe.transformer).from_config(pipe.transformer.config)  # a plain model
    copied = copy.deepcopy(made)
    assert copied.state_dict().keys() == made.state_dict().keys()
    assert copied.proj_out.weight is not made.proj_out.weight
    assert torch.equal(copied.proj_out.weight, made.proj_out.weight)
    handle.remove()
    assert pipe.components["transformer"] is model
    assert dict(pipe.config) == written


def test_save_pretrained(pipe, tmp_path):
    expected = run(pipe)
    with fxcache.apply(pipe, ALTERNATE, backend="eager"):
        pipe.save_pretrained(tmp_path)
        before = pipe.transformer.state_dict()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    after = loaded.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Weights that are mapped from a file lie at other alignments, where products round otherwise.
    torch.testing.assert_close(run(loaded), expected, atol=1e-5, rtol=1e-5)


def test_a_denoiser_that_was_put_in_a_pipeline_by_hand(pipe, caplog):
    """Without `apply`: a pipeline takes it and names its branches; timesteps tell trajectories."""
    expected = run(pipe)
    pipe.transformer = denoiser = fxcache.transform(pipe.transformer, NEVER, backend="eager")
    assert_identical(run(pipe), expected)
    assert denoiser.report().misses == 8
    assert {r.branch for r in denoiser.report().records} == {"cond", "uncond"}
    caplog.clear()
    adopt(denoiser, fxcache.FirstBlockCache(threshold=0.5))
    first = run(pipe)
    assert 0 < denoiser.report().hits < 6
    run(pipe, seed=1)
    assert_identical(run(pipe), first)
    assert len({r.trajectory for r in denoiser.report().records}) == 3
    assert not [r for r in caplog.records if r.name == "fxcache" and r.levelno >= logging.WARNING]


def test_to_another_dtype(pipe):
    """The pipeline and its denoiser move together, and nothing of before is reused."""
    plain = FLUX.build()
    for one in (pipe, plain):  # which all pipelines of the tests share
        for name in ("text_encoder", "text_encoder_2", "vae"):
            setattr(one, name, copy.deepcopy(getattr(one, name)))
    plain.to(torch.bfloat16)
    with fxcache.apply(pipe, NEVER, backend="eager"):
        run(pipe)
        pipe.to(torch.bfloat16)
        assert pipe.transformer.dtype == torch.bfloat16
        assert_identical(run(pipe), run(plain))


def test_from_pipe_shares_the_denoiser(pipe):
    family = PIPELINES["flux_img2img"]

    def redraw(pipe):
        return family.call(pipe, "a fox", steps=4, size=32, batch=1)

    plain = diffusers.FluxImg2ImgPipeline.from_pipe(FLUX.build())
    plain.set_progress_bar_config(disable=True)
    handle = fxcache.apply(pipe, NEVER, backend="eager")
    run(pipe)
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert_identical(redraw(other), redraw(plain))
    assert [r.step for r in handle.report().records[-4:]] == [2, 2, 3, 3]
    # With a scheduler of its own, which the denoiser does not see, it is as right.
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(plain.scheduler.config)
    assert_identical(redraw(other), redraw(plain))
    assert_identical(run(pipe), run(FLUX.build()))


def test_pipelines_of_one_class_and_copies_have_caches_of_their_own(pipe):
    """Hooks of diffusers make the model refer to the denoiser, in the copy as well."""
    other = FLUX.build()
    uncached = run(other)
    handle = fxcache.apply(pipe, ALTERNATE, backend="eager")
    expected, records = run(pipe), handle.report().records
    assert not torch.equal(expected, uncached)
    assert_identical(run(other), uncached)
    assert type(other.transformer) is diffusers.FluxTransformer2DModel
    assert vars(pipe.transformer)["_diffusers_hook"]._module_ref is pipe.transformer
    copied = copy.deepcopy(pipe)
    assert vars(copied.transformer)["_diffusers_hook"]._module_ref is copied.transformer
    assert_identical(run(copied), expected)
    assert copied.transformer.report().hits == handle.report().hits > 0
    assert handle.report().records == records
    model = copy.deepcopy(fxcache.restore(copied.transformer))
    assert type(model) is diffusers.FluxTransformer2DModel


def test_runs_that_are_stopped_leave_nothing(pipe):
    """By an exception in a callback, or as pipelines are interrupted: the next run is as good as a
    first one.
    """

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise RuntimeError("stopped")
        return kwargs

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    def stopped(callback):
        pipe("a hen", negative_prompt="dull", num_inference_steps=4,
             callback_on_step_end=callback, **FLUX.arguments(32, 1))  # fmt: skip

    with fxcache.apply(pipe, ALTERNATE, backend="eager") as handle:
        expected = run(pipe, seed=2)
        with pytest.raises(RuntimeError, match="stopped"):
            stopped(stop)
        assert_identical(run(pipe, seed=2), expected)
        before = len(handle.report().records)
        stopped(interrupt)
        assert {r.step for r in handle.report().records[before:]} == {0, 1}
        assert_identical(run(pipe, seed=2), expected)
        assert max(r.step for r in handle.report().records) == 3
        assert handle.report().graphs == 1


def test_compiling_around_it(pipe):
    """``torch.compile`` cuts at the denoiser, which goes on as it was."""
    handle, expected = fxcache.apply(pipe, NEVER, backend="eager"), []
    denoiser = pipe.transformer
    for policy in (NEVER, ALTERNATE):
        adopt(denoiser, policy)
        sampled = run(pipe)
        expected.append((policy, sampled, [r.is_hit for r in handle.report().records]))
    pipe.transformer = torch.compile(denoiser, backend="eager")
    for policy, sampled, decisions in expected:
        adopt(denoiser, policy)
        assert_identical(run(pipe), sampled)
        assert [r.is_hit for r in handle.report().records] == decisions
    assert handle.report().graphs == 1


def test_a_modular_pipeline(pipe):
    modular = pytest.importorskip("diffusers.modular_pipelines.flux")
    blocks = modular.FluxAutoBlocks().init_pipeline()
    blocks.update_components(
        **{name: pipe.components[name] for name in blocks.components if name in pipe.components}
    )
    blocks.set_progress_bar_config(disable=True)

    def sample():
        generator = torch.Generator().manual_seed(0)
        return blocks(prompt="a fox", num_inference_steps=4, height=32, width=32,
                      generator=generator, output="images", output_type="pt")  # fmt: skip

    expected = sample()
    with fxcache.apply(blocks, NEVER, backend="eager") as handle:
        assert_identical(sample(), expected)
        adopt(blocks.transformer, ALTERNATE)
        sample()
        assert [(r.step, r.is_hit) for r in handle.report().records] == [
            (0, False), (1, True), (2, False), (3, True)
        ]  # fmt: skip
    assert_identical(sample(), expected)


def weights(unet):
    """An adapter for `unet`, as its files hold it: a projection, and keys and values a layer."""
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(width * 4, 12),
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
    picture = torch.randn(inputs["sample"].shape[0], 1, 12)
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
