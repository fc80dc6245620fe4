"""Take whole experts out of a mixture of experts: the ones with the smallest saliency in one pass of the dense model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from wanda_lightning.calibration.block_runs import BlockRuns
from wanda_lightning.calibration.cloning import tensors_within
from wanda_lightning.calibration.expert_saliency import ExpertSaliency
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.unroutable import unroutable
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import counted
from wanda_lightning.core.patterns import Experts
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.run import Run
from wanda_lightning.models import SkippedMatrix, SkipReason, tied_tensors
from wanda_lightning.models.configuration import find_change
from wanda_lightning.models.mixtures import Mixture, mixtures, set_number
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
    found, kept = _find(plan)
    with run.timed("observe"), pruning_mode(plan.model):
        saliency = _observe(run, found)
        _refuse_few(plan, found, kept, saliency)
        keep = plan.processes.broadcast({each.name: _choose(plan, saliency.saliency(each)) for each in found}, 0)
    report = _report(run, found, kept, keep, saliency)
    if kept < found[0].number:
        with run.timed("drop"), pruning_mode(plan.model):
            for mixture in found:
                _refuse_wrong(plan, mixture, saliency, keep[mixture.name])
            change = _configuration(plan, found, kept)
            for mixture in found:
                mixture.take(keep[mixture.name])
            set_number(plan.model.modules(), found[0].number, kept)
            change()
    after = sum(parameter.numel() for parameter in plan.model.parameters())
    report.zeros = report.parameters - after
    report.notes.insert(0, _summary(found, kept, report.parameters, after))
    return report


def _find(plan: Plan) -> tuple[list[Mixture], int]:
    """Return the mixtures of the model and the number of experts that each keeps, or refuse the model."""
    found, shown = list(mixtures(plan.model)), plan.config.shown("pattern")
    if is_sharded(plan.model):
        raise UserError(f"{shown} needs whole layers, but the model is sharded. Prune it in one process, or with DDP.")
    if not found:
        raise UserError(f"{shown} needs a mixture of experts, but the model has no router beside experts. {_OTHERS}")
    number, groups = found[0].number, found[0].groups
    for mixture in found:
        if (mixture.number, mixture.groups) != (number, groups):
            raise UserError(
                f"{shown} drops the same number of experts in every layer, but {found[0].name} has {number} in {groups} "
                f"groups and {mixture.name} {mixture.number} in {mixture.groups}. {_OTHERS}"
            )
    _refuse_user_skips(plan, found)
    tied = tied_tensors(plan.model)
    for mixture in found:
        adapters = any(getattr(type(module), "adapter_layer_names", ()) for module in mixture.module.modules())
        if adapters or any((slot.module, slot.name) in tied for slot in mixture.slots):
            why = "adapters, which were trained for this number" if adapters else "tensors that others share"
            raise UserError(f"{shown} changes the number of experts, but {mixture.name} has {why}. {_OTHERS}")
    assert isinstance(plan.config.pattern, Experts)
    each, sparsity = number // groups, plan.config.sparsity
    kept = groups * plan.config.pattern.kept(each, sparsity)
    if kept == 0 or (kept == number and sparsity > 0):
        inside = f" in each of the {groups} groups" if groups > 1 else ""
        raise UserError(
            f"sparsity={sparsity:g} with {shown} drops {'all' if kept == 0 else 'none'} of the {each} experts{inside}. "
            f"Choose a sparsity between {1 / each:.3g} and {1 - 1 / each:.3g}."
        )
    return found, kept


def _refuse_user_skips(plan: Plan, found: Sequence[Mixture]) -> None:
    for matrix in plan.inventory.skipped_for(SkipReason.USER):
        if matrix.name.startswith(tuple(mixture.prefix for mixture in found)):
            raise UserError(
                f"{plan.config.shown('pattern')} drops the same number of experts in every layer, but skip or only "
                f"leaves out {matrix.name}. Leave out no experts."
            )


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
        if not saliency.saliency(mixture).isfinite().all():
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


def _choose(plan: Plan, saliency: Tensor) -> Units:
    """Return which experts stay."""
    groups = next(mixtures(plan.model)).groups
    return plan.config.pattern(saliency.float().view(groups, -1), plan.config.sparsity).flatten()


def _refuse_wrong(plan: Plan, mixture: Mixture, saliency: ExpertSaliency, keep: Units) -> None:
    """Refuse a mixture that does not compute the same without experts as with these experts unroutable."""

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        results = tensors_within(mixture.module.forward(*args, **kwargs))
        is_logits = [x.ndim > 0 and x.shape[-1] == mixture.number for x in results]
        return [x[..., keep.to(x.device)] if wide else x for x, wide in zip(results, is_logits, strict=True)]

    same, call = True, saliency.first.get(mixture.name)
    if call is not None:  # this process has a batch
        with mixture.restored(), ExitStack() as stack:
            stack.enter_context(unroutable(mixture, ~keep))

            def take() -> None:
                stack.close()
                mixture.take(keep)

            same = BlockRuns(mixture.module, [replace(call, forward=forward)]).same_after(take)
    if not plan.processes.all_reduce_min(int(same)):
        kept = int(keep.sum())
        where = f", {kept // mixture.groups} in each of its {mixture.groups} groups" if mixture.groups > 1 else ""
        raise UserError(
            f"{plan.config.shown('pattern')} would leave {kept} of {mixture.number} experts{where}, but "
            f"{mixture.name} ({type(mixture.module).__name__}) then computes something else than with the other "
            "experts unroutable: its groups may have too few experts for a token, or its experts are used in another "
            f"way. Choose a lower sparsity, or another pattern. {_OTHERS}"
        )


def _configuration(plan: Plan, found: Sequence[Mixture], kept: int) -> Callable[[], None]:
    """Return a function that changes the configuration of each model of transformers inside the model."""
    changes = []
    for model in _pretrained(plan.model):
        shapes = _shapes(model, found, kept)
        if shapes == {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}:
            continue  # its experts are elsewhere
        change = find_change(model, shapes, found[0].number, kept, word="expert")
        if change is None:
            raise UserError(
                f"{plan.config.shown('pattern')} needs a configuration that says the number of experts, but no "
                f"attribute of {type(model.config).__name__} that is {found[0].number} gives a "
                f"{type(model).__name__} with {kept} experts in each layer. {_OTHERS}"
            )
        changes.append(change)

    def change_all() -> None:
        for change in changes:
            change()

    return change_all


def _pretrained(module: nn.Module) -> Iterator[Any]:
    """Yield the models of transformers in a module that lie in no other one."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _pretrained(child)


def _shapes(model: nn.Module, found: Sequence[Mixture], kept: int) -> dict[str, Size]:
    """Return the shapes in the state dict of a model once experts are taken out."""
    changed: dict[int, Size] = {}
    gone: set[int] = set()
    for mixture in found:
        for slot in mixture.slots:
            sizes = list(slot.tensor.shape)
            sizes[slot.dim] = kept
            changed[id(slot.tensor)] = Size(sizes)
        experts = list(mixture.experts.children())[kept:] if mixture.is_list else []
        gone |= {id(tensor) for each in experts for tensor in (*each.parameters(), *each.buffers())}
    tensors = model.state_dict(keep_vars=True)
    return {name: changed.get(id(tensor), tensor.shape) for name, tensor in tensors.items() if id(tensor) not in gone}


def _report(
    run: Run, found: Sequence[Mixture], kept: int, keep: Mapping[str, Units], saliency: ExpertSaliency
) -> PruningReport:
    """Return the report, in which the weights of dropped experts count as zeros, and log its warnings."""
    plan, layers = run.plan, dict[str, PrunedLayer]()
    few = 0
    for mixture in found:
        children = list(mixture.experts.children()) if mixture.is_list else []
        own = {module: index for index, expert in enumerate(children) for module in expert.modules()}
        tokens = saliency.tokens(mixture).long().tolist()
        few += sum(count < plan.config.min_expert_tokens for count in tokens)
        for layer in plan.layers:
            index = own.get(layer.module, layer.expert if layer.module is mixture.experts else None)
            if index is not None:
                stays, block = bool(keep[mixture.name][index]), plan.inventory.blocks[layer.name]
                layers[layer.name] = PrunedLayer(
                    layer.name, layer.shape, 1 - kept / mixture.number, float(not stays), tokens[index],
                    "" if stays else "dropped", layer.siblings, block=block,
                )  # fmt: skip
    notes = []
    if few:
        notes.append(f"{counted(few, 'expert')} received fewer than {plan.config.min_expert_tokens} tokens: give more "
                     "calibration samples")  # fmt: skip
    if saliency.padding_counted:
        notes.append(f"padding counted in {counted(len(saliency.padding_counted), 'mixture')} of experts")
    for note in notes if plan.processes.rank == 0 else ():
        log.warning(note)
    others = [layer for layer in plan.layers if layer.name not in layers]
    detail = "no matrix of a routed expert"
    skipped = [SkippedMatrix(each.name, each.stored_shape, SkipReason.UNCOUPLED, detail) for each in others]
    return PruningReport(
        layers=[*layers.values()],
        skipped=[*plan.inventory.skipped, *skipped],
        parameters=sum(parameter.numel() for parameter in plan.model.parameters()),
        zeros=0,
        seconds=run.seconds,
        config={"preset": "", **plan.config.describe(), "calibration_batches": run.samples.total},
        notes=notes,
    )


def _summary(found: Sequence[Mixture], kept: int, before: int, after: int) -> str:
    return (
        f"{found[0].number - kept} of {found[0].number} experts were taken out of each of "
        f"{counted(len(found), 'layer')}, which leaves {after:,} of {before:,} parameters; in this report, dropped "
        "weights count as zeros"
    )
