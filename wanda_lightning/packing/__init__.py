"""Packed checkpoints: zeros that take no space on disk. Nothing is imported here, so that registration is fast."""
