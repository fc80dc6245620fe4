"""Packed checkpoints store the kept weights and their positions.

Nothing is imported here, so that registration is fast.
"""
