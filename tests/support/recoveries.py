"""Models pruned with a recovery, and without it."""

import copy

from wanda_lightning import prune


def pruned_with_and_without(dense, batches, sparsity=0.5, recovery=None, **choices):
    """The model that is pruned without the recovery, the one with it, and its report."""
    start, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(start, batches, sparsity, progress=False, **choices)
    return start, model, prune(model, batches, sparsity, recovery=recovery, progress=False, **choices)


def weights_of(report):
    """The names of the parameters that were pruned."""
    return {f"{layer.name}.weight" for layer in report.layers}
