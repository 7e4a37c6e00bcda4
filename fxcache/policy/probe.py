"""Probes: what a policy measures. The passes find it in the graph and write the measurement.

Each has a `reference`: the probe is compared with its value at the last "computed" step, or at the
"previous" step, computed or not; and `needs`: so many steps must have been computed before the
metric means anything.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class HeadResidual:
    """The residual of the head blocks on the image stream; the metric is its residual diff."""

    reference: ClassVar[str] = "computed"
    needs: ClassVar[int] = 1


@dataclass(frozen=True)
class ModulatedInput:
    """What the first block's first layer reads of the image stream: the stream after norm and
    modulation. The metric is its residual diff to the previous step.
    """

    reference: ClassVar[str] = "previous"
    needs: ClassVar[int] = 1


@dataclass(frozen=True)
class TimeEmbedding:
    """What the layers on the time input make of it: `layer` 1 is the time embedding (the result of
    the embedder's second layer), 2 its projection to the blocks' modulation. The metric is its
    residual diff to the previous step.
    """

    layer: int = 1
    reference: ClassVar[str] = "previous"
    needs: ClassVar[int] = 1


@dataclass(frozen=True)
class FilteredInput:
    """The model's noisy input through a filter that keeps what is signal at its noise level, as
    SeaCache defines it (see `fxcache.kernels.spectral`). `power` is the exponent of the signal's
    spectrum. The metric is the mean over the samples of their residual diffs to the previous step.
    """

    power: float = 3.0
    reference: ClassVar[str] = "previous"
    needs: ClassVar[int] = 1


@dataclass(frozen=True)
class ModelInput:
    """The model's noisy input, and how fast the output followed it.

    The metric predicts how far the output has moved since the previous step, relative to its size:
    ``k * mean|x - x_previous| / mean|o_c|`` with the rate ``k = mean|o_c - o_b| / mean|x_c - x_b|``
    of the last two computed steps b and c. It means nothing before two steps were computed.
    """

    reference: ClassVar[str] = "previous"
    needs: ClassVar[int] = 2


ProbeKind = HeadResidual | ModulatedInput | TimeEmbedding | FilteredInput | ModelInput
