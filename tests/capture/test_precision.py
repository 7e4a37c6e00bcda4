"""Low precision: bfloat16 and float16, autocast, quantized weights, and changes between steps."""

import copy
from contextlib import nullcontext

import pytest
import torch
from comparing import assert_close, assert_identical, tensors
from helpers import graphed, hits, plain, seeded
from opened import Small
from policies import ALWAYS, NEVER
from torch import nn
from torch.utils._pytree import tree_map
from zoo import BreaksBefore, SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import StepSchedule

MODELS = {
    "uvit": (torch.float16, {}),
    "wan_t2v": (torch.bfloat16, {"num_layers": 2}),  # some is in float32 all the same
}


def cast(tree, dtype):
    """`tree` with its floating tensors in `dtype`."""
    return tree_map(
        lambda leaf: leaf.to(dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf,
        tree,
    )


def steps(denoiser, inputs, count=3):
    """The outputs of a trajectory on the usual inputs."""
    return [denoiser(inputs["x"] * (1 + 0.05 * i), inputs["t"] - 0.1 * i) for i in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_models_in_half_precision(name):
    dtype, config = MODELS[name]
    model, inputs = make(name, **config)
    model.to(dtype)
    inputs = cast(inputs, dtype)
    denoiser = plain(model)
    for step in range(3):
        given = cast(at_step(name, inputs, step), dtype)
        outputs, expected = tensors(denoiser(**given)), tensors(model(**given))
        if step == 0:
            assert_identical(outputs, expected)
        assert [out.dtype for out in outputs] == [out.dtype for out in expected]
        assert all(out.isfinite().all() for out in outputs)
    assert hits(denoiser) == [False, True, True]


def test_half_precision_under_inductor(model, inputs):
    """As near to the truth as plain torch.compile: both round, at other places."""
    exact = copy.deepcopy(model).double()(**cast(inputs, torch.float64))
    model, given = model.to(torch.bfloat16), cast(inputs, torch.bfloat16)
    denoiser = fxcache.transform(model, ALWAYS)
    outputs = [denoiser(given["x"], given["t"] - 0.1 * step) for step in range(2)]
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2
    assert hits(denoiser) == [False, True]
    usual = (torch.compile(model)(**given) - exact).norm()
    assert (outputs[0] - exact).norm() < 1.5 * usual < 0.05 * exact.norm()


def test_the_metric_is_accumulated_in_float32(model):
    """Sums of absolute values go far beyond what float16 holds (65504)."""
    model.blocks[0].proj.weight *= 100
    model.blocks[0].proj.bias += 100
    inputs = {"x": torch.randn(2, 512, 4), "t": torch.ones(2)}
    denoiser, metrics = plain(model), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        denoiser.reset()
        outputs = steps(denoiser, cast(inputs, dtype))
        assert all(out.isfinite().all() for out in outputs)
        assert hits(denoiser) == [False, True, True]
        # What is kept is of that dtype, too: a residual and a probe.
        assert denoiser.report().cached_bytes == 2 * (2 * 512 * 16) * dtype.itemsize
        metrics.append([record.metric for record in denoiser.report().records[1:]])
    assert metrics[1:] == [pytest.approx(metrics[0], rel=0.05)] * 2


def test_autocast_of_a_float32_model(model, inputs):
    denoiser, dtype = plain(model), torch.float16
    with torch.autocast("cpu", dtype=dtype):
        expected = model(**inputs)
        outputs = steps(denoiser, inputs)
    assert_identical(outputs[0], expected)
    assert {out.dtype for out in outputs} == {dtype}
    steps(denoiser, inputs)  # without: another trajectory, of other residuals
    assert hits(denoiser) == [False, True, True] * 2
    assert_identical(steps(denoiser, inputs)[0], model(**inputs))


class Casting(Small):
    """Takes inputs of any dtype, as diffusers' models do."""

    def forward(self, x, t):
        dtype, device = self.embed.weight.dtype, self.embed.weight.device
        return super().forward(x.to(device, dtype), t.to(device, dtype))


def test_another_dtype_amid_a_trajectory_and_back(inputs):
    """Nothing of before is reused, though the inputs are the same and time goes on."""
    model = seeded(Casting)
    expected = model(**inputs)
    denoiser = plain(model)
    x, t = inputs["x"], inputs["t"]
    for dtype, announced in ((torch.bfloat16, True), (torch.float16, False)):
        with denoiser.trajectory(4) if announced else nullcontext():
            assert_close(denoiser(x, t), expected, 0.02)  # later its weights were rounded
            denoiser(x, t - 0.1)
            denoiser.to(dtype)
            assert_identical(denoiser(x, t - 0.2), model(x, t - 0.2))
            assert denoiser(x, t - 0.3).dtype == dtype
        assert hits(denoiser)[-4:] == [False, True, False, True]
        denoiser.float()
    assert_close(steps(denoiser, inputs)[0], expected, 0.02)
    assert hits(denoiser)[-3:] == [False, True, True]


def test_another_device(inputs):
    """ "meta" stands in for it: nothing may be read back from there, so a schedule decides."""
    model = seeded(Casting)
    denoiser = plain(model, StepSchedule(mask=[False, True, True]))
    devices = []
    for device in ("cpu", "meta"):
        model.to(device)
        with denoiser.trajectory(3):
            devices += [out.device.type for out in steps(denoiser, inputs)]
    assert devices == ["cpu"] * 3 + ["meta"] * 3
    assert hits(denoiser) == [False, True, True] * 2


@pytest.fixture
def quantize():
    """Quantizes the larger layers of a model to int8, in place."""
    quantization = pytest.importorskip("torchao.quantization")
    kinds = {
        "weights": quantization.Int8WeightOnlyConfig,
        "dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
    }

    def quantize(model, kind="weights", sizes=(16, 32, 64)):
        def is_large(module, name):
            return isinstance(module, nn.Linear) and module.in_features in sizes

        quantization.quantize_(model, kinds[kind](), filter_fn=is_large)
        return model

    return quantize


def test_a_dynamically_quantized_model(model, denoiser, quantize, inputs):
    """Quantized after transform. Its products are counted by their shapes, as if it were not."""
    full = fxcache.explain(model, **inputs)
    quantize(model, "dynamic")
    found = fxcache.explain(model, **inputs)
    assert found.span_blocks == full.span_blocks
    assert (found.flops, found.skipped_flops) == (full.flops, full.skipped_flops)
    outputs = steps(denoiser, inputs)
    assert_identical(outputs[0], model(**inputs))
    assert all(out.isfinite().all() for out in outputs)
    assert hits(denoiser) == [False, True, True]
    assert (denoiser.report().graphs, denoiser.report().recompiles) == (1, 0)


def test_a_quantized_model_that_is_captured_in_pieces(quantize, inputs):
    model = quantize(seeded(lambda: BreaksBefore(2)))
    denoiser = plain(model, fullgraph=False)
    assert_identical(steps(denoiser, inputs)[0], model(**inputs))
    assert hits(denoiser) == [False, True, True]


def test_quantizing_between_trajectories_and_amid_one(model, quantize, inputs):
    """By the denoiser or by the model."""
    denoiser, x, t = plain(model), inputs["x"], inputs["t"]
    steps(denoiser, inputs)
    assert quantize(denoiser, sizes=[32]) is denoiser
    assert_identical(denoiser(x, t), model(x, t))
    denoiser(x, t - 0.1)
    quantize(model, sizes=[16])
    assert_identical(denoiser(x, t - 0.5), model(x, t - 0.5))
    denoiser(x, t - 0.6)
    assert hits(denoiser)[3:] == [False, True, False, True]
    assert (denoiser.report().graphs, denoiser.report().recompiles) == (3, 2)


@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_quantized_blocks_are_compiled_once(quantize, inputs, monkeypatch):
    counted = []

    def count(gm, example_inputs):
        counted.append(gm)
        return gm.forward

    model = seeded(lambda: SequentialDiT(depth=5))
    quantize(model.blocks[1:3])
    denoiser = fxcache.transform(model, ALWAYS, backend=count)
    assert_identical(denoiser(**inputs), model(**inputs))
    assert len(counted) == 5  # head, hit, a block of either kind, the miss's tail


@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_quantized_weights_under_inductor(quantize, inputs):
    model = quantize(seeded(Small))
    denoiser = fxcache.transform(model, ALWAYS)
    first, second = steps(denoiser, inputs, 2)
    assert_close(first, model(**inputs))
    assert second.isfinite().all()
    assert hits(denoiser) == [False, True]


def test_replaced_quantized_weights_are_captured_anew(device, quantize, inputs):
    """A graph replays where weights lay: a wrapper has no memory, the tensors inside it have."""
    model = quantize(seeded(Small))
    denoiser = graphed(model, NEVER)
    for _ in range(3):
        steps(denoiser, inputs, 2)
    assert device.counts()[0] == 2
    other = quantize(Small().eval())
    model.load_state_dict(other.state_dict(), assign=True)
    for _ in range(3):
        assert_identical(denoiser(**inputs), other(**inputs))
    assert device.counts()[0] == 2


def test_diffusers_own_quantization(tmp_path):
    """Saved whole, loaded quantized."""
    quantization = pytest.importorskip("torchao.quantization")
    diffusers = pytest.importorskip("diffusers")
    model, inputs = make("flux", num_layers=1)
    model.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = type(model).from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.float32
    )
    weight = model.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__module__.startswith("torchao")
    denoiser = plain(model.eval())
    assert_identical(denoiser(**inputs), model(**inputs))
    denoiser(**at_step("flux", inputs, 1))
    assert hits(denoiser) == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float8_weights_on_a_gpu():
    quantization = pytest.importorskip("torchao.quantization")
    model = seeded(lambda: SequentialDiT(width=64)).to("cuda", torch.bfloat16)

    def is_large(module, name):
        return isinstance(module, nn.Linear) and module.in_features >= 16

    quantization.quantize_(model, quantization.Float8WeightOnlyConfig(), filter_fn=is_large)
    given = cast(token_inputs(), torch.bfloat16)
    given = {name: value.cuda() for name, value in given.items()}
    denoiser = plain(model)
    assert_identical(steps(denoiser, given)[0], model(**given))
    assert hits(denoiser) == [False, True, True]
    compiled = fxcache.transform(model, ALWAYS, mode="reduce-overhead")
    for step in range(4):
        assert compiled(given["x"], given["t"] - 0.1 * step).isfinite().all()
