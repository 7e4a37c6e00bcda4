"""The shortest path over measured errors, and the errors that it goes by."""

import itertools
import math

import numpy as np
import pytest
import torch

from fxcache import AdamsBashforth, Chebyshev, Hermite, PolicyError, Reuse, Taylor
from fxcache.policy.fitted import Fitted
from fxcache.runtime.state import Buffers, Slot
from fxcache.tuning import record as recording_module
from fxcache.tuning.record import Recorder, Trajectory
from fxcache.tuning.search import (
    fit_table,
    fit_weights,
    interpolated_sensitivity,
    schedule_costs,
    search,
    squared_error,
)


def random_cost(seed, spread=1.0):
    """A cost of (past, following) without any structure."""
    return lambda past, step: np.random.default_rng([seed, step, *past]).exponential(spread)


def cost_of(mask, cost, ring):
    """The total cost of a mask, run by run."""
    total, past = 0.0, (0,)
    for step in range(1, len(mask)):
        if not mask[step]:
            total += cost(past, step)
            past = (step, *past)[:ring]
    return total + cost(past, len(mask))


def longest_run(mask):
    runs = [len(list(group)) for is_hit, group in itertools.groupby(mask) if is_hit]
    return max(runs, default=0)


def brute_force(cost, steps, ring, max_hits):
    """By number of computed steps, the least cost of all masks."""
    best = {}
    for rest in itertools.product([False, True], repeat=steps - 1):
        mask = (False, *rest)
        if longest_run(mask) <= max_hits:
            total, number = cost_of(mask, cost, ring), steps - sum(mask)
            best[number] = min(best.get(number, math.inf), total)
    return best


@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize(("steps", "max_hits"), [(1, 1), (2, 1), (5, 6), (7, 2), (9, 3), (9, 8)])
def test_no_mask_is_better_than_the_shortest_path(steps, max_hits, ring):
    cost = random_cost(steps + 10 * ring)
    found = search(cost, steps=steps, ring=ring, max_hits=max_hits)
    oracle = brute_force(cost, steps, ring, max_hits)
    assert found.keys() == oracle.keys()
    for number, (total, mask) in found.items():
        assert len(mask) == steps
        assert not mask[0]
        assert steps - sum(mask) == number
        assert longest_run(mask) <= max_hits
        assert total == pytest.approx(oracle[number], abs=1e-12)
        assert total == pytest.approx(cost_of(mask, cost, ring), abs=1e-12)


def test_a_search_for_small_budgets_gives_the_same_masks():
    cost = random_cost(0)
    every = search(cost, steps=9, ring=3, max_hits=8)
    for most in (1, 2, 4, 9):
        expected = {number: found for number, found in every.items() if number <= most}
        assert search(cost, steps=9, ring=3, max_hits=8, most=most) == expected


@pytest.mark.parametrize("forecast", [Reuse(), Taylor(order=1), Taylor(order=2)])
def test_the_path_over_real_errors_is_the_best(forecast):
    """Costs of a forecaster on random residuals, as brute force finds them: squared errors, a fifth
    of what the step after a run tells, and all that it does not.
    """
    residuals = torch.randn(8, 5, dtype=torch.float64).cumsum(0)
    sensitivity = torch.rand(8, dtype=torch.float64) + 0.1

    def squared(step, nodes, weights):
        predicted = sum(w * residuals[at] for w, at in zip(weights, nodes, strict=True))
        return float(sensitivity[step] * (predicted - residuals[step]).square().sum())

    def direct(past, following):
        total = 0.0
        for step in range(past[0] + 1, following):
            error = squared(step, past, forecast.weights(step, past))
            if following < 8 and len(past) > 1:
                parabola = [following, *past[:2]]
                fit = np.polyfit(parabola, residuals[parabola].numpy(), 2)
                between = torch.tensor([np.polyval(column, step) for column in fit.T])
                untold = float(sensitivity[step] * (between - residuals[step]).square().sum())
                error = 0.2 * error + 0.8 * min(error, untold)
            total += error
        return total

    cost = schedule_costs(residuals @ residuals.T, sensitivity, forecast.weights)
    found = search(cost, steps=8, ring=forecast.ring, max_hits=7)
    for number, best in brute_force(direct, 8, forecast.ring, 7).items():
        assert found[number][0] == pytest.approx(best, rel=1e-9, abs=1e-9)


EVERY = [Reuse(), Taylor(order=2), Hermite(order=2), AdamsBashforth(order=3), Chebyshev(order=2)]


@pytest.mark.parametrize("forecast", EVERY, ids=lambda f: type(f).__name__)
def test_squared_error_is_that_of_the_forecast(forecast):
    residuals = torch.randn(9, 40, dtype=torch.float64)
    gram = residuals @ residuals.T / 40
    past = (6, 5, 3, 2, 0)[: forecast.ring]
    weights = forecast.weights(8, past)
    predicted = sum(w * residuals[at] for w, at in zip(weights, past, strict=True))
    direct = (predicted - residuals[8]).square().mean()
    assert squared_error(gram, 8, past, weights) == pytest.approx(float(direct), rel=1e-9)
    equal = torch.ones(3, 3, dtype=torch.float64) * 0.1
    assert 0 <= squared_error(equal, 2, (1, 0), [0.3, 0.7]) < 1e-12  # never negative


@pytest.mark.parametrize("past", [(3,), (3, 2), (4, 2, 0)])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_fitted_weights_are_the_constrained_least_squares(past, ridge):
    """Against numpy: the constraint is put in, w = e_1 + N z, and the rows are stacked."""
    residuals = torch.randn(6, 30, dtype=torch.float64)
    weights = fit_weights(residuals @ residuals.T, 5, past, ridge=ridge)
    n = len(past)
    differences = (residuals[list(past)] - residuals[5]).T.numpy()
    k = ridge * (differences**2).sum() / n
    basis = np.vstack([-np.ones(n - 1), np.eye(n - 1)])
    first = np.eye(n)[0]
    rows = np.vstack([differences @ basis, k**0.5 * basis])
    goal = np.concatenate([-differences @ first, np.zeros(n)])
    z = np.linalg.lstsq(rows, goal, rcond=None)[0]
    assert sum(weights) == pytest.approx(1)
    np.testing.assert_allclose(weights, first + basis @ z, rtol=1e-6, atol=1e-9)


def test_fitted_weights_are_better_than_every_forecaster_on_what_they_were_fitted_to():
    residuals = torch.randn(8, 50, dtype=torch.float64).cumsum(0).cumsum(0)
    gram = residuals @ residuals.T
    own = squared_error(gram, 7, (5, 4, 2), fit_weights(gram, 7, (5, 4, 2), ridge=1e-9))
    for forecast in (Taylor(order=1), Taylor(order=2), Hermite(order=1), AdamsBashforth(order=2)):
        past = (5, 4, 2)[: forecast.ring]
        assert own <= squared_error(gram, 7, past, forecast.weights(7, past)) + 1e-9


SCHEDULE = [False, False, True, False, True, True, False, False, True, True]


def test_fitted_weights_where_nothing_changes_are_those_of_reuse():
    same = torch.full((10, 7), 0.1, dtype=torch.float64)
    rounded = same + 1e-9 * torch.randn(10, 7, dtype=torch.float64)
    moving = torch.cat([rounded[:6], torch.randn(4, 7, dtype=torch.float64)])
    for residuals in (same, rounded, torch.zeros_like(same), moving):
        gram = residuals @ residuals.T
        assert fit_weights(gram, 4, (3, 2, 0)) == [1, 0, 0]
        table = fit_table(gram, torch.ones(10), SCHEDULE, 3)
        assert table[4, (3, 1, 0)] == table[5, (3, 1, 0)] == [1, 0, 0]
        assert table[2, (1, 0)] == [1, 0]


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_weights_that_are_fitted_together_are_the_constrained_least_squares(ridge):
    """Against numpy, on the residuals themselves: rows of errors, mixed by a root of what two
    errors have in common.
    """
    residuals = torch.randn(10, 30, dtype=torch.float64).cumsum(0)
    sensitivity = torch.rand(10, dtype=torch.float64) + 0.5
    table = fit_table(residuals @ residuals.T, sensitivity, SCHEDULE, 3, ridge=ridge)
    places, r, s = list(table), residuals.numpy(), sensitivity.numpy()
    assert places == [(2, (1, 0)), (4, (3, 1, 0)), (5, (3, 1, 0)), (8, (7, 6, 3)), (9, (7, 6, 3))]
    steps = np.array([step for step, _ in places])
    root = np.linalg.cholesky(0.9 ** abs(steps[:, None] - steps)).T

    def rows(weights):
        """All that is squared, of the weights of all hits."""
        pairs = list(zip(places, np.split(weights, [2, 5, 8, 11]), strict=True))
        errors = [s[t] * (w @ r[list(past)] - r[t]) for (t, past), w in pairs]
        pulls = [
            s[t]
            * (w - np.eye(len(w))[0])
            * (ridge * ((r[list(past)] - r[t]) ** 2).sum(1).mean()) ** 0.5
            for (t, past), w in pairs
        ]
        return np.concatenate([(root @ np.stack(errors)).ravel(), *pulls])

    found = np.concatenate([table[place] for place in places])
    assert [sum(weights) for weights in table.values()] == pytest.approx([1] * 5)
    least = np.square(rows(found)).sum()
    for i, j in [(0, 1), (2, 3), (3, 4), (5, 7), (8, 9), (11, 13), (12, 13)]:
        for step in (-1e-3, 1e-3):
            other = found.copy()
            other[i], other[j] = other[i] + step, other[j] - step
            assert np.square(rows(other)).sum() > least  # quadratic: so it is the minimum
    alone = fit_table(residuals @ residuals.T, sensitivity, SCHEDULE, 3, alike=0, ridge=ridge)
    for (step, past), weights in alone.items():
        wanted = fit_weights(residuals @ residuals.T, step, past, ridge=ridge)
        assert weights == pytest.approx(wanted, rel=1e-6)


def test_a_table_falls_back_on_others():
    fitted = Fitted(table={(2, (1, 0)): [3.0, -2.0]})
    assert fitted.weights(2, [1, 0]) == [3, -2]
    assert fitted.weights(3, [1, 0]) == pytest.approx([3, -2])
    assert fitted.weights(5, [3, 2, 0]) == [*Taylor(order=1).weights(5, [3, 2]), 0]
    assert fitted.weights(5, [3]) == [1]


def test_bad_tables_are_named():
    for arguments, message in (
        ({"table": {(2, (1, 0)): [1.0]}}, "one weight for each past step.*got 1 at step 2"),
        ({"table": {(4, (3, 2)): [1, 0]}, "ring": 1}, "at most 1|ring of at most 1"),
        ({"table": {(2, (1,)): [math.nan]}}, "finite weights.*nan.*step 2"),
        ({"table": {(2, (1,)): [math.inf]}}, "finite weights"),
        ({"table": {}, "ring": 6}, r"Fitted.ring must be an integer in \[1, 5\], got 6"),
        ({"table": {}, "ring": 2, "fallback": Taylor(order=2)}, "ring of at most 2"),
        ({"table": {}, "fallback": "Taylor"}, "forecast must be a forecaster"),
    ):
        with pytest.raises(PolicyError, match=message):
            Fitted(**arguments)


def test_sensitivity_is_interpolated_in_the_logarithm():
    residuals = torch.arange(6, dtype=torch.float64)[:, None]  # a reused residual is off by 1
    sensitivity = interpolated_sensitivity(residuals @ residuals.T, {1: 8.0, 4: 1.0})
    torch.testing.assert_close(
        sensitivity, torch.tensor([8, 8, 4, 2, 1, 1], dtype=torch.float64), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf])
def test_errors_that_say_nothing_are_left_out(error):
    residuals = torch.arange(4, dtype=torch.float64)[:, None]
    gram = residuals @ residuals.T
    expected = torch.full((4,), 2, dtype=torch.float64)
    torch.testing.assert_close(interpolated_sensitivity(gram, {1: 2.0, 3: error}), expected)
    assert interpolated_sensitivity(gram, {2: error}).tolist() == [1, 1, 1, 1]


def observe(recorder, slot, state, residuals, step):
    """Tell `recorder` of a computed step."""
    for (stored,), residual in zip(state.buffers.rings, residuals, strict=True):
        stored.copy_(residual)
    state.step, state.past = step, [(step, 0)]
    recorder(slot, state, math.nan, [torch.ones(2)])


def recorded(trajectories, recorder=None):
    """Record trajectories, each a list of steps of a list of residuals, in slots of their own."""
    recorder = recorder or Recorder()
    for steps in trajectories:
        slot = Slot()
        state = slot.new_branch(None, 1)
        state.buffers = Buffers({}, tuple((torch.empty_like(r),) for r in steps[0]))
        for step, residuals in enumerate(steps):
            observe(recorder, slot, state, residuals, step)
        del slot, state  # its id is free for the next one
    return list(recorder.trajectories.values())


def drifting(steps, *shapes):
    """Residuals of some streams that change from step to step."""
    start, slope = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    return [[a + 0.2 * t * b for a, b in zip(start, slope, strict=True)] for t in range(steps)]


def direct_gram(steps):
    rows = torch.stack([torch.cat([r.flatten() for r in step]).double() for step in steps])
    return rows @ rows.T / rows.shape[1]


def test_the_gram_matrix_is_a_mean_over_all_elements_of_all_streams():
    """Slots that are gone are not mixed up; norms are over channels; a first step has no ratio."""
    steps = drifting(4, (2, 5, 3), (1, 7))
    (found,) = recorded([steps])
    torch.testing.assert_close(found.gram(), direct_gram(steps), rtol=1e-5, atol=1e-7)
    found = recorded([drifting(3, (1, 2, 2)) for _ in range(20)])
    assert [trajectory.steps for trajectory in found] == [[0, 1, 2]] * 20
    for shape, channels in (((2, 6, 4), 2), ((2, 4, 3, 5), 1)):  # tokens, and features
        stream = torch.randn(shape)
        (found,) = recorded([[[stream]]])
        assert torch.equal(found.norms[0], stream.norm(dim=channels))
    two = Trajectory(norms=[torch.ones(3), torch.full((3,), 2.0)])
    assert two.ratios() == [1.0, pytest.approx(2.0)]


def test_elements_drawn_of_large_streams_stand_for_the_whole(monkeypatch):
    """Both streams count by their size, although of the large one few elements are kept."""
    monkeypatch.setattr(recording_module, "SAMPLED", 4000)
    steps = drifting(4, (1, 400, 100), (1, 30, 100))
    for step in steps:
        step[1] *= 3
    (found,) = recorded([steps])
    assert len(found.residuals[0]) == 4000 + 3000
    exact = direct_gram(steps)
    torch.testing.assert_close(found.gram(), exact, rtol=0.08, atol=0)
    error = squared_error(found.gram(), 3, (2, 1), [2, -1])  # straight lines: next to nothing
    assert error < 1e-9 * float(exact[3, 3])


def test_a_second_evaluation_of_a_step_replaces_the_first():
    first, second = drifting(2, (1, 4, 2))
    slot, recorder = Slot(), Recorder()
    state = slot.new_branch("cond", 1)
    state.buffers = Buffers({}, ((torch.empty(1, 4, 2),),))
    for step, residual in ((0, first), (1, first), (1, second)):
        observe(recorder, slot, state, residual, step)
    ((key, found),) = recorder.trajectories.items()
    assert key[2] == "cond"
    assert len(found) == 2
    torch.testing.assert_close(found.gram(), direct_gram([first, second]), rtol=1e-5, atol=1e-7)


def test_a_state_without_hits_is_counted():
    counter, slot = recording_module.Counter(), Slot()
    for branch, hits in (("a", [0, 1, 2, 0]), ("b", [0, 0, 0, 1])):
        state = slot.new_branch(branch, 1)
        for step, state.hits_in_a_row in enumerate(hits):
            state.step = step
            counter(slot, state, math.nan, [])
    assert counter.most == 3
    assert recording_module.Counter().most == 0
