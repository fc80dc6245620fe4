"""Packed checkpoints store the kept weights and one bit for each position.

Nothing is imported here, so that registration is fast.
"""
