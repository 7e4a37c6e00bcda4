"""What was compiled, as a file that another process, or another machine of the kind, starts with.

torch keeps it in two places: its own artifacts (the graphs of AOTAutograd and Inductor, Triton's
kernels) and, for kernels in C++, shared libraries in Inductor's folder. A file holds both, and says
what they were made with.
"""

import io
import json
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from fxcache.capture import torch_internals as internals
from fxcache.errors import ProfileError
from fxcache.policy.files import write_whole

FORMAT = "fxcache-compiled-1"
ABOUT, ARTIFACTS, LIBRARIES = "about.json", "artifacts.bin", "libraries/"


def save_compiled(path: str | Path) -> Path:
    """Write all that this process has compiled with Inductor (or loaded) to `path`.

    Call it when the denoisers have run at the sizes that are served. It is torch's own cache that
    is written, so what is found again is decided by torch's keys: the graphs with their sizes,
    dtypes and devices, and the options; a model with another config, or a policy with other
    pieces, compiles as if nothing were there. The file is there as a whole or not at all.

    Raises:
        ProfileError: if nothing was compiled.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise ProfileError(
            "nothing was compiled in this process yet: call the denoiser first, with "
            'backend="inductor"'
        )
    content, folder = io.BytesIO(), internals.inductor_folder().resolve()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ABOUT, json.dumps({"format": FORMAT, **_made_with()}))
        archive.writestr(ARTIFACTS, saved[0])
        for library in internals.compiled_libraries(folder):
            archive.write(library, LIBRARIES + str(library.relative_to(folder)))
    write_whole(Path(path), content.getvalue())
    return Path(path)


def load_compiled(path: str | Path) -> None:
    """Put what `save_compiled` wrote to `path` where this process will look for it.

    Call it before the first evaluation. Capture (Dynamo, AOTAutograd's trace) is done all the same.

    Raises:
        ProfileError: for a file that is missing, damaged, foreign, or made with another version of
            torch or Python, or for another kind of device.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read(ABOUT))
            artifacts = archive.read(ARTIFACTS)
            names = [name for name in archive.namelist() if name.startswith(LIBRARIES)]
            libraries = {name.removeprefix(LIBRARIES): archive.read(name) for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ProfileError(f"{path} is no file of save_compiled: {error}") from error
    expected = {"format": FORMAT, **_made_with()}
    for name, value in expected.items():
        if about.get(name) != value:
            raise ProfileError(
                f"{path} was made with {name} {about.get(name)!r}, and here it is {value!r}: "
                f"compile here, and save_compiled anew"
            )
    folder = internals.inductor_folder()
    for name, library in libraries.items():
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ProfileError(f"{path} holds a library outside of Inductor's folder: {name}")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, library)
    torch.compiler.load_cache_artifacts(artifacts)


def _made_with() -> dict[str, Any]:
    """What decides whether compiled code is of use."""
    device = "cpu"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"cuda {major}.{minor}"
    return {
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": device,
    }
