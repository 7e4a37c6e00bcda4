"""Run an outlined piece: compiled functions called one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

from fxcache.passes.outline import Outline

Function = Callable[..., Sequence[Any]]


class CallSequence:
    """Callable like the piece that was outlined.

    Args:
        outline: what is called on what.
        functions: the compiled function of each of its calls.
    """

    def __init__(self, outline: Outline, functions: Sequence[Function]) -> None:
        last_use = {
            place: number
            for number, call in enumerate(outline.calls)
            for place in (*call.writes, *call.reads)
        }
        arguments = outline.num_places - sum(len(call.writes) for call in outline.calls)
        self.others = [*[None] * (outline.num_places - arguments), *outline.constants]
        self.results = outline.results
        self.steps = []
        for number, (call, function) in enumerate(zip(outline.calls, functions, strict=True)):
            # The values that nobody reads any more: their memory is free for the next call.
            dead = [
                place
                for place, last in last_use.items()
                if last == number and place >= arguments and place not in self.results
            ]
            first = call.writes[0] if call.writes else 0
            self.steps.append((function, call.reads, first, first + len(call.writes), dead))

    def __call__(self, *args: Any) -> list[Any]:
        values = [*args, *self.others]
        for function, reads, first, end, dead in self.steps:
            values[first:end] = function(*[values[place] for place in reads])
            for place in dead:
                values[place] = None
        return [values[place] for place in self.results]
