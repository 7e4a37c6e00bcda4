"""EasyCache and TeaCache against their definitions in float64; the rules without a model."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import adopt, assert_close, hits, plain, sample, seeded, tensors, times
from opened import Small
from policy_cases import EASY, FIRST, POLY, STEPS, TEA, Narrow, case, moving, name_of
from zoo import SequentialDiT, StructuredDiT

from fxcache import EasyCache, PolicyError, SeaCache, StackNotFoundError, TeaCache

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
    adopt(denoiser, policy)
    with denoiser.trajectory(num_steps=STEPS):
        for step, out in enumerate(outputs):
            assert_close(tensors(denoiser(**at(step)))[0], out, tolerance)
    assert hits(denoiser) == made
    for record, metric in zip(denoiser.report().records, measured, strict=True):
        if metric is not None:
            assert record.metric == pytest.approx(metric, rel=1e-4)


def test_easy_cache():
    model, at, _ = case(SequentialDiT)
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


def test_easy_cache_needs_an_output_like_its_input():
    model, at, _ = case(Narrow)
    denoiser = plain(model, EASY)
    with pytest.raises(StackNotFoundError, match="they must have one shape"):
        denoiser(**at(0))


@pytest.mark.parametrize("name", [SequentialDiT, StructuredDiT], ids=name_of)
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


@pytest.mark.parametrize("policy", [EasyCache(warmup_steps=1), SeaCache(),
                                    TeaCache(coefficients=POLY), replace(FIRST, end=0.9)],
                         ids=name_of)  # fmt: skip
def test_the_number_of_steps_is_asked_for(policy):
    """And nothing is broken afterwards."""
    policy = replace(policy, threshold=9.0)
    denoiser, made = plain(seeded(Small), policy), []
    with pytest.raises(PolicyError, match=r"trajectory\(num_steps=") as error:
        denoiser(sample(), times(1))
    assert type(policy).__name__ in str(error.value)
    assert f"final_steps={policy.final_steps}" in str(error.value)
    for _ in range(2):
        with denoiser.trajectory(num_steps=6):
            for i in range(6):
                denoiser(moving(sample(), i), times(1 - i / 6))
        made.append(hits(denoiser)[-6:])
        denoiser.reset()
    assert made[0] == made[1]
    assert any(made[0])
