"""The kernels of fxcache: measure, forecast, refresh. Installed as `fxcache.kernels`.

Imports nothing but torch; Triton when a kernel is first used. `reference` holds the same functions
in plain tensor operations (fx proxies pass through those), `ops` registers ``torch.ops.fxcache``.
"""

from . import reference
from .api import forecast, refresh, refresh_error, residual_diff

__all__ = ["forecast", "reference", "refresh", "refresh_error", "residual_diff"]
