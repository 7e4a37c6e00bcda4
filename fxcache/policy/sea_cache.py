"""SeaCache: skip while the signal in the model's input, without its noise, changes little."""

from dataclasses import dataclass

from fxcache.policy.checks import check_number
from fxcache.policy.forecast import Forecast, Taylor
from fxcache.policy.named import ThresholdPolicy
from fxcache.policy.probe import FilteredInput


@dataclass(frozen=True, kw_only=True)
class SeaCache(ThresholdPolicy):
    """Reuse the stack's residual while the input's signal changes little.

    The noisy input goes through a filter that keeps what is signal at its noise level (of a signal
    whose spectrum falls with the frequency's `power`); its residual diff to the previous step, mean
    over the samples, is summed since the last computed step. The noise level is the time input,
    divided by 1000 where it is above 1 (flow matching). Pictures and videos are filtered along
    height, width and frames; sequences of tokens along the sequence. Source: SeaCache (arXiv
    2602.18993), defaults as in diffusers.

    Args:
        threshold: a hit needs a sum below this, in [0, inf].
        power: exponent of the signal's spectrum, above 0.
        warmup_steps, final_steps: computed steps at the trajectory's start and end. The number of
            steps must be announced (``denoiser.trajectory(num_steps=...)``) or `final_steps` be 0.
        max_consecutive_hits, start, end: see `ThresholdPolicy`.
        forecast, decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range; at the first evaluation that needs it, if the
            number of steps is not known.
    """

    threshold: float = 0.25
    power: float = 3.0
    warmup_steps: int = 1
    final_steps: int = 1
    max_consecutive_hits: int | None = 2
    forecast: Forecast = Taylor(order=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("power", self.power, "(0, inf)")

    @property
    def probe(self) -> FilteredInput:
        return FilteredInput(power=self.power)
