"""Run pruned linear layers faster: 2:4 on CUDA devices, and packed weights on CPUs."""

from wanda_lightning.acceleration.packed import accelerate_cpu
from wanda_lightning.acceleration.semi_structured import accelerate_2to4
from wanda_lightning.acceleration.swap import Accelerated

__all__ = ["Accelerated", "accelerate_2to4", "accelerate_cpu"]
