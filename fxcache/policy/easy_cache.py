"""EasyCache: skip the whole model while its output is predicted to move little."""

from dataclasses import dataclass

from fxcache.policy.base import Decision, History, Span
from fxcache.policy.named import ThresholdPolicy
from fxcache.policy.probe import ModelInput
from fxcache.policy.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class EasyCache(ThresholdPolicy):
    """Reuse the whole model's residual (output minus input) while the output moves little.

    The metric predicts how far the output has moved since the previous step from how far the input
    has, at the rate of the last two computed steps (see `fxcache.policy.probe.ModelInput`); it is
    summed since the last computed step. Nothing of the model runs on a hit. Source: EasyCache
    (arXiv 2507.02860).

    Args:
        threshold: a hit needs a sum below this, in [0, inf]. 0.05 is published for Wan2.1, 0.025
            for HunyuanVideo.
        warmup_steps, final_steps: computed steps at the trajectory's start and end. The number of
            steps must be announced (``denoiser.trajectory(num_steps=...)``) or `final_steps` be 0.
        decide: "first": the first branch of a step (cond) decides for the others.
        start, end, max_consecutive_hits: see `ThresholdPolicy`.
        forecast, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range; at the first evaluation that needs it, if the
            number of steps is not known.
    """

    threshold: float = 0.05
    warmup_steps: int = 10
    final_steps: int = 1
    decide: str = "first"

    @property
    def probe(self) -> ModelInput:
        return ModelInput()

    @property
    def span(self) -> Span:
        return Span(whole_model=True)

    def forced(self, history: History) -> Decision | None:
        """The miss that must be, also before there is a rate."""
        if (miss := super().forced(history)) is not None or history.computed >= 2:
            return miss
        return Decision(False, Reason.NO_RATE)
