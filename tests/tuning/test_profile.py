"""Profiles as files: whole, or refused by name."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle

import pytest
import torch
from helpers import plain, seeded
from opened import Small
from safetensors.torch import load_file, save_file
from samplers import euler
from zoo import UViT

import fxcache
from fxcache import PolicyError, Profile, ProfileError, TeaCache
from fxcache.tuning.profile import model_metadata

METADATA = {"method": "MagCache", "model": "Small", "config": "0", "steps": "3",
            "sampler": "euler", "date": "2026-01-01", "versions": "torch"}  # fmt: skip


def profile(**changes):
    """A profile of two branches and three steps."""
    parts = {
        "ratios": {"cond": (1.0, 1.1, 0.9), "a/b": (1.0, 1.2, 0.8)},
        "pairs": torch.rand(7, 2, dtype=torch.float64),
        "errors": {"Reuse": (math.nan, 0.1, 0.2), "Taylor(1)": (math.nan, math.nan, 0.05)},
        "metadata": dict(METADATA),
    }
    return Profile(**{**parts, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.fixture
def saved(path):
    return profile().save(path)


def rewritten(path, tensors=None, metadata=None, drop=()):
    """Change what the file at `path` holds."""
    held = {**METADATA, "format": "fxcache-profile-1", **(metadata or {})}
    kept = {**load_file(path), **(tensors or {})}
    for name in drop:
        kept.pop(name, None)
        held.pop(name, None)
    save_file(kept, path, held)


def test_round_trip(saved):
    before, after = profile(), Profile.load(saved)
    assert after.ratios == before.ratios
    assert after.metadata == before.metadata
    assert repr(after.errors) == repr(before.errors)  # NaN and all
    assert torch.equal(Profile.load(after.save(saved)).pairs, after.pairs)
    assert after.pairs.dtype == torch.float64
    assert os.listdir(saved.parent) == [saved.name]
    assert after.policy().ratios == dict(before.ratios)
    text = str(after)
    assert text.startswith("MagCache profile of Small, 3 steps, euler, 2026-01-01")
    assert "Reuse: mean error 0.1500 one step ahead" in text


class Timed(Small):
    """With a time embedding of two layers."""

    def __init__(self):
        super().__init__()
        self.second = torch.nn.Linear(16, 16)

    def forward(self, x, t):
        embedded = self.second(torch.nn.functional.silu(self.time(t[:, None])))
        return self.out(self.norm(self.stack(self.embed(x) + embedded[:, None])))


@pytest.mark.parametrize("kind", [fxcache.MagCache, TeaCache])
def test_a_calibration_is_the_same_after_loading(path, kind):
    model = seeded(Timed)
    policy = TeaCache(coefficients=[0] * 5, signal="time_embedding") if kind is TeaCache else kind
    before = fxcache.calibrate(model, euler, policy, progress=False)
    after = Profile.load(before.save(path), model)
    assert after.policy() == before.policy()
    assert getattr(after.policy(), "signal", "time_embedding") == "time_embedding"
    assert set(METADATA) < set(after.metadata)
    assert after.metadata["versions"].startswith(f"fxcache {fxcache.__version__}, torch ")
    assert after.metadata["sampler"].endswith("euler")
    assert Profile.load(path, plain(model)).metadata == before.metadata


def test_files_that_are_no_profiles(saved, tmp_path):
    content = saved.read_bytes()
    with pytest.raises(pickle.UnpicklingError):  # there is no pickle
        pickle.loads(content)
    header = json.loads(content[8:].split(b"}}")[0] + b"}}")
    assert header["__metadata__"]["steps"] == "3"
    truncated = [content[: int(share * len(content))] for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999)]
    others = [b"\0" * 100, bytes(range(256)) * 4, b"{}", pickle.dumps({"r": [1]}), b"\xff" * 9]
    for bad in (*truncated, *others):
        saved.write_bytes(bad)
        with pytest.raises(ProfileError, match="cannot be read as a profile"):
            Profile.load(saved)
    for place in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "x", "", "\0"):
        with pytest.raises(ProfileError, match="cannot be read as a profile"):
            Profile.load(place)
    for metadata, said in ((None, "got N"), ({"format": "pt"}, "got 'pt'")):
        save_file({"weight": torch.ones(3)}, saved, metadata)
        with pytest.raises(ProfileError, match=f"format must be 'fxcache-profile-1', {said}"):
            Profile.load(saved)
    # A flipped byte of the header: refused, or read; never another error.
    for at in range(0, content.index(b"}}") + 2):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        with contextlib.suppress(ProfileError):
            Profile.load(saved)


def test_a_flipped_bit_and_missing_metadata_are_noticed(saved):
    own = profile()
    assert Profile.load(own.save(saved)) == own
    content = bytearray(saved.read_bytes())
    content[-20] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(saved)
    for name in METADATA:
        profile().save(saved)
        rewritten(saved, drop=[name])
        with pytest.raises(ProfileError, match=f"metadata lacks {name}"):
            Profile.load(saved)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_bad_tables(saved):
    integers, complexes = torch.ones(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.complex64)
    for name, table, message in (
        ("ratios/cond", column(1, 1), "cond must have one value for each of the 3 .*got 2"),
        ("ratios/cond", column(1, math.nan, 1), r"ratios/cond must be .*\(0, inf\), got nan"),
        ("ratios/cond", column(1, -1, 1), r"\(0, inf\), got -1"),
        ("ratios/cond", column(1, math.inf, 1), r"\(0, inf\), got inf"),
        ("ratios/cond", column(1, 1, 1)[None], "must be a vector of float64"),
        ("ratios/cond", complexes, "float64, got torch.complex64"),
        ("errors/Reuse", column(0, 1), "errors/Reuse must have one value"),
        ("errors/Reuse", column(0, -1, 1), "errors/Reuse must be in"),
        ("pairs", column(1, 2), "pairs must be finite numbers"),
        ("pairs", column(1, math.nan)[None], "pairs must be finite numbers"),
        ("pairs", integers, "pairs must be .*float64, got torch.i"),
        ("steps", "4", "each of the 4 steps, got 3"),
        ("steps", "many", "each of the many steps"),
    ):
        profile().save(saved)
        rewritten(saved, *(({}, {name: table}) if name == "steps" else ({name: table}, {})))
        with pytest.raises(ProfileError, match=message) as raised:
            Profile.load(saved)
        assert str(saved) in str(raised.value)


def test_missing_and_short_tables(saved):
    short = {"ratios/cond": column(1), "ratios/a/b": column(1)}
    for tensors, metadata, drop, message in (
        ({}, {}, ["ratios/cond", "ratios/a/b"], "at least, got none"),
        ({}, {}, ["pairs"], "no pairs in the file"),
        (short, {"steps": "1"}, ["errors/Reuse", "errors/Taylor(1)"], "at least 2"),
    ):
        profile().save(saved)
        rewritten(saved, tensors, metadata, drop)
        with pytest.raises(ProfileError, match=message):
            Profile.load(saved)


def test_a_bad_profile_is_not_made_and_not_written():
    infinite = torch.full((2, 2), math.inf)
    for changes in ({"ratios": {}}, {"ratios": {"cond": (1, math.nan, 1)}}, {"pairs": infinite},
                    {"errors": {"Reuse": (1, 2)}}):  # fmt: skip
        with pytest.raises(ProfileError):
            profile(**changes)


def test_a_profile_of_another_model(model, path):
    own = profile(metadata={**METADATA, **model_metadata(model)})
    own.save(path)
    assert Profile.load(path, model).ratios == own.ratios
    wider = Small(width=32)
    with pytest.raises(ProfileError, match=r"config must be that of the model.*was made for"):
        Profile.load(path, wider)
    with pytest.raises(ProfileError, match=r"model must be that of the model, 'UViT'.*'Small"):
        Profile.load(path, seeded(UViT))


@dataclasses.dataclass
class Config:
    width: int
    act: object = torch.nn.functional.gelu
    _private: int = 0


def test_configs_of_any_kind_tell_models_apart(model):
    same, other = seeded(Small), seeded(Small)
    for make in (Config, lambda n: {"width": n}, lambda n: None):
        model.config, same.config, other.config = make(1), make(1), make(2)
        assert model_metadata(model) == model_metadata(same) == model_metadata(plain(model))
        assert (model_metadata(model) == model_metadata(other)) == (make(1) is None)


def test_policies_of_profiles():
    assert profile(ratios={"cond": (1, 2, 3)}).policy().ratios == (1, 2, 3)
    for changes, message in (({"threshold": -1}, "threshold"), ({"threshold": math.nan}, "nan")):
        with pytest.raises(PolicyError, match=message):
            profile().policy(**changes)
    tea = functools.partial(profile, metadata={**METADATA, "method": "TeaCache"})
    assert len(tea().policy().coefficients) == 5
    with pytest.raises(ProfileError, match=r"at least 5.*got 4"):
        tea(pairs=torch.rand(4, 2)).policy()


def test_the_polynomial_at_any_scale_and_of_pairs_that_are_all_the_same():
    for scale in (1e-6, 1.0, 1e4):
        x = torch.linspace(0.1, 1, 20, dtype=torch.float64) * scale
        y = 3 * (x / scale) ** 4 - 2 * (x / scale) + 0.5
        found = profile(pairs=torch.stack([x, y], 1)).coefficients()
        expected = (3 / scale**4, 0, 0, -2 / scale, 0.5)
        for power, (a, b) in enumerate(zip(reversed(found), reversed(expected), strict=True)):
            assert a * scale**power == pytest.approx(b * scale**power, abs=1e-8)
    zero = profile(pairs=torch.zeros(9, 2)).coefficients()
    assert all(math.isfinite(value) for value in zero)
    tea = profile(pairs=torch.full((9, 2), 0.5), metadata={**METADATA, "method": "TeaCache"})
    assert tea.policy().score(0.5) == pytest.approx(0.5)


def test_places_that_cannot_be_written(tmp_path, monkeypatch, path):
    path.write_text("old")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "missing" / "x.safetensors", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"missing|folder"):
            profile().save(place)
    with pytest.raises(TypeError):
        profile(metadata={**METADATA, "steps": 3}).save(path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        profile().save(path)
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["folder", path.name]
    assert not os.listdir(tmp_path / "folder")
