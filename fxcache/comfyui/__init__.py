"""fxcache's nodes for ComfyUI.

Only these modules import ComfyUI, and only when ComfyUI asks for the nodes: the package can be
imported without it. They use fxcache's public face alone.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """The nodes, as ComfyUI asks a folder in `custom_nodes` for them."""
    from fxcache.comfyui.extension import Extension

    return Extension()
