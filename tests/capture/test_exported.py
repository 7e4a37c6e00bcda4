"""Exported programs: the same numbers and decisions as the denoiser, with the decision inside."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import zoo
from helpers import assert_identical

import fxcache
from fxcache import AdaptiveCache, EasyCache, FirstBlockCache, MagCache, StepSchedule, Taylor

# torch's own, of what it copies.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

STEPS = 8
FIRST_BLOCK = FirstBlockCache(threshold=0.15)
ADAPTIVE = AdaptiveCache(tolerance=0.6)
POLICIES = {
    "first block": FIRST_BLOCK,
    "limits": FirstBlockCache(
        threshold=0.3, forecast=Taylor(order=2), max_consecutive_hits=2, start=0.2, end=0.9
    ),
    "adaptive": ADAPTIVE,
    "easy": EasyCache(threshold=0.3, warmup_steps=2),
    "schedule": StepSchedule(mask=(False, True, False, True, False, False, True, True)),
}
#: With the policy that each is tried with.
MODELS = {
    "flux": "adaptive",
    "sd3": "limits",
    "wan_t2v": "adaptive",
    "dit": "limits",
    "pixart": "limits",
    "sana": "schedule",
    "ltx_video": "adaptive",
    "chroma": "adaptive",
    "sd15_unet": "adaptive",
    "uvit": "limits",
    "structured_dit": "easy",
}
OWN = ("sequential_dit", "structured_dit", "uvit")
DYNAMIC = torch.export.Dim.DYNAMIC


def at(name, inputs, step):
    given = zoo.at_step(name, inputs, step)
    return given if name in OWN else {**given, "return_dict": False}


def solve(exported, calls, **options):
    """The outputs and decisions of a trajectory."""
    state, outputs, hits = exported.initial_state(calls[0], num_steps=len(calls), **options), [], []
    for inputs in calls:
        before = {name: value.clone() for name, value in state.items()}
        output, after = exported.step(inputs, state)
        for name, value in state.items():  # is the caller's
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
        hits.append(fxcache.is_hit(state, after))
        outputs.append(output)
        state = after
    return outputs, hits


def expected(model, policy, calls):
    denoiser = fxcache.transform(model, policy, backend="eager", audit=False)
    with torch.no_grad(), denoiser.trajectory(num_steps=len(calls)):
        outputs = [denoiser(**inputs) for inputs in calls]
    return outputs, [record.is_hit for record in denoiser.report().records]


@pytest.fixture(scope="module")
def net():
    model, inputs = zoo.make("sequential_dit")
    return model, [zoo.at_step("sequential_dit", inputs, step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def exported(net):
    model, calls = net
    return fxcache.export(model, FIRST_BLOCK, kwargs=calls[0])


# --- the same as the denoiser ---


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_their_denoisers(name):
    """Bit for bit, hits and misses."""
    model, inputs = zoo.make(name)
    calls, policy = [at(name, inputs, step) for step in range(STEPS)], POLICIES[MODELS[name]]
    outputs, hits = solve(fxcache.export(model, policy, kwargs=calls[0]), calls)
    wanted, decisions = expected(model, policy, calls)
    assert hits == decisions
    assert any(hits)
    assert_identical(outputs, wanted)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_policies_are_as_in_the_denoiser(net, name, form):
    model, calls = net
    outputs, hits = solve(fxcache.export(model, POLICIES[name], kwargs=calls[0], form=form), calls)
    wanted, decisions = expected(model, POLICIES[name], calls)
    assert hits == decisions
    assert any(hits)
    assert_identical(outputs, wanted)


def test_any_policy_decides_between_pieces(net):
    model, calls = net
    ratios = [1.0, 1.0, *[0.97] * 6]
    policy = MagCache(ratios=ratios, threshold=0.06, retention_ratio=0.2)
    exported = fxcache.export(model, policy, kwargs=calls[0], form="pieces")
    outputs, hits = solve(exported, calls)
    wanted, decisions = expected(model, policy, calls)
    assert hits == decisions
    assert any(hits)
    assert_identical(outputs, wanted)


def test_other_sizes(net):
    """Batch and tokens other than those of the example, and a state for them."""
    model, calls = net
    dynamic = {"x": {0: DYNAMIC, 1: DYNAMIC}, "t": {0: DYNAMIC}}
    exported = fxcache.export(model, ADAPTIVE, kwargs=calls[0], dynamic_shapes=dynamic)
    others = [{"x": given["x"][:1, :5], "t": given["t"][:1]} for given in calls]
    for sizes in (others, calls):
        outputs, hits = solve(exported, sizes)
        wanted, decisions = expected(model, ADAPTIVE, sizes)
        assert hits == decisions
        assert_identical(outputs, wanted)
    with pytest.raises(fxcache.OptionError, match="inputs must be those of the first step"):
        exported.initial_state()


# --- what is inside ---


def test_the_threshold_is_an_input(exported, net):
    _, calls = net
    assert not any(solve(exported, calls, threshold=0.0)[1])
    assert solve(exported, calls, threshold=math.inf)[1] == [False] + [True] * (STEPS - 1)


@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_the_side_that_is_not_taken_does_not_run(net, form):
    """A poisoned residual shows on a hit only, and a poisoned span on a miss only."""
    model, calls = net
    exported = fxcache.export(model, FIRST_BLOCK, kwargs=calls[0], form=form)
    plain, state = exported.step(calls[0], exported.initial_state())
    poisoned = {**state, "entry_0_0": torch.full_like(state["entry_0_0"], math.nan)}
    assert exported.step(calls[1], poisoned, decision=True)[0].isnan().all()
    assert exported.step(calls[1], poisoned, decision=False)[0].isfinite().all()
    weight = model.blocks[2].mlp[0].weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        assert exported.step(calls[1], state, decision=True)[0].isfinite().all()
        assert exported.step(calls[1], state, decision=False)[0].isnan().any()
    finally:
        weight.data.copy_(kept)
    assert_identical(exported.step(calls[0], exported.initial_state())[0], plain)


@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_nan_is_a_miss_and_forgets(net, form):
    model, calls = net
    exported = fxcache.export(model, FIRST_BLOCK, kwargs=calls[0], form=form)
    broken = [dict(given) for given in calls]
    broken[3]["x"] = torch.full_like(calls[3]["x"], math.nan)
    _, hits = solve(exported, broken, threshold=math.inf)
    assert hits == expected(model, FirstBlockCache(threshold=math.inf), broken)[1]
    assert hits[3:5] == [False, False]


def test_branches_return_what_they_change(exported, net):
    """The state holds what must outlive a step, and a hit hands the entries on as they are."""
    _, calls = net
    state = exported.initial_state()
    assert set(state) == {"key", "numbers", "settings", "entry_0_0", "fxcache_reference"}
    _, state = exported.step(calls[0], state)
    _, after = exported.step(calls[0], state)
    assert fxcache.is_hit(state, after)
    assert all(after[name] is state[name] for name in ("entry_0_0", "fxcache_reference"))


@pytest.mark.slow
def test_a_package_runs_alone(exported, net, tmp_path):
    """In a process that has neither this library nor the model's code."""
    _, calls = net
    path = exported.package(tmp_path / "model.pt2")
    torch.save((calls, exported.initial_state()), tmp_path / "given.pt")
    script = """
        import sys, torch
        folder = sys.argv[1]
        calls, state = torch.load(f"{folder}/given.pt")
        step = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
        del state["key"]
        results = []
        for inputs in calls:
            output, changed = step(inputs, state)
            slot = int(changed["slot"])
            state["numbers"] = changed["numbers"]
            if slot >= 0:
                state[f"entry_0_{slot}"] = changed["fresh_0"]
                state["fxcache_reference"] = changed["fxcache_reference"]
            results.append((output, slot < 0))
        torch.save(results, f"{folder}/results.pt")
        assert not {"fxcache", "diffusers"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs, hits = solve(exported, calls)
    results = torch.load(tmp_path / "results.pt")
    assert [hit for _, hit in results] == hits
    torch.testing.assert_close([output for output, _ in results], outputs, atol=1e-5, rtol=1e-5)
    loaded = fxcache.load_exported(path)
    again, decisions = solve(loaded, calls)
    assert decisions == hits
    torch.testing.assert_close(again, outputs, atol=1e-5, rtol=1e-5)
    with pytest.raises(fxcache.OptionError, match="compiled already"):
        loaded.package(tmp_path / "again.pt2")


@pytest.mark.slow
def test_packaged_pieces(net, tmp_path):
    model, calls = net
    exported = fxcache.export(model, ADAPTIVE, kwargs=calls[0], form="pieces")
    path = exported.package(tmp_path / "pieces.pt2")
    with pytest.raises(fxcache.OptionError, match="policy must be the AdaptiveCache"):
        fxcache.load_exported(path)
    outputs, hits = solve(fxcache.load_exported(path, ADAPTIVE), calls)
    wanted, decisions = solve(exported, calls)
    assert hits == decisions
    torch.testing.assert_close(outputs, wanted, atol=1e-5, rtol=1e-5)


# --- bad input ---


def test_what_does_not_fit(exported, net):
    model, calls = net
    with pytest.raises(fxcache.PolicyError, match="MagCache has no rule in tensor arithmetic"):
        fxcache.export(model, MagCache(ratios=[1.0, 1.0]), kwargs=calls[0])
    hermite = FirstBlockCache(forecast=fxcache.Hermite(order=2))
    with pytest.raises(fxcache.PolicyError, match="has no weights in tensor arithmetic"):
        fxcache.export(model, hermite, kwargs=calls[0])
    with pytest.raises(fxcache.PolicyError, match="control_threshold"):
        fxcache.export(model, FirstBlockCache(control_threshold=0.1), kwargs=calls[0])
    with pytest.raises(fxcache.OptionError, match="dynamic_shapes has y"):
        fxcache.export(model, FIRST_BLOCK, kwargs=calls[0], dynamic_shapes={"y": {0: DYNAMIC}})
    with pytest.raises(fxcache.OptionError, match='form must be "cond" or "pieces"'):
        fxcache.export(model, FIRST_BLOCK, kwargs=calls[0], form="both")
    with pytest.raises(fxcache.OptionError, match="threshold must be in"):
        exported.initial_state(threshold=math.nan)
    with pytest.raises(fxcache.OptionError, match="inputs must be x, t"):
        exported.step({"x": calls[0]["x"]}, exported.initial_state())
    easy = fxcache.export(model, POLICIES["easy"], kwargs=calls[0])
    with pytest.raises(fxcache.OptionError, match="num_steps must be"):
        easy.initial_state()
    with pytest.raises(fxcache.OptionError, match="not one of this program"):
        exported.step(calls[0], easy.initial_state(num_steps=8))
    with pytest.raises(fxcache.OptionError, match="denoiser already"):
        fxcache.export(fxcache.transform(model), FIRST_BLOCK, kwargs=calls[0])
    pieces = fxcache.export(model, FIRST_BLOCK, kwargs=calls[0], form="pieces")
    with pytest.raises(fxcache.OptionError, match="head, hit, miss"):
        _ = pieces.program


def test_states_of_a_deeper_model_and_dropout_are_refused(exported, net):
    _, calls = net
    deeper = fxcache.export(zoo.SequentialDiT(depth=5).eval(), FIRST_BLOCK, kwargs=calls[0])
    assert deeper.layout.shapes == exported.layout.shapes
    with pytest.raises(fxcache.OptionError, match="not one of this program"):
        exported.step(calls[0], deeper.initial_state())

    class Dropping(zoo.SequentialDiT):
        def forward(self, x, t):
            return super().forward(torch.nn.functional.dropout(x, 0.1, self.training), t)

    with pytest.raises(fxcache.CaptureError, match=r"dropout of Dropping is on: call model.eval"):
        fxcache.export(Dropping().train(), FIRST_BLOCK, kwargs=calls[0])


def test_a_model_that_writes_is_refused():
    class Counting(zoo.SequentialDiT):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t):
            self.calls.add_(1)
            return super().forward(x, t)

    with pytest.raises(fxcache.CaptureError, match="writes into calls"):
        fxcache.export(Counting().eval(), kwargs=zoo.token_inputs())
