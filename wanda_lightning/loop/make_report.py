"""Make the report of a pruning run, with a note for each thing that a user should know."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from wanda_lightning.calibration import observer
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import quantity
from wanda_lightning.loop.coverage import Note, unfit_layers
from wanda_lightning.loop.plan import Plan
from wanda_lightning.loop.run import Run, unreached
from wanda_lightning.models import SkippedMatrices, SkippedMatrix, SkipReason, count_parameters
from wanda_lightning.report import PruningReport

log = logging.getLogger(__name__)

_RARE_EXPERTS = ("expert layer", "pruned with the statistics of all experts")


def make_report(
    run: Run,
    dense: SkippedMatrices,
    notes: Iterable[Note] = (),
    settings: Mapping[str, Any] = {},
    rare_experts: tuple[str, str] = _RARE_EXPERTS,
) -> PruningReport:
    """Return the report of a run that has pruned all stops, and log its warnings.

    Args:
        run: The run.
        dense: What stayed dense, from `left_dense`.
        notes: What a user should know about what left.
        settings: Further entries for the configuration in the report.
        rare_experts: What got few tokens, in the singular, and what follows for it.
    """
    plan = run.plan
    pruned = run.done.layers
    if not pruned and plan.config.sparsity > 0:
        only_zeros = any(matrix.reason == SkipReason.INACTIVE for matrix in dense.values())
        inputs = "only zeros" if only_zeros else "no token except padding"
        raise UserError(
            f"batches must reach the layers, but {inputs} reached any of the {len(plan.layers)} layers, so nothing was "
            "pruned. Check that the batches hold more than padding or zeros, and that forward= runs the model."
        )

    all_notes = [
        *([Note(run.fallback)] if run.fallback else []),
        *_on_layers(run, dense, rare_experts),
        *unfit_layers(plan.inventory),
        *notes,
        *_on_few_tokens(run),
        *_on_batch_norm(run),
        *_on_training(run),
    ]
    for note in all_notes:
        if note.is_warning and plan.processes.rank == 0:
            log.warning(note.text)

    config = {
        "preset": plan.preset,
        **plan.config.describe(),
        "calibration_batches": run.samples.total,
        **settings,
    }
    with run.clock.timed("report"):
        parameters, zeros = count_parameters(plan.model)
    return PruningReport(
        layers=tuple(pruned[name] for name in plan.inventory.blocks if name in pruned),
        skipped=(*plan.inventory.skipped, *dense.values()),
        parameters=parameters,
        # The zeros of blocks on disk are known from when they were written.
        zeros=zeros + run.store.zeros,
        seconds=dict(run.clock),
        config=config,
        notes=tuple(note.text for note in all_notes),
        training=run.training,
    )


def left_dense(run: Run) -> dict[str, SkippedMatrix]:
    """Return the layers of the plan that were not pruned, in model order."""
    done = run.done
    return {
        layer.name: done.skipped.get(layer.name) or unreached(layer)
        for layer in run.plan.layers
        if layer.name not in done.layers
    }


_LEFT_DENSE = (
    (SkipReason.UNREACHED, "no calibration batch called"),
    (SkipReason.UNROUTED, "no calibration token was observed in"),
    (SkipReason.INACTIVE, "all inputs were zero in"),
)


def _on_layers(run: Run, dense: SkippedMatrices, rare_experts: tuple[str, str]) -> Iterator[Note]:
    for reason, why in _LEFT_DENSE:
        names = [name for name, matrix in dense.items() if matrix.reason is reason]
        if names:
            yield Note(f"{why} {_layers(names)}, {names[0]} first: left dense")

    noun, fate = rare_experts
    rare = [name for name in run.done.few_tokens if name in run.done.layers]
    if rare:
        rarest = min(rare, key=lambda name: run.done.layers[name].tokens)
        yield Note(
            f"{_layers(rare, noun)} received fewer than "
            f"{observer.MIN_EXPERT_TOKENS} tokens, {rarest} fewest: {run.done.layers[rarest].tokens}. "
            f"They are {fate}: give more calibration samples"
        )
    if run.plan.observed and run.plan.config.sequential != "none":
        yield from _on_passed(run)


def _on_passed(run: Run) -> Iterator[Note]:
    """Name the layers whose statistics leave out calls, since a batch reached their stop after its visit."""
    passed = _shared_outside(run.plan)
    for stop in run.plan.stops:
        if stop.name in run.done.passed:
            passed |= {layer.name for layer in stop.layers}

    names = [name for name in run.done.layers if name in passed]
    if names:
        yield Note(
            f"the model calls {_layers(names)} more than once, or in another order for some batches, {names[0]} first, "
            "but the statistics leave these calls out: use sequential='none', so that they include all calls"
        )


def _shared_outside(plan: Plan) -> set[str]:
    """Return the layers whose weight the model also holds outside of their stop, where it is called once more."""
    all_parameters = plan.model.named_parameters(remove_duplicate=False)
    number_of_names = Counter(id(parameter) for _, parameter in all_parameters)
    shared = set()
    for stop in plan.stops:
        has_several = any(number_of_names[id(layer.parameter)] > 1 for layer in stop.layers)
        if stop.module is None or not has_several:
            continue
        # The argument leaves out that module and what it contains.
        outside = {
            id(parameter)
            for _, module in plan.model.named_modules({stop.module})
            for parameter in module.parameters(recurse=False)
        }
        shared |= {layer.name for layer in stop.layers if id(layer.parameter) in outside}
    return shared


def _on_few_tokens(run: Run) -> Iterator[Note]:
    few_tokens = [
        layer
        for layer in run.done.layers.values()
        if layer.tokens < layer.shape[1]
        and layer.name not in run.done.few_tokens
        and layer.name in run.selections  # others only write hidden units
    ]
    if few_tokens and "gram" in run.plan.config.needs:
        fewest = min(few_tokens, key=lambda layer: layer.tokens / layer.shape[1])
        yield Note(
            f"{_layers(few_tokens)} received fewer tokens than inputs, {fewest.name} fewest: {fewest.tokens} "
            f"tokens for {fewest.shape[1]} inputs. Their Gram matrices depend on the dampening: give more "
            "calibration samples"
        )


def _on_batch_norm(run: Run) -> Iterator[Note]:
    if run.not_corrected:
        yield Note(
            "BatchNorm layers keep the statistics of the dense model, which do not fit the pruned one: "
            f"{run.not_corrected}"
        )
    correction = run.batch_norm
    if correction is None:
        return
    if not correction.layers:
        yield Note(
            "no calibration batch reached a BatchNorm layer: they keep the statistics of the dense model"
        )
        return

    if correction.kept:
        layers = quantity(correction.layers, "BatchNorm layer")
        text = f"the statistics of {layers} are corrected on {correction.samples} samples"
        verb = "changes"
    else:
        text = "BatchNorm layers keep their statistics instead of a correction"
        verb = "would change"
    if correction.before is None or correction.after is None:
        text += "; no predictions of held-out samples to compare"
    else:
        text += (
            f", which {verb} the distance from the dense predictions on {correction.held_out} held-out samples from "
            f"{correction.before:.4g} to {correction.after:.4g}"
        )
    yield Note(text, is_warning=False)


def _on_training(run: Run) -> Iterator[Note]:
    parts = [layer.part for layer in run.done.layers.values() if layer.part]
    stopped_parts = {part.name: part for part in parts if part.stopped}
    if stopped_parts:
        first = next(iter(stopped_parts.values()))
        untrained = sum(not part.after < part.before for part in stopped_parts.values())
        yield Note(
            f"the training of {_layers(stopped_parts, 'part')} stopped, {first.name} first: {first.stopped}. "
            f"{untrained} of them keep the weights from before the training: load the model in a wider dtype, or use a "
            "lower learning_rate"
        )

    training = run.training
    if training is None:
        return
    text = f"{training.recovery} trained on {quantity(training.trained, 'sample')}"
    losses = [one_pass.held_out for one_pass in training.passes if one_pass.held_out is not None]
    if losses:
        best = losses.index(min(losses))  # number 0 is before the training
        held_out = quantity(training.held_out, "held-out sample")
        shown = ", ".join(f"{loss:.4g}" for loss in losses)
        kept = f"of pass {best}" if best else "from before the training"
        text += f"; mean loss on {held_out}, before and after each pass: {shown}; the weights {kept} are kept"
    else:
        text += "; too few samples to hold any out"
    if training.stopped:
        text += f"; {training.stopped}"
    yield Note(text, is_warning=bool(training.stopped))


def _layers(names: Sized, noun: str = "layer") -> str:
    return quantity(len(names), noun)
