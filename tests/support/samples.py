"""Calibration samples from batches, or from anything that can be called."""

from functools import partial

from support.zoo import run

from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import token_masks


def as_samples(runs):
    """One sample for each callable."""
    return [Sample(each, each, batch_index=index) for index, each in enumerate(runs)]


def samples_of(model, batches, forward=None):
    """One sample for each batch, with its padding."""
    runs = [partial(forward or partial(run, model), batch) for batch in batches]
    return [
        Sample(each, each, batch, token_masks(model, batch), batch_index=index)
        for index, (each, batch) in enumerate(zip(runs, batches, strict=True))
    ]
