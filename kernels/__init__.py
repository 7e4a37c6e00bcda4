"""The measuring kernels of fxcache. Installed as `fxcache.kernels`; imports nothing but torch."""

from .reference import forecast, residual_diff

__all__ = ["forecast", "residual_diff"]
