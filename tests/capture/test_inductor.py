"""The compiled path: same numbers, two regions a step, no recompiles."""

import math

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, hits
from zoo import SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import FirstBlockCache, Taylor
from fxcache.capture.compile import compile_pieces
from fxcache.runtime.regions import Compiled

pytestmark = pytest.mark.slow


#: Small ones: compiling is what takes time.
MODELS = {
    "sequential_dit": {},
    "flux": {},
    "sd15_unet": {
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [8],
    },
    "wan_vace": {"vace_layers": [0], "num_layers": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_inductor_computes_what_eager_does(name):
    model, inputs = make(name, **MODELS[name])
    policy = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=Taylor(order=1))
    compiled = fxcache.transform(model, policy)
    eager = fxcache.transform(model, policy, backend="eager")
    for step in range(4):
        given = at_step(name, inputs, step)
        assert_close(compiled(**given), eager(**given), tolerance=1e-4)
    assert hits(compiled) == hits(eager) == [False, False, True, True]
    report = compiled.report()
    assert (report.graphs, report.recompiles) == (1, 0)


def test_a_miss_is_what_torch_compile_computes():
    model, inputs = make("flux")
    plain = torch.compile(model, fullgraph=True)
    assert_close(fxcache.transform(model, NEVER)(**inputs), plain(**inputs), tolerance=1e-5)


def test_a_warm_start_finds_every_piece_on_disk():
    counters = torch._dynamo.utils.counters["aot_autograd"]
    for start in ("cold", "warm"):
        counters.clear()
        model, inputs = make("sequential_dit")
        taylor = FirstBlockCache(threshold=math.inf, forecast=Taylor(order=1))
        fxcache.transform(model, taylor)(**inputs)
        assert counters["autograd_cache_bypass"] == 0, start
        torch._dynamo.reset()
    assert counters["autograd_cache_hit"] > 0
    assert counters["autograd_cache_miss"] == 0


def test_two_regions_a_step(monkeypatch):
    """head, then hit or miss: nothing else is called in a step."""
    torch.manual_seed(0)
    called = []

    def spy(*args):
        compiled = compile_pieces(*args)
        regions = {}
        for name in ("head", "hit", "miss"):
            region = getattr(compiled, name)
            regions[name] = lambda *a, n=name, r=region: (called.append(n), r(*a))[1]
        return Compiled(**regions)

    monkeypatch.setattr(fxcache.capture.backend, "compile_pieces", spy)
    denoiser = fxcache.transform(SequentialDiT().eval(), ALWAYS, audit=False)
    for _ in range(3):
        denoiser(**token_inputs())
    assert called == ["head", "miss", "head", "hit", "head", "hit"]


def test_dynamic_shapes_share_one_compilation():
    torch.manual_seed(0)
    model = SequentialDiT().eval()
    denoiser = fxcache.transform(model, ALWAYS, dynamic=True)
    for batch, tokens in ((2, 8), (3, 8), (2, 12), (4, 6)):
        given = token_inputs(batch, tokens)
        assert_close(denoiser(**given), model(**given))
        assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True] * 4
    assert (denoiser.report().graphs, denoiser.report().recompiles) == (1, 0)


def test_guards_may_be_filtered():
    model = SequentialDiT().eval()
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"guard_filter_fn": skip}
    denoiser = fxcache.transform(model, NEVER, backend="eager", options=options)
    given = token_inputs()
    assert_close(denoiser(**given), model(**given))
    assert options == {"guard_filter_fn": skip}  # torch.compile empties what it is given


def test_sizes_that_depend_on_data():
    pytest.importorskip("diffusers")
    model, inputs = make("hunyuan_framepack", num_layers=1, num_single_layers=1)
    denoiser = fxcache.transform(model, ALWAYS)
    for _ in range(2):
        assert_close(denoiser(**inputs), model(**inputs), tolerance=1e-4)
    assert hits(denoiser) == [False, True]
