"""Calibration samples from batches, a run before anything is measured, and gradient statistics."""

from functools import partial

import torch
from support.layers import rng
from support.zoo import run

from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.pruning_mode import calibration_mode
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import GradientLimit
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.loop.run import Run, WeightStore
from wanda_lightning.models import token_masks
from wanda_lightning.parallel import SINGLE_PROCESS


def samples_of(model, batches, forward=None):
    """One sample for each batch, with its padding."""
    forward = forward or partial(run, model)
    samples = []
    for index, batch in enumerate(batches):
        call = partial(forward, batch)
        samples.append(Sample(call, call, batch, token_masks(model, batch), batch_index=index))
    return samples


@torch.no_grad()
def calls_of(model, names, batches):
    """The arguments of each call of some modules, by slow hooks."""
    calls = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: calls[name].append(args)
        )
        for name in names
    ]
    for batch in batches:
        run(model, batch)
    for hook in hooks:
        hook.remove()
    return calls


def run_of(model, batches, processes=SINGLE_PROCESS, **choices):
    plan = make_plan(PruningConfig(**choices), model)
    samples = Samples(model, batches, lambda batch: run(model, batch), None, processes, "the test")
    return Run(plan, samples, WeightStore())


def split(batches, size):
    """Cut batches (mappings of tensors) into batches of another size."""
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    parts = {key: value.split(size) for key, value in whole.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def gradients(
    model,
    batches,
    samples=None,
    predictions=0,
    recomputed=True,
    processes=SINGLE_PROCESS,
    **choices,
):
    """The statistics by layer. Blocks are recomputed, as in pruning, or not."""
    pruning = run_of(model, batches, processes, allocation="fisher", **choices)
    blocks = pruning.plan.blocks if recomputed else ()
    with calibration_mode(model), torch.no_grad():
        return gradient_statistics(
            model,
            pruning.plan.layers,
            blocks,
            pruning.samples,
            lambda _: None,
            GradientLimit(samples, predictions),
            {},
        )


def drawn(logits, sample):
    """The labels that are drawn from the predictions of one sample, which are rows, by its number."""
    generator = rng(sample)
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
