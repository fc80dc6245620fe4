"""The report of a pruning run, with its notes: one function for each thing that a user should know."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import NamedTuple

from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration import observer
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import Inventory, SkippedMatrix, SkipReason, is_wrapper
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.run import Run, unreached
from wanda_lightning.report import PruningReport
from wanda_lightning.report.records import grouped

log = logging.getLogger(__name__)

_ENOUGH_COVERAGE = 0.8  # fraction of the weights that a user would expect to be pruned


def make_report(run: Run) -> PruningReport:
    """Return the report of a run that has pruned all stops, and log its warnings."""
    started = time.perf_counter()
    plan = run.plan
    pruned = run.done.layers
    skipped = _left_dense(run)
    if not pruned and plan.config.sparsity > 0:
        only_zeros = any(each.reason == SkipReason.INACTIVE for each in skipped.values())
        found = "only zeros" if only_zeros else "no token except padding"
        raise UserError(
            f"batches must reach the layers, but {found} reached any of the {len(plan.layers)} layers, so nothing was "
            "pruned. Check that the batches hold more than padding or zeros, and that forward= runs the model."
        )
    notes = _notes_on(run, skipped)
    for note in notes:
        if note.is_warning and plan.processes.rank == 0:
            log.warning(note.text)
    parameters = [p for p in plan.model.parameters() if not isinstance(p, UninitializedParameter)]
    held = (p.detach() for p in parameters if not is_wrapper(p) and not is_unloaded(p))
    zeros = run.store.zeros + sum(int((values == 0).count_nonzero()) for values in held)
    limits = (
        None
        if plan.config.pattern.prunes_units
        else plan.config.allocation.limits(plan.config.sparsity)
    )
    run.clock["report"] = time.perf_counter() - started
    return PruningReport(
        layers=tuple(pruned[name] for name in plan.inventory.blocks if name in pruned),
        skipped=(*plan.inventory.skipped, *skipped.values()),
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=zeros,
        seconds=dict(run.clock),
        config={
            "preset": plan.preset,
            **plan.config.describe(),
            "calibration_batches": run.samples.total,
            **({"allocation_limits": list(limits)} if limits else {}),
            **({"unit_costs": dict(plan.costs)} if plan.costs else {}),
        },
        notes=tuple(note.text for note in notes),
        training=run.training,
    )


def _left_dense(run: Run) -> dict[str, SkippedMatrix]:
    """Return the layers of the plan that were not pruned, and what writes the hidden units that such layers read."""
    done = run.done
    plan = run.plan
    dense = {
        x.name: done.skipped.get(x.name) or unreached(x)
        for x in plan.layers
        if x.name not in done.layers
    }
    for name, units in plan.coupled.items():
        for writer in units.writers if name in dense else ():
            dense.setdefault(
                writer.name, replace(dense[name], name=writer.name, shape=writer.stored_shape)
            )
    return {
        name: dense[name]
        for name in plan.inventory.blocks
        if name in dense and name not in done.layers
    }


class Note(NamedTuple):
    """A sentence for the report; a warning is also logged."""

    text: str
    is_warning: bool = True


def _notes_on(run: Run, skipped: Mapping[str, SkippedMatrix]) -> list[Note]:
    coverage = None if run.plan.coupled else low_coverage(run.plan.inventory, skipped)
    return [
        *_on_layers(run, skipped),
        *filter(None, (unfit_layers(run.plan.inventory), coverage)),
        *_on_targets(run),
        *_on_units(run),
        *_on_permutation(run),
        *_on_batch_norm(run),
        *_on_training(run),
    ]


_LEFT_DENSE = (
    (SkipReason.UNREACHED, "no calibration batch called"),
    (SkipReason.UNROUTED, "no calibration token was observed in"),
    (SkipReason.INACTIVE, "all inputs were zero in"),
)


def _on_layers(run: Run, skipped: Mapping[str, SkippedMatrix]) -> Iterator[Note]:
    for reason, why in _LEFT_DENSE:
        if names := [name for name, matrix in skipped.items() if matrix.reason is reason]:
            yield Note(f"{why} {_layers(names)}, {names[0]} first: left dense")
    if few := [name for name in run.done.few_tokens if name in run.done.layers]:
        least = min(few, key=lambda name: run.done.layers[name].tokens)
        noun = "expert layer"
        use = "pruned with the statistics of all experts"
        if run.plan.config.pattern.drops_experts:
            noun = "expert"
            use = "scored by these"
        yield Note(
            f"{_layers(few, noun)} received fewer than {observer.MIN_EXPERT_TOKENS} tokens, {least} "
            f"fewest: {run.done.layers[least].tokens}. They are {use}: give more calibration samples"
        )
    if run.plan.observed and run.plan.config.sequential != "none":
        yield from _on_passed(run)


def _on_passed(run: Run) -> Iterator[Note]:
    """Name the layers whose statistics leave out calls, because a batch did not wait at their stop."""
    again = _shared_outside(run.plan)
    late = set[str]()
    for stop in run.plan.stops:
        inside = {layer.name for layer in stop.layers}
        if stop.name in run.done.passed.again:
            again |= inside
        elif stop.name in run.done.passed.late:
            late |= inside

    if names := [name for name in run.done.layers if name in again]:
        yield Note(
            f"the model calls {_layers(names)} more than once, {names[0]} first, but the statistics include only the "
            "first call: use sequential='none', so that they include all calls"
        )
    if names := [name for name in run.done.layers if name in late - again]:
        yield Note(
            f"some batches call the layers in another order than others, so the statistics of {_layers(names)}, "
            f"{names[0]} first, leave these batches out: use sequential='none', so that they include all batches"
        )


def _shared_outside(plan: Plan) -> set[str]:
    """Return the layers whose weight the model also holds outside of their stop, where it is called once more."""
    names = Counter(id(p) for _, p in plan.model.named_parameters(remove_duplicate=False))
    shared = set[str]()
    for stop in plan.stops:
        if stop.module is not None and any(names[id(layer.parameter)] > 1 for layer in stop.layers):
            # Without that module and what it contains.
            modules = plan.model.named_modules({stop.module})
            outside = {id(p) for _, module in modules for p in module.parameters(recurse=False)}
            shared |= {layer.name for layer in stop.layers if id(layer.parameter) in outside}
    return shared


def unfit_layers(inventory: Inventory) -> Note | None:
    """Name the layers that the pattern does not fit."""
    if not (unfit := inventory.skipped_for(SkipReason.PATTERN)):
        return None
    return Note(
        f"the pattern does not fit {_layers(unfit)}, {unfit[0].name} largest ({unfit[0].detail}): left dense"
    )


def low_coverage(inventory: Inventory, skipped: Mapping[str, SkippedMatrix] = {}) -> Note | None:
    """Warn if many weights are not pruned, apart from embeddings, stems, heads and what the user left out.

    `skipped` holds the layers of the inventory that turned out to stay dense.
    """
    left = [matrix for matrix in inventory.skipped if not matrix.reason.is_expected]
    left += [skipped[layer.name] for layer in inventory.layers if layer.name in skipped]
    pruned = sum(layer.size for layer in inventory.layers if layer.name not in skipped)
    total = pruned + _size(left)
    if pruned >= _ENOUGH_COVERAGE * total:
        return None
    alike = grouped(left, lambda matrix: matrix.detail)
    texts = []
    for detail, matrices in sorted(alike.items(), key=lambda item: -_size(item[1]))[:3]:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        texts.append(f"{matrices[0].name}{more}, {_size(matrices):,} weights: {detail}")
    return Note(
        f"only {pruned / total:.0%} of the weights besides embeddings, stem and head are in pruned layers; the largest "
        f"parts left out are {'; '.join(texts)}"
    )


def _on_targets(run: Run) -> Iterator[Note]:
    layers = run.done.layers.values()
    few = [
        layer
        for layer in layers
        if layer.tokens < layer.shape[1] and layer.name not in run.done.few_tokens
    ]
    # Not what only writes hidden units.
    few = [layer for layer in few if layer.name in run.selections]
    if "gram" in run.plan.config.needs and few:
        least = min(few, key=lambda layer: layer.tokens / layer.shape[1])
        yield Note(
            f"{_layers(few)} received fewer tokens than inputs, {least.name} fewest: {least.tokens} tokens for "
            f"{least.shape[1]} inputs. Their Gram matrices depend on the dampening: give more calibration samples"
        )
    if short := [
        layer for layer in layers if layer.target - layer.sparsity > 0.01 + 1 / layer.shape[1]
    ]:
        worst = min(short, key=lambda layer: layer.sparsity)
        yield Note(
            f"{run.plan.config.pattern} left {_layers(short)} short of the target, {worst.name} most: "
            f"{worst.sparsity:.1%} of {worst.target:.1%}"
        )


def _on_units(run: Run) -> Iterator[Note]:
    if not run.plan.coupled or not run.plan.config.sparsity:
        return
    zero = sum(run.done.zero_units.values())
    width = sum(units.width for units in run.plan.coupled.values())
    if not zero:
        yield Note(
            f"none of {width:,} hidden units is zero, because sparsity={run.plan.config.sparsity:g} rounds to no unit "
            "of any layer: use a smaller multiple_of, or a higher sparsity"
        )
        return
    plan = run.plan
    of_cost = ""
    if plan.costs:
        cost = plan.config.allocation.cost
        total = plan.cost_of({name: units.width for name, units in plan.coupled.items()})
        of_cost = f", {plan.cost_of(run.done.zero_units) / total:.1%} of the {cost} of all"
    yield Note(
        f"{zero:,} of {width:,} hidden units are zero{of_cost}; shrink() takes them out",
        is_warning=False,
    )


def _on_permutation(run: Run) -> Iterator[Note]:
    if not (done := run.permuted):
        return
    reason = ""
    nm = f"{run.plan.config.pattern.group_kept}:{run.plan.config.pattern.group_size}"
    if back := done.put_back:
        reason = f"; the units of {_layers(back, 'block')} were put back, {back[0]} first, because its output changed"
    if not done.kept:
        why = done.why_not or "no layer reads hidden units whose order can be changed"
        yield Note(f"nothing is permuted for {nm}: {why}{reason}")
        return
    before, after = (sum(column) for column in zip(*done.kept.values(), strict=True))
    yield Note(
        f"the inputs of {_layers(done.kept)} are permuted, which raises the Wanda scores that {nm} keeps "
        f"in them by {after / before - 1:.2%}{reason}",
        is_warning=bool(reason),
    )


def _on_batch_norm(run: Run) -> Iterator[Note]:
    if why := run.not_corrected:
        yield Note(
            f"BatchNorm layers keep the statistics of the dense model, which do not fit the pruned one: {why}"
        )
    if not (done := run.batch_norm):
        return
    if not done.layers:
        yield Note(
            "no calibration batch reached a BatchNorm layer: they keep the statistics of the dense model"
        )
        return
    text = f"the statistics of {quantity(done.layers, 'BatchNorm layer')} are corrected on {done.samples} samples"
    if not done.kept:
        text = "BatchNorm layers keep their statistics instead of a correction"
    if done.before is None or done.after is None:
        text += "; no predictions of held-out samples to compare"
    else:
        text += (
            f", which {'changes' if done.kept else 'would change'} the distance from the dense predictions on "
            f"{done.held_out} held-out samples from {done.before:.4g} to {done.after:.4g}"
        )
    yield Note(text, is_warning=False)


def _on_training(run: Run) -> Iterator[Note]:
    if parts := {
        layer.part.name: layer.part
        for layer in run.done.layers.values()
        if layer.part and layer.part.stopped
    }:
        first = next(iter(parts.values()))
        untrained = sum(not part.after < part.before for part in parts.values())
        yield Note(
            f"the training of {_layers(parts, 'part')} stopped, {first.name} first: {first.stopped}. {untrained} of "
            "them keep the weights from before the training: load the model in a wider dtype, or use a lower "
            "learning_rate"
        )
    if not (training := run.training):
        return
    text = f"{training.recovery} trained on {quantity(training.trained, 'sample')}"
    if losses := [each.held_out for each in training.passes if each.held_out is not None]:
        best = losses.index(min(losses))
        text += f"; mean loss on {quantity(training.held_out, 'held-out sample')}, before and after each pass: "
        text += ", ".join(f"{loss:.4g}" for loss in losses)
        text += (
            f"; the weights {f'of pass {best}' if best else 'from before the training'} are kept"
        )
    else:
        text += "; too few samples to hold any out"
    yield Note(
        f"{text}; {training.stopped}" if training.stopped else text,
        is_warning=bool(training.stopped),
    )


def _size(matrices: Sequence[SkippedMatrix]) -> int:
    return sum(matrix.size for matrix in matrices)


def _layers(names: Sized, noun: str = "layer") -> str:
    return quantity(len(names), noun)
