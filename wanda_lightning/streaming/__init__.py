"""Prune a model that does not fit in memory: read it block by block, and write each block when it is pruned."""

from wanda_lightning.streaming.from_disk import prune_from_disk
from wanda_lightning.streaming.measure_perplexity import perplexity_from_disk
from wanda_lightning.streaming.shrinking_from_disk import shrink_from_disk

__all__ = ["perplexity_from_disk", "prune_from_disk", "shrink_from_disk"]
