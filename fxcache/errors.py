"""The errors of fxcache. Every message says what was wrong, the value, and what is right."""


class FxCacheError(Exception):
    """Base of all errors raised by fxcache."""


class OptionError(FxCacheError, ValueError, RuntimeError):
    """An argument of `transform` or of the backend that does not fit.

    A RuntimeError too, because torch.compile raises that for the same mistakes.
    """


class CaptureError(FxCacheError, RuntimeError):
    """The denoiser could not be captured: the reason is Dynamo's, and is quoted."""


class StackNotFoundError(FxCacheError, RuntimeError):
    """No block stack in the captured graph. Says what was seen and what was tried."""


class BrokenGraphError(CaptureError, StackNotFoundError):
    """The denoiser breaks into graphs, none of which holds its block stack."""


class BatchError(FxCacheError, RuntimeError):
    """Requests of this model cannot be batched: its rows are not computed apart."""


class PolicyError(FxCacheError, ValueError):
    """A bad policy parameter: names the parameter, its value and its range."""


class ProfileError(FxCacheError, ValueError):
    """A calibration file that is damaged, foreign or does not fit."""


class RanksDifferError(FxCacheError, RuntimeError):
    """Ranks that compute together decided differently (found with ``FXCACHE_CHECK_RANKS=1``)."""
