"""Take the experts with the smallest saliency, measured in one pass of the dense model, out of each mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wanda_lightning.calibration import observer
from wanda_lightning.calibration.block_runs import BlockRuns
from wanda_lightning.calibration.cloning import tensors_within
from wanda_lightning.calibration.expert_saliency import ExpertSaliency, unroutable
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import counted
from wanda_lightning.core.patterns import Experts
from wanda_lightning.core.types import Units
from wanda_lightning.engine.notes import make_report
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.run import Run
from wanda_lightning.models import SkippedMatrix, SkipReason, adapted_module
from wanda_lightning.models.mixtures import Mixture, mixtures
from wanda_lightning.report import PrunedLayer, PruningReport
from wanda_lightning.shrinking.configuration import fit_configuration

_OTHERS = "Use pattern='unstructured' or '2:4'."


def drop_experts(run: Run) -> PruningReport:
    """Drop experts in place, and return the report, which counts their weights as zeros.

    All batches run once through the dense model. Before anything changes, each mixture is run without the experts that
    were chosen: it must compute the same as with these experts unroutable.

    Raises:
        UserError: If no mixture of experts is found, or one that cannot do without the experts; nothing has changed.
    """
    plan, model, keep = run.plan, run.plan.model, dict[str, Units]()
    with plan.processes.fail_together():
        found = find_mixtures(plan)
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
            _refuse_wrong(plan, mixture, saliency, keep[mixture.name])
    with run.clock.timed("drop"), torch.inference_mode(False), torch.no_grad():
        with ExitStack() as undo:  # first without data, since dense and smaller tensors would be in memory together
            for mixture in found:
                undo.callback(mixture.drop_data())
                undo.callback(mixture.take(keep[mixture.name]))
            problem, undo_configuration = fit_configuration(model)
        if problem:
            undo_configuration()
            raise UserError(f"{plan.config.shown('pattern')} changes the shapes of the model, but {problem}. {_OTHERS}")
        for mixture in found:
            mixture.take(keep[mixture.name])
    zeros = report.parameters - sum(parameter.numel() for parameter in model.parameters())
    gone = f"{int((~keep[found[0].name]).sum())} of {found[0].number} experts were taken out of each of "
    note = f"{gone}{counted(len(found), 'layer')}: {zeros:,} parameters, reported as zeros"
    config = {**report.config, "preset": "", "criterion": {"name": "REAP"}}  # of experts, not of weights
    return replace(report, zeros=zeros, config=config, seconds=dict(run.clock), notes=(note, *report.notes))


def find_mixtures(plan: Plan) -> list[Mixture]:
    """Return the mixtures of the model, or refuse the model."""
    found, shown, pattern = list(mixtures(plan.model)), plan.config.shown("pattern"), plan.config.pattern
    assert isinstance(pattern, Experts)
    sizes = {(mixture.number, mixture.groups): mixture.name for mixture in found}
    experts = tuple(f"{mixture.prefix}." for mixture in found)
    left_out = [m.name for m in plan.inventory.skipped_for(SkipReason.USER) if m.name.startswith(experts)]
    size, sparsity = (found[0].number // found[0].groups if found else 1), plan.config.sparsity
    kept = pattern.kept(size, sparsity)
    where = f" in each of the {found[0].groups} groups" if found and found[0].groups > 1 else ""
    for is_wrong, why in (
        (
            adapted_module(plan.model) is not None,
            "needs whole layers, but the model has adapters. Merge them first.",
        ),
        (
            not found,
            "needs a mixture of experts, but no module of the model has experts in stacked parameters (a list of "
            f"modules does not count) and a router with one row for each of them. {_OTHERS}",
        ),
        (len(sizes) > 1, f"needs as many experts in {' as in '.join(sizes.values())}, in as many groups. {_OTHERS}"),
        (left_out, f"drops experts in every layer, but skip or only leaves out {', '.join(left_out[:1])}. {_OTHERS}"),
        (
            kept == 0 or (kept == size and sparsity > 0),
            f"drops {'none' if kept else 'all'} of the {size} experts{where} with sparsity={sparsity:g}. Choose at "
            f"least {1 / size:.3g} and at most {1 - 1 / size:.3g}.",
        ),
    ):
        if is_wrong:
            raise UserError(f"{shown} {why}")
    return found


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


def _refuse_wrong(plan: Plan, mixture: Mixture, saliency: ExpertSaliency, keep: Units) -> None:
    """Refuse a mixture that does not compute the same without experts as with these experts unroutable."""

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        results = tensors_within(mixture.module.forward(*args, **kwargs))  # perhaps with one logit for each expert
        return [x[..., keep.to(x.device)] if x.shape[-1:] == keep.shape else x for x in results]

    kept, same = int(keep.sum()), True
    if (call := saliency.first.get(mixture.name)) is not None:  # this process has a batch
        with ExitStack() as undo, ExitStack() as lowered:
            lowered.enter_context(unroutable(mixture, ~keep))

            def take() -> None:
                lowered.close()
                undo.callback(mixture.take(keep))

            same = BlockRuns(mixture.module, [replace(call, forward=forward)]).same_after(take)
            same = same and saliency.per_token[mixture.name] <= kept
    if not plan.processes.all_agree(same):
        raise UserError(
            f"sparsity={plan.config.sparsity:g} with {plan.config.shown('pattern')} leaves {kept} of {mixture.number} "
            f"experts, but without the others {mixture.name} ({type(mixture.module).__name__}) computes something "
            "else than with the others unroutable: a token may need more experts, or the experts are used in another "
            f"way. Choose a lower sparsity. {_OTHERS}"
        )


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
