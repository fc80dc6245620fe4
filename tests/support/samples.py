"""Calibration samples from batches."""

from functools import partial

import torch
from support.zoo import run

from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import token_masks


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
