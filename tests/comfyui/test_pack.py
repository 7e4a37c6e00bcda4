"""The pack without ComfyUI: on stand-ins of what it touches (`stand_in`)."""

import importlib
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import stand_in
import torch
from helpers import seeded
from server import PATH, PYTHON
from torch import nn

import fxcache
from fxcache.cli import main
from fxcache.comfyui import policies
from fxcache.comfyui.install import MARK


class Net(nn.Module):
    """A stack of blocks with a text, called as ComfyUI calls its models."""

    def __init__(self):
        super().__init__()
        self.embed, self.text, self.out = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, timesteps, context=None, transformer_options={}):  # noqa: B006
        h = self.embed(x) + timesteps[:, None, None] + self.text(context).mean(1, keepdim=True)
        for block in self.blocks:
            h = h + torch.tanh(block(h)) / 4
        return self.out(h)


class Wrapped(Net):
    """As most of ComfyUI's models: the wrappers of nodes are called in the forward."""

    def forward(self, x, timesteps, context=None, transformer_options={}):  # noqa: B006
        kind, options = stand_in.WrappersMP.DIFFUSION_MODEL, transformer_options
        wrappers = stand_in.get_all_wrappers(kind, options)
        return stand_in.WrapperExecutor.new_class_executor(super().forward, self, wrappers).execute(
            x, timesteps, context, options
        )


@pytest.fixture
def pack(monkeypatch):
    """The pack's modules, on stand-ins."""
    stand_in.put(monkeypatch)
    names = ("sampling", "nodes", "tools", "extension")
    for name in names:
        monkeypatch.delitem(sys.modules, f"fxcache.comfyui.{name}", raising=False)
    yield stand_in.Record(
        **{name: importlib.import_module(f"fxcache.comfyui.{name}") for name in names}
    )
    for name in names:
        sys.modules.pop(f"fxcache.comfyui.{name}")


class Flux:
    """What ComfyUI says of a model of that class."""

    unet_config = {"guidance_embed": True}  # noqa: RUF012


@pytest.fixture(params=[Net, Wrapped], ids=lambda net: net.__name__)
def patcher(request):
    return stand_in.ModelPatcher(stand_in.BaseModel(seeded(request.param), Flux()))


SIGMAS = torch.linspace(1, 0, 13)


def solved(patcher, sigmas=SIGMAS, **given):
    noise = torch.Generator().manual_seed(0)
    x, *texts = (torch.randn(1, 8, 4, generator=noise) for _ in range(3))
    with torch.inference_mode():
        return stand_in.Guider(patcher, **given).sample(x, sigmas, texts)


@pytest.fixture
def put(pack):
    """Puts one of the pack's nodes on a model."""
    known = {kind.define_schema().node_id: kind for kind in pack.described["extension"].NODES}

    def behind(name, patcher, **given):
        inputs = [one for one in known[name].define_schema().inputs if "default" in one.described]
        usual = {one.name: one.described["default"] for one in inputs}
        return known[name].execute(patcher, **{**usual, **given}).args[0]

    behind.known, behind.last = known, pack.described["sampling"].last_denoiser
    return behind


@pytest.mark.parametrize("given", [{}, {"second": True}, {"batched": False}], ids=str)
def test_tolerance_0_is_the_model(put, patcher, given):
    plain = solved(patcher, **given)
    assert torch.equal(solved(put("FxCache", patcher, tolerance=0.0), **given), plain)
    assert torch.equal(solved(patcher, **given), plain)


@pytest.mark.parametrize("given", [{}, {"second": True}, {"batched": False}], ids=str)
def test_it_hits_and_what_is_reported_is_one_run(put, patcher, given):
    plain, cached = solved(patcher, **given), put("FxCache", patcher, tolerance=1.0)
    for _ in range(2):
        output = solved(cached, **given)
        report = put.last(patcher.model).report()
        assert report.hits >= 4
        assert report.hits + report.misses == {"second": 23, "batched": 24}.get(*given or [""], 12)
        assert report.recompiles == 0
        assert 0 < (output - plain).abs().mean() < 0.1 * plain.abs().mean()
    named = {"second": {"uncond+cond", "uncond+cond 2"}, "batched": {"cond", "uncond"}}
    branches = {record.branch for record in report.records}
    assert branches == named.get(*given or [""], {"uncond+cond"})
    assert isinstance(patcher.model.diffusion_model, Net)
    assert put.last(patcher.model).report().cached_bytes == 0


def test_nothing_is_compiled_again_for_another_threshold(put, patcher):
    for tolerance in (0.0, 0.1, 1.0):
        solved(put("FxCache", patcher, tolerance=tolerance))
    assert put.last(patcher.model).report().graphs == 1


def test_other_nodes_stay_around_it(put, patcher):
    seen = []

    def count(executor, *args, **kwargs):
        seen.append(type(executor.class_obj))
        return executor(*args, **kwargs)

    kinds = stand_in.WrappersMP
    for place in ("before", "after"):
        model = patcher.clone() if place == "before" else put("FxCache", patcher, tolerance=1.0)
        for kind in (kinds.APPLY_MODEL, kinds.DIFFUSION_MODEL):
            model.add_wrapper_with_key(kind, "other", count)
        model = put("FxCache", model, tolerance=1.0) if place == "before" else model
        seen.clear()
        solved(model)
        wraps = isinstance(patcher.model.diffusion_model, Wrapped)
        assert len(seen) == 12 * (1 + wraps)
        assert put.last(patcher.model).report().hits >= 4


def test_an_error_half_way_leaves_the_model_its_own(put, patcher):
    plain, cached = solved(patcher), put("FxCache", patcher, tolerance=1.0)

    def stop(executor, *args, **kwargs):
        if float(args[1][0]) < 0.5:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    stopped = cached.clone()
    stopped.add_wrapper_with_key(stand_in.WrappersMP.APPLY_MODEL, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        solved(stopped)
    assert type(patcher.model.diffusion_model) in (Net, Wrapped)
    assert put.last(patcher.model).report().cached_bytes == 0
    assert torch.equal(solved(put("FxCache", patcher, tolerance=0.0)), plain)


def test_the_window(put, patcher):
    solved(put("FxCache", patcher, tolerance=100.0, start_percent=0.5, end_percent=0.8))
    report = put.last(patcher.model).report()
    assert [record.step for record in report.records if record.is_hit] == [6, 7, 8, 9]
    solved(put("FxCacheMagCache", patcher, start_step=4, end_step=-4))
    report = put.last(patcher.model).report()
    assert {record.step for record in report.records if record.is_hit} == {4, 5, 6, 7, 8}


class Deep(Net):
    """Its graph breaks in each block."""

    def forward(self, x, timesteps, context=None, transformer_options={}):  # noqa: B006
        h = self.embed(x) + timesteps[:, None, None]
        for block in self.blocks:
            torch._dynamo.graph_break()
            h = h + torch.tanh(block(h))
        return self.out(h)


class Stackless(Net):
    """One block: nothing repeats."""

    def __init__(self):
        super().__init__()
        self.blocks = self.blocks[:1]


def test_what_cannot_be_captured_runs_as_it_is(put, caplog):
    patcher = stand_in.ModelPatcher(stand_in.BaseModel(seeded(Deep), Flux()))
    plain, cached = solved(patcher), put("FxCache", patcher, tolerance=1.0)
    for _ in range(2):
        assert torch.equal(solved(cached), plain)
    assert caplog.text.count("this model runs uncached") == 1
    assert put.last(patcher.model) is None


def test_a_model_without_a_stack_is_an_error(put):
    patcher = stand_in.ModelPatcher(stand_in.BaseModel(seeded(Stackless), Flux()))
    plain = solved(patcher)
    with pytest.raises(fxcache.StackNotFoundError, match="no block stack"):
        solved(put("FxCache", patcher))
    assert type(patcher.model.diffusion_model) is Stackless
    assert torch.equal(solved(patcher), plain)


def test_sigmas_that_rise_and_a_model_that_is_called_outside_of_a_run(put, patcher):
    plain = solved(patcher, SIGMAS.flip(0))
    cached = put("FxCache", patcher, tolerance=0.0)
    assert torch.equal(solved(cached, SIGMAS.flip(0)), plain)
    steps = [record.step for record in put.last(patcher.model).report().records]
    assert steps == list(range(12))


def test_compiled_pieces(put, patcher):
    plain = solved(patcher)
    compiled = put("FxCacheCompile", patcher, backend="aot_eager", options="")
    output = solved(put("FxCache", compiled, tolerance=0.0))
    torch.testing.assert_close(output, plain)
    assert put("FxCacheCompile", patcher, disable=True) is patcher
    for text in ("{", "[1]"):
        with pytest.raises(fxcache.OptionError, match="options must be"):
            put("FxCacheCompile", patcher, options=text)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("FxCacheFirstBlock", {"residual_diff_threshold": 1.0}),
        ("FxCacheEasyCache", {"reuse_threshold": 3.0}),
        ("FxCacheMagCache", {}),
        ("FxCacheSchedule", {"schedule": "every 2"}),
        ("FxCache", {"policy": "first block", "tolerance": 1.0, "forecast": "taylor 1"}),
    ],
)
def test_every_node_hits(put, patcher, name, given, caplog):
    solved(put(name, patcher, **given))
    assert put.last(patcher.model).report().hits >= 2


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("FxCache", {"start_percent": 0.6, "end_percent": 0.5}, "start must be below the end"),
        ("FxCache", {"policy": "guess"}, "policy must be one of adaptive"),
        ("FxCache", {"forecast": "hermite 1"}, "forecast must be one of auto"),
        ("FxCache", {"tolerance": float("nan")}, "tolerance"),
        ("FxCacheSchedule", {"schedule": "0 1 x"}, "schedule must be"),
        ("FxCacheSchedule", {"schedule": "gone.json"}, "gone.json"),
    ],
)
def test_bad_input(put, patcher, name, given, message):
    with pytest.raises((fxcache.FxCacheError, FileNotFoundError), match=message):
        put(name, patcher, **given)


def test_a_schedule_for_fewer_steps_says_so(put, patcher):
    with pytest.raises(fxcache.PolicyError, match="step 40, but the last of 12"):
        solved(put("FxCacheSchedule", patcher, schedule="0 1 40"))


def test_what_was_published_is_known_by_what_comfyui_detected():
    known = fxcache.presets()
    for class_name, _, names in policies._table():
        assert set(names) <= known.keys(), class_name
    assert policies.preset_names(Flux()) == ("flux-dev (comfyui)", "flux-dev")
    assert policies.policy_for("magcache", 0.1, model_config=Flux()).threshold == 0.1
    with pytest.raises(fxcache.PolicyError, match="published for object"):
        policies.policy_for("teacache", 0.1, model_config=object())


def test_every_node_has_a_place_and_a_text(put):
    assert len(put.known) == 11
    package = resources.files("fxcache.comfyui")
    texts = json.loads((package / "locales/en/nodeDefs.json").read_text("utf-8"))
    assert texts.keys() == put.known.keys()
    for name, kind in put.known.items():
        schema = kind.define_schema()
        assert name.startswith("FxCache")
        assert schema.category == "model_patches/fxcache"
        assert texts[name]["display_name"] == schema.display_name
        assert texts[name]["description"] == schema.description


def test_it_is_put_into_a_comfyui_and_taken_out(tmp_path, capsys):
    assert main(["comfyui", str(tmp_path)]) == 2
    assert "is no ComfyUI" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert main(["comfyui", str(tmp_path), "--remove"]) == 2
    for _ in range(2):  # again: an update
        assert main(["comfyui", str(tmp_path)]) == 0
    folder = tmp_path / "custom_nodes" / "fxcache"
    assert MARK in (folder / "__init__.py").read_text()
    assert len(list((folder / "example_workflows").glob("*.json"))) == 13
    assert (folder / "locales/en/nodeDefs.json").exists()
    assert main(["comfyui", str(tmp_path), "--remove"]) == 0
    assert not folder.exists()
    folder.mkdir()
    (folder / "__init__.py").write_text("# somebody else's\n")
    assert main(["comfyui", str(tmp_path), "--remove"]) == 2
    assert main(["comfyui", str(tmp_path)]) == 2
    assert (folder / "__init__.py").read_text() == "# somebody else's\n"


@pytest.mark.comfyui
@pytest.mark.skipif(PATH is None, reason="COMFYUI_PATH names no ComfyUI")
def test_contract():
    """A real ComfyUI has what the stand-ins stand in for, with the same arguments."""
    code = (
        "import json, sys, inspect; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[:1]\n"
        "from comfy.cli_args import args; args.cpu = True\n"
        "import importlib, stand_in\n"
        "for name, members in stand_in.MODULES.items():\n"
        "    real = importlib.import_module(name)\n"
        "    for member, own in members.items():\n"
        "        theirs = getattr(real, member)\n"
        "        if inspect.isfunction(own):\n"
        "            names = list(inspect.signature(own).parameters)\n"
        "            has = list(inspect.signature(theirs).parameters)\n"
        "            assert set(names) <= set(has), (name, member, has)\n"
        "print('the same')\n"
    )
    run = subprocess.run(
        [PYTHON, "-c", code, PATH], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert "the same" in run.stdout, run.stderr
