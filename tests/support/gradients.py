"""Gradient statistics of a model, as pruning collects them."""

import torch
from support.zoo import run

from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import GradientLimit
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.parallel import SINGLE_PROCESS


def gradients(model, batches, samples=None, predictions=0, recomputed=True, processes=SINGLE_PROCESS, **choices):
    """The statistics by layer. Blocks are recomputed, as in pruning, or not."""
    plan = make_plan(PruningConfig.from_names(allocation="fisher", **choices), model)
    data = Samples(model, batches, lambda batch: run(model, batch), None, processes, "the test")
    blocks = plan.blocks if recomputed else ()
    with calibration_mode(model), torch.no_grad():
        return gradient_statistics(
            model, plan.layers, blocks, data, lambda: None, processes, GradientLimit(samples, predictions)
        )


def drawn(logits, sample):
    """The labels that are drawn from the predictions of one sample, which are rows, by its number."""
    generator = torch.Generator().manual_seed(sample)
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
