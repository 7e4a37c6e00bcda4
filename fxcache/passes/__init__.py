"""Rewrites of the captured graph, one a file."""
