"""Exported programs: the same numbers and decisions as the denoiser, with the decision inside."""

import dataclasses
import functools
import math

import pytest
import torch
import zoo
from helpers import assert_identical, hits, plain
from opened import Small
from scripts import compiled_fast

import fxcache
from fxcache import AdaptiveCache, EasyCache, FirstBlockCache, MagCache, StepSchedule, Taylor

# torch's own, of what it copies.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

STEPS = 8
FIRST_BLOCK = FirstBlockCache(threshold=0.15)
ALWAYS = FirstBlockCache(threshold=math.inf)
ADAPTIVE = AdaptiveCache(tolerance=0.6, max_consecutive_hits=1)  # a second hit corrects the first
POLICIES = {
    "first block": FIRST_BLOCK,
    "limits": FirstBlockCache(
        threshold=0.3, forecast=Taylor(order=2), max_consecutive_hits=2, start=0.2, end=0.9
    ),
    "adaptive": ADAPTIVE,
    "easy": EasyCache(threshold=0.3, warmup_steps=2),
    "schedule": StepSchedule(mask=(False, True, False, True, False, False, True, True)),
}
#: With the policy that each is tried with, and a config.
MODELS = {
    "flux": ("limits", {}),
    "wan_t2v": ("adaptive", {"num_layers": 2}),
    "sana": ("schedule", {"num_layers": 2}),
    "sd15_unet": ("adaptive", {}),
    "uvit": ("limits", {}),
    "structured_dit": ("easy", {}),
}
OWN = ("structured_dit", "uvit")
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
    denoiser = plain(model, policy, audit=False)
    with torch.no_grad(), denoiser.trajectory(num_steps=len(calls)):
        outputs = [denoiser(**inputs) for inputs in calls]
    return outputs, hits(denoiser)


def check(exported, model, policy, calls):
    """Bit for bit, hits and misses."""
    outputs, decisions = solve(exported, calls)
    wanted, wanted_decisions = expected(model, policy, calls)
    assert decisions == wanted_decisions
    assert any(decisions)
    assert_identical(outputs, wanted)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, inputs = Small().eval(), zoo.token_inputs()
    return model, [zoo.at_step("sequential_dit", inputs, step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def export(net):
    """`net` by policy and form, each exported once."""
    model, calls = net

    @functools.cache
    def export(policy, form="cond"):
        return fxcache.export(model, policy, kwargs=calls[0], form=form)

    return export


@pytest.fixture(scope="module")
def exported(export):
    return export(FIRST_BLOCK)


# --- the same as the denoiser ---


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_their_denoisers(name):
    policy, config = POLICIES[MODELS[name][0]], MODELS[name][1]
    model, inputs = zoo.make(name, **config)
    calls = [at(name, inputs, step) for step in range(STEPS)]
    check(fxcache.export(model, policy, kwargs=calls[0]), model, policy, calls)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_policies_are_as_in_the_denoiser(net, export, name, form):
    check(export(POLICIES[name], form), net[0], POLICIES[name], net[1])


def test_any_policy_decides_between_pieces(net, export):
    ratios = (1.0, 1.0, *[0.97] * 6)
    policy = MagCache(ratios=ratios, threshold=0.06, retention_ratio=0.2)
    check(export(policy, "pieces"), net[0], policy, net[1])


def test_other_sizes(net):
    """Batch and tokens other than those of the example, and a state for them."""
    model, calls = net
    dynamic = {"x": {0: DYNAMIC, 1: DYNAMIC}, "t": {0: DYNAMIC}}
    exported = fxcache.export(model, ADAPTIVE, kwargs=calls[0], dynamic_shapes=dynamic)
    others = [{"x": given["x"][:1, :5], "t": given["t"][:1]} for given in calls]
    for sizes in (others, calls):
        check(exported, model, ADAPTIVE, sizes)
    with pytest.raises(fxcache.OptionError, match="inputs must be those of the first step"):
        exported.initial_state()


# --- what is inside ---


def test_the_threshold_is_an_input(exported, net):
    _, calls = net
    assert not any(solve(exported, calls, threshold=0.0)[1])
    assert solve(exported, calls, threshold=math.inf)[1] == [False] + [True] * (STEPS - 1)


@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_the_side_that_is_not_taken_does_not_run(net, export, form):
    """A poisoned residual shows on a hit only, and a poisoned span on a miss only."""
    (model, calls), exported = net, export(FIRST_BLOCK, form)
    plain, state = exported.step(calls[0], exported.initial_state())
    poisoned = {**state, "entry_0_0": torch.full_like(state["entry_0_0"], math.nan)}
    assert exported.step(calls[1], poisoned, decision=True)[0].isnan().all()
    assert exported.step(calls[1], poisoned, decision=False)[0].isfinite().all()
    weight = model.blocks[1].up.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        assert exported.step(calls[1], state, decision=True)[0].isfinite().all()
        assert exported.step(calls[1], state, decision=False)[0].isnan().any()
    finally:
        weight.data.copy_(kept)
    assert_identical(exported.step(calls[0], exported.initial_state())[0], plain)


@pytest.mark.parametrize("form", ["cond", "pieces"])
def test_nan_is_a_miss_and_forgets(net, export, form):
    model, calls = net
    broken = [dict(given) for given in calls]
    broken[3]["x"] = torch.full_like(calls[3]["x"], math.nan)
    _, hits = solve(export(FIRST_BLOCK, form), broken, threshold=math.inf)
    assert hits == expected(model, ALWAYS, broken)[1]
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


def hosted(path, state, calls):
    """`solve` with torch's own loader."""
    step, outputs, hits = torch._inductor.aoti_load_package(str(path)), [], []
    del state["key"]
    for inputs in calls:
        output, changed = step(inputs, state)
        slot = int(changed["slot"])
        state["numbers"] = changed["numbers"]
        if slot >= 0:
            state[f"entry_0_{slot}"] = changed["fresh_0"]
            state["fxcache_reference"] = changed["fxcache_reference"]
        outputs.append(output)
        hits.append(slot < 0)
    return outputs, hits


def close(got, expected):
    assert got[1] == expected[1]
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_package_is_as_what_was_packaged(exported, net, tmp_path):
    """That it runs alone, in a process without this library, `test_export_and_run` shows."""
    _, calls = net
    with compiled_fast():
        path = exported.package(tmp_path / "model.pt2")
    close(hosted(path, exported.initial_state(), calls), solve(exported, calls))
    loaded = fxcache.load_exported(path)
    close(solve(loaded, calls), solve(exported, calls))
    with pytest.raises(fxcache.OptionError, match="compiled already"):
        loaded.package(tmp_path / "again.pt2")


@pytest.mark.slow
def test_packaged_pieces(export, net, tmp_path):
    exported = export(ADAPTIVE, "pieces")
    with compiled_fast():
        path = exported.package(tmp_path / "pieces.pt2")
    for other in (None, dataclasses.replace(ADAPTIVE, control_threshold=0.5)):
        with pytest.raises(fxcache.OptionError, match="policy must be the AdaptiveCache"):
            fxcache.load_exported(path, other)
    close(solve(fxcache.load_exported(path, ADAPTIVE), net[1]), solve(exported, net[1]))


# --- bad input ---


def test_what_does_not_fit(exported, export, net):
    model, calls = net
    hermite = FirstBlockCache(forecast=fxcache.Hermite(order=2))
    for policy, said in (
        (MagCache(ratios=[1.0, 1.0]), "MagCache has no rule in tensor arithmetic"),
        (hermite, "has no weights in tensor arithmetic"),
        (FirstBlockCache(control_threshold=0.1), "control_threshold"),
    ):
        with pytest.raises(fxcache.PolicyError, match=said):
            fxcache.export(model, policy, kwargs=calls[0])
    for options, said in (
        ({"dynamic_shapes": {"y": {0: DYNAMIC}}}, "dynamic_shapes has y"),
        ({"form": "both"}, 'form must be "cond" or "pieces"'),
        ({"model": fxcache.transform(Small().eval())}, "denoiser already"),
    ):
        with pytest.raises(fxcache.OptionError, match=said):
            fxcache.export(**{"model": model, "policy": FIRST_BLOCK, "kwargs": calls[0], **options})
    with pytest.raises(fxcache.OptionError, match="threshold must be in"):
        exported.initial_state(threshold=math.nan)
    with pytest.raises(fxcache.OptionError, match="inputs must be x, t"):
        exported.step({"x": calls[0]["x"]}, exported.initial_state())
    easy = export(POLICIES["easy"])
    with pytest.raises(fxcache.OptionError, match="num_steps must be"):
        easy.initial_state()
    with pytest.raises(fxcache.OptionError, match="not one of this program"):
        exported.step(calls[0], easy.initial_state(num_steps=8))
    with pytest.raises(fxcache.OptionError, match="head, hit, miss"):
        _ = export(FIRST_BLOCK, "pieces").program


def test_states_of_a_deeper_model_and_dropout_are_refused(exported, net):
    _, calls = net
    deeper = fxcache.export(Small(depth=3).eval(), FIRST_BLOCK, kwargs=calls[0])
    assert deeper.layout.shapes == exported.layout.shapes
    with pytest.raises(fxcache.OptionError, match="not one of this program"):
        exported.step(calls[0], deeper.initial_state())

    class Dropping(Small):
        def forward(self, x, t):
            return super().forward(torch.nn.functional.dropout(x, 0.1, self.training), t)

    with pytest.raises(fxcache.CaptureError, match=r"dropout of Dropping is on: call model.eval"):
        fxcache.export(Dropping().train(), FIRST_BLOCK, kwargs=calls[0])


def test_a_model_that_writes_is_refused():
    class Counting(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t):
            self.calls.add_(1)
            return super().forward(x, t)

    with pytest.raises(fxcache.CaptureError, match="writes into calls"):
        fxcache.export(Counting().eval(), kwargs=zoo.token_inputs())
