"""Make the report of a pruning run."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from torch.nn.parameter import UninitializedParameter

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.engine.notes import notes_on
from wanda_lightning.engine.run import Run, unreached
from wanda_lightning.models import SkipReason, is_wrapper
from wanda_lightning.parallel import zero_counts
from wanda_lightning.report import PruningReport

log = logging.getLogger(__name__)


def make_report(run: Run) -> PruningReport:
    """Return the report of a run that has pruned all units, and log its warnings."""
    started = time.perf_counter()
    plan = run.plan
    for layer in plan.layers:
        if layer.name not in run.layers and layer.name not in run.skipped:  # no batch reached its unit
            run.skipped[layer.name] = unreached(layer)
    for name, units in plan.coupled.items():
        for writer in units.writers if name in run.skipped else ():
            why = replace(run.skipped[name], name=writer.name, shape=writer.stored_shape)
            run.skipped.setdefault(writer.name, why)
    if not run.layers and plan.config.sparsity > 0:
        found = "no token except padding reached any"
        if any(each.reason == SkipReason.INACTIVE for each in run.skipped.values()):
            found = "only zeros reached any"
        raise UserError(
            f"batches must reach the layers, but {found} of the {len(plan.layers)} layers, so nothing was pruned. "
            "Check that the batches hold more than padding or zeros, and that forward= runs the model."
        )
    notes = notes_on(run)
    for note in notes:
        if note.is_warning and plan.processes.rank == 0:
            log.warning(note.text)
    parameters = [p for p in plan.model.parameters() if not isinstance(p, UninitializedParameter)]
    # The zeros of a parameter that is one pruned layer are known; to count them again would read every weight.
    known = {
        id(layer.parameter): run.layers[layer.name].zeros
        for layer in plan.layers
        if layer.name in run.layers and layer.size == layer.parameter.numel() and not is_unloaded(layer.parameter)
    }
    others = [p for p in parameters if id(p) not in known and not is_wrapper(p) and not is_unloaded(p)]
    zeros = run.store.zeros + sum(known.values()) + sum(zero_counts(others, plan.processes))
    names = plan.inventory.blocks if plan.coupled else [layer.name for layer in plan.layers]
    skipped = [run.skipped[name] for name in names if name in run.skipped and name not in run.layers]
    run.seconds["report"] = time.perf_counter() - started
    return PruningReport(
        layers=[run.layers[name] for name in names if name in run.layers],
        skipped=[*plan.inventory.skipped, *skipped],
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=zeros,
        seconds=run.seconds,
        config={"preset": plan.preset, **plan.config.describe(), "calibration_batches": run.samples.total},
        notes=[note.text for note in notes],
        training=run.training,
    )
