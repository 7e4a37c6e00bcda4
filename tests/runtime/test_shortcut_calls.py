"""The shortcut: which calls must not take it, and what models may return."""

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from helpers import (
    NEVER,
    assert_identical,
    plain,
    sample,
    seeded,
    short,
    times,
)
from opened import Small, opened
from torch import nn

from fxcache import FirstBlockCache

TWO = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)


def counted(model):
    """A denoiser that takes the shortcut, and its calls that do not."""
    denoiser = opened(model, NEVER, guards="trajectory")
    return denoiser, denoiser.count_complete()


# --- what sends a call the complete way ---


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
CALLS = [
    ((), {}),
    ((), {"extra": E}),
    ((), {"extra": E.double()}),
    ((), {"extra": E[:1]}),
    ((), {"extra": E.transpose(0, 1).contiguous().transpose(0, 1)}),
    ((), {"extra": torch.tensor(0.5)}),
    ((), {"extra": 0.25}),
    ((), {"scale": 2.0}),
    ((), {"scale": 2}),
    ((), {"scale": True}),
    ((), {"skip": True}),
    ((), {"skip": 1}),
    ((), {"parts": (E,)}),
    ((), {"parts": [E]}),
    ((), {"parts": (E, E)}),
    ((), {"parts": (E, -E)}),
    ((), {"parts": {}}),
]


@torch._dynamo.config.patch(recompile_limit=64)
def test_other_arguments_go_the_complete_way():
    """Whatever the last call was, an unlike one is computed as the model does."""
    model = seeded(Flexible)
    denoiser = short(model, NEVER)
    with denoiser.trajectory():
        for call in CALLS:
            for args, kwargs in (call, call, CALLS[0]):
                given = sample(seed=len(kwargs)), times(0.5), *args
                assert_identical(denoiser(*given, **kwargs), model(*given, **kwargs))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(2, -1, -1),
        lambda x: x[:, :5],
        lambda x: nn.Parameter(x, requires_grad=False),
    ],
    ids=["strides", "expanded", "shape", "type"],
)
def test_other_layouts_go_the_complete_way(change):
    """Compiled pieces take the layouts for granted."""
    model = seeded(Small)
    denoiser, calls = counted(model)
    with denoiser.trajectory():
        for _ in range(2):
            denoiser(sample(), times(1))
        assert len(calls) == 1
        x = change(sample())
        assert_identical(denoiser(x, times(1)), model(x, times(1)))
    assert len(calls) == 2


@pytest.mark.parametrize("given", [0.5, 500, torch.tensor(0.5)], ids=["float", "int", "0d"])
def test_kinds_of_timesteps(given):
    class Timed(Small):
        def forward(self, x, timestep):
            return super().forward(x, torch.ones(x.shape[0]) * timestep)

    model = seeded(Timed)
    a, b = short(model, TWO), plain(model, TWO)
    for _ in range(2):
        for share in (1.0, 0.8, 0.6, 0.4, 0.2):
            t = type(given)(given * share) if not torch.is_tensor(given) else given * share
            assert_identical(a(sample(), t), b(sample(), t))
    assert a.report().records == b.report().records


class Two(Small):
    def forward(self, x, t, other):
        return super().forward(x + 2 * other, t)


def test_the_same_tensor_as_two_arguments():
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


def test_positional_and_keyword_arguments():
    model = seeded(Small)
    a = short(model, NEVER)
    expected = model(sample(), times(1))
    with a.trajectory():
        for _ in range(2):
            assert_identical(a(sample(), times(1)), expected)
            assert_identical(a(sample(), t=times(1)), expected)
            assert_identical(a(x=sample(), t=times(1)), expected)
            assert_identical(a(t=times(1), x=sample()), expected)


# --- what models return ---

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
    denoiser, calls = counted(model)
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
