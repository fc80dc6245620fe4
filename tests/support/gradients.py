"""Gradient statistics of a model, as pruning collects them."""

import torch
from support.samples import run_of

from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.core.allocation import GradientLimit
from wanda_lightning.parallel import SINGLE_PROCESS


def gradients(model, batches, samples=None, predictions=0, recomputed=True, processes=SINGLE_PROCESS, **choices):
    """The statistics by layer. Blocks are recomputed, as in pruning, or not."""
    own = run_of(model, batches, processes, allocation="fisher", **choices)
    blocks = own.plan.blocks if recomputed else ()
    with calibration_mode(model), torch.no_grad():
        return gradient_statistics(
            model, own.plan.layers, blocks, own.samples, lambda: None, processes, GradientLimit(samples, predictions)
        )


def drawn(logits, sample):
    """The labels that are drawn from the predictions of one sample, which are rows, by its number."""
    generator = torch.Generator().manual_seed(sample)
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
