"""`apply` on real pipelines of diffusers, from the prompt to the decoded picture."""

import copy
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from comparing import assert_identical
from helpers import adopt
from pipelines import PIPELINES, Family
from policies import ALTERNATE, NEVER
from torch.utils._pytree import tree_map_only

import fxcache

STEPS, OTHER_STEPS = 4, 5
#: One batch for both branches, whose sizes become dynamic, and unnamed branches amid the schedule:
#: these are run with other sizes and batches, too, for which they are captured anew.
RESIZED = ("pixart_sigma", "flux_img2img")

Table = dict[tuple[str, Hashable], list[tuple[int, bool]]]


def first_run(family: Family, pipe: Any) -> torch.Tensor:
    return family.call(pipe, "a red cat", steps=STEPS, size=family.sizes[0], batch=1)


def second_run(family: Family, pipe: Any) -> torch.Tensor:
    """Another prompt (as long, so that nothing is captured anew), number of steps and seed."""
    size = family.sizes[0]
    return family.call(pipe, "blue dogs", steps=OTHER_STEPS, size=size, batch=1, seed=1)


def other_run(family: Family, pipe: Any) -> torch.Tensor:
    """Another size and batch, too."""
    size, batch = family.sizes[1], family.batch
    return family.call(pipe, "two blue dogs", steps=OTHER_STEPS, size=size, batch=batch, seed=1)


def applied(family: Family, pipe: Any, policy: Any) -> Any:
    return fxcache.apply(pipe, policy, backend="eager", dynamic=family.dynamic, audit=False)


def seen(report: fxcache.Report) -> Table:
    """The steps of each branch of each denoiser, and whether they were hits."""
    table: Table = {}
    for r in report.records:
        table.setdefault((r.component, r.branch), []).append((r.step, r.is_hit))
    return table


def expected(family: Family, pipe: Any, steps: int, *, hits: bool) -> Table:
    """The same as it must be after a run of `pipe`: with `hits`, every second step of a branch."""
    table: Table = {}
    for component, own in steps_of(family, pipe, steps).items():
        solve = [(step, hits and place % 2 == 1) for place, step in enumerate(own)]
        for branch in family.branches:
            table[component, branch] = solve * family.sections
    return table


def steps_of(family: Family, pipe: Any, steps: int) -> dict[str, list[int]]:
    """The steps that each denoiser of `pipe` is called at."""
    run = range(family.first_step(steps), steps)
    boundary = getattr(pipe.config, "boundary_ratio", None)
    if boundary is None:
        return {"unet" if hasattr(pipe, "unet") else "transformer": list(run)}
    is_noisy = (pipe.scheduler.timesteps >= 1000 * boundary).tolist()
    assert True in is_noisy
    assert False in is_noisy
    return {
        "transformer": [step for step in run if is_noisy[step]],
        "transformer_2": [step for step in run if not is_noisy[step]],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_pipeline(name):
    """Never hitting changes nothing; hits come where they must; a second run has nothing of the
    first, nor a branch of another; removal undoes it. All with one capture.
    """
    family = PIPELINES[name]
    pipe = family.build()
    plain, before = first_run(family, pipe), dict(vars(pipe))
    sibling = copy.copy(pipe)  # another pipeline with the same models
    handle = applied(family, pipe, NEVER)
    changed = {key for key, value in vars(pipe).items() if value is not before[key]}
    assert changed == set(handle.denoisers)
    assert_identical(first_run(family, pipe), plain)
    report = handle.report()
    assert seen(report) == expected(family, pipe, STEPS, hits=False)
    assert_identical(first_run(family, sibling), plain)
    assert handle.report() == report  # the sibling's calls do not go through the denoisers

    for denoiser in handle.denoisers.values():
        adopt(denoiser, ALTERNATE)
    cached = first_run(family, pipe)
    assert seen(handle.report()) == expected(family, pipe, STEPS, hits=True)
    assert len({r.trajectory for r in handle.report().records}) == family.sections
    assert not torch.equal(cached, plain)  # a hit is not what the whole model gives
    second = second_run(family, pipe)
    handle.reset()
    with recorded(handle.denoisers) as calls:
        assert_identical(second_run(family, pipe), second)
    assert seen(handle.report()) == expected(family, pipe, OTHER_STEPS, hits=True)
    assert handle.report().graphs == report.graphs
    for component, denoiser in handle.denoisers.items():
        assert_branches_stand_alone(denoiser, calls[component])

    if name in RESIZED:
        first_run(family, pipe)
        assert_as_good_as_fresh(family, pipe)
    assert_undone(family, pipe, handle, before)
    assert_identical(first_run(family, pipe), plain)
    assert type(pipe) is type(sibling)


def assert_as_good_as_fresh(family: Family, pipe: Any) -> None:
    """What a pipeline that has run gives is what one gives that has not."""
    other = other_run(family, pipe)
    torch._dynamo.reset()  # else sizes would be dynamic for the fresh pipeline, too
    fresh = family.build()
    handle = applied(family, fresh, ALTERNATE)
    assert_identical(other_run(family, fresh), other)
    assert seen(handle.report()) == expected(family, fresh, OTHER_STEPS, hits=True)
    assert_identical(other_run(family, fresh), other)  # of the same shapes: nothing is left over


def assert_undone(family: Family, pipe: Any, handle: Any, before: dict[str, Any]) -> None:
    """Removal gives back what was there before `apply`, and nothing else is touched."""
    inside = dict(vars(pipe))
    handle.remove()
    own = {name: before[name] for name in handle.denoisers}
    assert list(vars(pipe)) == list(inside)
    assert all(vars(pipe)[key] is value for key, value in {**inside, **own}.items())
    assert not handle.report().records


class Call(NamedTuple):
    """An evaluation as the pipeline made it."""

    args: Any
    kwargs: Any
    output: Any


@contextmanager
def recorded(denoisers: dict[str, Any]) -> Iterator[dict[str, list[Call]]]:
    """Inside, every call of the denoisers is kept, by component."""
    calls: dict[str, list[Call]] = {name: [] for name in denoisers}

    def note(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        # Not copies of the inputs: with other strides the model would be captured anew.
        kept = tree_map_only(torch.Tensor, torch.clone, output)
        calls[name].append(Call(args, kwargs, kept))

    with ExitStack() as stack:
        for name, denoiser in denoisers.items():
            hook = denoiser.register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        yield calls


def assert_branches_stand_alone(denoiser: Any, calls: list[Call]) -> None:
    """Each branch got what it gets if it is the only one: a cache that they shared would show."""
    records = denoiser.report().records
    solves: dict[tuple[int, Hashable], list[Call]] = {}
    for record, call in zip(records, calls, strict=True):
        solves.setdefault((record.trajectory, record.branch), []).append(call)
    for own in solves.values():
        with denoiser.slot("alone"), denoiser.trajectory(OTHER_STEPS, records[0].step):
            for call in own:
                assert_identical(denoiser(*call.args, **call.kwargs), call.output)
    # Which shows only because the branches are given, and give, different things.
    for together in zip(*solves.values(), strict=True):
        first, *others = (call.output[0] for call in together)
        assert not any(torch.equal(first, other) for other in others)
