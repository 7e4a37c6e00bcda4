"""Call the user's own sampling function, with a denoiser that follows a policy of ours."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fxcache.capture.runner import Runner
from fxcache.denoiser import DenoiserMethods, check_model, make_denoiser, other_policy
from fxcache.errors import OptionError, ProfileError
from fxcache.options import Options
from fxcache.pipelines.components import COMPONENTS, put
from fxcache.policy import Policy, StepSchedule

#: The name of a lone argument of `run` that gets the denoiser, where run could do without.
_TARGET_NAMES = {"denoiser", "pipe", "pipeline", "model", "transformer", "unet", "d", "m", "p"}

Run = Callable[..., Any]
Seen = TypeVar("Seen", bound=Callable[..., None])


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

    def following(self, policy: Policy) -> AbstractContextManager[Runner]:
        """Inside, the denoiser follows `policy`."""
        return other_policy(self.denoiser, policy)

    def call(self, runner: Runner, seed: int, make: Callable[[], Seen]) -> tuple[Any, Seen]:
        """What the function returned, and an observer (`Session.observe`) made by `make`.

        The denoiser's state is clean before, torch's global generators are seeded inside and
        restored afterwards. Where it is seen only in the midst that timesteps rise along this
        sampler's trajectories, the first steps were taken for trajectories, so it is called again.
        Raises ProfileError if the function raises.
        """
        session = runner.session
        for _ in range(2):
            rising = session.steps.rising
            runner.reset()
            session.steps.rising = rising
            session.observe = seen = make()
            try:
                result = self._called(seed)
            finally:
                session.observe = None
            if session.steps.rising == rising:
                break
        return result, seen

    def _called(self, seed: int) -> Any:
        bound = arguments(self.run, self.target, self.denoiser, seed)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            try:
                return self.run(*bound.args, **bound.kwargs)
            except Exception as error:
                raise ProfileError(
                    f"run raised {type(error).__name__} with seed {seed}: {error}"
                ) from error


def arguments(run: Run, target: Any, denoiser: Any, seed: int) -> inspect.BoundArguments:
    """run(), run(seed), run(denoiser_or_pipe) or run(denoiser_or_pipe, seed).

    Of the arguments without a default, one that is called seed gets the seed, and of two the second
    one. A lone one of another name gets the target if it is named like one. In the place of a plain
    model, which a function cannot call by itself, it gets the denoiser. An argument with a default
    is left alone, unless it is called seed. Raises OptionError for a function that needs others.
    """
    if not callable(run):
        raise OptionError(f"run must be a function that samples, got {run!r}")
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError) as error:
        raise OptionError(f"run must have a signature, got {run!r}: {error}") from error
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in signature.parameters.values() if p.kind not in various]
    seeds = [p.name for p in named if p.name == "seed"]
    others = [p.name for p in named if p.default is p.empty and p.name != "seed"]
    is_plain = isinstance(target, nn.Module) and not isinstance(target, DenoiserMethods)
    if len(others) == 2 and not seeds:
        seeds = [others.pop()]
    elif len(others) == 1 and not seeds and not is_plain and others[0] not in _TARGET_NAMES:
        seeds, others = others, []
    if len(others) > 1:
        raise OptionError(
            f"run must take at most two arguments, (denoiser_or_pipe, seed), got {signature}"
        )
    if is_plain and not others:
        raise OptionError(
            f"run must take the denoiser as its argument where a {type(target).__name__} is given: "
            f"run(denoiser, seed). Or pass fxcache.transform(model, ...), and let run call that"
        )
    given = denoiser if is_plain else target
    values = {**dict.fromkeys(others, given), **dict.fromkeys(seeds, seed)}
    in_order = OrderedDict((p.name, values[p.name]) for p in named if p.name in values)
    return inspect.BoundArguments(signature, in_order)


@contextmanager
def sampler_for(target: Any, run: Run, component: str | None = None) -> Iterator[Sampler]:
    """`target` (a denoiser, a model, or a pipeline) and `run`, ready to sample.

    A pipeline's model is replaced by a denoiser inside (``backend="eager"``), and is itself again
    afterwards. Raises OptionError for a `run` that takes other arguments, a target without a
    denoiser, or with several if `component` does not say which.
    """
    arguments(run, target, None, 0)
    name, model = ("", target) if isinstance(target, nn.Module) else _in_pipeline(target, component)
    with ExitStack() as undo:
        denoiser: Any = model
        if not isinstance(model, DenoiserMethods):
            check_model(model)
            options = Options(backend="eager")
            denoiser = make_denoiser(model, StepSchedule(mask=[False]), options)
            if name:
                put(target, name, denoiser)
                undo.callback(object.__setattr__, target, name, model)
        yield Sampler(target, run, denoiser)


def _in_pipeline(pipe: Any, component: str | None) -> tuple[str, nn.Module]:
    """The denoiser of a pipeline, and its name there."""
    names = [name for name in COMPONENTS if component in (None, name)]
    found = {name: getattr(pipe, name, None) for name in names}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if len(models) != 1:
        raise OptionError(
            f"{type(pipe).__name__} must have one denoiser ({', '.join(COMPONENTS)}), got "
            f"{sorted(models) or 'none'}; with several, say component=..."
        )
    (only,) = models.items()
    return only


def as_tensor(result: Any) -> torch.Tensor:
    """What a sampling function returned, as float64 on the CPU: tensors, arrays and pictures, also
    in lists, dicts and pipelines' outputs (without what is None). Whole numbers are divided by 255.

    Raises ProfileError for something else, and for nothing.
    """
    sample = _as_tensor(result)
    if not sample.numel():
        raise ProfileError("run must return what was sampled, got nothing")
    return sample


def _as_tensor(result: Any) -> torch.Tensor:
    for name in ("images", "frames", "audios", "sample"):
        if hasattr(result, name):
            return _as_tensor(getattr(result, name))
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        parts = [_as_tensor(part).flatten() for part in result if part is not None]
        return torch.cat(parts) if parts else torch.empty(0)
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
    range. inf for equal samples, -inf for a sample that is not finite.
    """
    low, high = float(reference.min()), float(reference.max())
    peak = 1.0 if low >= 0 and high <= 1 else high - low
    error = float((sample - reference).square().mean())
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak and math.isfinite(error) else -math.inf
