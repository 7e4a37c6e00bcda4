"""What a pipeline of the tests' zoo is (`pipelines.PIPELINES`), and how its entries are written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from pipeline_parts import TOKENS, seeded

from fxcache.pipelines.tiny import tiny_model

NEGATIVE = "very dull"


@dataclass(frozen=True)
class Family:
    """A pipeline of the zoo.

    `arguments` are those of a call besides the usual ones, given its size and batch. `branches` are
    the names in the report. `first_step` is the first of `steps` steps that is run, `sections` the
    solves of one call. `sizes` are a smaller and a larger one, `batch` is the largest batch.
    `dynamic` goes to fxcache.apply.
    """

    build: Callable[[], Any]
    arguments: Callable[[int, int], dict[str, Any]]
    branches: tuple[Any, ...] = (None,)
    first_step: Callable[[int], int] = lambda steps: 0
    sections: int = 1
    sizes: tuple[int, int] = (32, 48)
    batch: int = 2
    dynamic: bool | None = None

    def call(
        self, pipe: Any, prompt: str, *, steps: int, size: int, batch: int, seed: int = 0
    ) -> torch.Tensor:
        """Run the pipeline, VAE included."""
        prompts = [prompt[i:] + prompt[:i] for i in range(batch)]
        negative = [NEGATIVE] * batch
        output = pipe(
            prompt=prompts if batch > 1 else prompt,
            negative_prompt=negative if batch > 1 else NEGATIVE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **self.arguments(size, batch),
        )[0]
        assert torch.is_tensor(output)
        assert output.isfinite().all()
        return output


PIPELINES: dict[str, Family] = {}


def family(arguments: Callable[[int, int], dict[str, Any]], **options: Any):
    """Register the builder of a pipeline under its name."""

    def register(build: Callable[[], Any]):
        PIPELINES[build.__name__] = Family(build, arguments, **options)
        return build

    return register


def variant(arguments: Callable[[int, int], dict[str, Any]], **options: Any):
    """A family whose architecture another one has, too: without dynamic shapes, which take long to
    capture.
    """
    return family(arguments, dynamic=False, **options)


def pipeline(cls: str, **components: Any) -> Any:
    pipe = getattr(diffusers, cls)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(cls: str, seed: int = 0, **config: Any) -> Any:
    """A tiny transformer with as few blocks as can be: it is captured often."""
    config = {"num_layers": 2, **config}
    return seeded(lambda: tiny_model(cls, **config)[0], seed=seed)


def picture(size: int, batch: int = 1, channels: int = 3, seed: int = 7) -> torch.Tensor:
    """A picture to start from, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, size, size, generator=generator)


def half(steps: int) -> int:
    return steps // 2


def square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def text(size: int) -> dict[str, int]:
    return {**square(size), "max_sequence_length": TOKENS}


def video(size: int) -> dict[str, int]:
    return {**text(size), "num_frames": 5}
