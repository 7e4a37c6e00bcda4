"""Pipelines of diffusers, and hooks of accelerate: the only place that knows these libraries."""
