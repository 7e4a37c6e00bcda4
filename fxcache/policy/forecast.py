"""Forecasters: what stands in for the residual that a hit does not compute.

Each is a weight vector over a ring of past residuals, so one fused operation serves all of them
and changing weights never recompiles. The weights sum to 1: a residual that does not change is
forecast exactly.

Notation: ``s_0 > s_1 > ...`` are the computed steps, newest first, ``r_0, r_1, ...`` their
residuals, ``x = step - s_0`` is how far the forecast lies ahead of the newest, and
``r[s_0 .. s_i]`` a divided difference, whose ``i!``-fold estimates the i-th derivative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub
from typing import Any, Protocol, runtime_checkable

from fxcache.errors import PolicyError
from fxcache.policy.checks import check_integer, check_number


@runtime_checkable
class Forecast(Protocol):
    """`ring` past residuals are kept; `weights` says how much of each makes the forecast."""

    @property
    def ring(self) -> int:
        """How many past residuals are kept, 1 to 5 (the kernels' limit)."""

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """Weights for the residuals computed at steps `past` (newest first) to forecast `step`."""


def check_forecast(value: object) -> None:
    """Raise PolicyError unless `value` is a forecaster."""
    if isinstance(value, type) or not isinstance(value, Forecast):
        raise PolicyError(
            f"forecast must be a forecaster like Reuse() or Taylor(order=1), got {value!r}"
        )


@dataclass(frozen=True)
class Reuse:
    """The last residual as it is (First Block Cache, TeaCache, MagCache)."""

    @property
    def ring(self) -> int:
        return 1

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        return [1.0]


@dataclass(frozen=True, kw_only=True)
class Within:
    """`inner` with a longer ring than it reads, so that several forecasters share one compiled
    denoiser (`tune`).
    """

    inner: Forecast
    ring: int

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        own = past[: self.inner.ring]
        return [*self.inner.weights(step, own), *[0.0] * (len(past) - len(own))]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A polynomial through all residuals that are kept but the oldest, whose errors are made good.

    One residual more is kept than `inner` reads. With it a miss compares its own with what `inner`
    would have forecast (`History.error`), and tells how far off the hits before it were: between
    two computed steps the polynomial through all that is kept knows better than the one that ended
    there. The errors of one run of hits have the same sign, and a sampler adds them up; so the
    first hit after the miss adds the opposite, and only the error of that estimate stays. (Where
    two misses follow, nothing is added: the step after the run is no longer the newest.)
    """

    inner: Forecast

    @property
    def ring(self) -> int:
        return self.inner.ring + 1

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """Those of `inner` alone."""
        own = past[: self.inner.ring]
        return [*self.inner.weights(step, own), *[0.0] * (len(past) - len(own))]

    def correct(self, step: int, past: Sequence[int], hits: Sequence[int]) -> list[float]:
        """The weights for `step` with what is to be made good of `hits`, earlier steps."""
        weights = self.weights(step, past)
        if len(past) < self.ring or any(past[0] < hit < step for hit in hits):
            return weights  # too little is known, or another hit did it
        # The two polynomials differ by the divided difference times the product of the distances.
        lacking = sum(math.prod(h - n for n in past[1:]) for h in hits if past[1] < h < past[0])
        return _add(weights, _divided_difference(past), lacking)


def checked(policy: Any) -> Corrected | None:
    """The forecast of `policy`, if its misses compare their residuals with it."""
    return policy.forecast if isinstance(policy.forecast, Corrected) else None


@dataclass(frozen=True)
class _Ordered:
    """What the forecasters with an order share: its check, unless they differ the ring, and which
    residuals count.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_integer(f"{type(self).__name__}.order", self.order, 1, 4)

    @property
    def ring(self) -> int:
        return self.order + 1

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """The weights of the newest distinct steps of `past`, as many as the ring has, by residual.

        Of several evaluations of one step (Heun) the newest counts, the others weigh 0; at the
        newest step itself, and as long as no other is known, its residual is the forecast.
        """
        points = list(dict.fromkeys(past))[: self.ring]
        is_reuse = len(points) < 2 or step == points[0]
        by_step = dict(zip(points, [1.0] if is_reuse else self._rule(step, points), strict=False))
        return [by_step.pop(at, 0.0) for at in past]

    def _rule(self, step: int, points: Sequence[int]) -> list[float]:
        """The weights of residuals at distinct steps, two or more, to forecast a later step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Taylor(_Ordered):
    """Extrapolation by finite differences over the last computed steps, which may be uneven.

    The polynomial of degree `order` through the last ``order + 1`` residuals (of lower degree as
    long as fewer were computed; of several evaluations of one step the newest counts):
    ``sum_i r[s_0 .. s_i] (step - s_0) ... (step - s_{i-1})``. Source: TaylorSeer (arXiv
    2503.06923), with divided differences, so that uneven distances between computed steps are
    taken into account. TaylorSeer itself has ``x^i`` in place of the product and divides by the
    last gap only: the same for order 1, and for order 2 it is `AdamsBashforth` of order 2.

    Args:
        order: degree, 1 to 4. Order 0 is `Reuse`.

    Raises:
        PolicyError: for another order.
    """

    order: int = 1

    def _rule(self, step: int, points: Sequence[int]) -> list[float]:
        return lagrange(step, points)


@dataclass(frozen=True)
class Hermite(_Ordered):
    """Taylor's series with scaled Hermite polynomials in place of the powers.

    ``sum_i r[s_0 .. s_i] P_i(x)`` for i up to `order`, where ``P_i(x) = scale^i H_i(scale x)`` and
    ``H_i`` are the physicists' Hermite polynomials: ``P_1 = 2 scale^2 x``,
    ``P_2 = (2 scale^2 x)^2 - 2 scale^2``. Source: HiCache (arXiv 2508.16984). Its derivatives are
    recursive differences divided by the last gap; divided differences are the same for even gaps
    and are derivatives for uneven ones, too. Steps grow and differences point forward, so `x` is
    positive; some ports evaluate at ``-x``, which turns the odd orders round (reported and mended
    by HiCache++, PyPI hicache-pp 1.2).

    A smaller scale stays closer to `Reuse`: the slope counts ``2 scale^2``-fold, half at 0.5 and
    fully at ``sqrt(1/2)``. There ``P_i`` are the probabilists' polynomials (x, ``x^2 - 1``, ...),
    straight lines are exact and order 1 is `Taylor` of order 1.

    Args:
        order: highest derivative, 1 to 4 (lower as long as fewer residuals were computed).
        scale: contraction, in (0, 1].

    Raises:
        PolicyError: for another order or scale.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Hermite.scale", self.scale, "(0, 1]")

    def _rule(self, step: int, points: Sequence[int]) -> list[float]:
        """The newest residual, and each divided difference times its Hermite polynomial."""
        x, slope = step - points[0], 2 * float(self.scale) ** 2
        weights = [0.0] * len(points)
        before, polynomial = 0.0, 1.0
        for i in range(len(points)):
            for j, weight in enumerate(_divided_difference(points[: i + 1])):
                weights[j] += polynomial * weight
            before, polynomial = polynomial, slope * (x * polynomial - i * before)
        return weights


@dataclass(frozen=True)
class AdamsBashforth(_Ordered):
    """The newest residual plus the integral of its extrapolated slope.

    Feature caching as an ODE for the features (FoCa, arXiv 2508.16211): take
    ``d_j = (r_j - r_{j+1}) / (s_j - s_{j+1})`` for the slope at ``s_j``; the forecast is ``r_0``
    plus the integral, from ``s_0`` to `step`, of the polynomial through the last `order` slopes.
    For even gaps and one gap ahead these are the textbook's coefficients, 3/2 and -1/2 for order 2.
    Order 1 is `Taylor` of order 1; order 2 is what TaylorSeer computes for order 2.

    A backward difference is the slope of half a gap earlier, so only straight lines are exact; in
    return the weights are smaller than Taylor's (2.5, -2, 0.5 against 3, -3, 1) and amplify less
    noise. BDF gives no other forecaster: solved for the new value, with the slope there that of the
    polynomial through the past, it returns this polynomial, `Taylor`. FoCa's BDF2 for even gaps,
    ``4/3 r_0 - 1/3 r_1 + 2/3 h d_0``, calibrated or not, is `Taylor` of order 1.

    Args:
        order: number of slopes, 1 to 4 (fewer as long as fewer residuals were computed).

    Raises:
        PolicyError: for another order.
    """

    def _rule(self, step: int, points: Sequence[int]) -> list[float]:
        """1 for the newest residual, and each slope's difference times its integral, for which two
        Gauss nodes are enough: they are exact for cubics.
        """
        half = (step - points[0]) / 2
        nodes = [points[0] + half * (1 + side / math.sqrt(3)) for side in (-1, 1)]
        early, late = (lagrange(node, points[:-1]) for node in nodes)
        weights = [1.0] + [0.0] * (len(points) - 1)
        for j, integral in enumerate(half * (a + b) for a, b in zip(early, late, strict=True)):
            for k, weight in enumerate(_divided_difference(points[j : j + 2]), start=j):
                weights[k] += integral * weight
        return weights


@dataclass(frozen=True)
class Chebyshev(_Ordered):
    """Ridge regression of Chebyshev polynomials over the last five residuals.

    ``f(s) = r_0 + sum_m c_m (T_m(t(s)) - T_m(t(s_0)))`` for m from 1 to `order`, where `t` maps
    [oldest step, `step`] to [-1, 1] and the coefficients minimise
    ``sum_j |r_j - f(s_j)|^2 + ridge sum_m |c_m|^2``; the forecast is ``f(step)``.

    Source: Spectrum (arXiv 2603.01623), which regresses on all computed steps (order 4, ridge 0.1),
    maps the whole trajectory to [-1, 1] and shrinks the constant, too. Here the number of steps is
    not known, the ring ends at five residuals, and the fit is anchored at the newest one, so that a
    large ridge leads to `Reuse` and not to 0. Without ridge it is the least-squares polynomial
    through ``r_0``; with no more than ``order + 1`` residuals that is `Taylor`.

    Args:
        order: degree, 1 to 4 (lower as long as fewer residuals were computed).
        ridge: weight of the coefficients' squares, in [0, inf).

    Raises:
        PolicyError: for another order or ridge.
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Chebyshev.ridge", self.ridge, "[0, inf)")

    @property
    def ring(self) -> int:
        return 5

    def _rule(self, step: int, points: Sequence[int]) -> list[float]:
        """Weights of the regression on the differences to the newest residual."""
        order, length = min(self.order, len(points) - 1), step - points[-1]
        values = [_chebyshev(1 - 2 * (step - at) / length, order) for at in (*points, step)]
        *rows, target = [list(map(sub, row, values[0])) for row in values[1:]]
        weights = _ridge(rows, target, float(self.ridge))
        return [1.0 - sum(weights), *weights]


def _apart(at: float, points: Sequence[int], j: int) -> float:
    """The product of the distances from `at` to all `points` but the j-th."""
    return math.prod(at - other for k, other in enumerate(points) if k != j)


def lagrange(at: float, points: Sequence[int]) -> list[float]:
    """Weights of the values at `points` in their interpolating polynomial, evaluated at `at`."""
    return [_apart(at, points, j) / _apart(points[j], points, j) for j in range(len(points))]


def _divided_difference(points: Sequence[int]) -> list[float]:
    """Weights of the values at `points` in their divided difference."""
    return [1 / _apart(points[j], points, j) for j in range(len(points))]


def _chebyshev(t: float, order: int) -> list[float]:
    """``T_1(t) .. T_order(t)``."""
    values = [1.0, t]
    while len(values) <= order:
        values.append(2 * t * values[-1] - values[-2])
    return values[1 : order + 1]


def _ridge(rows: list[list[float]], target: list[float], ridge: float) -> list[float]:
    """The weight of each row's value in its ridge regression on `rows`, evaluated at `target`.

    ``rows (rows^T rows + ridge)^-1 target``, or the head of the shortest vector that has the
    product `target` with the columns of `rows` above ``sqrt(ridge)`` times the identity. It is
    built by Gram-Schmidt: the normal equations would square the condition number.
    """
    root = max(math.sqrt(ridge), 1e-14)  # never quite 0: columns stay independent at any distance
    shortest, basis = [0.0] * (len(rows) + len(target)), list[list[float]]()
    for m, goal in enumerate(target):
        column = [row[m] for row in rows] + [root * (k == m) for k in range(len(target))]
        missing = goal - _dot(column, shortest)
        for unit in basis:
            column = _add(column, unit, -_dot(column, unit))
        norm = math.hypot(*column)
        basis.append([value / norm for value in column])
        shortest = _add(shortest, basis[-1], missing / norm)
    return shortest[: len(rows)]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _add(a: list[float], b: list[float], times: float) -> list[float]:
    return [x + times * y for x, y in zip(a, b, strict=True)]
