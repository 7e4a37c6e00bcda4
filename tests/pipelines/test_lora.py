"""Adapters on a pipeline that fxcache was applied to: the same as on the plain pipeline."""

import peft
import pytest
import torch
from comparing import assert_identical
from helpers import adopt
from pipelines import PIPELINES
from policies import ALTERNATE, NEVER

import fxcache

# PEFT says so of each second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a .peft_config.")
WAN = PIPELINES["wan_t2v"]  # the fastest to be captured
TARGETS = ["attn1.to_q", "proj"]


def make():
    return WAN.build()


def run(pipe, seed=0):
    return WAN.call(pipe, "a fox", steps=4, size=32, batch=1, seed=seed)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two LoRAs, of ranks 2 and 4, as files that pipelines load."""
    saved = {}
    for seed, (name, rank) in enumerate({"a": 2, "b": 4}.items()):
        torch.manual_seed(seed)
        pipe = make()
        config = peft.LoraConfig(
            r=rank, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False
        )
        pipe.transformer.add_adapter(config)
        layers = peft.utils.get_peft_model_state_dict(pipe.transformer)
        # As large as the weights themselves, so that no adapter can hide.
        layers = {key: torch.randn_like(value) * 0.3 for key, value in layers.items()}
        saved[name] = tmp_path_factory.mktemp(name)
        pipe.save_lora_weights(saved[name], transformer_lora_layers=layers)
    return saved


def load(pipe, adapters, name, **options):
    pipe.load_lora_weights(adapters[name], adapter_name=name, **options)


#: What users do with adapters, in order; each step gives another model than the one before.
LIFE = {
    "load": lambda pipe, files: load(pipe, files, "a"),
    "scale": lambda pipe, files: pipe.set_adapters(["a"], adapter_weights=[0.4]),
    "second": lambda pipe, files: load(pipe, files, "b"),
    "both": lambda pipe, files: pipe.set_adapters(["a", "b"], adapter_weights=[0.7, 0.5]),
    "disable": lambda pipe, files: pipe.disable_lora(),
    "enable": lambda pipe, files: pipe.enable_lora(),
    "delete": lambda pipe, files: pipe.delete_adapters("a"),
    "fuse": lambda pipe, files: pipe.fuse_lora(lora_scale=0.8),
    "unfuse": lambda pipe, files: pipe.unfuse_lora(),
    "unload": lambda pipe, files: pipe.unload_lora_weights(),
}


def test_the_life_of_adapters(adapters):
    """After each change: bit-identical to the plain pipeline with the same adapters where nothing
    is cached; where something is, the run equals one of which everything was forgotten before.
    """
    plain, pipe = make(), make()
    handle = fxcache.apply(pipe, ALTERNATE, backend="eager")
    denoiser, before = pipe.transformer, run(plain)
    for name, change in {"none": lambda *_: None, **LIFE}.items():
        change(plain, adapters)
        change(pipe, adapters)
        expected = run(plain)
        assert not torch.allclose(expected, before) or name in ("none", "unfuse"), name
        first = run(pipe)
        adopt(denoiser, NEVER)
        assert_identical(run(pipe), expected)
        adopt(denoiser, ALTERNATE)
        assert_identical(run(pipe), first)
        assert handle.report().hits == handle.report().misses > 0
        assert not torch.equal(first, expected)
        before = expected
    # One capture for each structure of the layers, none for what only holds other numbers.
    assert handle.report().recompiles <= len(LIFE)


def test_adapters_before_apply_and_after_removal(adapters):
    plain, pipe = make(), make()
    for one in (plain, pipe):
        load(one, adapters, "a")
    with fxcache.apply(pipe, NEVER, backend="eager"):
        assert_identical(run(pipe), run(plain))
        for one in (plain, pipe):
            load(one, adapters, "b")
        assert_identical(run(pipe), run(plain))
    assert_identical(run(pipe), run(plain))
    for one in (plain, pipe):
        one.unload_lora_weights()
    assert_identical(run(pipe), run(plain))
    assert not [name for name, _ in pipe.transformer.named_modules() if "lora" in name]


def test_hot_swap_never_recompiles(adapters):
    """The new adapter is written into the weights of the old one."""
    plain, pipe = make(), make()
    handle = fxcache.apply(pipe, NEVER, backend="eager")
    for one in (plain, pipe):
        one.enable_lora_hotswap(target_rank=4)
        one.load_lora_weights(adapters["a"], adapter_name="style")
    assert_identical(run(pipe), run(plain))
    graphs = handle.report().graphs
    first = run(pipe)
    for one in (plain, pipe):
        one.load_lora_weights(adapters["b"], adapter_name="style", hotswap=True)
    swapped = run(pipe)
    assert_identical(swapped, run(plain))
    assert not torch.allclose(swapped, first)
    assert handle.report().graphs == graphs
