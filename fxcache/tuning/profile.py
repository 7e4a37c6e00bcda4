"""What calibration found about one model and sampler, and the file that holds it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxcache.errors import PolicyError, ProfileError
from fxcache.pipelines.components import class_name
from fxcache.policy import MagCache, Origin, Policy, TeaCache
from fxcache.policy.files import write_whole
from fxcache.policy.tea_cache import DEGREE

FORMAT = "fxcache-profile-1"
_REQUIRED = ("format", "method", "model", "config", "steps", "sampler", "date", "versions")


@dataclass(frozen=True, eq=False)
class Profile:
    """A calibration; `policy()` makes a ready policy of it.

    Attributes:
        ratios: by branch, the magnitude ratio of each step (mean over tokens of |r_t| / |r_(t-1)|).
        pairs: float64 [N, 2]: (probe's residual diff, relative change of the output) of steps;
            empty where nothing was measured.
        errors: by forecaster, its relative error at each step when it forecasts from the steps
            right before (NaN where it has too few).
        metadata: text: method, model (class name), config (hash), steps, sampler, date, versions.

    Raises:
        ProfileError: for tables that differ in length or have none or bad numbers.
    """

    ratios: Mapping[str, Sequence[float]]
    pairs: torch.Tensor
    errors: Mapping[str, Sequence[float]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ProfileError("ratios must hold a table for one branch at least, got none")
        for kind, table in (("ratios", self.ratios), ("errors", self.errors)):
            for name, values in table.items():
                if len(values) != self.num_steps or len(values) < 2:
                    raise ProfileError(
                        f"{kind}/{name} must have one value for each of the {self.num_steps} steps "
                        f"(at least 2), got {len(values)}"
                    )
        for name, values in self.ratios.items():
            if bad := [value for value in values if not 0 < value < math.inf]:
                raise ProfileError(f"ratios/{name} must be numbers in (0, inf), got {bad[0]!r}")
        for name, values in self.errors.items():
            if bad := [value for value in values if value < 0 or math.isinf(value)]:
                raise ProfileError(f"errors/{name} must be in [0, inf) or NaN, got {bad[0]!r}")
        if self.pairs.ndim != 2 or self.pairs.shape[1] != 2 or not self.pairs.isfinite().all():
            raise ProfileError("pairs must be finite numbers [N, 2]")

    @property
    def num_steps(self) -> int:
        return len(next(iter(self.ratios.values())))

    def policy(self, **changes: Any) -> Policy:
        """The policy that was calibrated: `MagCache` with the ratios, or `TeaCache` with the
        polynomial through the pairs. `changes` are fields of the policy.

        Raises PolicyError for a method without a table, or a bad field; ProfileError if there are
        too few pairs for a polynomial.
        """
        meta = self.metadata
        method, made_for = meta.get("method"), meta.get("model", "")
        source = f"fxcache.calibrate, {meta.get('steps')} steps, {meta.get('date')}"
        changes.setdefault("origin", Origin(f"calibration of {made_for}", (made_for,), source))
        if method == "MagCache":
            first, *more = self.ratios.values()  # of one branch: the table itself
            return MagCache(**{"ratios": dict(self.ratios) if more else first, **changes})
        if method == "TeaCache":
            signal = meta.get("signal", "modulated_input")
            return TeaCache(**{"coefficients": self.coefficients(), "signal": signal, **changes})
        raise PolicyError(
            f"a profile gives a policy for the methods MagCache and TeaCache, got {method!r}"
        )

    def coefficients(self) -> tuple[float, ...]:
        """TeaCache's polynomial: least squares through the pairs, highest power first."""
        if len(self.pairs) < DEGREE + 1:
            raise ProfileError(
                f"pairs must be at least {DEGREE + 1} for a polynomial of degree {DEGREE}, got "
                f"{len(self.pairs)}: calibrate with policy=TeaCache and more steps or runs"
            )
        x, y = self.pairs.double().unbind(1)
        scale = float(x.abs().max()) or 1.0  # powers of numbers near 1 are well conditioned
        powers = torch.linalg.vander(x / scale, N=DEGREE + 1).flip(1)
        solved = torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0]
        return tuple(float(value) / scale ** (DEGREE - place) for place, value in enumerate(solved))

    def check_model(self, model: Any) -> None:
        """Raise ProfileError unless the profile was made for a model like `model`."""
        for name, own in model_metadata(model).items():
            made_for = self.metadata.get(name)
            if made_for != own:
                raise ProfileError(
                    f"{name} must be that of the model, {own!r}; the profile was made for "
                    f"{made_for!r}"
                )

    def save(self, path: str | Path) -> Path:
        """Write the profile as safetensors; the file is there as a whole or not at all."""
        from safetensors.torch import save

        tensors = self._tensors()
        metadata = {**self.metadata, "format": FORMAT}
        metadata["digest"] = _digest(tensors, metadata)
        write_whole(Path(path), save(tensors, metadata))
        return Path(path)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tables as float64 tensors, by name."""
        tensors = {"pairs": self.pairs.double().contiguous()}
        for kind, table in (("ratios", self.ratios), ("errors", self.errors)):
            for name, values in table.items():
                tensors[f"{kind}/{name}"] = torch.tensor(values, dtype=torch.float64)
        return tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return _digest(self._tensors(), self.metadata) == _digest(other._tensors(), other.metadata)

    def __hash__(self) -> int:
        return hash(_digest(self._tensors(), self.metadata))

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "Profile":
        """Read a profile; with `model`, one that was made for a model like it.

        Raises ProfileError for a file that is missing, damaged, foreign or too short, and for a
        profile of another model.
        """
        tensors, metadata = _read(Path(path))
        found: dict[str, dict[str, tuple[float, ...]]] = {"ratios": {}, "errors": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if tensor.dtype != torch.float64 or (kind in found and tensor.ndim != 1):
                raise ProfileError(
                    f"{path}: {key} must be a vector of float64, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if kind in found:
                found[kind][name] = tuple(tensor.tolist())
        if "pairs" not in tensors:
            raise ProfileError(f"{path}: there are no pairs in the file")
        digest, written = _digest(tensors, metadata), metadata.pop("digest", None)
        del metadata["format"]
        try:
            profile = cls(found["ratios"], tensors["pairs"], found["errors"], metadata)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error
        if metadata["steps"] != str(profile.num_steps):
            raise ProfileError(
                f"{path}: ratios must have one value for each of the {metadata['steps']} steps, "
                f"got {profile.num_steps}"
            )
        if digest != written:
            raise ProfileError(f"{path} is damaged: its content is not what was written")
        if model is not None:
            profile.check_model(model)
        return profile

    def __str__(self) -> str:
        meta = self.metadata
        lines = [
            f"{meta.get('method')} profile of {meta.get('model')}, {self.num_steps} steps, "
            f"{meta.get('sampler')}, {meta.get('date')}"
        ]
        for branch, ratios in self.ratios.items():
            values = " ".join(f"{ratio:.4f}" for ratio in ratios)
            lines.append(f"  ratios {branch}: {values}")
        for name, errors in self.errors.items():
            known = [error for error in errors if math.isfinite(error)]
            if known:
                mean = sum(known) / len(known)
                lines.append(f"  {name}: mean error {mean:.4f} one step ahead")
        return "\n".join(lines)


def model_metadata(model: Any) -> dict[str, str]:
    """What tells a model: its class name, and a hash of its config and of its weights' shapes."""
    given = getattr(model, "config", None)
    items = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    plain = (bool, int, float, str, list, tuple, dict, type(None))  # others may show an address
    config = {
        str(key): str(value)
        for key, value in items.items()
        if str(key)[:1] != "_" and isinstance(value, plain)
    }
    shapes = {name: list(value.shape) for name, value in model.named_parameters()}
    text = json.dumps([config, shapes], sort_keys=True)
    return {"model": class_name(model), "config": hashlib.sha256(text.encode()).hexdigest()}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a profile's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{path} cannot be read as a profile: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ProfileError(
            f"{path} is no profile: format must be {FORMAT!r}, got {metadata.get('format')!r}"
        )
    if missing := [name for name in _REQUIRED if name not in metadata]:
        raise ProfileError(f"{path}: metadata lacks {', '.join(missing)}")
    return tensors, metadata


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of everything in a profile."""
    text = {key: value for key, value in sorted(metadata.items()) if key != "digest"}
    content = hashlib.sha256(json.dumps(text).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        content.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return content.hexdigest()
