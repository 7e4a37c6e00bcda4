"""What `transform`, `apply` and the backend can be asked for: one object, checked once."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from fxcache.errors import OptionError

#: What `cache_dtype` may be, besides None: as residuals are computed.
CACHE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_CHOICES = {
    "fullgraph": (None, True, False),
    "disable": (True, False),
    "fallback": (True, False),
    "outline": (True, False),
    "audit": (True, False),
    "kernel": ("auto", "triton", "aten"),
    "guards": ("always", "trajectory"),
    "cache_dtype": (None, *CACHE_DTYPES),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `fxcache.transform`. Raises OptionError for a value that is none of the known ones.

    Whether a backend knows `mode` and `options` is seen when its compiler is made
    (`fxcache.capture.compile.Compilers`).
    """

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool | None = None
    options: dict[str, Any] | None = None
    disable: bool = False
    fallback: bool = False
    kernel: str = "auto"
    outline: bool = True
    guards: str = "always"
    cache_dtype: torch.dtype | None = None
    cache_device: torch.device | str | None = None
    audit: bool = True
    sync: Any = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or value == choice for choice in choices):
                raise OptionError(f"{name} must be one of {choices}, got {value!r}")
        if self.mode is not None and self.options:
            raise OptionError(
                f"either mode or options can be given, not both: mode={self.mode!r}, "
                f"options={self.options!r}"
            )
        _ = self.host  # or an error
        if self.sync not in ("auto", None) and self.vote is None:
            raise OptionError(
                f'sync must be "auto", None or a torch.distributed.ProcessGroup, got {self.sync!r}'
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Options":
        """Itself: nothing changes it, and process groups cannot be copied."""
        return self

    @property
    def vote(self) -> Any:
        """The process group whose ranks vote, None if none do."""
        known = torch.distributed.is_available()
        is_group = known and isinstance(self.sync, torch.distributed.ProcessGroup)
        return self.sync if is_group else None

    @property
    def host(self) -> torch.device | None:
        """Where residuals are kept, None: where they are computed."""
        if self.cache_device is None:
            return None
        with suppress(RuntimeError, TypeError):  # no device goes by that name
            device = torch.device(self.cache_device)
            if device.type == "cpu":
                return device
        raise OptionError(
            f'cache_device must be "cpu" (host memory) or None (where residuals are computed), '
            f"got {self.cache_device!r}"
        )

    @property
    def is_eager(self) -> bool:
        """Whether nothing is compiled: pieces run as they were written."""
        return self.backend == "eager"

    @property
    def guard_filter(self) -> dict[str, Any] | None:
        """What of the compiler's options is Dynamo's matter."""
        found = (self.options or {}).get("guard_filter_fn")
        return None if found is None else {"guard_filter_fn": found}

    @property
    def for_compiler(self) -> dict[str, Any] | None:
        """What of them is the compiler's own."""
        own = {k: v for k, v in (self.options or {}).items() if k != "guard_filter_fn"}
        return own or None
