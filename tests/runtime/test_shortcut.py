"""guards="trajectory": which evaluations go past Dynamo, what is forgotten, what models may return.

That outputs and decisions are those of the complete way is in test_ways.py.
"""

import copy
import gc
import math
import pickle
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from comparing import assert_close, assert_identical
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from helpers import hits, plain, sample, seeded, short, solve, times
from opened import Small, opened
from policies import ALWAYS, MASK, NEVER, name_of
from torch import nn

import fxcache
from fxcache import FirstBlockCache, OptionError
from fxcache.runtime.regions import Wiring

TWO = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)


def quick(model, policy=ALWAYS):
    """A denoiser that takes the shortcut, and its calls that do not."""
    denoiser = opened(model, policy, guards="trajectory")
    return denoiser, denoiser.count_complete()


@pytest.mark.parametrize("policy", [TWO, NEVER, MASK], ids=name_of)
def test_one_evaluation_of_a_trajectory_goes_the_complete_way(model, policy, monkeypatch):
    """Of each branch of each request; where timesteps rise, two are lost until that is clear."""
    denoiser, calls = quick(model, policy)
    for _ in range(2):
        solve(denoiser, 6)
    with denoiser.trajectory(6):
        solve(denoiser, 6)
    assert calls == [0, 6, 12]
    for i in range(5):
        for slot, branch in (("r", "cond"), ("r", "uncond"), ("s", None)):
            with denoiser.slot(slot), denoiser.branch(branch):
                denoiser(sample(), times(1 - i / 5))
    assert len(calls) == 3 + 3
    monkeypatch.setattr("fxcache.runtime.shortcut._MAX_PATHS", 3)  # more requests than paths
    denoiser.reset()
    for i in range(3):
        for slot in range(5):
            with denoiser.slot(slot):
                x, t = sample(seed=slot), times(1 - i / 5)
                output, is_hit = denoiser(x, t), hits(denoiser)[-1]
                assert is_hit or torch.equal(output, model(x, t))
    assert len(denoiser.shortcut.paths) <= 3
    rising, calls = quick(model, policy)
    for _ in range(3):
        for t in (0.0, 0.1, 0.2, 0.3, 0.4):
            rising(sample(), times(t))
    assert len(calls) == 5


def test_weights_are_seen_in_what_goes_past_dynamo(model):
    """Written in place: at once; replaced: by the next trajectory, of one step and unannounced."""
    denoiser, calls = quick(model, NEVER)
    with denoiser.trajectory():
        for _ in range(4):
            model.blocks[1].up.weight.mul_(0.7)
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
            assert_identical(denoiser(sample(), times(1)), model(sample(), times(1)))
    assert len(calls) == 1
    model.out.weight = nn.Parameter(torch.randn_like(model.out.weight))
    for _ in range(2):
        assert_identical(denoiser(sample(), times(1)), model(sample(), times(1)))


def test_reset_forgets_what_was_learned(model):
    denoiser, calls = quick(model)
    solve(denoiser)
    calls.clear()
    denoiser(sample(), times(0.1))
    assert calls == []
    denoiser.reset()
    assert denoiser.shortcut.paths == {}
    denoiser(sample(), times(0.05))
    assert len(calls) == 1
    assert hits(denoiser) == [False]


def test_copies_learn_by_themselves(model):
    denoiser = short(model)
    expected = solve(denoiser)
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert_identical(solve(twin), expected)
    assert fxcache.restore(denoiser) is model


def test_an_exception_forgets_and_comes_back(model, monkeypatch):
    (a, _), begin, fails = quick(model, TWO), Wiring.begin, []

    def failing(*given):
        if fails:
            raise RuntimeError("out of memory, say")
        return begin(*given)

    monkeypatch.setattr(Wiring, "begin", failing)
    solve(a)
    with a.trajectory():
        solve(a, 3)
        fails.append(1)
        with pytest.raises(RuntimeError, match="out of memory"):
            a(sample(), times(0.1))
        fails.clear()
        assert_identical(a(sample(), times(0.1)), model(sample(), times(0.1)))
    assert hits(a)[-1] is False
    assert a.session.trusts_trajectory.get() is False


def test_bad_options_and_arguments_are_named(model):
    for guards in ("never", None, True, "Always"):
        with pytest.raises(OptionError, match="guards"):
            fxcache.transform(model, ALWAYS, backend="eager", guards=guards)
    with pytest.raises(TypeError, match="multiple values"):
        short(model)(sample(), times(1), t=times(1))


def test_the_backend_of_torch_compile_keeps_no_calls(model):
    options = {"policy": NEVER, "backend": "eager"}
    compiled = torch.compile(model, backend="fxcache", options=options)
    x = sample()
    ref = weakref.ref(x)
    assert_close(compiled(x, times(1)), model(x, times(1)))
    del x
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("policy", [ALWAYS, MASK], ids=name_of)
def test_nothing_of_the_callers_is_kept(model, policy):
    denoiser, kept = quick(model, policy)[0], []
    for request in (None, "a", "b"):
        with denoiser.slot(request), denoiser.trajectory():
            for i in range(4):
                x, t = sample(seed=i), times(1 - i / 4)
                out = denoiser(x, t)
                kept += map(weakref.ref, (x, t, out))
                del x, t, out
                assert [ref() for ref in kept] == [None] * len(kept)
            if request is not None:
                kept += map(weakref.ref, denoiser.buffers())
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_call_that_fails_behind_the_executor_leaves_no_tensor_of_the_caller(model):
    denoiser = quick(model, NEVER)[0]
    cached = denoiser.cached

    def failing(*args):
        cached(*args)
        raise RuntimeError("afterwards")

    denoiser.cached = failing
    given = sample()
    alive = weakref.ref(given)
    with pytest.raises(RuntimeError, match="afterwards"):
        denoiser(given, times(1))
    del given
    gc.collect()
    assert alive() is None


class Flexible(Small):
    """Takes all sorts of arguments."""

    def forward(self, x, t, extra=None, scale=1.0, skip=False, parts=()):
        x = x.to(self.embed.weight.dtype)
        h = super().forward(x, t.to(x.dtype))
        if extra is not None:
            h = h + extra
        for part in parts:
            h = h - part
        return h if skip else h * scale


E = sample(seed=9)
TURNED = E.transpose(0, 1).contiguous().transpose(0, 1)
CALLS = [
    {}, {"extra": E}, {"extra": E.double()}, {"extra": E[:1]}, {"extra": TURNED}, {"extra": 0.25},
    {"extra": torch.tensor(0.5)}, {"scale": 2.0}, {"scale": 2}, {"scale": True}, {"skip": True},
    {"skip": 1}, {"parts": (E,)}, {"parts": [E]}, {"parts": (E, E)}, {"parts": (E, -E)},
    {"parts": {}},
]  # fmt: skip


@torch._dynamo.config.patch(recompile_limit=64)
def test_other_arguments_go_the_complete_way():
    """Whatever the last call was, an unlike one is computed as the model does."""
    model = seeded(Flexible)
    denoiser = short(model, NEVER)
    with denoiser.trajectory():
        for call in CALLS:
            for options in (call, call, CALLS[0]):
                given = sample(seed=len(options)), times(0.5)
                assert_identical(denoiser(*given, **options), model(*given, **options))


LAYOUTS = {
    "strides": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(2, -1, -1),
    "shape": lambda x: x[:, :5],
    "type": lambda x: nn.Parameter(x, requires_grad=False),
}


def test_other_layouts_go_the_complete_way(model):
    """Compiled pieces take the layouts for granted."""
    denoiser, calls = quick(model, NEVER)
    for name, change in LAYOUTS.items():
        calls.clear()
        with denoiser.trajectory():
            for _ in range(2):
                denoiser(sample(), times(1))
            assert len(calls) == 1, name
            x = change(sample())
            assert_identical(denoiser(x, times(1)), model(x, times(1)))
        assert len(calls) == 2, name


def test_kinds_of_timesteps():
    """A float, an int, and a tensor of no dimensions."""

    class Timed(Small):
        def forward(self, x, timestep):
            return super().forward(x, torch.ones(x.shape[0]) * timestep)

    model = seeded(Timed)
    for kind, given in ((float, 0.5), (int, 500), (torch.tensor, 0.5)):
        a, b = short(model, TWO), plain(model, TWO)
        for share in (1.0, 0.8, 0.6, 0.4, 0.2) * 2:
            t = kind(given * share)
            assert_identical(a(sample(), t), b(sample(), t))
        assert a.report().records == b.report().records


def test_the_same_tensor_as_two_arguments():
    class Two(Small):
        def forward(self, x, t, other):
            return super().forward(x + 2 * other, t)

    model = seeded(Two)
    for first in (True, False):
        denoiser = short(model, NEVER)
        with denoiser.trajectory():
            for same in (first, first, not first, not first, first):
                x = sample()
                other = x if same else sample(seed=3)
                assert_identical(denoiser(x, times(1), other), model(x, times(1), other))
        both = torch.randn(3, 8, 4)
        given = both[:2], times(1), both[1:]  # views of one storage
        assert_identical(denoiser(*given), model(*given))


def test_positional_and_keyword_arguments(model):
    a = short(model, NEVER)
    expected = model(sample(), times(1))
    with a.trajectory():
        for _ in range(2):
            assert_identical(a(sample(), times(1)), expected)
            assert_identical(a(sample(), t=times(1)), expected)
            assert_identical(a(x=sample(), t=times(1)), expected)
            assert_identical(a(t=times(1), x=sample()), expected)


Pair = namedtuple("Pair", ["out", "flag"])


@dataclass
class Unknown:
    """A dataclass that pytree does not know."""

    out: torch.Tensor


RETURNS = {
    "tuple": (lambda out, x, t: (out, out * 2, None), True),
    "dict": (lambda out, x, t: {"b": [out], "a": "text"}, True),
    "namedtuple": (lambda out, x, t: Pair(out, True), True),
    "diffusers": (lambda out, x, t: Transformer2DModelOutput(sample=out), True),
    "twice": (lambda out, x, t: (out, out), True),
    "view": (lambda out, x, t: (out, out[:1]), True),
    "input": (lambda out, x, t: (out, x), False),
    "number": (lambda out, x, t: (out, x.shape[0]), False),
    "computed number": (lambda out, x, t: (out, float(t.max())), False),
    "unknown": (lambda out, x, t: Unknown(out), False),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_models_return(name):
    wrap, is_learned = RETURNS[name]

    class Returns(Small):
        def forward(self, x, t):
            return wrap(super().forward(x, t), x, t)

    def parts(result):
        return torch.utils._pytree.tree_flatten(vars(result) if name == "unknown" else result)

    model = seeded(Returns)
    denoiser, calls = quick(model, NEVER)
    with denoiser.trajectory():
        for i in range(4):
            x, t = sample(seed=i), times(1 - i / 4)
            got, expected = denoiser(x, t), model(x, t)
            assert type(got) is type(expected)
            (leaves, spec), (others, expected_spec) = parts(got), parts(expected)
            assert spec == expected_spec
            assert_identical(leaves, others)
            assert [v for v in leaves if not torch.is_tensor(v)] == [
                v for v in others if not torch.is_tensor(v)
            ]
            if name == "input":
                assert got[1] is x
            if name == "twice":
                assert got[0] is got[1]
    assert len(calls) == (1 if is_learned else 4)


def test_an_intermediate_that_the_model_keeps():
    """The path would not write it: it is not learned."""

    class Keeps(Small):
        last = None

        def stack(self, h):
            self.last = h = super().stack(h)
            return h

    model = seeded(Keeps)
    denoiser = short(model, NEVER)
    for i in range(3):
        denoiser(sample(seed=i), times(1 - i / 3))
        kept = model.last
        model(sample(seed=i), times(1 - i / 3))
        assert_identical(kept, model.last)
