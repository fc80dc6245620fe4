"""Take the experts with the smallest saliency, measured in one pass of the dense model, out of each mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from wanda_lightning.calibration import observer
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import counted
from wanda_lightning.core.types import Units
from wanda_lightning.engine.notes import make_report
from wanda_lightning.engine.run import Run
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.experts.removal import find_mixtures, refuse_wrong, take_out
from wanda_lightning.experts.saliency import ExpertSaliency
from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.report import PrunedLayer, PruningReport


def drop_experts(run: Run) -> PruningReport:
    """Drop experts in place, and return the report, which counts their weights as zeros.

    All batches run once through the dense model. Before anything changes, each mixture is run without the experts that
    were chosen: it must compute the same as with these experts unroutable.

    Raises:
        UserError: If no mixture of experts is found, or one that cannot do without the experts; nothing has changed.
    """
    plan, model, keep = run.plan, run.plan.model, dict[str, Units]()
    with plan.processes.fail_together():
        found = find_mixtures(plan.config, model, plan.inventory)
    with run.clock.timed("observe"), pruning_mode(model):
        saliency = _observe(run, found)
        for mixture in found:
            scores = saliency(mixture).float().view(mixture.groups, -1)
            keep[mixture.name] = plan.config.pattern(scores, plan.config.sparsity).flatten()
        keep = plan.processes.broadcast(keep, 0)
    _record(run, found, keep, saliency)
    report = make_report(run)
    with run.clock.timed("drop"), pruning_mode(model):
        for mixture in found:
            refuse_wrong(plan.config, mixture, saliency, keep[mixture.name], plan.processes)
    with run.clock.timed("drop"), torch.inference_mode(False), torch.no_grad():
        take_out(plan.config, model, found, keep)
    zeros = report.parameters - sum(parameter.numel() for parameter in model.parameters())
    gone = f"{int((~keep[found[0].name]).sum())} of {found[0].number} experts were taken out of each of "
    note = f"{gone}{counted(len(found), 'layer')}: {zeros:,} parameters, reported as zeros"
    config = {**report.config, "preset": "", "criterion": {"name": "REAP"}}  # of experts, not of weights
    return replace(report, zeros=zeros, config=config, seconds=dict(run.clock), notes=(note, *report.notes))


def _observe(run: Run, found: Sequence[Mixture]) -> ExpertSaliency:
    """Run all samples through the dense model."""
    saliency, processes = ExpertSaliency(found), run.plan.processes
    with ProgressBar("Observing experts", run.samples.length, run.progress) as bar, processes.fail_together():
        for sample in run.samples:
            with saliency.collect(sample):
                sample.forward()
            bar.advance()
    run.samples.refuse_if_empty()
    saliency.all_reduce(processes)
    for mixture in found:
        reached = saliency.tokens(mixture).any()
        if not reached or not saliency(mixture).isfinite().all():
            problem = "return NaN or infinity" if reached else "get no token except padding"
            raise UserError(
                f"batches must give finite activations in all layers, but the experts of {mixture.name} {problem}. "
                "Check the batches and the weights, and that forward= runs the model; load it in float32 or bfloat16."
            )
    return saliency


def _record(run: Run, found: Sequence[Mixture], keep: Mapping[str, Units], saliency: ExpertSaliency) -> None:
    """Record the matrices of dropped experts as zeros."""
    plan, mixture_of = run.plan, {mixture.experts: mixture for mixture in found}
    counted_experts = set[object]()
    for layer in plan.layers:
        if layer.module not in mixture_of or layer.expert is None:
            detail = "no matrix of a routed expert"
            run.done.skipped[layer.name] = SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNCOUPLED, detail)
            continue
        mixture = mixture_of[layer.module]
        dropped, tokens = not keep[mixture.name][layer.expert], int(saliency.tokens(mixture)[layer.expert])
        note = "dropped" if dropped else "padding counted" * (mixture.name in saliency.padding_counted)
        record = PrunedLayer(layer.name, layer.shape, float(dropped), float(dropped), tokens, note)
        run.done.layers[layer.name] = replace(record, siblings=layer.siblings, block=plan.inventory.blocks[layer.name])
        if tokens < observer.MIN_EXPERT_TOKENS and (layer.module, layer.expert) not in counted_experts:
            run.done.few_tokens[layer.name] = tokens
        counted_experts.add((layer.module, layer.expert))  # which may have several matrices
