"""The pack, as ComfyUI wants it."""

from typing import Any

from comfy_api.latest import ComfyExtension

from fxcache.comfyui import nodes, tools

NODES = (
    nodes.FxCache,
    nodes.FxCacheFirstBlock,
    nodes.FxCacheMagCache,
    nodes.FxCacheTeaCache,
    nodes.FxCacheEasyCache,
    tools.FxCacheSchedule,
    tools.FxCacheCompile,
    tools.FxCacheKSampler,
    tools.FxCacheTune,
    tools.FxCacheCalibrate,
    tools.FxCacheReport,
)


class Extension(ComfyExtension):
    """All nodes of fxcache."""

    async def get_node_list(self) -> list[type[Any]]:
        return list(NODES)
