"""Prune a model: what happens in which order, and what each step needs to know."""
