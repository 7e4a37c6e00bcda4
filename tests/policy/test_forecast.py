"""The forecasters' weights, against numpy, diffusers and a float64 model.

Each oracle forecasts values ([n, k], newest first) in another way than the library: by fitting,
not by closed weights.
"""

import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from helpers import adopt, hits, plain, sample, solve, times
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial, chebyshev, hermite

from fxcache import PolicyError, StepSchedule
from fxcache.policy.forecast import (
    AdamsBashforth,
    Chebyshev,
    Hermite,
    Reuse,
    Taylor,
    check_forecast,
)

ORDERS = (1, 2, 3, 4)
EXACT_LINES = math.sqrt(0.5)  # the scale at which Hermite's slope is Taylor's
ORDERED = [
    make(order=order) for make in (Taylor, Hermite, AdamsBashforth, Chebyshev) for order in ORDERS
] + [
    Hermite(order=3, scale=EXACT_LINES),
    Hermite(order=4, scale=1),
    Chebyshev(order=2, ridge=0),
    Chebyshev(order=4, ridge=0),
    Chebyshev(order=3, ridge=10.0),
]
SETTINGS = settings(deadline=None, max_examples=30)
UNEVEN = [17, 16, 12, 10, 3]


@st.composite
def situations(draw, most=5):
    """A step to forecast, and up to `most` uneven computed steps before it, newest first."""
    gaps = draw(st.lists(st.integers(1, 12), min_size=1, max_size=most))
    step = draw(st.integers(sum(gaps), 200))
    return step, [step - sum(gaps[: i + 1]) for i in range(len(gaps))]


def fit(at, values):
    """The polynomial through `values` ([n, k]) at the steps `at`, one a column."""
    return [Polynomial(np.polyfit(at, column, len(at) - 1)[::-1]) for column in values.T]


def reuse(forecast, step, past, values):
    return values[0]


def taylor(forecast, step, past, values):
    at = np.subtract(past, step)
    return np.array([polynomial(0) for polynomial in fit(at, values)])


def hermites(forecast, step, past, values):
    x, forecasted = step - past[0], np.zeros(values.shape[1])
    for i in range(len(past)):
        at = np.subtract(past[: i + 1], past[0])
        derivative = np.array([p.deriv(i)(0) for p in fit(at, values[: i + 1])])
        basis = hermite.Hermite.basis(i)(forecast.scale * x) * forecast.scale**i
        forecasted += derivative / math.factorial(i) * basis
    return forecasted


def adams_bashforth(forecast, step, past, values):
    if len(past) == 1:
        return values[0]
    slopes = np.diff(values, axis=0) / np.diff(past)[:, None]
    integrals = [p.integ() for p in fit(np.subtract(past[:-1], past[0]), slopes)]
    return values[0] + [p(step - past[0]) - p(0) for p in integrals]


def ridge_regression(forecast, step, past, values):
    order = min(forecast.order, len(past) - 1)
    t = np.interp([*past, step], [past[-1], step], [-1, 1])
    basis = chebyshev.chebvander(t, order)[:, 1:]
    basis -= basis[0]
    penalty = math.sqrt(forecast.ridge) * np.eye(order)
    differences = np.vstack([values - values[0], np.zeros((order, values.shape[1]))])
    fitted = np.linalg.lstsq(np.vstack([basis[:-1], penalty]), differences, rcond=None)[0]
    return values[0] + basis[-1] @ fitted


ORACLES = {
    Reuse: reuse,
    Taylor: taylor,
    Hermite: hermites,
    AdamsBashforth: adams_bashforth,
    Chebyshev: ridge_regression,
}


def expected(forecast, step, past, values):
    """What the oracle of `forecast` makes of the residuals that its ring holds."""
    ring = forecast.ring
    return ORACLES[type(forecast)](forecast, step, past[:ring], values[:ring])


def combined(forecast, step, past, values):
    """What `forecast` makes of `values`, and how large rounding may be."""
    weights = np.array(forecast.weights(step, past))
    return weights @ values, 1e-8 * np.abs(weights).sum()


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@SETTINGS
@given(situation=situations(), seed=st.integers(0, 9))
def test_forecasts_are_the_oracles(forecast, situation, seed):
    step, past = situation
    values = np.random.default_rng(seed).standard_normal((len(past), 3))
    made, rounding = combined(forecast, step, past, values)
    np.testing.assert_allclose(made, expected(forecast, step, past, values), 0, max(rounding, 1e-8))


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@SETTINGS
@given(situation=situations(), times_each=st.lists(st.integers(1, 3), min_size=5, max_size=5))
def test_of_several_evaluations_of_a_step_the_newest_counts(forecast, situation, times_each):
    """Heun evaluates twice a step. What the ring holds is then fewer steps, not none."""
    step, past = situation
    weights = iter(forecast.weights(step, past))
    repeated, wanted = [], []
    for at, count in zip(past, times_each, strict=False):
        repeated += [at] * count
        wanted += [next(weights)] + [0.0] * (count - 1)
    assert forecast.weights(step, repeated) == wanted


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@pytest.mark.parametrize("past", [UNEVEN, [4, 3, 2, 1, 0]], ids=["uneven", "even"])
def test_large_gaps_stay_finite(forecast, past):
    for step, known in itertools.product((100, 1000, 10**6, 3 * 10**9), range(1, 6)):
        weights = forecast.weights(step, past[:known])
        assert all(map(math.isfinite, weights))
        assert sum(weights) == pytest.approx(1, abs=1e-14 * sum(map(abs, weights)))


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
def test_forecasters_are_frozen_values_with_a_ring(forecast):
    """Of little that is known a lower order is made; what the ring does not hold weighs nothing; a
    second evaluation of the newest step reuses it.
    """
    check_forecast(forecast)
    assert 1 <= forecast.ring <= 5
    assert forecast == copy.deepcopy(forecast)
    assert hash(forecast) == hash(copy.deepcopy(forecast))
    assert forecast != type(forecast)(order=forecast.order % 4 + 1)
    with pytest.raises(AttributeError):
        forecast.order = 2
    assert type(forecast)(2) == type(forecast)(order=2)

    assert forecast.weights(20, UNEVEN[:1]) == [1.0]
    options = {name: getattr(forecast, name) for name in ("scale", "ridge")
               if hasattr(forecast, name)}  # fmt: skip
    for known in range(2, forecast.order + 1):
        lower = type(forecast)(order=known - 1, **options)
        assert forecast.weights(20, UNEVEN[:known]) == lower.weights(20, UNEVEN[:known])
    past = [*UNEVEN, 2, 0]
    weights = forecast.weights(20, past)
    assert weights[: forecast.ring] == forecast.weights(20, past[: forecast.ring])
    assert weights[forecast.ring :] == [0.0] * (7 - forecast.ring)
    assert forecast.weights(17, UNEVEN) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_defaults_and_numbers_of_numpy():
    assert Taylor() == Taylor(order=1)
    assert Hermite() == Hermite(order=2, scale=0.5)
    assert AdamsBashforth() == AdamsBashforth(order=2)
    assert Chebyshev() == Chebyshev(order=2, ridge=0.1)
    assert [f.ring for f in (Taylor(), Hermite(), AdamsBashforth(), Chebyshev())] == [2, 3, 3, 5]
    for made, plainly in [
        (Hermite(order=np.int64(2), scale=np.float32(0.5)), Hermite()),
        (Chebyshev(order=np.int64(2), ridge=np.float32(0.5)), Chebyshev(ridge=0.5)),
    ]:
        weights = made.weights(20, UNEVEN)
        assert weights == plainly.weights(20, UNEVEN)
        assert {type(weight) for weight in weights} == {float}


BAD_ORDERS = [(make, "order", value, "[1, 4]")
              for make in (Taylor, Hermite, AdamsBashforth, Chebyshev)
              for value in (0, 5, -1, 1.0, True, None, "2", math.nan)]  # fmt: skip
BAD_SCALES = [(Hermite, "scale", value, "(0, 1]")
              for value in (0, 0.0, -0.1, 1.1, math.nan, math.inf, True, None, "0.5")]  # fmt: skip
BAD_RIDGES = [(Chebyshev, "ridge", value, "[0, inf)")
              for value in (-0.1, -1, math.nan, math.inf, True, None, "0")]  # fmt: skip


def test_bad_values_are_named():
    for make, name, value, allowed in BAD_ORDERS + BAD_SCALES + BAD_RIDGES:
        with pytest.raises(PolicyError) as error:
            make(**{name: value})
        message = str(error.value)
        assert message.startswith(f"{make.__name__}.{name} must be ")
        assert allowed in message
        assert message.endswith(f"got {value!r}")


def test_hermite_has_the_published_series():
    """Half the slope at 0.5; the second term is ((x / 2)^2 - 1 / 2) times half the second."""
    value = np.array([4.0, 1.0, 0.0])  # steps 2, 1, 0: slope 3, second derivative 2
    for x in (1, 2, 5):
        made = np.dot(Hermite(order=2).weights(2 + x, [2, 1, 0]), value)
        assert made == pytest.approx(4 + 3 * x / 2 + (x * x / 4 - 1 / 2))


@pytest.mark.parametrize(
    "coefficients",
    [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]],
)
def test_adams_bashforth_has_the_textbooks_coefficients(coefficients):
    order = len(coefficients)
    slopes = np.diff(np.eye(order + 1), axis=0)  # minus r_{j+1} - r_j: steps fall
    wanted = np.eye(order + 1)[0] - coefficients @ slopes
    made = AdamsBashforth(order=order).weights(order + 1, range(order, -1, -1))
    np.testing.assert_allclose(made, wanted, atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_a_large_ridge_is_reuse(order):
    """And not 0, as where the constant is shrunk, too."""
    for ridge in (1e20, sys.float_info.max):
        weights = Chebyshev(order=order, ridge=ridge).weights(20, UNEVEN)
        assert weights == pytest.approx([1, 0, 0, 0, 0], abs=1e-15)


def taylorseer(order, past, values):
    """diffusers' state after the computed steps `past`, which hold `values` ([n, k])."""
    state = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=order)
    for at, value in zip(past[::-1], values[::-1], strict=True):
        state.current_step = at
        state.update((torch.tensor(value, dtype=torch.float32),))
    return state


def predict(state, step):
    state.current_step = step
    return state.predict()[0].double().numpy()


@SETTINGS
@given(situation=situations())
def test_taylorseer_of_order_one_and_of_order_two_which_is_adams_bashforth(situation):
    """Also for uneven gaps: both let the slope change linearly from that at s_1 to that at s_0."""
    step, past = situation
    values = np.random.default_rng(0).standard_normal((len(past), 3))
    theirs = [predict(taylorseer(order, past, values), step) for order in (1, 2)]
    made, _ = combined(Taylor(order=1), step, past[:2], values[:2])
    np.testing.assert_allclose(made, theirs[0], 1e-4, 1e-4)
    made, rounding = combined(AdamsBashforth(order=2), step, past[:3], values[:3])
    np.testing.assert_allclose(made, theirs[1], 1e-4, 1e4 * rounding)


MASK = [i in (2, 5, 7, 8, 10, 11) for i in range(12)]  # hits; the gaps between misses are uneven


def forecasted(model, forecast):
    """The outputs of a float64 copy of `model` with the residuals of hits by the oracle."""
    model, past, residuals, outputs = copy.deepcopy(model).double(), [], [], []
    for step, is_hit in enumerate(MASK):
        x, t = sample().double() + 0.05 * step, times(1 - step / len(MASK)).double()
        h = model.embed(x) + model.time(t[:, None])[:, None]
        if is_hit:
            flat = np.stack([residual.flatten().numpy() for residual in residuals])
            residual = torch.from_numpy(expected(forecast, step, past, flat)).view_as(h)
        else:
            residual = model.stack(h) - h
            past, residuals = [step, *past][:5], [residual, *residuals][:5]
        outputs.append(model.out(model.norm(h + residual)))
    return outputs


def test_hits_of_a_model_are_forecast(model):
    """One capture a size of the ring."""
    denoiser = plain(model, StepSchedule(mask=MASK))
    for forecast in sorted([Reuse(), *ORDERED[1:16:2]], key=lambda each: each.ring):
        adopt(denoiser, StepSchedule(mask=MASK, forecast=forecast))
        with denoiser.trajectory():
            outputs = solve(denoiser, steps=len(MASK))
        assert hits(denoiser) == MASK, forecast
        for step, (made, wanted) in enumerate(
            zip(outputs, forecasted(model, forecast), strict=True)
        ):
            torch.testing.assert_close(
                made.double(), wanted, rtol=1e-4, atol=1e-4,
                msg=lambda text, at=(forecast, step): f"{at}: {text}",
            )  # fmt: skip
    assert denoiser.report().graphs == 3
