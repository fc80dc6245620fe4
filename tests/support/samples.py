"""Calibration samples from batches, and what `prune` makes of its arguments before anything is measured."""

from functools import partial

import torch
from support.zoo import run

from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.run import Run, WeightStore
from wanda_lightning.models import token_masks
from wanda_lightning.parallel import SINGLE_PROCESS


def samples_of(model, batches, forward=None):
    """One sample for each batch, with its padding."""
    runs = [partial(forward or partial(run, model), batch) for batch in batches]
    return [
        Sample(each, each, batch, token_masks(model, batch), batch_index=index)
        for index, (each, batch) in enumerate(zip(runs, batches, strict=True))
    ]


@torch.no_grad()
def calls_of(model, names, batches):
    """The arguments of each call of some modules, by slow hooks."""
    calls = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
        for name in names
    ]
    for batch in batches:
        run(model, batch)
    for hook in hooks:
        hook.remove()
    return calls


def run_of(model, batches, processes=SINGLE_PROCESS, **choices):
    plan = make_plan(PruningConfig.from_names(**choices), model)
    samples = Samples(model, batches, lambda batch: run(model, batch), None, processes, "the test")
    return Run(plan, samples, WeightStore())


def split(batches, size):
    """Cut batches (mappings of tensors) into batches of another size."""
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    parts = {key: value.split(size) for key, value in whole.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
