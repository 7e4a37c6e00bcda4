"""Put the nodes into a ComfyUI: ``python -m fxcache comfyui PATH``."""

import shutil
from importlib import resources
from pathlib import Path

from fxcache.errors import OptionError

#: By this a folder is known as ours, so that no other is ever written to or removed.
MARK = "from fxcache.comfyui import comfy_entrypoint"
INIT = f'''"""fxcache's nodes. They are those of the installed package: pip install -U fxcache."""
{MARK}  # noqa: F401
'''


def install(comfyui: Path) -> str:
    """Write ``custom_nodes/fxcache`` in the folder of a ComfyUI; returns what to do next.

    It holds two lines that import the installed package, the workflows and the texts.

    Raises OptionError for a folder that is no ComfyUI, or one of that name that is not ours.
    """
    target = _target(comfyui)
    target.mkdir(exist_ok=True)
    (target / "__init__.py").write_text(INIT)
    source = resources.files("fxcache.comfyui")
    for name in ("example_workflows", "locales"):
        with resources.as_file(source / name) as folder:
            shutil.copytree(folder, target / name, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md"):
        (target / name).write_text((source / name).read_text("utf-8"), "utf-8")
    return (
        f"written to {target}\n"
        f"Restart ComfyUI (this Python must be the one that it runs on). Add the node fxcache, in "
        f"the category model_patches/fxcache, behind the one that loads the model; workflows are "
        f"under Templates > fxcache."
    )


def remove(comfyui: Path) -> str:
    """Undo `install`; returns what to do next.

    Raises OptionError where there is nothing to undo.
    """
    target = _target(comfyui)
    if not target.exists():
        raise OptionError(f"there is no {target}: fxcache is not installed in this ComfyUI")
    shutil.rmtree(target)
    return f"removed {target}; restart ComfyUI"


def _target(comfyui: Path) -> Path:
    """The folder that is ours, there or not."""
    if not (comfyui / "custom_nodes").is_dir():
        raise OptionError(
            f"{comfyui} is no ComfyUI: there is no folder custom_nodes in it. Give the folder that "
            f"holds ComfyUI's main.py"
        )
    target = comfyui / "custom_nodes" / "fxcache"
    init = target / "__init__.py"
    text = init.read_text("utf-8") if init.is_file() else ""
    if target.is_symlink() or (target.exists() and MARK not in text):
        raise OptionError(f"{target} is there already and is not ours; move it away first")
    return target
