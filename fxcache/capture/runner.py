"""Call a model through the cache: capture it, hand its graphs to the backend, sort out errors."""

import functools
import inspect
import itertools
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcache.capture import shards
from fxcache.capture import torch_internals as internals
from fxcache.capture.backend import Backend, repeated_weights
from fxcache.capture.batching import Batches
from fxcache.capture.compile import Compilers
from fxcache.capture.evaluate import evaluate, own_evaluate
from fxcache.capture.functional import by_path
from fxcache.capture.torch_guards import failed_guard, guards_of
from fxcache.errors import (
    BatchError,
    BrokenGraphError,
    CaptureError,
    FxCacheError,
    StackNotFoundError,
)
from fxcache.options import Options
from fxcache.passes.graph import TIMESTEP_NAMES
from fxcache.pipelines import hooks
from fxcache.policy import Policy
from fxcache.policy.reasons import Reason
from fxcache.runtime.session import Outdated, Session
from fxcache.runtime.shortcut import NOT_TAKEN, Shortcut
from fxcache.runtime.training import goes_around, is_recomputation, trains

log = logging.getLogger("fxcache")


#: Where all captures are dropped twice within so many evaluations, the model is captured no more.
MAX_QUIET_CALLS = 100


_numbers = itertools.count()


class Runner:
    """Calls a model through the cache, or around it where nothing may be cached."""

    def __init__(self, model: nn.Module, policy: Policy, options: Options) -> None:
        self.model, self.options, self.number = model, options, next(_numbers)
        self.session = Session(policy)
        self.compilers = Compilers(options)
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.time_names = [p.name for p in parameters if p.name in TIMESTEP_NAMES]
        self.session.recapture = self._recapture
        self.gave_up = False
        #: After how many evaluations all captures were dropped.
        self._renewed_at: int | None = None
        self.batches = Batches(self)
        self.shortcut = Shortcut(self.session, checks=options.guards == "always")
        self.uncached = (
            evaluate if options.is_eager else self.compile(self.compilers.piece, fullgraph=False)
        )
        self.use(self.new_backend())

    def new_backend(self, rows_per_request: int | None = None) -> Backend:
        return Backend(
            self.session,
            self.compilers,
            argument_names=self.names,
            num_weights=functools.partial(repeated_weights, weakref.ref(self.model)),
            rows_per_request=rows_per_request,
        )

    def _recapture(self) -> None:
        """Capture anew: another policy needs other pieces."""
        self.use(self.new_backend())
        self.shortcut.forget()

    def use(self, backend: Backend) -> None:
        """Capture anew, for `backend`."""
        #: The model is one graph; it became so with more of Dynamo's switches on.
        self.backend, self.is_whole, self.captures_more = backend, True, False
        self.cached = self.compile(backend)
        self.batches.compiled.clear()

    def compile(
        self, backend: Callable[..., Any], *, fullgraph: bool = True, rows: int | None = None
    ) -> Callable[..., Any]:
        """`evaluate` as Dynamo captures it and hands it to `backend`."""
        function = own_evaluate(self.number, rows)
        if rows is None:
            self.function = function
        return torch.compile(
            function,
            backend=backend,
            fullgraph=fullgraph,
            dynamic=self.options.dynamic,
            options=self.options.guard_filter,
            **internals.ISOLATED,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.options.disable:
            return evaluate(self.model, args, kwargs, hooks.own_forward(self.model))
        if self.gave_up or not self._may_cache(args, kwargs):
            return self.evaluate_uncached(args, kwargs)
        try:
            return self.evaluate(args, kwargs)
        except (StackNotFoundError, CaptureError, BatchError) as error:
            if not self.options.fallback:
                raise
            warnings.warn(f"fxcache runs this model uncached: {error}", stacklevel=3)
            self.gave_up = True
            return self.evaluate_uncached(args, kwargs)

    def evaluate_uncached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation around the cache."""
        return self.uncached(self.model, args, kwargs, hooks.own_forward(self.model))

    def reset(self, *, records: bool = True) -> None:
        """Forget all state and every learned path."""
        self.session.reset(records=records)
        self.shortcut.forget()

    def _may_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an evaluation goes through the cache; if not, the state takes note of it.

        Gradients may be wanted of some steps of a trajectory only, so it counts as a step. One that
        trains the model is none, and all branches forget for it.
        """
        session = self.session
        if not goes_around(session, args, kwargs):
            return True
        if is_recomputation():
            return False
        if session.where.requests is not None:
            for where in session.where.of_requests():
                for state in session.slot_of(where).branches.values():
                    state.lose_to(Reason.UNCACHED)
            return False
        timestep = self.placed_by(args, kwargs)[1]
        if trains(self.model, timestep) or session.steps.goes_back(session.slot, timestep):
            for state in session.slot.branches.values():
                state.lose_to(Reason.UNCACHED)
            return False
        with session.settled(*self.placed_by(args, kwargs)) as call:
            if call.step is None:
                session.steps.complete(call, None)
            call.state.lose_to(Reason.UNCACHED)
        return False

    def placed_by(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """The inputs by path, and the time input."""
        named = [*self.names, *map(str, range(len(self.names), len(args)))]
        inputs = by_path(dict(zip(named, args, strict=False)) | kwargs)
        names = [*self.time_names, self.session.steps.time_name]
        times = (inputs.get(name) for name in names if name is not None)
        return inputs, next((time for time in times if time is not None), None)

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation through the cache.

        The model is captured as one graph if it can be. If it cannot and ``fullgraph=False``, it is
        captured in pieces, one of which must hold the stack.
        """
        if hooks.replaces_weights(self.model):
            raise CaptureError(hooks.obstacles(self.model))
        if self.session.where.requests is not None:
            return self.batches.evaluate(args, kwargs)
        with self.session.settled(*self.placed_by(args, kwargs)) as call:
            try:
                return self.evaluate_placed(args, kwargs)
            except Outdated:  # a trajectory of another policy: the model is captured anew for it
                return self.evaluate_checked(args, kwargs)
            except BaseException:
                call.state.undo(call.step)
                raise
            finally:
                self.session.last_call.set(None)  # it holds the caller's tensors

    def evaluate_placed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation, past Dynamo where that way is known."""
        if not self.is_whole:
            return self.evaluate_checked(args, kwargs)
        given = self._locals(args, kwargs)
        outputs = self.shortcut.evaluate(given)
        if outputs is NOT_TAKEN:
            outputs = self.evaluate_checked(args, kwargs)
            if self.shortcut.learns:
                find = functools.partial(guards_of, self.function, given)
                self.shortcut.learn(given, outputs, find)
        return outputs

    def _locals(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `evaluate`, by name."""
        forward = hooks.own_forward(self.model)
        given = {"args": args, "kwargs": kwargs, "forward": forward, "of_rows": ()}
        return {"model": self.model, **given}

    def evaluate_checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation through Dynamo, which checks its guards.

        What fails as one graph is tried with more captured, then in pieces, one of which must hold
        the stack. What then works is the way of all later evaluations.
        """
        first: CaptureError | StackNotFoundError | None = None
        while True:
            try:
                return self._run(args, kwargs)
            except (CaptureError, StackNotFoundError) as error:
                first = first or error
                # Hooks have come that break the graph.
                if hooks.make_traceable(self.model) + shards.make_traceable(self.model):
                    if not self.is_whole:
                        self._break_up()
                    continue
                self._relax(error, first)

    def _relax(self, error: FxCacheError, first: FxCacheError) -> None:
        """Go on to the next way to capture the model. Raises `error`, or the first one of this
        evaluation, if there is none.
        """
        is_batch = self.session.calls.get() is not None
        if is_batch or (self.is_whole and isinstance(error, StackNotFoundError)):
            raise error
        if self.is_whole and not self.captures_more:
            log.info("trying again with more captured: %s", error)
            self.captures_more = True
        elif self.is_whole:
            self.captures_more = False
            asked = self.options.fullgraph
            if asked or (asked is None and hooks.obstacles(self.model)):
                raise first
            log.info("capturing in pieces: %s", first)
            self._break_up()
        elif self.captures_more:
            log.info("trying again in pieces with less captured: %s", error)
            self._break_up(captures_more=False)
        else:
            raise error

    def _break_up(self, *, captures_more: bool = True) -> None:
        self.is_whole = self.backend.fullgraph = False
        self.captures_more = captures_more
        self.backend.refused.clear()
        self.session.graphs = 0
        self.cached = self.compile(self.backend, fullgraph=False)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the compiled model. Dynamo captures it only so often; then what it has is dropped
        (a life of many adapters and sizes), and it begins anew. Where that happens again in one
        trajectory's time, the model is not captured any more.
        """
        own = hooks.own_forward(self.model)
        is_batch = self.session.calls.get() is not None
        try:
            if is_batch:
                return self.batches.call(args, kwargs, own)
            return self.cached(self.model, args, kwargs, own)
        except internals.FailOnRecompileLimitHit:
            evaluations, self._renewed_at = self._renewed_at, self.session.evaluations
        name, graphs = type(self.model).__name__, self.session.graphs
        given = self._locals(args, kwargs)
        why = failed_guard(self.function, given) or "TORCH_LOGS=recompiles shows what"
        if evaluations is not None and self.session.evaluations - evaluations < MAX_QUIET_CALLS:
            self.gave_up = True
            log.warning(
                f"{name} was captured {graphs} times, and runs uncached from here on: something "
                f"that a graph depends on is another at each call. What failed last: {why}"
            )
            return self.evaluate_uncached(args, kwargs)
        log.info(
            f"{name} was captured {graphs} times and is captured anew. What failed last: {why}"
        )
        if is_batch:
            self.batches.compiled.clear()
        else:
            self.cached = self.compile(self.backend, fullgraph=self.is_whole)
        return self._call(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the compiled model; errors of the pass and of the capture become our own."""
        session = self.session
        before = session.evaluations
        try:
            with internals.capturing(more=self.captures_more):
                outputs = self._call(args, kwargs)
        except internals.BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, FxCacheError):
                raise inner from None
            if isinstance(inner, torch.OutOfMemoryError):
                raise
            raise CaptureError(
                f"{type(self.model).__name__} was captured and could not be compiled: "
                f"{type(inner).__name__}: {inner}"
            ) from error
        except (*internals.NOT_CAPTURED, internals.TorchRuntimeError) as error:
            cause = hooks.obstacles(self.model) or ""
            if not cause and isinstance(error, internals.TorchRuntimeError):
                raise  # shapes that do not fit are the caller's
            forward = inspect.signature(self.model.forward)
            forward.bind(*args, **kwargs)  # a TypeError is the caller's
            raise CaptureError(
                f"{type(self.model).__name__} could not be captured in one graph by torch.compile. "
                f"{cause} Dynamo says: {error}"
            ) from error
        if session.evaluations == before and not self.gave_up:
            cause = hooks.obstacles(self.model) or (
                "Graph breaks inside the blocks are the usual cause: TORCH_LOGS=graph_breaks shows "
                "them"
            )
            raise BrokenGraphError(
                f"no graph of {type(self.model).__name__} holds its block stack: it breaks into "
                f"{session.graphs} graphs. {self.backend.summary()} {cause}"
            )
        if not self.is_whole and session.evaluations > before + 1:
            session.say_once(
                "two stacks",
                "the model breaks into graphs in the midst of its block stack: the parts share one "
                "state, and nothing is cached",
            )
        return outputs
