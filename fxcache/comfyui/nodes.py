"""The nodes that put a cache on a model."""

from typing import Any

from comfy_api.latest import io

import fxcache
from fxcache.comfyui.policies import FORECASTS, METHODS, policy_for, published
from fxcache.comfyui.sampling import Cache, cached

CATEGORY = "model_patches/fxcache"
MODEL = io.Model.Input("model", tooltip="The model, with its LoRAs and patches or before them.")


def percent(name: str, default: float) -> Any:
    """An input for a fraction of the model's range of noise, as other nodes of ComfyUI mean it."""
    tooltip = "Nothing is reused outside of start and end. 0 is the first step, 1 the last."
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def schema(name: str, title: str, description: str, inputs: list[Any], **more: Any) -> io.Schema:
    """What all of these nodes say of themselves."""
    more.setdefault("outputs", [io.Model.Output()])
    return io.Schema(
        node_id=name,
        display_name=title,
        category=CATEGORY,
        description=description,
        inputs=[MODEL, *inputs],
        **more,
    )


def config_of(model: Any) -> Any:
    """ComfyUI's description of what it detected a model to be."""
    return getattr(model.model, "model_config", None)


class FxCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCache",
            "fxcache",
            "Samples faster by reusing what changes little from step to step. Works with every "
            "model that ComfyUI loads; there is nothing to choose.",
            [
                io.Combo.Input(
                    "policy",
                    options=list(METHODS),
                    default="adaptive",
                    tooltip="adaptive watches its own error. magcache and teacache use what was "
                    "published for the model.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.08,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="adaptive: 0.05 high quality, 0.08 balanced, 0.12 fast, 0 off. The "
                    "threshold of the other policies.",
                ),
                percent("start_percent", 0.0),
                percent("end_percent", 1.0),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="At most so many steps in a row are reused.",
                ),
                io.Combo.Input(
                    "forecast",
                    options=list(FORECASTS),
                    default="auto",
                    tooltip="How a reused step is made of the computed ones.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, policy: str, start_percent: float, end_percent: float, **given: Any
    ) -> io.NodeOutput:
        chosen = policy_for(policy, **given, model_config=config_of(model))
        return io.NodeOutput(cached(model, Cache(chosen, (start_percent, end_percent))))


class FxCacheFirstBlock(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheFirstBlock",
            "fxcache First Block Cache",
            "Reuses while the first block's output changes little (in the place of "
            "ApplyFBCacheOnModel).",
            [
                io.Float.Input(
                    "residual_diff_threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Flux: 0.12. 0 turns it off.",
                ),
                percent("start", 0.0),
                percent("end", 1.0),
                io.Int.Input(
                    "max_consecutive_cache_hits",
                    default=-1,
                    min=-1,
                    max=100,
                    tooltip="-1: no limit.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        residual_diff_threshold: float,
        start: float,
        end: float,
        max_consecutive_cache_hits: int,
    ) -> io.NodeOutput:
        limit = None if max_consecutive_cache_hits < 0 else max_consecutive_cache_hits
        policy = fxcache.FirstBlockCache(
            threshold=residual_diff_threshold, max_consecutive_hits=limit
        )
        return io.NodeOutput(cached(model, Cache(policy, (start, end))))


class FxCacheMagCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheMagCache",
            "fxcache MagCache",
            "Reuses while a table says that the residual's magnitude hardly changes. The table is "
            "the one that was published for the model, or one of fxcache Calibrate.",
            [
                io.Float.Input(
                    "magcache_thresh", default=0.24, min=0.0, max=1.0, step=0.01,
                    tooltip="The error that is allowed to add up.",
                ),
                io.Float.Input(
                    "retention_ratio", default=0.1, min=0.0, max=1.0, step=0.01,
                    tooltip="This part of the steps is computed at the start.",
                ),
                io.Int.Input(
                    "magcache_K", default=5, min=0, max=100,
                    tooltip="At most so many steps in a row are reused.",
                ),
                io.Int.Input("start_step", default=0, min=0, max=10000),
                io.Int.Input("end_step", default=-1, min=-10000, max=10000),
                io.String.Input(
                    "profile", optional=True, default="",
                    tooltip="A file of fxcache Calibrate. Empty: what was published.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        magcache_thresh: float,
        retention_ratio: float,
        magcache_K: int,  # noqa: N803 (the name of the node that it stands in for)
        start_step: int,
        end_step: int,
        profile: str = "",
    ) -> io.NodeOutput:
        given = {
            "threshold": magcache_thresh,
            "retention_ratio": retention_ratio,
            "max_consecutive_hits": magcache_K,
        }
        if profile:
            policy = fxcache.Profile.load(profile).policy(**given)
        else:
            policy = published(config_of(model), "magcache", **given)
        return io.NodeOutput(cached(model, Cache(policy, steps=(start_step, end_step))))


class FxCacheTeaCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheTeaCache",
            "fxcache TeaCache",
            "Reuses while a polynomial of the first block's modulated input predicts a small "
            "change. The polynomial is the one that was published for the model.",
            [
                io.Float.Input("rel_l1_thresh", default=0.4, min=0.0, max=10.0, step=0.001),
                percent("start_percent", 0.0),
                percent("end_percent", 1.0),
                io.Combo.Input(
                    "cache_device",
                    options=["main", "cpu"],
                    default="main",
                    tooltip="Where what is reused is kept; cpu spares the GPU's memory.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        rel_l1_thresh: float,
        start_percent: float,
        end_percent: float,
        cache_device: str,
    ) -> io.NodeOutput:
        policy = published(config_of(model), "teacache", threshold=rel_l1_thresh)
        options = (("cache_device", "cpu"),) if cache_device == "cpu" else ()
        cache = Cache(policy, (start_percent, end_percent), options=options)
        return io.NodeOutput(cached(model, cache))


class FxCacheEasyCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FxCacheEasyCache",
            "fxcache EasyCache",
            "Skips the whole model while its output is predicted to move little.",
            [
                io.Float.Input("reuse_threshold", default=0.2, min=0.0, max=3.0, step=0.01),
                percent("start_percent", 0.15),
                percent("end_percent", 0.95),
                io.Boolean.Input("verbose", default=False, tooltip="Log each step's decision."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        reuse_threshold: float,
        start_percent: float,
        end_percent: float,
        verbose: bool,
    ) -> io.NodeOutput:
        # The window says which steps at the ends are computed.
        policy = fxcache.EasyCache(threshold=reuse_threshold, warmup_steps=0, final_steps=0)
        cache = Cache(policy, (start_percent, end_percent), verbose=verbose)
        return io.NodeOutput(cached(model, cache))
