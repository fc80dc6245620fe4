"""Take the experts with the smallest saliency out of each mixture, when all samples have passed it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from wanda_lightning.calibration import observer
from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.pruning_mode import RestoredBuffers, pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.wording import quantity
from wanda_lightning.core.types import Units
from wanda_lightning.engine.make_report import make_report
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.experts.removal import declare, find_mixtures, refuse_wrong, take_shapes
from wanda_lightning.experts.saliency import ExpertSaliency
from wanda_lightning.models import SkippedMatrix, SkipReason, Stop
from wanda_lightning.planning.run import Run
from wanda_lightning.report import PrunedLayer, PruningReport

log = logging.getLogger(__name__)


def drop_experts(run: Run) -> PruningReport:
    """Drop experts in place, and return the report, which counts their weights as zeros.

    With `sequential="none"`, all experts are scored in the dense model; with `"block"`, those of each block after the
    mixtures of earlier blocks became smaller. Before a mixture changes, it is run without the experts that were chosen:
    it must compute the same as with these experts unroutable.

    Raises:
        UserError: If no mixture of experts is found, or one that cannot do without the experts. Nothing has changed
            then in memory with `sequential="none"`.
    """
    plan, model = run.plan, run.plan.model
    with plan.processes.fail_together():
        found = find_mixtures(plan.config, model, plan.inventory)
        # Refuse a model without a configuration for the rest, before any batch runs.
        with ExitStack() as undo:
            for mixture in found:
                undo.callback(take_shapes(plan.config, mixture))
            undo.callback(declare(plan.config, model, found))
    size = _parameters(run)
    saliency = ExpertSaliency(found)
    left = {mixture.experts: mixture for mixture in found}
    for layer in plan.layers:
        if layer.module not in left or layer.expert is None:
            detail = "no matrix of a routed expert"
            run.done.skipped[layer.name] = SkippedMatrix(
                layer.name, layer.stored_shape, SkipReason.UNCOUPLED, detail
            )
    with (
        run.clock.timed("drop"),
        pruning_mode(model) as buffers,
        note_on_error(run.written, log.error),
        ProgressBar("Dropping experts", None, run.progress) as bar,
    ):
        for stop in run.store.passed(run, saliency.watched, bar):
            here = dict.fromkeys(layer.module for layer in stop.layers)
            _drop(
                run,
                stop,
                [left.pop(experts) for experts in here if experts in left],
                saliency,
                buffers,
            )
        _choose(run, list(left.values()), saliency)  # refuses those that no batch has reached
        run.store.finish(run)
    declare(plan.config, model, found)
    report = make_report(run)
    zeros = size - _parameters(run)
    gone = f"{found[0].number - len(found[0].slots[-1].tensor)} of {found[0].number} experts were taken out of each of "
    note = f"{gone}{quantity(len(found), 'layer')}: {zeros:,} parameters, reported as zeros"
    # Of experts, not of weights.
    config = {
        **report.config,
        "preset": "",
        "criterion": {"name": "REAP"},
    }
    return replace(report, parameters=size, zeros=zeros, config=config, notes=(note, *report.notes))


def _parameters(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.plan.model.parameters())


def _drop(
    run: Run,
    stop: Stop,
    mixtures: Sequence[Mixture],
    saliency: ExpertSaliency,
    buffers: RestoredBuffers,
) -> None:
    """Take experts out of the mixtures of one stop; only make these small if an earlier run has done so."""
    if any(layer.name in run.done.layers for layer in stop.layers):
        for mixture in mixtures:
            take_shapes(run.plan.config, mixture)
        return
    keep = _choose(run, mixtures, saliency)
    for mixture in mixtures:
        refuse_wrong(run.plan.config, mixture, saliency, keep[mixture.name], run.plan.processes)
    for mixture in mixtures:
        _record(run, mixture, keep[mixture.name], saliency)
        with buffers.changing(slot.module for slot in mixture.slots):
            mixture.take(keep[mixture.name])


def _choose(run: Run, mixtures: Sequence[Mixture], saliency: ExpertSaliency) -> dict[str, Units]:
    """Return which experts of each mixture stay."""
    config = run.plan.config
    processes = run.plan.processes
    keep = dict[str, Units]()
    saliency.all_reduce(mixtures, processes)
    for mixture in mixtures:
        reached = saliency.tokens(mixture).any()
        if not reached or not saliency(mixture).isfinite().all():
            problem = "return NaN or infinity" if reached else "get no token except padding"
            raise UserError(
                f"batches must give finite activations in all layers, but the experts of {mixture.name} {problem}. "
                "Check the batches and the weights, and that forward= runs the model; load it in float32 or bfloat16."
            )
        scores = saliency(mixture).float().view(mixture.groups, -1)
        keep[mixture.name] = config.pattern(scores, config.sparsity).flatten()
    return processes.broadcast(keep, 0)


def _record(run: Run, mixture: Mixture, keep: Units, saliency: ExpertSaliency) -> None:
    """Record the matrices of dropped experts as zeros."""
    counted_experts = set[int]()
    for layer in run.plan.layers:
        if layer.module is not mixture.experts or layer.expert is None:
            continue
        dropped = not keep[layer.expert]
        tokens = int(saliency.tokens(mixture)[layer.expert])
        note = (
            "dropped" if dropped else "padding counted" * (mixture.name in saliency.padding_counted)
        )
        record = PrunedLayer(layer.name, layer.shape, float(dropped), float(dropped), tokens, note)
        block = run.plan.inventory.blocks[layer.name]
        run.done.layers[layer.name] = replace(record, siblings=layer.siblings, block=block)
        if tokens < observer.MIN_EXPERT_TOKENS and layer.expert not in counted_experts:
            run.done.few_tokens[layer.name] = tokens
        counted_experts.add(layer.expert)  # which may have several matrices
