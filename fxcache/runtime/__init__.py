"""Runs rewritten graphs: the step executor, and the state that lives between evaluations."""
