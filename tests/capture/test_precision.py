"""Low precision: bfloat16 and float16, autocast, quantized weights, and changes between steps."""

import copy

import pytest
import torch
from helpers import (
    ALWAYS,
    NEVER,
    assert_close,
    assert_identical,
    graphed,
    hits,
    plain,
    seeded,
    tensors,
)
from torch import nn
from torch.utils._pytree import tree_map
from zoo import SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import StepSchedule

MODELS = {
    "sequential_dit": torch.bfloat16,
    "flux": torch.float16,
    "sd3": torch.bfloat16,
    "wan_t2v": torch.bfloat16,
    "sdxl_unet": torch.float16,
}


def cast(tree, dtype):
    """`tree` with its floating tensors in `dtype`."""
    return tree_map(
        lambda leaf: leaf.to(dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf,
        tree,
    )


def steps(denoiser, inputs, count=3):
    """The outputs of a trajectory on inputs of `SequentialDiT`."""
    return [denoiser(inputs["x"] * (1 + 0.05 * i), inputs["t"] - 0.1 * i) for i in range(count)]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return token_inputs()


# --- models in half precision ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), MODELS.items())
def test_models_in_half_precision(name, dtype):
    model, inputs = make(name)
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
    (buffers,) = {
        s.allocated.rings[0][0].dtype for s in denoiser._fxcache.session.slot.branches.values()
    }
    assert buffers == dtype


def test_half_precision_under_inductor(inputs):
    """As near to the truth as plain torch.compile: both round, at other places."""
    model = seeded(lambda: SequentialDiT(depth=2))
    exact = copy.deepcopy(model).double()(**cast(inputs, torch.float64))
    model, given = model.to(torch.bfloat16), cast(inputs, torch.bfloat16)
    denoiser = fxcache.transform(model, ALWAYS)
    outputs = [denoiser(given["x"], given["t"] - 0.1 * step) for step in range(2)]
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2
    assert hits(denoiser) == [False, True]
    usual = (torch.compile(model)(**given) - exact).norm()
    assert (outputs[0] - exact).norm() < 1.5 * usual < 0.05 * exact.norm()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 100.0), (torch.bfloat16, 1.0)])
def test_the_metric_is_accumulated_in_float32(dtype, scale):
    """Sums of absolute values go far beyond what float16 holds (65504)."""
    torch.manual_seed(0)
    model = SequentialDiT().eval()
    with torch.no_grad():
        model.blocks[0].mlp[2].weight *= scale
        model.blocks[0].mlp[2].bias += scale
    inputs = {"x": torch.randn(2, 512, 4), "t": torch.ones(2)}
    metrics = []
    for kind in (torch.float32, dtype):
        denoiser = plain(model.to(kind))
        outputs = steps(denoiser, cast(inputs, kind))
        assert all(out.isfinite().all() for out in outputs)
        metrics.append([record.metric for record in denoiser.report().records[1:]])
    assert metrics[1] == pytest.approx(metrics[0], rel=0.05)
    assert hits(denoiser) == [False, True, True]


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


# --- a model that changes -------------------------------------------------------------------------


class Casting(SequentialDiT):
    """Takes inputs of any dtype, as diffusers' models do."""

    def forward(self, x, t):
        dtype, device = self.embed.weight.dtype, self.embed.weight.device
        return super().forward(x.to(device, dtype), t.to(device, dtype))


CHANGES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize(
    ("change", "announced"), [("bfloat16", True), ("bfloat16", False), ("half", False)]
)
def test_another_dtype_amid_a_trajectory(inputs, change, announced):
    """Nothing of before is reused, though the inputs are the same and time goes on."""
    model = seeded(Casting)
    denoiser = plain(model)

    def run():
        denoiser(inputs["x"], inputs["t"])
        denoiser(inputs["x"], inputs["t"] - 0.1)
        CHANGES[change](denoiser)
        later = inputs["t"] - 0.2
        assert_identical(denoiser(inputs["x"], later), model(inputs["x"], later))
        denoiser(inputs["x"], inputs["t"] - 0.3)

    if announced:
        with denoiser.trajectory(4):
            run()
    else:
        run()
    assert hits(denoiser) == [False, True, False, True]


def test_another_dtype_and_back(inputs):
    model = seeded(Casting)
    expected = model(**inputs)
    denoiser = plain(model)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        outputs = steps(denoiser, inputs)
        assert_close(outputs[0].float(), expected)
        assert outputs[1].dtype == dtype
    assert hits(denoiser) == [False, True, True] * 3


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


# --- quantized weights ----------------------------------------------------------------------------


@pytest.fixture
def quantize():
    """Quantizes the larger layers of a model to int8, in place."""
    quantization = pytest.importorskip("torchao.quantization")
    kinds = {
        "weights": quantization.Int8WeightOnlyConfig,
        "dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
    }

    def quantize(model, kind="weights", at_least=16):
        def is_large(module, name):
            return isinstance(module, nn.Linear) and module.in_features >= at_least

        quantization.quantize_(model, kinds[kind](), filter_fn=is_large)
        return model

    return quantize


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sequential_dit", "weights"), ("sequential_dit", "dynamic"), ("flux", "dynamic")],
)
def test_quantized_models(quantize, name, kind):
    model, inputs = make(name)
    quantize(model, kind)
    denoiser = plain(model)
    assert_identical(denoiser(**inputs), model(**inputs))
    for step in (1, 2):
        outputs = tensors(denoiser(**at_step(name, inputs, step)))
        assert all(out.isfinite().all() for out in outputs)
    assert hits(denoiser) == [False, True, True]


def test_products_of_quantized_weights_are_counted(quantize, model, inputs):
    """By their shapes, whatever the weights are stored as."""
    full = fxcache.explain(model, **inputs)
    found = fxcache.explain(quantize(model, "dynamic"), **inputs)
    assert found.span_blocks == full.span_blocks
    assert (found.flops, found.skipped_flops) == (full.flops, full.skipped_flops)


def test_a_quantized_model_that_is_captured_in_pieces(quantize):
    from zoo import BreaksBefore

    model, given = quantize(seeded(BreaksBefore)), token_inputs()
    denoiser = plain(model, fullgraph=False)
    assert_identical(steps(denoiser, given)[0], model(**given))
    assert hits(denoiser) == [False, True, True]


@pytest.mark.parametrize("when", ["before the first", "between two", "amid one"])
def test_quantizing_after_transform(quantize, model, inputs, when):
    denoiser = plain(model)
    if when != "before the first":
        steps(denoiser, inputs)
    assert quantize(denoiser if when == "between two" else model) in (model, denoiser)
    t = inputs["t"] - (0.5 if when == "amid one" else 0)
    assert_identical(denoiser(inputs["x"], t), model(inputs["x"], t))
    denoiser(inputs["x"], t - 0.1)
    assert hits(denoiser)[-2:] == [False, True]
    report = denoiser.report()
    assert (report.graphs, report.recompiles) == ((1, 0) if when == "before the first" else (2, 1))


@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_quantized_blocks_are_compiled_once(quantize, inputs, monkeypatch):
    counted = []

    def count(gm, example_inputs):
        counted.append(gm)
        return gm.forward

    model = quantize(seeded(SequentialDiT))
    denoiser = fxcache.transform(model, ALWAYS, backend=count)
    assert_identical(denoiser(**inputs), model(**inputs))
    deeper = quantize(seeded(lambda: SequentialDiT(depth=8)))
    before = len(counted)
    fxcache.transform(deeper, ALWAYS, backend=count)(**inputs)
    assert len(counted) == 2 * before  # depth adds nothing


@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_quantized_weights_under_inductor(quantize, inputs):
    model = quantize(seeded(lambda: SequentialDiT(depth=2)))
    denoiser = fxcache.transform(model, ALWAYS)
    first, second = steps(denoiser, inputs, 2)
    assert_close(first, model(**inputs))
    assert second.isfinite().all()
    assert hits(denoiser) == [False, True]


def test_replaced_quantized_weights_are_captured_anew(device, quantize, inputs):
    """A graph replays where weights lay: a wrapper has no memory, the tensors inside it have."""
    model = quantize(seeded(SequentialDiT))
    denoiser = graphed(model, NEVER)
    for _ in range(3):
        steps(denoiser, inputs, 2)
    assert device.counts()[0] == 2
    other = quantize(SequentialDiT().eval())
    model.load_state_dict(other.state_dict(), assign=True)
    for _ in range(3):
        assert_identical(denoiser(**inputs), other(**inputs))
    assert device.counts()[0] == 2


def test_diffusers_own_quantization(tmp_path):
    """Saved whole, loaded quantized."""
    quantization = pytest.importorskip("torchao.quantization")
    diffusers = pytest.importorskip("diffusers")
    model, inputs = make("flux")
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
