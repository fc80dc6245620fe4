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
    blocks = plan.block_units if recomputed else ()
    with calibration_mode(model), torch.no_grad():
        return gradient_statistics(
            model, plan.layers, blocks, data, lambda: None, processes, GradientLimit(samples, predictions)
        )


def objective(logits, index):
    """A number with the random gradient that sample number `index` gets at its logits, of shape (predictions, classes).

    The gradient is `L v` with random signs v and a root `L = diag(sqrt(p)) - p sqrt(p)^T` of the Fisher matrix.
    """
    signs = torch.empty(logits.shape).bernoulli_(0.5, generator=torch.Generator().manual_seed(index)) * 2 - 1
    p = logits.detach().float().softmax(-1)
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    return (logits * (root @ signs[:, :, None])[..., 0]).sum()
