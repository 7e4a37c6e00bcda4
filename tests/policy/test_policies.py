"""EasyCache and TeaCache against their definitions in float64; the rules without a model."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, hits, plain, sample, tensors, times
from policy_cases import (
    EASY,
    FIRST,
    MEASURING,
    POLY,
    STEPS,
    TEA,
    Narrow,
    case,
    moving,
    name_of,
)
from zoo import SequentialDiT, StructuredDiT, UViT

from fxcache import EasyCache, MagCache, PolicyError, SeaCache, StackNotFoundError, TeaCache
from fxcache.policy.simulate import simulate

# --- references in float64 ---


def distance(a, b):
    return (a.double() - b.double()).abs().mean().item()


def easy_reference(model, at, threshold, warmup=0, final=0):
    """Hits, metrics and outputs of EasyCache."""
    made, measured, outputs, computed = [], [], [], []
    total, previous = 0.0, None
    for step in range(STEPS):
        given = at(step)
        x = next(iter(v for k, v in given.items() if k in ("x", "hidden_states")))
        metric = None
        if len(computed) >= 2:
            (x_b, o_b), (x_c, o_c) = computed[-2:]
            k = distance(o_c, o_b) / distance(x_c, x_b)
            metric = k * distance(x, previous) / o_c.double().abs().mean().item()
        free = metric is not None and warmup <= step < STEPS - final
        is_hit = free and total + metric < threshold
        if is_hit:
            total += metric
            x_c, o_c = computed[-1]
            out = x.double() + (o_c.double() - x_c.double()) if x.shape == o_c.shape else o_c
        else:
            total, out = 0.0, tensors(model(**given))[0]
            computed.append((x, out))
        previous = x
        made.append(is_hit), measured.append(metric), outputs.append(out)
    return made, measured, outputs


def tea_reference(model, at, blocks, layer, threshold, warmup=1, final=0):
    """Hits, metrics and outputs of TeaCache: the plain model, the last block's result replaced."""
    first, last, _, image = blocks
    state = {"is_hit": False, "total": 0.0, "previous": None, "step": 0}
    made, measured, outputs = [], [], []

    def stream(value):
        if isinstance(value, dict):
            return torch.cat([value["register"], value["image"]], dim=1)
        return value

    def measure(signal):
        metric, previous = None, state["previous"]
        if previous is not None:
            metric = distance(signal, previous) / previous.double().abs().mean().item()
        score = math.inf if metric is None else abs(sum(c * metric ** (4 - i)
                                                        for i, c in enumerate(POLY)))  # fmt: skip
        free = metric is not None and warmup <= state["step"] < STEPS - final
        state["is_hit"] = free and state["total"] + score < threshold
        state["total"] = state["total"] + score if state["is_hit"] else 0.0
        state["previous"] = signal.clone()
        made.append(state["is_hit"]), measured.append(metric)

    def enter(_, args, kwargs):
        value = args[0] if args else kwargs["hidden_states"]
        state["u"] = value["image"] if isinstance(value, dict) else value

    def leave(_, args, result):
        out = result if image is None else (getattr(result, image) if isinstance(image, str)
                                            else result[image])  # fmt: skip
        if not state["is_hit"]:
            state["r"] = out.double() - state["u"].double()
            return result
        new = (state["u"].double() + state["r"]).float()
        if image is None:
            return new
        if isinstance(image, str):
            return replace(result, **{image: new})
        return tuple(new if i == image else value for i, value in enumerate(result))

    hooks = [first.register_forward_pre_hook(enter, with_kwargs=True),
             last.register_forward_hook(leave)]  # fmt: skip
    if layer is blocks[2]:  # it reads the signal, the others give it
        hooks.append(layer.register_forward_pre_hook(lambda _, args: measure(args[0])))
    else:
        hooks.append(layer.register_forward_hook(lambda _, args, out: measure(out)))
    for step in range(STEPS):
        state["step"] = step
        outputs.append(tensors(model(**at(step)))[0])
    for hook in hooks:
        hook.remove()
    return made, measured, outputs


def compare(denoiser, policy, at, expected, tolerance=2e-5):
    """Solve with `policy` in the place of the denoiser's (of the same probe and span)."""
    made, measured, outputs = expected
    denoiser.reset()
    denoiser._fxcache.session.policy = policy
    with denoiser.trajectory(num_steps=STEPS):
        for step, out in enumerate(outputs):
            assert_close(tensors(denoiser(**at(step)))[0], out, tolerance)
    assert hits(denoiser) == made
    for record, metric in zip(denoiser.report().records, measured, strict=True):
        if metric is not None:
            assert record.metric == pytest.approx(metric, rel=1e-4)


CASES = [SequentialDiT, UViT, StructuredDiT, "flux", "wan_t2v", "sd3"]
IDS = [name if isinstance(name, str) else name.__name__ for name in CASES]


@pytest.mark.parametrize("name", CASES, ids=IDS)
def test_easy_cache(name):
    model, at, _ = case(name)
    denoiser, patterns = plain(model, EASY), set()
    scale = [m for m in easy_reference(model, at, 0.0)[1] if m is not None]
    for times_, warmup, final in ((1.5, 0, 0), (2.7, 3, 1), (6.1, 0, 2)):
        threshold = times_ * sorted(scale)[len(scale) // 2]
        expected = easy_reference(model, at, threshold, warmup, final)
        policy = replace(EASY, threshold=threshold, warmup_steps=warmup, final_steps=final)
        compare(denoiser, policy, at, expected)
        assert 0 < sum(expected[0]) < STEPS - 2
        patterns.add(tuple(expected[0]))
    assert len(patterns) == 3


@pytest.mark.parametrize("cls", [Narrow])
def test_easy_cache_needs_an_output_like_its_input(cls):
    model, at, _ = case(cls)
    denoiser = plain(model, EASY)
    with pytest.raises(StackNotFoundError, match="they must have one shape"):
        denoiser(**at(0))


#: Not a U shape, whose last unit runs on every hit.
STACKS = [name for name in CASES if name is not UViT]


@pytest.mark.parametrize("name", STACKS, ids=[i for i in IDS if i != "UViT"])
def test_tea_cache(name):
    model, at, blocks = case(name)
    denoiser, patterns = plain(model, TEA), set()
    metrics = tea_reference(model, at, blocks, blocks[2], 0.0)[1][1:]
    scores = sorted(TEA.score(m) for m in metrics)
    for times_, warmup, final in ((1.5, 1, 0), (2.7, 3, 1), (6.1, 1, 2)):
        threshold = times_ * scores[len(scores) // 2]
        expected = tea_reference(model, at, blocks, blocks[2], threshold, warmup, final)
        policy = replace(TEA, threshold=threshold, warmup_steps=warmup, final_steps=final)
        compare(denoiser, policy, at, expected)
        assert 0 < sum(expected[0]) < STEPS - 1
        patterns.add(tuple(expected[0]))
    assert len(patterns) == 3


@pytest.mark.parametrize(
    ("name", "signal", "path"),
    [("flux", "time_embedding", "time_text_embed.timestep_embedder.linear_2"),
     ("wan_t2v", "time_embedding", "condition_embedder.time_embedder.linear_2"),
     ("wan_t2v", "time_projection", "condition_embedder.time_proj")],
)  # fmt: skip
def test_tea_cache_of_the_time(name, signal, path):
    model, at, blocks = case(name)
    layer = model.get_submodule(path)
    threshold = 2.7 * TEA.score(tea_reference(model, at, blocks, layer, 0.0)[1][STEPS // 2])
    expected = tea_reference(model, at, blocks, layer, threshold)
    assert 0 < sum(expected[0]) < STEPS - 1
    policy = replace(TEA, signal=signal, threshold=threshold)
    compare(plain(model, policy), policy, at, expected)


# --- the rules, without a model ---


def made(policy, metrics, **options):
    return [decision.is_hit for decision in simulate(policy, metrics, **options)]


def reasons(policy, metrics, **options):
    return [decision.reason for decision in simulate(policy, metrics, **options)]


def test_easy_cache_sums_since_the_last_computed_step():
    metrics = [9.0, 9.0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.4, 0.1]
    pattern = [False, False, True, True, False, True, False, False, True]
    assert made(EASY, metrics) == pattern
    assert reasons(EASY, metrics)[:2] == ["nothing cached", "no rate yet"]
    policy = replace(EASY, warmup_steps=3, final_steps=1)
    assert reasons(policy, metrics, num_steps=9) == [
        "nothing cached", "warm-up", "warm-up", None, None, "above threshold", None,
        "above threshold", "final step"]  # fmt: skip


def test_tea_cache_sums_the_polynomial():
    policy = TeaCache(coefficients=[0, 0, 0, -2.0, 0.05], threshold=0.55, final_steps=0)
    assert policy.score(0.1) == pytest.approx(0.15)
    assert TEA.score(0.3) == pytest.approx(40 * 0.0081 - 7 * 0.027 + 3 * 0.09 + 0.45 + 0.01)
    metrics = [9.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1]
    pattern = [False, True, True, True, False, True, True, True, True]
    assert made(policy, metrics) == pattern
    assert simulate(policy, metrics)[5].score == pytest.approx(0.05)


def test_sea_cache_sums_and_counts():
    policy = SeaCache(threshold=1.0, final_steps=2)
    pattern = [False, True, True, False, True, False, True, True, False, False]
    metrics = [9.0, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.2, 0.0, 0.0]
    assert made(policy, metrics, num_steps=10) == pattern
    assert reasons(policy, metrics, num_steps=10)[3] == "max_consecutive_hits"


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_limits_of_every_policy_that_measures(policy):
    broken = [0.0, 0.0, math.nan, 0.0, math.inf, 0.0, 0.0, 0.0]
    assert not any(made(policy, broken)[i] for i in (0, 2, 4))
    assert reasons(replace(policy, threshold=math.inf), broken)[2::2][:2] == ["not finite"] * 2
    assert not any(made(replace(policy, threshold=0.0), [0.0] * 8))
    window = replace(policy, threshold=9.0, start=0.25, end=0.75, max_consecutive_hits=None)
    assert [i for i, hit in enumerate(made(window, [0.01] * 8, num_steps=8)) if hit] == [2, 3, 4, 5]
    # In float32: a sum that rounds to the threshold is not below it.
    metric = 0.10000000149011612
    tie = replace(policy, threshold=0.1)
    if not isinstance(policy, TeaCache):
        assert not made(tie, [0.0, 0.0, metric])[2]


@pytest.mark.parametrize("policy", [EasyCache(warmup_steps=1), SeaCache(),
                                    TeaCache(coefficients=POLY), replace(FIRST, end=0.9)],
                         ids=name_of)  # fmt: skip
def test_the_number_of_steps_is_asked_for(model, policy):
    """And nothing is broken afterwards."""
    policy = replace(policy, threshold=9.0)
    denoiser, fresh = plain(model, policy), plain(model, policy)
    with pytest.raises(PolicyError, match=r"trajectory\(num_steps=") as error:
        denoiser(sample(), times(1))
    assert type(policy).__name__ in str(error.value)
    assert f"final_steps={policy.final_steps}" in str(error.value)
    for each in (denoiser, fresh):
        with each.trajectory(num_steps=6):
            for i in range(6):
                each(moving(sample(), i), times(1 - i / 6))
    assert hits(denoiser)[-6:] == hits(fresh)
    assert any(hits(fresh))


BAD = [
    (EasyCache, "threshold", -0.1), (EasyCache, "threshold", math.nan),
    (EasyCache, "threshold", "0.1"), (EasyCache, "threshold", None),
    (EasyCache, "warmup_steps", -1), (EasyCache, "warmup_steps", 1.0),
    (EasyCache, "final_steps", -1), (EasyCache, "final_steps", True),
    (EasyCache, "decide", "last"), (EasyCache, "decide", None), (EasyCache, "decide", ["first"]),
    (EasyCache, "start", -0.1), (EasyCache, "end", 1.5),
    (EasyCache, "origin", "flux"), (EasyCache, "forecast", None),
    (TeaCache, "coefficients", [1.0] * 4), (TeaCache, "coefficients", [1.0] * 6),
    (TeaCache, "coefficients", [0, 0, math.nan, 0, 0]),
    (TeaCache, "coefficients", [0, 0, math.inf, 0, 0]), (TeaCache, "coefficients", "12345"),
    (TeaCache, "coefficients", None), (TeaCache, "coefficients", [0, 0, "x", 0, 0]),
    (TeaCache, "coefficients", torch.ones(5, 2)), (TeaCache, "coefficients", [10**400, 0, 0, 0, 0]),
    (TeaCache, "signal", "time"), (TeaCache, "signal", ["time_embedding"]),
    (TeaCache, "threshold", -1), (TeaCache, "max_consecutive_hits", -1),
    (SeaCache, "power", 0), (SeaCache, "power", math.inf), (SeaCache, "power", math.nan),
    (SeaCache, "power", -1.0), (SeaCache, "threshold", -1), (SeaCache, "warmup_steps", -1),
    (MagCache, "threshold", -0.1), (MagCache, "threshold", math.nan),
    (MagCache, "retention_ratio", -0.1), (MagCache, "retention_ratio", 1.1),
    (MagCache, "retention_ratio", math.nan), (MagCache, "max_consecutive_hits", -1),
    (MagCache, "max_consecutive_hits", None), (MagCache, "decide", "cond"),
    (MagCache, "ratios", []), (MagCache, "ratios", [1.0]), (MagCache, "ratios", None),
    (MagCache, "ratios", [1.0, -1.0]), (MagCache, "ratios", [1.0, math.nan]),
    (MagCache, "ratios", [1.0, math.inf]), (MagCache, "ratios", {}), (MagCache, "ratios", "123"),
    (MagCache, "ratios", {"cond": [1.0, 1.0], "uncond": [1.0] * 3}),
    (MagCache, "ratios", torch.ones(2, 2)), (MagCache, "ratios", [1, 10**400]),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "name", "value"), BAD)
def test_bad_values_are_named(policy, name, value):
    needed = {TeaCache: {"coefficients": POLY}, MagCache: {"ratios": [1.0, 1.0]}}.get(policy, {})
    policy(**needed)
    with pytest.raises(PolicyError, match=f"^{name}") as error:
        policy(**{**needed, name: value})
    assert any(word in str(error.value) for word in ("must be", "must hold", "must have"))
    if not isinstance(value, list | tuple | dict | torch.Tensor):
        assert repr(value) in str(error.value)
