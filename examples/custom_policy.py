"""A policy of one's own, without a change anywhere else in fxcache.

    python examples/custom_policy.py

The longer the hits go on, the less the first block may have moved. Runs on
the demo's trained denoiser and prints which of 30 steps were hits.
"""

from dataclasses import dataclass

import torch

import fxcache
from fxcache.policy import Decision, Forecast, History, Span, Taylor
from fxcache.policy.probe import HeadResidual


@dataclass(frozen=True, kw_only=True)
class CalmSteps:
    """Hit while the residual diff times the steps since the last miss stays below `budget`."""

    budget: float = 0.5
    probe: HeadResidual | None = HeadResidual()  # what is measured
    span: Span = Span(head_blocks=1)  # what a hit skips
    forecast: Forecast = Taylor(order=1)  # what stands in for it
    decide: str = "each"

    def rule(self, metric: float, history: History) -> Decision:
        if not history.past or history.step < 3:
            return Decision(False, "warm-up")
        score = metric * (history.hits_in_a_row + 1)
        return Decision(score < self.budget, None if score < self.budget else "moving", score)


def main() -> None:
    from fxcache.demo.sampler import load_denoiser, sample

    model, _ = load_denoiser()
    denoiser = fxcache.transform(model, CalmSteps(), backend="eager")
    pictures = sample(denoiser, torch.arange(2), steps=30, seed=0)
    print(denoiser.report())
    print(f"sampled {list(pictures.shape)}")


if __name__ == "__main__":
    main()
