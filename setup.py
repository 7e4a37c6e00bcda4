"""Where the packages lie; everything else stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fxcache",
        "fxcache.capture",
        "fxcache.comfyui",
        "fxcache.demo",
        "fxcache.pipelines",
        "fxcache.kernels",
        "fxcache.passes",
        "fxcache.policy",
        "fxcache.runtime",
        "fxcache.tuning",
    ],
    package_dir={"fxcache.kernels": "kernels"},
    package_data={
        "fxcache": ["py.typed"],
        "fxcache.comfyui": [
            "*.json",
            "*.md",
            "*.toml",
            "*.png",
            "example_workflows/*",
            "locales/en/*",
        ],
        "fxcache.demo": ["model/*"],
        "fxcache.pipelines": ["*.json"],
        "fxcache.policy": ["*.json"],
    },
)
