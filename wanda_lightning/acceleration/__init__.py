"""Run pruned linear layers faster: 2:4 on CUDA devices."""

from wanda_lightning.acceleration.semi_structured import Accelerated, accelerate_2to4

__all__ = ["Accelerated", "accelerate_2to4"]
