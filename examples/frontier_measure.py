"""How `benchmark_frontier.py` samples, counts and compares; imported by that script.

Pictures are sampled in batches, each with noise of its own: every contestant gets the same, and
decides for a batch at a time. What is compared is always the uncached sampler's picture from the
same noise. Settings are screened and tables calibrated on seeds that are not evaluated.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_adaptive import SAMPLERS
from benchmark_adaptive import load as load_model
from benchmark_adaptive import sample as sample_with
from contestants import silent_stderr

from fxcache.demo import metrics
from fxcache.demo.sampler import GUIDANCE, sample

#: Seeds that only choose settings, and those that only make tables and schedules.
SCREENING_SEED, CALIBRATION_SEED = 100, 200
#: The noise level at which the denoiser looks at pictures for the feature distance.
FEATURE_TIME = 0.1

#: The labels of a batch and its seed.
Chunk = tuple[torch.Tensor, int]
#: Pictures of a chunk, and the share of block calls that was computed for them.
Sampler = Callable[[torch.Tensor, int], tuple[torch.Tensor, float]]
#: A setting's name, and what makes the peer ready with it.
Settings = Iterator[tuple[str, Callable[[], Sampler]]]


@dataclass(frozen=True)
class Task:
    """What everybody has to sample."""

    steps: int = 30
    images: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 4
    #: A folder that `train_demo.py` wrote; None is the denoiser that ships with fxcache.
    model: Path | None = None

    @functools.cached_property
    def predicts_noise(self) -> bool:
        return load_model(self.model)[1] == "epsilon"

    def sample(
        self, denoiser: Any, labels: torch.Tensor, seed: int, steps: int | None = None
    ) -> torch.Tensor:
        """Pictures as the demo samples them (Euler), or by DDIM if the model predicts the noise."""
        steps = steps or self.steps
        if not self.predicts_noise:
            return sample(denoiser, labels, steps=steps, seed=seed)
        with torch.no_grad():
            scheduler = SAMPLERS["epsilon"]["euler"]()
            return sample_with(denoiser, scheduler, labels, seed, steps, GUIDANCE)

    def noise_share(self, timestep: torch.Tensor) -> float:
        """The noise's share of noise and picture there: flow matching's sigma."""
        if not self.predicts_noise:
            return float(timestep) / 1000
        kept = float(SAMPLERS["epsilon"]["euler"]().alphas_cumprod[int(timestep)])
        return (1 - kept) ** 0.5 / ((1 - kept) ** 0.5 + kept**0.5)

    def load(self) -> Any:
        """A new copy of the denoiser, in which nothing is patched."""
        return load_model(self.model)[0]

    def weights(self) -> str:
        """A digest of the denoiser's weights."""
        state = self.load().state_dict()
        return hashlib.sha256(
            b"".join(state[k].numpy().tobytes() for k in sorted(state))
        ).hexdigest()

    def chunks(self, seeds: tuple[int, ...] | None = None, images: int = 0) -> list[Chunk]:
        """Batches of `images` pictures a seed (default: those that are evaluated)."""
        count, classes = images or self.images, self.load().config.num_embeds_ada_norm
        return [
            (torch.arange(start, min(start + self.batch, count)) % classes, 1000 * seed + start)
            for seed in (self.seeds if seeds is None else seeds)
            for start in range(0, count, self.batch)
        ]

    def calibration_run(self, denoiser: Any, images: int = 16) -> torch.Tensor:
        """Sample pictures for calibration: on a seed that is neither screened nor evaluated."""
        chunks = self.chunks((CALIBRATION_SEED,), images)
        return torch.cat([self.sample(denoiser, c, s) for c, s in chunks])


class BlockCounter:
    """The share of block calls that a model really computes.

    Hooks on a linear layer within attention and one within feed-forward: caches that replace a
    block's forward, or attention's, do not get there. Each counts as its share of a block's
    multiplications (norms, embeddings and what a forecast costs are not counted: about 1 %).
    """

    def __init__(self, model: Any, evaluations: int) -> None:
        self.computed = 0.0
        self.total = len(model.transformer_blocks) * evaluations
        self.attention_share = attention_share(model)
        for block in model.transformer_blocks:
            weights = (self.attention_share, 1 - self.attention_share)
            parts = (block.attn1.to_q, block.ff.net[-1])
            for part, weight in zip(parts, weights, strict=True):
                part.register_forward_hook(functools.partial(self._count, weight))

    def _count(self, weight: float, *_: Any) -> None:
        self.computed += weight

    def take(self) -> float:
        """The share since the last call."""
        share, self.computed = self.computed / self.total, 0.0
        return share


def attention_share(model: Any) -> float:
    """Attention's share of a block's multiplications."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = (config.sample_size // config.patch_size) ** 2
    attention = 4 * width**2 + 2 * tokens * width
    return float(attention / (attention + 8 * width**2))


def dispatched_share(run: Sampler, chunk: Chunk, task: Task) -> tuple[float, float]:
    """The share that `run` says it computed for one chunk, and the one that torch's profiler saw.

    Whatever wraps or rewrites the model: a computed block is one attention and one GELU.
    """
    with silent_stderr(), torch.autograd.profiler.profile(use_kineto=False) as profiler:
        _, said = run(*chunk)
    names = Counter(event.name for event in profiler.function_events)
    model = task.load()
    weight = attention_share(model)
    # Where the model's graph is one of ATen's operations, attention goes by its kernel's name.
    kernel, whole = "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"
    attentions = max(names[f"aten::{kernel}"], names[f"aten::{whole}"])
    seen = attentions * weight + names["aten::gelu"] * (1 - weight)
    return said, seen / (task.steps * len(model.transformer_blocks))


class Judge:
    """The uncached pictures, made once, and the distances to them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.load()
        self._pictures: dict[int, torch.Tensor] = {}
        self._features: dict[int, torch.Tensor] = {}
        size = self.model.config.sample_size
        self._grey = self.features(torch.full((1, 3, size, size), 0.5))

    def reference(self, chunk: Chunk) -> torch.Tensor:
        labels, seed = chunk
        if seed not in self._pictures:
            self._pictures[seed] = self.task.sample(self.model, labels, seed)
            self._features[seed] = self.features(self._pictures[seed])
        return self._pictures[seed]

    @torch.no_grad()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the denoiser's middle block makes of pictures with a little noise, unconditioned.

        No download has a perceptual network for 32 x 32 emoji; the denoiser itself has learnt what
        matters in them. Everybody gets the same noise.
        """
        noise = torch.randn(pictures[:1].shape, generator=torch.Generator().manual_seed(0))
        noisy = (1 - FEATURE_TIME) * (2 * pictures - 1) + FEATURE_TIME * noise
        kept: list[torch.Tensor] = []
        blocks = self.model.transformer_blocks
        hook = blocks[len(blocks) // 2].register_forward_hook(lambda *given: kept.append(given[2]))
        self.model(
            noisy,
            timestep=torch.full((len(pictures),), FEATURE_TIME * 1000),
            class_labels=torch.full((len(pictures),), self.model.config.num_embeds_ada_norm),
        )
        hook.remove()
        return kept[0].flatten(1)

    def compare(self, pictures: torch.Tensor, chunk: Chunk) -> dict[str, list[float]]:
        """PSNR, SSIM and feature distance of each picture.

        The feature distance is relative: 1 is as far as the uncached picture is from plain grey.
        """
        reference = self.reference(chunk)
        features = self._features[chunk[1]]
        distance = (self.features(pictures) - features).norm(dim=1)
        pairs = list(zip(pictures.split(1), reference.split(1), strict=True))
        return {
            "psnr": [metrics.psnr(a, b) for a, b in pairs],
            "ssim": [metrics.ssim(a, b) for a, b in pairs],
            "features": (distance / (features - self._grey).norm(dim=1)).tolist(),
        }


WORST: dict[str, Callable[[list[float]], float]] = {"psnr": min, "ssim": min, "features": max}


def measure(
    run: Sampler, judge: Judge, chunks: list[Chunk], on_chunk: Callable[[], object]
) -> dict[str, Any]:
    """Sample all `chunks`: the share of computed blocks, and mean and worst of each distance."""
    values: dict[str, list[float]] = {name: [] for name in WORST}
    shares = []
    for chunk in chunks:
        pictures, share = run(*chunk)
        shares += [share] * len(pictures)
        for name, more in judge.compare(pictures, chunk).items():
            values[name] += more
        on_chunk()
    figures: dict[str, Any] = {"images": len(shares), "share": round(statistics.fmean(shares), 6)}
    figures["speedup"] = round(1 / figures["share"], 4)
    for name, found in values.items():
        mean, worst = statistics.fmean(found), WORST[name](found)
        figures[name] = {"mean": round(mean, 4), "worst": round(worst, 4)}
        if len(found) > 1:
            spread = statistics.stdev(found) / len(found) ** 0.5
            figures[name]["standard_error"] = round(spread, 4)
    figures["psnr"]["each"] = [round(value, 2) for value in values["psnr"]]
    return figures


@contextlib.contextmanager
def silence() -> Iterator[io.StringIO]:
    """What Python code prints inside goes into the text that this yields."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def named(**values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def grid(**choices: Any) -> Iterator[dict[str, Any]]:
    """All combinations of the choices."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def regular_masks(steps: int) -> dict[str, list[bool]]:
    """Where hits are if every nth step is computed after a warm-up, and the last one too."""
    return {
        f"warm-up {warmup}, every {every}": [
            step >= warmup and (step - warmup + 1) % every != 0 and step < steps - 1
            for step in range(steps)
        ]
        for warmup, every in itertools.product((2, 4, 6, 9), (2, 3, 4, 5))
    }
