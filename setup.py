"""Where the packages lie; everything else stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fxcache",
        "fxcache.capture",
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
        "fxcache.demo": ["model/*"],
        "fxcache.pipelines": ["*.json"],
        "fxcache.policy": ["*.json"],
    },
)
