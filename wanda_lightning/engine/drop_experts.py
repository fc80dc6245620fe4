"""Take the experts with the smallest saliency, measured in one pass of the dense model, out of each mixture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor

from wanda_lightning.calibration.block_runs import BlockRuns
from wanda_lightning.calibration.cloning import tensors_within
from wanda_lightning.calibration.expert_saliency import ExpertSaliency
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.unroutable import unroutable
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import counted
from wanda_lightning.core.expert_pattern import Experts
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.run import Run
from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.models.configuration import find_change, pretrained_models, shapes_of
from wanda_lightning.models.mixtures import Mixture, mixtures, set_number, shapes_without
from wanda_lightning.models.removable_units import Units
from wanda_lightning.parallel import is_sharded
from wanda_lightning.report import PrunedLayer, PruningReport

log = logging.getLogger(__name__)

_OTHERS = "Use pattern='unstructured' or '2:4'."


def drop_experts(run: Run) -> PruningReport:
    """Drop experts in place, and return the report.

    All batches run once through the dense model. Before anything changes, each mixture is run without the experts that
    were chosen: it must compute the same as with these experts unroutable.

    Raises:
        UserError: If no mixture of experts is found, or one that cannot do without the experts; nothing has changed.
    """
    plan = run.plan
    model, sparsity, pattern = plan.model, plan.config.sparsity, plan.config.pattern
    with plan.processes.fail_together():
        found, kept = _find(plan)
    with run.timed("observe"), pruning_mode(model):
        saliency = _observe(run, found)
        _refuse_few(plan, found, kept, saliency)
        scores = {each.name: saliency(each).float().view(each.groups, -1) for each in found}
        keep = {name: pattern(grouped, sparsity).flatten() for name, grouped in scores.items()}
        keep = plan.processes.broadcast(keep, 0)
    report = _report(run, found, keep, saliency)
    if kept < found[0].number:
        with run.timed("drop"), pruning_mode(model):
            for mixture in found:
                _refuse_wrong(plan, mixture, saliency, keep[mixture.name])
            changes = [*_configurations(plan, found, kept)]
            for mixture in found:
                mixture.take(keep[mixture.name])
            set_number(model.modules(), found[0].number, kept)
            for change in changes:
                change()
        report.zeros = report.parameters - sum(parameter.numel() for parameter in model.parameters())
    report.notes.insert(
        0,
        f"{found[0].number - kept} of {found[0].number} experts were taken out of each of "
        f"{counted(len(found), 'layer')}: {report.zeros:,} parameters, which count as zeros in this report",
    )
    return report


def _find(plan: Plan) -> tuple[list[Mixture], int]:
    """Return the mixtures of the model and the number of experts that each keeps, or refuse the model."""
    found, shown, pattern = list(mixtures(plan.model)), plan.config.shown("pattern"), plan.config.pattern
    if is_sharded(plan.model):
        raise UserError(f"{shown} needs whole layers, but the model is sharded. Prune it in one process, or with DDP.")
    if not found:
        raise UserError(
            f"{shown} needs a mixture of experts, but no module of the model has experts and a router with one row for "
            f"each of them. {_OTHERS}"
        )
    number, groups = found[0].number, found[0].groups
    for mixture in found:
        if (mixture.number, mixture.groups) != (number, groups):
            raise UserError(
                f"{shown} drops the same number of experts in every layer, but {found[0].name} has {number} (groups: "
                f"{groups}) and {mixture.name} has {mixture.number} (groups: {mixture.groups}). {_OTHERS}"
            )
    for matrix in plan.inventory.skipped_for(SkipReason.USER):
        if matrix.name.startswith(tuple(mixture.prefix for mixture in found)):
            raise UserError(
                f"{shown} drops the same number of experts in every layer, but skip or only leaves out {matrix.name}. "
                "Leave out no experts."
            )
    assert isinstance(pattern, Experts)
    each, sparsity = number // groups, plan.config.sparsity
    kept = groups * pattern.kept(each, sparsity)
    if kept == 0 or (kept == number and sparsity > 0):
        inside = f" in each of the {groups} groups" if groups > 1 else ""
        raise UserError(
            f"sparsity={sparsity:g} with {shown} drops {'all' if kept == 0 else 'none'} of the {each} experts{inside}. "
            f"Choose at least {1 / each:.3g} and at most {1 - 1 / each:.3g}."
        )
    return found, kept


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
    return saliency


def _refuse_few(plan: Plan, found: Sequence[Mixture], kept: int, saliency: ExpertSaliency) -> None:
    """Refuse to keep fewer experts than a token is routed to, and activations that are not finite."""
    for mixture in found:
        if not (per_token := saliency.per_token(mixture)):
            raise UserError(
                f"batches must reach all experts, but no token except padding reached {mixture.name}. Check that the "
                "batches hold more than padding and that forward= runs the model."
            )
        if not saliency(mixture).isfinite().all():
            raise UserError(
                f"batches must give finite activations, but the experts of {mixture.name} return NaN or infinity. "
                "Check the weights, or load the model in float32 or bfloat16."
            )
        if per_token > kept:
            raise UserError(
                f"sparsity={plan.config.sparsity:g} with {plan.config.shown('pattern')} leaves {kept} of "
                f"{mixture.number} experts, but {mixture.name} routes each token to {per_token}. Choose a sparsity of "
                f"at most {1 - per_token / mixture.number:.3g}."
            )


def _refuse_wrong(plan: Plan, mixture: Mixture, saliency: ExpertSaliency, keep: Units) -> None:
    """Refuse a mixture that does not compute the same without experts as with these experts unroutable."""

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        results = tensors_within(mixture.module.forward(*args, **kwargs))  # perhaps with one logit for each expert
        return [x[..., keep.to(x.device)] if x.shape[-1:] == keep.shape else x for x in results]

    same, call = True, saliency.first.get(mixture.name)
    if call is not None:  # this process has a batch
        with mixture.restored(), ExitStack() as stack:
            stack.enter_context(unroutable(mixture, ~keep))

            def take() -> None:
                stack.close()
                mixture.take(keep)

            same = BlockRuns(mixture.module, [replace(call, forward=forward)]).same_after(take)
    if not plan.processes.all_reduce_min(int(same)):
        kept, groups = int(keep.sum()), mixture.groups
        where = f" ({kept // groups} in each of its {groups} groups)" if groups > 1 else ""
        raise UserError(
            f"sparsity={plan.config.sparsity:g} with {plan.config.shown('pattern')} leaves {kept} of {mixture.number} "
            f"experts{where}, but without the others {mixture.name} ({type(mixture.module).__name__}) computes "
            "something else than with the others unroutable: a token may need more experts of a group, or the experts "
            f"are used in another way. Choose a lower sparsity, or another pattern. {_OTHERS}"
        )


def _configurations(plan: Plan, found: Sequence[Mixture], kept: int) -> Iterator[Callable[[], None]]:
    """Yield functions that change the configurations of the models of transformers inside the model."""
    for model in pretrained_models(plan.model):
        if (shapes := shapes_without(model, found, kept)) == shapes_of(model):
            continue  # its experts are elsewhere
        change = find_change(model, shapes, found[0].number, kept, word="expert")
        if change is None:
            raise UserError(
                f"{plan.config.shown('pattern')} needs a configuration with the number of experts, but none of the "
                f"attributes of {type(model.config).__name__} that are {found[0].number} describes this "
                f"{type(model).__name__} with {kept} experts in each layer. Adapters must be merged first. {_OTHERS}"
            )
        yield change


def _report(run: Run, found: Sequence[Mixture], keep: Mapping[str, Units], saliency: ExpertSaliency) -> PruningReport:
    """Return the report of the dense model, with the weights of dropped experts as zeros, and log its warnings."""
    plan, layers, few = run.plan, dict[str, PrunedLayer](), 0
    least = plan.config.min_expert_tokens
    for mixture in found:
        tokens = saliency.tokens(mixture).long().tolist()
        few += sum(count < least for count in tokens)
        target = 1 - float(keep[mixture.name].double().mean())
        for layer in plan.layers:
            if (index := mixture.index_of(layer)) is not None:
                note, block = "" if keep[mixture.name][index] else "dropped", plan.inventory.blocks[layer.name]
                record = PrunedLayer(layer.name, layer.shape, target, float(bool(note)), tokens[index], note)
                layers[layer.name] = replace(record, siblings=layer.siblings, block=block)
    notes = [f"{counted(few, 'expert')} received fewer than {least} tokens: give more calibration samples"] * bool(few)
    if uncertain := saliency.padding_counted:
        notes.append(f"padding counted in {counted(len(uncertain), 'layer')} of experts")
    for note in notes if plan.processes.rank == 0 else ():
        log.warning(note)
    others = [layer for layer in plan.layers if layer.name not in layers]
    detail = "no matrix of a routed expert"
    skipped = [SkippedMatrix(each.name, each.stored_shape, SkipReason.UNCOUPLED, detail) for each in others]
    config = {"preset": "", **plan.config.describe(), "criterion": {"name": "REAP"}}  # of experts, not of weights
    return PruningReport(
        layers=[*layers.values()],
        skipped=[*plan.inventory.skipped, *skipped],
        parameters=sum(parameter.numel() for parameter in plan.model.parameters()),
        zeros=0,
        seconds=run.seconds,
        config={**config, "calibration_batches": run.samples.total},
        notes=notes,
    )
