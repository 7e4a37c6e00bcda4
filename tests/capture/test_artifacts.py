"""What was compiled, in a file, and a process that starts with it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fxcache

SUPPORT = Path(__file__).parent.parent / "support"
#: Prints how many graphs came from a cache, how many did not, and how often C++ was compiled.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[3])
import torch, fxcache
import torch._inductor.cpp_builder as builder
from helpers import ALWAYS, sample, seeded, times
from opened import Small

built, original = [], builder.run_compile_cmd
def run(line, *rest, **named):
    built.append(".so" in line)
    return original(line, *rest, **named)
builder.run_compile_cmd = run
if sys.argv[1] == "load":
    fxcache.load_compiled(sys.argv[2])
denoiser = fxcache.transform(seeded(Small), ALWAYS)
with torch.no_grad():
    for t in (1.0, 0.9):
        output = denoiser(sample(), times(t))
known = torch._dynamo.utils.counters["aot_autograd"]
if sys.argv[1] == "save":
    fxcache.save_compiled(sys.argv[2])
hits, misses = (known[f"autograd_cache_{name}"] for name in ("hit", "miss"))
print(hits, misses, sum(built), output.sum().item())
"""


def run(what: str, path: Path, folder: Path) -> list[float]:
    # With an empty folder Inductor tries out the processor's vector extensions, which takes long.
    known = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    command = [sys.executable, "-c", SCRIPT, what, path, SUPPORT]
    done = subprocess.run(command, env=os.environ | known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()[-4:]]


@pytest.mark.slow
def test_another_process_compiles_nothing_again(tmp_path):
    path = tmp_path / "compiled"
    _, missed, built, output = run("save", path, tmp_path / "cold")
    assert missed >= 2
    assert built >= 2
    assert run("load", path, tmp_path / "warm") == [missed, 0, 0, output]


def test_nothing_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(fxcache.ProfileError, match="nothing was compiled"):
        fxcache.save_compiled(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file of artifacts that hold nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "folder"))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"none", None))
    return fxcache.save_compiled(tmp_path / "compiled")


def test_a_file_that_is_none(tmp_path, written, monkeypatch):
    for content in (b"", written.read_bytes()[:-40]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(fxcache.ProfileError, match="no file of save_compiled"):
            fxcache.load_compiled(tmp_path / "bad")
    with pytest.raises(fxcache.ProfileError, match="gone"):
        fxcache.load_compiled(tmp_path / "gone")
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(fxcache.ProfileError, match=r"made with torch .* here it is '1\.0'"):
        fxcache.load_compiled(written)


def test_a_library_goes_nowhere_else(tmp_path, written):
    with zipfile.ZipFile(written) as archive:
        about = json.loads(archive.read("about.json"))
    with zipfile.ZipFile(tmp_path / "evil", "w") as archive:
        archive.writestr("about.json", json.dumps(about))
        archive.writestr("artifacts.bin", b"")
        archive.writestr("libraries/../../escaped.so", b"")
    with pytest.raises(fxcache.ProfileError, match="outside"):
        fxcache.load_compiled(tmp_path / "evil")
    assert not (tmp_path / "escaped.so").exists()
