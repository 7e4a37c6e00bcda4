"""Requests that a test solves together and alone: they come and go, each at steps of its own."""

from contextlib import ExitStack
from typing import Any

import torch
import zoo
from comparing import tensors
from helpers import seeded
from nets import tokens
from torch.utils import _pytree as pytree

STEPS = 8
NAMES = ("a", "b", "c")


def _is_of_rows(path: Any, leaf: Any) -> bool:
    is_shared = "img_ids" in pytree.keystr(path)  # places of tokens, one for all requests
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and not is_shared


class Requests:
    """The `names` requests of a model of the zoo, or of a class, each with inputs of its own.

    The n-th begins `gap` calls after the one before it. `given` are inputs besides the usual ones.
    """

    def __init__(
        self,
        of: Any,
        names: Any = NAMES,
        gap: int = 2,
        steps: int = STEPS,
        rows: int = 2,
        **given: torch.Tensor,
    ) -> None:
        self.name, self.names, self.gap, self.steps = of, names, gap, steps
        if isinstance(of, str):
            self.model, inputs = zoo.make(of)
        else:
            self.name = "sequential_dit"  # it is called like that
            self.model, inputs = seeded(of), {**zoo.token_inputs(rows), **given}
        leaves = pytree.tree_leaves(inputs)
        self.rows = next(v for v in leaves if isinstance(v, torch.Tensor)).shape[0]
        self.inputs = {each: self._own(inputs, seed) for seed, each in enumerate(names)}

    def _own(self, inputs: Any, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def drawn(path: Any, leaf: Any) -> Any:
            if not _is_of_rows(path, leaf) or not leaf.is_floating_point():
                return leaf
            return torch.randn(leaf.shape, generator=generator)

        return pytree.tree_map_with_path(drawn, inputs)

    def at(self, request: str, step: int) -> dict[str, Any]:
        """What the model is called with at a step of a request."""
        given = zoo.at_step(self.name, self.inputs[request], step)
        for name in zoo.TIMESTEPS:
            if name in given and given[name].ndim == 0:
                given[name] = given[name].repeat(self.rows)
        return given

    def together(self, steps: dict[str, int]) -> dict[str, Any]:
        """The same for several, each at its step."""

        def joined(path: Any, *leaves: Any) -> Any:
            return torch.cat(leaves) if _is_of_rows(path, leaves[0]) else leaves[0]

        first, *others = (self.at(request, step) for request, step in steps.items())
        return pytree.tree_map_with_path(joined, first, *others)

    def live(self, call: int) -> dict[str, int]:
        """Who takes part in a call, and at which step."""
        steps = {name: call - self.gap * n for n, name in enumerate(self.names)}
        return {name: step for name, step in steps.items() if 0 <= step < self.steps}

    def alone(self, denoiser: Any) -> dict[str, list[torch.Tensor]]:
        """Each request's outputs, one request after the other."""
        outputs = {}
        for name in self.names:
            solve = denoiser.trajectory(num_steps=self.steps, slot=name)
            with torch.no_grad(), solve, denoiser.slot(name):
                calls = (denoiser(**self.at(name, step)) for step in range(self.steps))
                outputs[name] = [tensors(output)[0] for output in calls]
        return outputs

    def batched(self, denoiser: Any) -> dict[str, list[torch.Tensor]]:
        """Each request's outputs, all requests that are there in one call."""
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        open_ones: dict[str, ExitStack] = {}
        call = 0
        while steps := self.live(call):
            for name in steps.keys() - open_ones.keys():
                open_ones[name] = ExitStack()
                solve = denoiser.trajectory(num_steps=self.steps, slot=name)
                open_ones[name].enter_context(solve)
            with torch.no_grad(), denoiser.batch(list(steps), rows_per_request=self.rows):
                output = tensors(denoiser(**self.together(steps)))[0]
            for name, part in zip(steps, output.chunk(len(steps)), strict=True):
                outputs[name].append(part)
            for name, step in steps.items():
                if step == self.steps - 1:
                    open_ones[name].close()
            call += 1
        return outputs


def decisions(denoiser: Any, request: str) -> list[tuple[bool, Any]]:
    """Of a request: whether each evaluation hit, and why not."""
    return [(record.is_hit, record.reason) for record in denoiser.report(request).records]


def together(denoiser, names, *given, **options):
    with torch.no_grad(), denoiser.batch(names, **options):
        return denoiser(*given)


def of_net(step, requests=2, seed=0):
    """Rows of a small net: one a request."""
    x, t = tokens(step, seed)
    return x.repeat(requests, 1, 1)[:requests].clone(), t[:1].repeat(requests)
