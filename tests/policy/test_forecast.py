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
from helpers import plain, sample, seeded, solve, times
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial, chebyshev, hermite
from zoo import SequentialDiT

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


# --- oracles -------------------------------------------------------------------------------------


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


def polynomial_values(degree, steps):
    """A polynomial of that degree at `steps`: [n, 1]."""
    return Polynomial(np.arange(1.0, degree + 2) / 10.0 ** np.arange(degree + 1))(
        np.array(steps, dtype=float)
    )[:, None]


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@SETTINGS
@given(situation=situations(), seed=st.integers(0, 9))
def test_forecasts_are_the_oracles(forecast, situation, seed):
    step, past = situation
    values = np.random.default_rng(seed).standard_normal((len(past), 3))
    made, rounding = combined(forecast, step, past, values)
    np.testing.assert_allclose(made, expected(forecast, step, past, values), 0, max(rounding, 1e-8))


@pytest.mark.parametrize("forecast", [Reuse(), *ORDERED], ids=repr)
@SETTINGS
@given(situation=situations())
def test_weights_sum_to_one(forecast, situation):
    step, past = situation
    weights = forecast.weights(step, past[: forecast.ring])
    assert [type(weight) for weight in weights] == [float] * len(past[: forecast.ring])
    assert sum(weights) == pytest.approx(1, abs=1e-14 * sum(map(abs, weights)))


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@SETTINGS
@given(situation=situations(), shift=st.integers(0, 1000))
def test_only_distances_count(forecast, situation, shift):
    step, past = situation
    shifted = forecast.weights(step + shift, [at + shift for at in past])
    # Gauss nodes are floats: they round with the steps.
    assert shifted == pytest.approx(forecast.weights(step, past), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
def test_while_little_is_known_the_order_is_lower(forecast):
    assert forecast.weights(20, UNEVEN[:1]) == [1.0]
    for known in range(2, forecast.order + 1):
        options = {name: getattr(forecast, name) for name in ("scale", "ridge")
                   if hasattr(forecast, name)}  # fmt: skip
        lower = type(forecast)(order=known - 1, **options)
        assert forecast.weights(20, UNEVEN[:known]) == lower.weights(20, UNEVEN[:known])


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
def test_what_the_ring_does_not_hold_weighs_nothing(forecast):
    past = [*UNEVEN, 2, 0]
    weights = forecast.weights(20, past)
    assert weights[: forecast.ring] == forecast.weights(20, past[: forecast.ring])
    assert weights[forecast.ring :] == [0.0] * (7 - forecast.ring)


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
def test_a_second_evaluation_of_the_newest_step_reuses_it(forecast):
    assert forecast.weights(17, UNEVEN) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
@pytest.mark.parametrize("past", [UNEVEN, [4, 3, 2, 1, 0]], ids=["uneven", "even"])
def test_large_gaps_stay_finite(forecast, past):
    for step, known in itertools.product((100, 1000, 10**6, 3 * 10**9), range(1, 6)):
        weights = forecast.weights(step, past[:known])
        assert all(map(math.isfinite, weights))
        assert sum(weights) == pytest.approx(1, abs=1e-14 * sum(map(abs, weights)))


@pytest.mark.parametrize("forecast", ORDERED, ids=repr)
def test_forecasters_are_frozen_values(forecast):
    check_forecast(forecast)
    assert 1 <= forecast.ring <= 5
    assert forecast == copy.deepcopy(forecast)
    assert hash(forecast) == hash(copy.deepcopy(forecast))
    assert forecast != type(forecast)(order=forecast.order % 4 + 1)
    with pytest.raises(AttributeError):
        forecast.order = 2
    assert type(forecast)(2) == type(forecast)(order=2)


def test_defaults():
    assert Taylor() == Taylor(order=1)
    assert Hermite() == Hermite(order=2, scale=0.5)
    assert AdamsBashforth() == AdamsBashforth(order=2)
    assert Chebyshev() == Chebyshev(order=2, ridge=0.1)
    assert [f.ring for f in (Taylor(), Hermite(), AdamsBashforth(), Chebyshev())] == [2, 3, 3, 5]


BAD_ORDERS = [(make, "order", value, "[1, 4]")
              for make in (Taylor, Hermite, AdamsBashforth, Chebyshev)
              for value in (0, 5, -1, 1.0, True, None, "2", math.nan)]  # fmt: skip
BAD_SCALES = [(Hermite, "scale", value, "(0, 1]")
              for value in (0, 0.0, -0.1, 1.1, math.nan, math.inf, True, None, "0.5")]  # fmt: skip
BAD_RIDGES = [(Chebyshev, "ridge", value, "[0, inf)")
              for value in (-0.1, -1, math.nan, math.inf, True, None, "0")]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "value", "allowed"), BAD_ORDERS + BAD_SCALES + BAD_RIDGES)
def test_bad_values_are_named(make, name, value, allowed):
    with pytest.raises(PolicyError) as error:
        make(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{make.__name__}.{name} must be ")
    assert allowed in message
    assert message.endswith(f"got {value!r}")


def test_numbers_of_numpy_are_numbers():
    for made, plainly in [
        (Hermite(order=np.int64(2), scale=np.float32(0.5)), Hermite()),
        (Chebyshev(order=np.int64(2), ridge=np.float32(0.5)), Chebyshev(ridge=0.5)),
    ]:
        weights = made.weights(20, UNEVEN)
        assert weights == plainly.weights(20, UNEVEN)
        assert {type(weight) for weight in weights} == {float}


# --- each of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("make", "degree"),
    [
        (lambda order: Taylor(order=order), lambda order: order),
        (lambda order: Chebyshev(order=order, ridge=0), lambda order: order),
        (lambda order: Hermite(order=order), lambda order: 0),
        (lambda order: Hermite(order=order, scale=EXACT_LINES), lambda order: 1),
        (lambda order: AdamsBashforth(order=order), lambda order: 1),
    ],
    ids=["Taylor", "Chebyshev", "Hermite", "Hermite at sqrt(1/2)", "AdamsBashforth"],
)
@SETTINGS
@given(situation=situations())
def test_polynomials_are_exact_up_to_a_degree(make, degree, order, situation):
    step, past = situation
    forecast = make(order)
    for below in range(min(degree(order), len(past) - 1) + 1):
        made, _ = combined(forecast, step, past, polynomial_values(below, past))
        np.testing.assert_allclose(made, polynomial_values(below, [step])[0], 1e-6)


def test_hermite_has_the_published_series():
    """Half the slope at 0.5; the second term is ((x / 2)^2 - 1 / 2) times half the second."""
    value = np.array([4.0, 1.0, 0.0])  # steps 2, 1, 0: slope 3, second derivative 2
    for x in (1, 2, 5):
        made = np.dot(Hermite(order=2).weights(2 + x, [2, 1, 0]), value)
        assert made == pytest.approx(4 + 3 * x / 2 + (x * x / 4 - 1 / 2))


def test_hermite_extrapolates_forwards():
    """A growing residual goes on growing: evaluated at -x, odd orders would turn back."""
    assert Hermite(order=1).weights(3, [2, 1]) == [1.5, -0.5]
    assert Hermite(order=1).weights(6, [2, 1]) == [3.0, -2.0]


@pytest.mark.parametrize("order", ORDERS)
def test_a_small_scale_is_reuse(order):
    weights = Hermite(order=order, scale=1e-9).weights(20, UNEVEN)
    assert weights == pytest.approx([1, 0, 0, 0, 0], abs=1e-15)


def test_hermite_at_root_one_half_is_taylor_of_order_one():
    line = Hermite(order=1, scale=EXACT_LINES).weights(20, UNEVEN[:2])
    assert line == pytest.approx(Taylor(order=1).weights(20, UNEVEN[:2]))


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


@SETTINGS
@given(situation=situations())
def test_the_first_orders_are_the_same_line(situation):
    step, past = situation
    line = Taylor(order=1).weights(step, past)
    assert AdamsBashforth(order=1).weights(step, past) == pytest.approx(line)


@SETTINGS
@given(situation=situations())
def test_bdf_reduces_to_taylor(situation):
    """Its polynomial takes the slope at the new step from that of the past, so it is that one."""
    step, past = situation
    values = np.random.default_rng(0).standard_normal((len(past), 1))
    at = np.subtract(past, step)
    slope = fit(at, values)[0].deriv()(0)
    # Unknown: the coefficients of a polynomial that takes the past values and has this slope at 0.
    powers = np.arange(len(past) + 1)
    conditions = np.vstack([at[:, None].astype(float) ** powers, powers == 1])
    new = np.linalg.solve(conditions, [*values[:, 0], slope])[0]
    made, rounding = combined(Taylor(order=max(len(past) - 1, 1)), step, past, values)
    assert made[0] == pytest.approx(new, rel=1e-5, abs=max(rounding, 1e-6))


@pytest.mark.parametrize("order", ORDERS)
@SETTINGS
@given(situation=situations())
def test_chebyshev_without_ridge_interpolates_what_it_can(order, situation):
    step, past = situation
    past = past[: order + 1]
    made = Chebyshev(order=order, ridge=0).weights(step, past)
    weights = Taylor(order=order).weights(step, past)
    assert made == pytest.approx(weights, abs=1e-8 * max(map(abs, weights)))


@pytest.mark.parametrize("order", ORDERS)
def test_chebyshev_without_ridge_is_least_squares_through_the_newest(order):
    values = np.random.default_rng(0).standard_normal(5)
    powers = np.subtract(UNEVEN, UNEVEN[0])[:, None].astype(float) ** np.arange(1, order + 1)
    fitted = np.linalg.lstsq(powers, values - values[0], rcond=None)[0]
    wanted = values[0] + (20 - UNEVEN[0]) ** np.arange(1, order + 1) @ fitted
    made = np.dot(Chebyshev(order=order, ridge=0).weights(20, UNEVEN), values)
    assert made == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_a_large_ridge_is_reuse(order):
    """And not 0, as where the constant is shrunk, too."""
    for ridge in (1e20, sys.float_info.max):
        weights = Chebyshev(order=order, ridge=ridge).weights(20, UNEVEN)
        assert weights == pytest.approx([1, 0, 0, 0, 0], abs=1e-15)


# --- TaylorSeer as diffusers has it --------------------------------------------------------------


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
def test_taylorseer_of_order_one(situation):
    step, past = situation
    values = np.random.default_rng(0).standard_normal((len(past), 3))
    theirs = predict(taylorseer(1, past, values), step)
    made, _ = combined(Taylor(order=1), step, past[:2], values[:2])
    np.testing.assert_allclose(made, theirs, 1e-4, 1e-4)


@SETTINGS
@given(situation=situations())
def test_taylorseer_of_order_two_is_adams_bashforth(situation):
    """Also for uneven gaps: both let the slope change linearly from that at s_1 to that at s_0."""
    step, past = situation
    values = np.random.default_rng(0).standard_normal((len(past), 3))
    theirs = predict(taylorseer(2, past, values), step)
    made, rounding = combined(AdamsBashforth(order=2), step, past[:3], values[:3])
    np.testing.assert_allclose(made, theirs, 1e-4, 1e4 * rounding)


@SETTINGS
@given(gap=st.integers(1, 6), ahead=st.integers(1, 6))
def test_taylorseer_of_order_two_misses_parabolas_for_even_gaps(gap, ahead):
    """Its slope is that in the middle of the last gap, its terms are x^2 and not x (x + gap)."""
    past = [2 * gap, gap, 0]
    step = past[0] + ahead
    values = np.square(past)[:, None].astype(float)
    made, _ = combined(Taylor(order=2), step, past, values)
    assert made[0] == pytest.approx(step**2)
    theirs = predict(taylorseer(2, past, values), step)
    assert theirs[0] == pytest.approx(step**2 - ahead * gap)


def test_taylorseers_differences_are_no_derivatives_for_uneven_gaps():
    """It divides a difference of slopes by the last gap, though they lie (s_0 - s_2) / 2 apart."""
    past = [10, 9, 1]
    values = np.square(past)[:, None].astype(float)
    theirs = taylorseer(2, past, values).taylor_factors[0][2].item()
    assert theirs == pytest.approx(9)  # the second derivative of a parabola is 2 everywhere
    zero, made = (np.dot(Hermite(order=2, scale=s).weights(11, past), values) for s in (1e-9, 0.5))
    assert made - zero == pytest.approx(19 / 2 + (1 / 4 - 1 / 2) * 2 / 2)


@pytest.mark.parametrize("order", ORDERS)
@SETTINGS
@given(gap=st.integers(1, 6), ahead=st.integers(1, 6), known=st.integers(1, 5))
def test_hermite_on_taylorseers_derivatives(order, gap, ahead, known):
    """For even gaps, HiCache is Hermite polynomials on the factors that TaylorSeer keeps."""
    past = [gap * i for i in range(known)][::-1]
    values = np.random.default_rng(0).standard_normal((known, 3))
    factors = taylorseer(order, past, values).taylor_factors[0]
    theirs = sum(
        factor.double().numpy()
        / math.factorial(i)
        * 0.6**i
        * hermite.hermval(0.6 * ahead, [0] * i + [1])
        for i, factor in factors.items()
    )
    made, _ = combined(
        Hermite(order=order, scale=0.6), past[0] + ahead, past[: order + 1], values[: order + 1]
    )
    np.testing.assert_allclose(made, theirs, 1e-4, 1e-4)


# --- a model -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("forecast", [Reuse(), *ORDERED[1:16:2]], ids=repr)
@torch.no_grad()
def test_hits_of_a_model_are_forecast(forecast):
    model = seeded(SequentialDiT)
    denoiser = plain(model, StepSchedule(mask=MASK, forecast=forecast))
    with denoiser.trajectory():
        outputs = solve(denoiser, steps=len(MASK))
    assert [record.is_hit for record in denoiser.report().records] == MASK
    for step, (made, wanted) in enumerate(zip(outputs, forecasted(model, forecast), strict=True)):
        torch.testing.assert_close(
            made.double(), wanted, rtol=1e-4, atol=1e-4, msg=lambda text, i=step: f"{i}: {text}"
        )
