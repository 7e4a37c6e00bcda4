"""EasyCache and TeaCache against definitions in float64; others against diffusers' own caches.

Known differences from these, which no threshold here comes near: a score equal to the threshold
(diffusers hits, fxcache does not) and NaN. diffusers' SeaCache of residual_order 1 is
`Taylor(order=1)`. Its TaylorSeer forecasts the output of every attention and MLP, nothing forecasts
the residual of a list of blocks: there is no fair comparison.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparing import assert_close, tensors
from helpers import adopt, hits, plain, sample, seeded, times
from opened import Small
from policies import EASY, FIRST, POLY, TEA, name_of
from policy_cases import STEPS, case, moving
from torch import nn
from zoo import SequentialDiT, StructuredDiT

import fxcache
from fxcache import EasyCache, FirstBlockCache, MagCache, PolicyError, SeaCache, Taylor, TeaCache

peers = pytest.importorskip("diffusers", minversion="0.42").hooks


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


BOTH = ("cond", "uncond")


@pytest.fixture
def subject(request):
    """A model, and its inputs at a step of a branch."""
    model, at, _ = case(request.param)

    def given(step, branch="cond"):
        inputs = at(step)
        text = inputs["encoder_hidden_states"]
        return inputs if branch == "cond" else {**inputs, "encoder_hidden_states": text.flip(-1)}

    return model, given


class Peer:
    """A copy of a model under a cache of diffusers; `hits` by branch: its last block was idle."""

    def __init__(self, model: nn.Module, apply: Any, config: Any) -> None:
        self.model, self.is_busy = copy.deepcopy(model), False
        blocks = [m for name, m in self.model.named_children() if name.endswith("blocks")]
        layer = next(m for m in blocks[-1][-1].modules() if isinstance(m, nn.Linear))
        layer.register_forward_hook(lambda *_: setattr(self, "is_busy", True))
        apply(self.model, config)
        self.hits: dict[str, list[bool]] = {name: [] for name in BOTH}

    def __call__(self, name: str, given: dict[str, Any], **where: Any) -> torch.Tensor:
        self.is_busy = False
        with self.model.cache_context(name, **where):
            output = self.model(**given, return_dict=False)[0]
        self.hits[name].append(not self.is_busy)
        return output


def compare_with_peer(given: Any, denoiser: Any, policy: Any, peer: Peer, solves: int = 1) -> Any:
    """Solve with both, `policy` in the place of the denoiser's; the hits by branch."""
    for _ in range(solves):
        adopt(denoiser, policy)
        peer.hits = {name: [] for name in BOTH}
        peer.model._reset_stateful_cache()
        with denoiser.trajectory(num_steps=STEPS):
            for step in range(STEPS):
                where = {"step_index": step, "sigma": 1 - step / STEPS}
                for name in BOTH:
                    inputs = given(step, name)
                    expected = peer(name, inputs, **where, num_inference_steps=STEPS)
                    with denoiser.branch(name):
                        actual = denoiser(**inputs, return_dict=False)[0]
                    assert_close(actual, expected, 1e-5)
        records = denoiser.report().records
        own = {name: [r.is_hit for r in records if r.branch == name] for name in BOTH}
        assert own == peer.hits
    return own


def metrics(given: Any, denoiser: Any) -> torch.Tensor:
    """What the policy measures as long as it never hits, sorted."""
    adopt(denoiser, replace(denoiser.policy, threshold=0.0))
    with denoiser.trajectory(num_steps=STEPS):
        for step in range(STEPS):
            denoiser(**given(step))
    return torch.tensor([r.metric for r in denoiser.report().records if r.metric]).sort().values


def check_patterns(patterns: list[dict[str, list[bool]]]) -> None:
    """Each with hits and misses after the start, and not all the same."""
    for pattern in patterns:
        for made in pattern.values():
            assert 0 < sum(made) < STEPS - 1
    assert len({tuple(pattern["cond"]) for pattern in patterns}) == len(patterns)


@pytest.mark.parametrize("subject", ["flux"], indirect=True)
def test_first_block_cache(subject):
    model, given = subject
    found, denoiser = [], plain(model, FirstBlockCache())
    scale = metrics(given, denoiser)
    for rank in (3, 6):
        threshold = scale[rank : rank + 2].mean().item()  # between two of them
        peer = Peer(model, peers.apply_first_block_cache, peers.FirstBlockCacheConfig(threshold))
        policy = FirstBlockCache(threshold=threshold)
        found.append(compare_with_peer(given, denoiser, policy, peer, solves=1 + (rank == 6)))
    check_patterns(found)


RATIOS = [1.0, 1.3, 1.1, 0.9, 1.04, 0.97, 1.01, 1.02, 0.98, 1.005, 0.95, 1.1, 0.9, 0.85]
#: Ratios, threshold, K, retention.
MAG = [
    (RATIOS, 0.06, 3, 0.2),
    (RATIOS, 0.12, 2, 0.3),
    (RATIOS, 0.5, 9, 0.0),
    (RATIOS, 9.0, 4, 0.36),
    ([*RATIOS, *reversed(RATIOS[1:])], 0.1, 3, 0.25),
    (RATIOS[:9], 0.15, 3, 0.1),
    (RATIOS, 0.0, 3, 0.2),
    (RATIOS, 9.0, 0, 0.2),
]


@pytest.mark.parametrize("subject", ["flux"], indirect=True)
def test_mag_cache(subject):
    model, given = subject
    found, denoiser = [], plain(model, MagCache(ratios=RATIOS))
    for ratios, threshold, limit, retention in MAG:
        config = peers.MagCacheConfig(threshold, limit, retention, STEPS, ratios)
        policy = MagCache(ratios=ratios, threshold=threshold, max_consecutive_hits=limit,
                          retention_ratio=retention)  # fmt: skip
        own = compare_with_peer(given, denoiser, policy, Peer(model, peers.apply_mag_cache, config))
        found.append(own)
    check_patterns(found[:-2])
    assert not any(any(made) for own in found[-2:] for made in own.values())


def latents(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """(C, T, H, W) of each sample; packed tokens are filtered along the sequence."""
    x = kwargs["hidden_states"]
    return [sample if x.ndim == 5 else sample.T[:, None, None] for sample in x]


@pytest.mark.parametrize(("subject", "order"), [("flux", 1), ("wan_t2v", 0)], indirect=["subject"])
def test_sea_cache(subject, order):
    (model, given), found, power = subject, [], 3.0 if order else 1.5
    policy = SeaCache(power=power, forecast=Taylor(order=1) if order else fxcache.Reuse())
    denoiser = plain(model, policy)
    scale = metrics(given, denoiser)
    for factor, limit, start, final in ((1.5, 2, 1, 1), (2.7, 0, 1, 0), (4.1, 4, 3, 2)):
        threshold = factor * scale[len(scale) // 2].item()
        config = peers.SeaCacheConfig(threshold, order, start, final, limit, power, latents)
        own = replace(policy, threshold=threshold, warmup_steps=start, final_steps=final,
                      max_consecutive_hits=limit or None)  # fmt: skip
        peer = Peer(model, peers.apply_sea_cache, config)
        found.append(compare_with_peer(given, denoiser, own, peer, solves=1 + (limit == 2)))
    check_patterns(found)
