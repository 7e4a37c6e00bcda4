"""TeaCache: skip while a polynomial of the modulated input's change stays small."""

from collections.abc import Sequence
from dataclasses import dataclass

from fxcache.errors import PolicyError
from fxcache.policy.checks import checked_numbers
from fxcache.policy.named import ThresholdPolicy
from fxcache.policy.probe import ModulatedInput, TimeEmbedding

#: What `signal` may be, and the probe that measures it.
SIGNALS: dict[str, ModulatedInput | TimeEmbedding] = {
    "modulated_input": ModulatedInput(),
    "time_embedding": TimeEmbedding(layer=1),
    "time_projection": TimeEmbedding(layer=2),
}
DEGREE = 4


@dataclass(frozen=True, kw_only=True)
class TeaCache(ThresholdPolicy):
    """Reuse the stack's residual while a calibrated polynomial predicts a small change.

    The metric d is the residual diff of a signal to its value at the previous step; the score
    ``|c_4 d^4 + ... + c_0|`` is summed since the last computed step. Source: TeaCache (arXiv
    2411.19108).

    Args:
        coefficients: of the polynomial of degree 4, highest power first; of `signal`, calibrated
            for the model (`fxcache.preset`, `fxcache.calibrate`).
        threshold: a hit needs a sum below this, in [0, inf].
        signal: what is measured: "modulated_input" of the first block, the "time_embedding", or
            its "time_projection" to the blocks' modulation.
        warmup_steps, final_steps: computed steps at the trajectory's start and end. The number of
            steps must be announced (``denoiser.trajectory(num_steps=...)``) or `final_steps` be 0.
        start, end, max_consecutive_hits: see `ThresholdPolicy`.
        forecast, decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range; at the first evaluation that needs it, if the
            number of steps is not known.
    """

    coefficients: Sequence[float]
    threshold: float = 0.25
    signal: str = "modulated_input"
    warmup_steps: int = 1
    final_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        values = checked_numbers("coefficients", self.coefficients, "(-inf, inf)")
        if len(values) != DEGREE + 1:
            raise PolicyError(
                f"coefficients must be {DEGREE + 1} numbers (a polynomial of degree {DEGREE}, "
                f"highest power first), got {len(values)}"
            )
        object.__setattr__(self, "coefficients", values)
        if self.signal not in tuple(SIGNALS):
            raise PolicyError(f"signal must be one of {tuple(SIGNALS)}, got {self.signal!r}")

    @property
    def probe(self) -> ModulatedInput | TimeEmbedding:
        return SIGNALS[self.signal]

    def score(self, metric: float) -> float:
        """The polynomial's absolute value at `metric`."""
        total = 0.0
        for coefficient in self.coefficients:
            total = total * metric + coefficient
        return abs(total)
