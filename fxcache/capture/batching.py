"""A runner's evaluations of batches: requests in one call, which decide by themselves."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fxcache.errors import BatchError, OptionError
from fxcache.passes.facts import SAMPLE_NAMES
from fxcache.runtime.steps import Where

if TYPE_CHECKING:
    from fxcache.capture.runner import Runner

log = logging.getLogger("fxcache")


class Batches:
    """Captures a runner's model with a symbolic number of rows, and calls it for batches."""

    def __init__(self, runner: "Runner") -> None:
        self.runner = runner
        #: The captured model by the rows of a request, and for which of these numbers the tensors
        #: that have as many rows as the batch are not known to be the batch's.
        self.compiled: dict[int, Callable[..., Any]] = {}
        self.unsure: set[int] = set()
        #: Where among the arguments lies what had another number of rows once.
        self.others: set[Any] = set()

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation of a batch, each request where it belongs. A request that is the only one
        is called alone.
        """
        runner, session, where = self.runner, self.runner.session, self.runner.session.where
        inputs, timestep = runner.placed_by(args, kwargs)
        check_rows(inputs, session.steps.samples, where)
        each = where.of_requests()
        is_known = where.branch is not None
        is_known = is_known and all(session.slot_of(one).is_announced for one in each)
        times = times_of(timestep, len(each), where.rows_per_request, is_known=is_known)
        with ExitStack() as stack:
            placed = zip(times, each, strict=True)
            calls = [stack.enter_context(session.settled({}, time, one)) for time, one in placed]
            token = session.calls.set(calls if len(calls) > 1 else None)
            try:
                if len(calls) == 1:
                    return runner.evaluate_placed(args, kwargs)
                return self._together(args, kwargs)
            except BaseException:
                for call in calls:
                    call.state.undo(call.step)
                raise
            finally:
                session.calls.reset(token)
                session.last_call.set(None)

    def _together(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation of several requests. That all tensors that have as many rows as the batch
        are the batch's is believed until a capture, or what it computes, shows that it is not so.
        """
        rows = self.runner.session.where.rows_per_request
        try:
            return self.runner.evaluate_checked(args, kwargs)
        except BatchError as error:
            if rows in self.unsure:
                raise
            log.info("trying again without one number of rows for all: %s", error)
            self.unsure.add(rows)
            self.others.clear()
            self.compiled.pop(rows, None)
            return self.runner.evaluate_checked(args, kwargs)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        """Call the captured model."""
        runner, calls = self.runner, self.runner.session.calls.get() or []
        rows = runner.session.where.rows_per_request
        if not runner.is_whole:
            raise BatchError(
                f"{type(runner.model).__name__} breaks into graphs, and requests can only be "
                f"batched where it is one"
            )
        if rows not in self.compiled:
            self.compiled[rows] = runner.compile(runner.new_backend(rows), rows=rows)
        given, of_rows = self._with_symbolic_rows((args, kwargs), rows * len(calls))
        together = () if rows in self.unsure else of_rows
        return self.compiled[rows](runner.model, *given, forward, together)

    def _with_symbolic_rows(self, arguments: Any, rows: int) -> tuple[Any, tuple[int, ...]]:
        """`arguments` with aliases of the tensors that have `rows` rows, as far as is known, whose
        number Dynamo then makes a symbol (a fixed size where it is another thing), and the places
        of these leaves.
        """
        paths, spec = pytree.tree_flatten_with_path(arguments)
        leaves, of_rows = [leaf for _, leaf in paths], []
        for place, (path, leaf) in enumerate(paths):
            if not isinstance(leaf, torch.Tensor) or path in self.others:
                continue
            if leaf.shape[:1] == (rows,):
                leaves[place] = leaf.detach()
                torch._dynamo.maybe_mark_dynamic(leaves[place], 0)
                of_rows.append(place)
            else:
                self.others.add(path)
        return pytree.tree_unflatten(leaves, spec), tuple(of_rows)


def check_rows(inputs: Mapping[str, Any], samples: Collection[str], where: Where) -> None:
    """Raise OptionError unless the noisy sample has the rows of a batch's requests."""
    for name in sorted(samples or SAMPLE_NAMES):
        sample = inputs.get(name)
        number, rows = len(where.requests or ()), where.rows_per_request
        if isinstance(sample, torch.Tensor) and tuple(sample.shape[:1]) != (number * rows,):
            raise OptionError(
                f"a batch of {number} requests of {rows} row(s) each has {number * rows} rows, and "
                f"{name} has the shape {tuple(sample.shape)}: pass the requests in the order of "
                f"their rows, and rows_per_request=2 where guidance pairs are batched"
            )


def times_of(timestep: Any, number: int, rows: int, *, is_known: bool) -> Sequence[Any]:
    """The time input of each request; that of a GPU is read back, unless all steps are known."""
    if not isinstance(timestep, torch.Tensor):
        return [timestep] * number
    if timestep.device.type != "cpu":
        if is_known or timestep.device.type == "meta":
            return [None] * number
        timestep = timestep.cpu()
    return timestep.chunk(number) if timestep.shape[:1] == (number * rows,) else [timestep] * number
