"""Call the user's own sampling function, with a denoiser that follows a policy of ours."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcache.api import transform
from fxcache.denoiser import DenoiserMethods, other_policy
from fxcache.errors import OptionError, ProfileError
from fxcache.policy import Policy, StepSchedule
from fxcache.runner import Runner

#: Where pipelines keep their denoisers.
COMPONENTS = ("transformer", "transformer_2", "unet")
_TARGET_NAMES = {"denoiser", "pipe", "pipeline", "model", "transformer", "unet"}

Run = Callable[..., Any]


@dataclass
class Sampler:
    """The user's sampling function and the denoiser that it calls."""

    target: Any
    run: Run
    denoiser: DenoiserMethods

    @property
    def model(self) -> nn.Module:
        return self.denoiser._fxcache.model

    @property
    def name(self) -> str:
        """What samples: the pipeline's scheduler, or the function."""
        scheduler = getattr(self.target, "scheduler", None)
        if scheduler is not None:
            return type(scheduler).__name__
        return str(getattr(self.run, "__qualname__", type(self.run).__name__))

    @contextmanager
    def following(self, policy: Policy) -> Iterator[Runner]:
        """Inside, the denoiser follows `policy`."""
        with other_policy(self.denoiser, policy) as runner:
            yield runner

    def sample(self, seed: int) -> torch.Tensor:
        """What the function returns, as one float64 vector or tensor on the CPU.

        The global generators are seeded inside and restored afterwards. Raises ProfileError if the
        function raises.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                result = self.run(*self._arguments(seed))
            except Exception as error:
                raise ProfileError(
                    f"run raised {type(error).__name__} with seed {seed}: {error}"
                ) from error
        return as_tensor(result)

    def _arguments(self, seed: int) -> list[Any]:
        """run(), run(seed), run(denoiser_or_pipe) or run(denoiser_or_pipe, seed)."""
        names = required_arguments(self.run)
        if len(names) > 2:
            raise OptionError(
                f"run must take at most two arguments, (denoiser_or_pipe, seed), got {names}"
            )
        given = self.denoiser if isinstance(self.target, nn.Module) else self.target
        if len(names) == 1:
            return [given if names[0] in _TARGET_NAMES else seed]
        return [given, seed][: len(names)]


def required_arguments(run: Run) -> list[str]:
    """The names of the positional arguments that `run` must be given."""
    if not callable(run):
        raise OptionError(f"run must be a function that samples, got {run!r}")
    parameters = inspect.signature(run).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters if p.kind in kinds]
    return [p.name for p in named if p.default is p.empty or p.name == "seed"]


@contextmanager
def sampler_for(target: Any, run: Run, component: str | None = None) -> Iterator[Sampler]:
    """`target` (a denoiser, a model, or a pipeline) and `run`, ready to sample.

    A pipeline's model is replaced by a denoiser inside (``backend="eager"``), and is itself again
    afterwards. Raises OptionError for a target without a denoiser, or with several if `component`
    does not say which.
    """
    required_arguments(run)
    if isinstance(target, DenoiserMethods):
        yield Sampler(target, run, target)
    elif isinstance(target, nn.Module):
        if not required_arguments(run):
            raise OptionError(
                f"run must take the denoiser as its argument where a {type(target).__name__} is "
                f"given: run(denoiser, seed). Or pass fxcache.transform(model, ...), and let run "
                f"call that"
            )
        yield Sampler(target, run, _eager(target))
    else:
        with ExitStack() as undo:
            yield Sampler(target, run, _in_pipeline(target, component, undo))


def _eager(model: nn.Module) -> Any:
    return transform(model, StepSchedule(mask=[False]), backend="eager")


def _in_pipeline(pipe: Any, component: str | None, undo: ExitStack) -> Any:
    """The denoiser of a pipeline, put in its place."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if component is not None:
        models = {name: model for name, model in models.items() if name == component}
    if len(models) != 1:
        raise OptionError(
            f"{type(pipe).__name__} must have one denoiser ({', '.join(COMPONENTS)}), got "
            f"{sorted(models) or 'none'}; with several, say component=..."
        )
    ((name, model),) = models.items()
    if isinstance(model, DenoiserMethods):
        return model
    denoiser = _eager(model)
    setattr(pipe, name, denoiser)
    undo.callback(setattr, pipe, name, model)
    return denoiser


def as_tensor(result: Any) -> torch.Tensor:
    """What a sampling function returned, as float64 on the CPU: tensors, arrays and pictures, also
    in lists and in pipelines' outputs. Whole numbers are divided by 255.
    """
    for name in ("images", "frames", "audios", "sample"):
        if hasattr(result, name):
            return as_tensor(getattr(result, name))
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple) and result:
        return torch.cat([as_tensor(part).flatten() for part in result])
    values = result if isinstance(result, torch.Tensor) else _from_array(result)
    is_picture = not values.is_floating_point()
    return values.detach().to("cpu", torch.float64) / (255 if is_picture else 1)


def _from_array(result: Any) -> torch.Tensor:
    """An array, or a picture, as a tensor."""
    try:
        import numpy

        return torch.from_numpy(numpy.array(result))
    except Exception as error:
        raise ProfileError(
            f"run must return what was sampled (tensors, arrays or pictures), got a "
            f"{type(result).__name__}"
        ) from error


def psnr(sample: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB; the peak is 1 for values in [0, 1], else the reference's
    range. inf for equal samples, NaN if a sample is not finite.
    """
    low, high = float(reference.min()), float(reference.max())
    peak = 1.0 if low >= 0 and high <= 1 else high - low
    error = (sample - reference).square().mean()
    return float(10 * torch.log10(peak**2 / error))
