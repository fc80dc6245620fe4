"""The optimizer of our modules."""

from typing import Any

import lightning as L
import torch
from transformers import get_linear_schedule_with_warmup


def adamw(module: L.LightningModule, lr: float, weight_decay: float, lr_decay: bool) -> Any:
    """Return AdamW over the parameters that require a gradient; `lr_decay` decays its rate linearly to 0."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if not lr_decay:
        return optimizer

    steps = int(module.trainer.estimated_stepping_batches)
    decay = get_linear_schedule_with_warmup(optimizer, 0, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
