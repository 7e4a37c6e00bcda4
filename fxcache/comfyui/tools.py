"""The nodes that sample, compile and measure."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import nodes as core
import numpy
import torch
from comfy_api.latest import io, ui
from comfy_api.torch_helpers import set_torch_compile_wrapper
from PIL import Image

import fxcache
from fxcache.comfyui.nodes import config_of, schema
from fxcache.comfyui.policies import METHODS, policy_for, schedule_for
from fxcache.comfyui.sampling import COMPILE_OPTIONS, Cache, cached, denoiser_of, last_denoiser


class FxCacheSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheSchedule",
            "fxcache Schedule",
            "Computes the steps that are named and reuses on the others.",
            [
                io.String.Input(
                    "schedule",
                    default="every 2",
                    tooltip='"every 2", the steps that are computed ("0 1 2 5 8"), or a file of '
                    "fxcache Tune.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, schedule: str) -> io.NodeOutput:
        schedule_for(schedule, 1_000_000)  # a text that is none is said here, not while sampling
        return io.NodeOutput(cached(model, Cache(lambda steps: schedule_for(schedule, steps))))


class FxCacheCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        modes = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
        return schema(
            "FxCacheCompile",
            "fxcache Compile",
            "Compiles the model with torch.compile; with one of fxcache's other nodes before or "
            "after it, the pieces that these make of it.",
            [
                io.Combo.Input("mode", options=modes, default="default"),
                io.Combo.Input(
                    "dynamic",
                    options=["auto", "true", "false"],
                    default="auto",
                    tooltip="auto: the second size is compiled for all sizes.",
                ),
                io.Boolean.Input("fullgraph", default=False),
                io.String.Input(
                    "options",
                    default="",
                    multiline=True,
                    tooltip='The compiler\'s options as JSON, such as {"max_autotune": true}.',
                ),
                io.String.Input("backend", default="inductor"),
                io.Boolean.Input("disable", default=False),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        mode: str,
        dynamic: str,
        fullgraph: bool,
        options: str,
        backend: str,
        disable: bool,
    ) -> io.NodeOutput:
        if disable:
            return io.NodeOutput(model)
        clone = model.clone()
        set_torch_compile_wrapper(
            model=clone,
            backend=backend,
            options=parsed_options(options),
            mode=None if mode == "default" else mode,
            fullgraph=fullgraph,
            dynamic={"auto": None, "true": True, "false": False}[dynamic],
        )
        return io.NodeOutput(clone)


def parsed_options(text: str) -> dict[str, Any] | None:
    """The compiler's options of a JSON text. Raises OptionError for what is none."""
    if not text.strip():
        return None
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise fxcache.OptionError(f"options must be JSON, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise fxcache.OptionError(f"options must be a JSON object, got {text!r}")
    return options


def sampling_inputs() -> list[Any]:
    """What KSampler asks for, but for `denoise`."""
    kinds = comfy.samplers.KSampler
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
        io.Int.Input("steps", default=20, min=1, max=10000),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
        io.Combo.Input("sampler_name", options=kinds.SAMPLERS),
        io.Combo.Input("scheduler", options=kinds.SCHEDULERS),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Latent.Input("latent_image"),
    ]


class FxCacheKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheKSampler",
            "KSampler (fxcache)",
            "KSampler with the cache in it (in the place of KSampler (EasyCache)).",
            [
                *sampling_inputs(),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Boolean.Input("enabled", default=True),
                io.Combo.Input("policy", options=list(METHODS), default="adaptive"),
                io.Float.Input("tolerance", default=0.08, min=0.0, max=10.0, step=0.001),
                io.Int.Input("warmup_steps", default=0, min=0, max=1000),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        enabled: bool,
        policy: str,
        tolerance: float,
        warmup_steps: int,
        **given: Any,
    ) -> io.NodeOutput:
        if enabled:
            chosen = policy_for(policy, tolerance, model_config=config_of(model))
            end = 2**31  # of every run
            model = cached(model, Cache(chosen, steps=(warmup_steps, end)))
        latent = given.pop("latent_image")
        return io.NodeOutput(*core.common_ksampler(model, latent=latent, **given))


class Trial:
    """The user's sampler as `fxcache.tune` and `fxcache.calibrate` call it: by a seed.

    `given` is what `sampling_inputs` asks for, but for the seed.
    """

    def __init__(self, runs: int, model: Any, **given: Any) -> None:
        self.model, self.given = cached(model, Cache(None)), given
        self.bar = comfy.utils.ProgressBar(runs * given["steps"])
        options = model.model_options.get(COMPILE_OPTIONS) or {"backend": "eager"}
        diffusion_model = model.model.diffusion_model
        self.denoiser = denoiser_of(model.model, diffusion_model, fxcache.AdaptiveCache(), options)

    def __call__(self, seed: int) -> torch.Tensor:
        latent = self.given["latent_image"]["samples"]
        latent = comfy.sample.fix_empty_latent_channels(self.model, latent)
        noise = comfy.sample.prepare_noise(latent, seed)
        given = {**self.given, "latent_image": latent, "seed": seed, "disable_pbar": True}
        samples: torch.Tensor = comfy.sample.sample(
            self.model, noise, **given, callback=lambda *_: self.bar.update(1)
        )
        return samples


def measured(
    model: Any,
    name: str,
    kind: str,
    runs: int,
    measure: Callable[[Trial], tuple[Any, Any]],
    **given: Any,
) -> io.NodeOutput:
    """The model with the policy that `measure` gives, the file that it is saved to, and a text.

    Raises OptionError for a name that is no file's name.
    """
    if not name or Path(name).name != name:
        raise fxcache.OptionError(f"name must be the name of a file without a folder, got {name!r}")
    folder = Path(folder_paths.get_output_directory()) / "fxcache"
    folder.mkdir(parents=True, exist_ok=True)
    result, policy = measure(Trial(runs, model, **given))
    path = result.save(folder / f"{name}.{kind}")
    return io.NodeOutput(cached(model, Cache(policy)), str(path), str(result))


OUTPUTS = [
    io.Model.Output(display_name="model"),
    io.String.Output(display_name="file"),
    io.String.Output(display_name="result"),
]


class FxCacheTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheTune",
            "fxcache Tune",
            "Samples about thirty times and finds the best schedule for a speedup: for this model, "
            "sampler and number of steps. The file is for fxcache Schedule.",
            [
                *sampling_inputs(),
                io.Float.Input("target_speedup", default=1.75, min=1.0, max=100.0, step=0.05),
                io.String.Input("name", default="schedule"),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(
        cls, model: Any, seed: int, target_speedup: float, name: str, **given: Any
    ) -> io.NodeOutput:
        def measure(trial: Trial) -> tuple[Any, Any]:
            result = fxcache.tune(
                trial.denoiser, trial, target_speedup=target_speedup, seed=seed, progress=False
            )
            return result, result.policy

        return measured(model, name, "json", 30, measure, **given)


class FxCacheCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheCalibrate",
            "fxcache Calibrate",
            "Records uncached runs and makes the table of MagCache, or the polynomial of TeaCache, "
            "for this model. A file of MagCache is for fxcache MagCache.",
            [
                *sampling_inputs(),
                io.Combo.Input("policy", options=["magcache", "teacache"], default="magcache"),
                io.Int.Input("runs", default=1, min=1, max=100),
                io.String.Input("name", default="profile"),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(
        cls, model: Any, seed: int, policy: str, runs: int, name: str, **given: Any
    ) -> io.NodeOutput:
        kind = fxcache.MagCache if policy == "magcache" else fxcache.TeaCache

        def measure(trial: Trial) -> tuple[Any, Any]:
            profile = fxcache.calibrate(
                trial.denoiser, lambda number: trial(seed + number), kind, runs=runs, progress=False
            )
            return profile, profile.policy()

        return measured(model, name, "safetensors", runs, measure, **given)


class FxCacheReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheReport",
            "fxcache Report",
            "What the last run of a model reused, step by step. Put it behind the sampler.",
            [io.Latent.Input("samples", tooltip="What the sampler made of the model.")],
            outputs=[
                io.Latent.Output(display_name="samples"),
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="plot"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> io.NodeOutput:
        denoiser = last_denoiser(model.model)
        if denoiser is None:
            raise fxcache.OptionError(
                "this model did not sample with fxcache: connect the model of an fxcache node, and "
                "the samples of the sampler that it went to"
            )
        report = denoiser.report()
        return io.NodeOutput(samples, str(report), plot(report), ui=ui.PreviewText(str(report)))


def plot(report: fxcache.Report) -> torch.Tensor:
    """The report's picture as ComfyUI's images are: [1, height, width, 3] in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = report.plot(Path(folder) / "report.png")
        except ImportError:  # there is no matplotlib
            return torch.ones(1, 8, 8, 3)
        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"), dtype=numpy.float32) / 255
    return torch.from_numpy(pixels)[None]
