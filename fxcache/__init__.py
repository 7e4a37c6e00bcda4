"""fxcache: a PyTorch compiler pass that makes diffusion models sample faster.

``denoiser = fxcache.transform(model, fxcache.FirstBlockCache(threshold=0.08))``
"""

from fxcache.api import Applied, apply, explain, export, restore, transform
from fxcache.capture.artifacts import load_compiled, save_compiled
from fxcache.capture.exported import Exported, is_hit, load_exported
from fxcache.errors import (
    BatchError,
    BrokenGraphError,
    CaptureError,
    FxCacheError,
    OptionError,
    PolicyError,
    ProfileError,
    RanksDifferError,
    StackNotFoundError,
)
from fxcache.explain import Explanation
from fxcache.policy import (
    AdamsBashforth,
    AdaptiveCache,
    Chebyshev,
    EasyCache,
    FirstBlockCache,
    Hermite,
    MagCache,
    Reuse,
    SeaCache,
    StepSchedule,
    Taylor,
    TeaCache,
)
from fxcache.policy.presets import preset, presets
from fxcache.policy.schedule_file import load_schedule, save_schedule
from fxcache.report import Record, Report
from fxcache.tuning.calibrate import calibrate
from fxcache.tuning.profile import Profile
from fxcache.tuning.result import TuneResult
from fxcache.tuning.tune import tune

__version__ = "0.1.0"
__all__ = [
    "AdamsBashforth",
    "AdaptiveCache",
    "Applied",
    "BatchError",
    "BrokenGraphError",
    "CaptureError",
    "Chebyshev",
    "EasyCache",
    "Explanation",
    "Exported",
    "FirstBlockCache",
    "FxCacheError",
    "Hermite",
    "MagCache",
    "OptionError",
    "PolicyError",
    "Profile",
    "ProfileError",
    "RanksDifferError",
    "Record",
    "Report",
    "Reuse",
    "SeaCache",
    "StackNotFoundError",
    "StepSchedule",
    "Taylor",
    "TeaCache",
    "TuneResult",
    "apply",
    "calibrate",
    "explain",
    "export",
    "is_hit",
    "load_compiled",
    "load_exported",
    "load_schedule",
    "preset",
    "presets",
    "restore",
    "save_compiled",
    "save_schedule",
    "transform",
    "tune",
]
