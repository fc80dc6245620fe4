"""The notes of a report: one function for each thing that a user should know about a pruning run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import NamedTuple

from wanda_lightning.common.words import counted
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.engine.plan import Plan, Selections
from wanda_lightning.models import Inventory, SkippedMatrix, SkipReason
from wanda_lightning.report import BatchNormCorrection, Permuted, PrunedLayer, Training

_ALREADY_SPARSE = 0.05  # fraction of zeros before pruning
_ENOUGH_COVERAGE = 0.8  # fraction of the weights that a user would expect to be pruned


class Note(NamedTuple):
    """A sentence for the report; a warning is also logged."""

    text: str
    is_warning: bool = True


@dataclass
class Outcome:
    """Result of a pruning run for the layers of a plan.

    Attributes:
        plan: The plan.
        selections: The sparsity, criterion and pattern of each layer.
        layers: The pruned layers by name, in the order in which they were pruned.
        skipped: Layers that were left dense, by name.
        few_tokens: Number of tokens of each expert that was pruned with the statistics of all experts of its module.
        revisited: Layers that the model called again after they were pruned.
        batch_norm: The correction of BatchNorm layers; None if there was none.
        not_corrected: Why the model's BatchNorm layers were not corrected; empty if it has none, or they were.
        permuted: The permutation of hidden units; None if there was none.
        training: The training of the whole model; None if there was none.
        seconds: Time by stage.
    """

    plan: Plan
    selections: Selections = field(default_factory=dict)
    layers: dict[str, PrunedLayer] = field(default_factory=dict)
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)
    few_tokens: Mapping[str, int] = field(default_factory=dict)
    revisited: set[str] = field(default_factory=set)
    batch_norm: BatchNormCorrection | None = None
    not_corrected: str = ""
    permuted: Permuted | None = None
    training: Training | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def notes_on(outcome: Outcome) -> list[Note]:
    """Return all notes on a pruning run."""
    notes = (
        _left_dense(outcome, SkipReason.UNREACHED, "no calibration batch called"),
        _left_dense(outcome, SkipReason.UNROUTED, "no calibration token was observed in"),
        _left_dense(outcome, SkipReason.INACTIVE, "all inputs were zero in"),
        _few_expert_tokens(outcome),
        _revisited(outcome),
        _already_sparse(outcome),
        unfit_layers(outcome.plan.inventory),
        low_coverage(outcome.plan.inventory, outcome.skipped),
        _few_tokens(outcome),
        _short_of_target(outcome),
        _mixed_nm(outcome),
        _permuted(outcome),
        _batch_norm(outcome),
        _training(outcome),
    )
    return [note for note in notes if note]


def _left_dense(outcome: Outcome, reason: SkipReason, why: str) -> Note | None:
    names = [name for name, matrix in outcome.skipped.items() if matrix.reason is reason]
    return Note(f"{why} {_layers(names)}, {names[0]} first: left dense") if names else None


def _few_expert_tokens(outcome: Outcome) -> Note | None:
    few = {name: tokens for name, tokens in outcome.few_tokens.items() if name in outcome.layers}
    if not few:
        return None
    least = min(few, key=lambda name: outcome.layers[name].tokens)
    return Note(
        f"{_layers(few, 'expert')} received fewer than {max(1, outcome.plan.config.min_expert_tokens)} tokens, {least} "
        f"fewest: {outcome.layers[least].tokens}. They are pruned with the statistics of all experts: give more "
        "calibration samples"
    )


def _revisited(outcome: Outcome) -> Note | None:
    names = [name for name in outcome.layers if name in outcome.revisited]
    if not names:
        return None
    return Note(
        f"the model calls {_layers(names)} more than once, {names[0]} first, but the statistics include only the first "
        "call: use sequential='none', which includes all calls"
    )


def _already_sparse(outcome: Outcome) -> Note | None:
    sparse = [layer for layer in outcome.layers.values() if layer.before > _ALREADY_SPARSE]
    if not sparse:
        return None
    most = max(sparse, key=lambda layer: layer.before)
    were = "was" if len(sparse) == 1 else "were"
    return Note(
        f"{_layers(sparse)} {were} sparse already, {most.name} most: {most.before:.1%} zeros, which count toward the "
        "target",
        is_warning=False,
    )


def unfit_layers(inventory: Inventory) -> Note | None:
    """Name the layers that the pattern does not fit."""
    if not (unfit := inventory.skipped_for(SkipReason.PATTERN)):
        return None
    return Note(f"the pattern does not fit {_layers(unfit)}, {unfit[0].name} largest ({unfit[0].detail}): left dense")


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
    alike: dict[str, list[SkippedMatrix]] = {}
    for matrix in left:
        alike.setdefault(matrix.detail, []).append(matrix)
    largest = sorted(alike.items(), key=lambda item: -_size(item[1]))[:3]
    texts = []
    for detail, matrices in largest:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        texts.append(f"{matrices[0].name}{more}, {_size(matrices):,} weights: {detail}")
    return Note(
        f"only {pruned / total:.0%} of the weights besides embeddings, stem and head are in pruned layers; the largest "
        f"parts left out are {'; '.join(texts)}"
    )


def _few_tokens(outcome: Outcome) -> Note | None:
    layers = outcome.layers.values()
    few = [layer for layer in layers if layer.tokens < layer.shape[1] and layer.name not in outcome.few_tokens]
    if "gram" not in outcome.plan.config.needs or not few:
        return None
    least = min(few, key=lambda layer: layer.tokens / layer.shape[1])
    return Note(
        f"{_layers(few)} received fewer tokens than inputs, {least.name} fewest: {least.tokens} tokens for "
        f"{least.shape[1]} inputs. Their Gram matrices depend on the dampening: give more calibration samples"
    )


def _short_of_target(outcome: Outcome) -> Note | None:
    short = [layer for layer in outcome.layers.values() if layer.target - layer.sparsity > 0.01 + 1 / layer.shape[1]]
    if not short:
        return None
    worst = min(short, key=lambda layer: layer.sparsity)
    return Note(
        f"{outcome.plan.config.pattern} left {_layers(short)} short of the target, {worst.name} most: "
        f"{worst.sparsity:.1%} of {worst.target:.1%}"
    )


def _mixed_nm(outcome: Outcome) -> Note | None:
    kinds = Counter(outcome.selections[name].pattern for name in outcome.layers)
    if outcome.plan.config.pattern.fixed_sparsity is None or len(kinds) < 2:
        return None
    counts = {_as_nm(kind): number for kind, number in kinds.items()}
    listed = ", ".join(f"{number} layer{'s' * (number > 1)} {kind}" for kind, number in sorted(counts.items()))
    return Note(f"mixed N:M: {listed}", is_warning=False)


def _permuted(outcome: Outcome) -> Note | None:
    if not (done := outcome.permuted):
        return None
    pattern = outcome.plan.config.pattern
    if done.put_back:
        reason = f"; the units of {_layers(done.put_back, 'block')} were put back, {done.put_back[0]} first, because "
        reason += "its output changed"
    else:
        reason = ""
    if not done.kept:
        why = done.why_not or "no layer reads hidden units whose order can be changed"
        return Note(f"nothing is permuted for {_as_nm(pattern)}: {why}{reason}")
    before, after = (sum(column) for column in zip(*done.kept.values(), strict=True))
    return Note(
        f"the inputs of {_layers(done.kept)} are permuted, which raises the Wanda scores that {_as_nm(pattern)} keeps "
        f"in them by {after / before - 1:.2%}{reason}",
        is_warning=bool(reason),
    )


def _batch_norm(outcome: Outcome) -> Note | None:
    if why := outcome.not_corrected:
        return Note(f"BatchNorm layers keep the statistics of the dense model, which do not fit the pruned one: {why}")
    if not (done := outcome.batch_norm):
        return None
    if not done.layers:
        return Note("no calibration batch reached a BatchNorm layer: they keep the statistics of the dense model")
    if done.before is None or done.after is None:
        compared = "; no predictions of held-out samples to compare"
    else:
        changes = "changes" if done.kept else "would change"
        compared = (
            f", which {changes} the distance from the dense predictions on {done.held_out} held-out samples from "
            f"{done.before:.4g} to {done.after:.4g}"
        )
    if done.kept:
        layers = _layers(range(done.layers), "BatchNorm layer")
        return Note(f"the statistics of {layers} are corrected on {done.samples} samples{compared}", is_warning=False)
    return Note(f"BatchNorm layers keep their statistics instead of a correction{compared}", is_warning=False)


def _training(outcome: Outcome) -> Note | None:
    if not (training := outcome.training):
        return None
    losses = ", ".join(f"{each.loss:.4g}" for each in training.passes if each.loss is not None)
    trained = counted(training.trained, "sample")
    text = f"{training.recovery} trained on {trained}, mean loss of each pass: {losses or 'none'}"
    held_out = [each.held_out for each in training.passes if each.held_out is not None]
    if held_out:
        best = held_out.index(min(held_out))
        text += f"; on {counted(training.held_out, 'held-out sample')}, before and after each pass: "
        text += ", ".join(f"{loss:.4g}" for loss in held_out)
        text += f"; the weights {f'of pass {best}' if best else 'from before the training'} are kept"
    else:
        text += "; too few samples to hold any out"
    return Note(f"{text}; {training.stopped}" if training.stopped else text, is_warning=bool(training.stopped))


def _as_nm(pattern: Pattern) -> str:
    if pattern.fixed_sparsity is None:
        return "dense"
    return f"{pattern.group_kept}:{pattern.group_size}"


def _size(matrices: Sequence[SkippedMatrix]) -> int:
    return sum(matrix.size for matrix in matrices)


def _layers(names: Sized, noun: str = "layer") -> str:
    return counted(len(names), noun)
