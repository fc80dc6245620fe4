"""Prune the layers of one stop with their statistics: solve, write, and record what happened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wanda_lightning.calibration.observer import Observation
from wanda_lightning.calibration.torch_internals import write_count
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.statistics import InputStatistics, relative_error
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason, Stop
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.run import Run, unreached
from wanda_lightning.report import POOLED, PrunedLayer


def prune_stop(run: Run, stop: Stop, found: Observation) -> None:
    """Prune the layers that the samples reached, and leave the others dense with a reason."""
    plan = run.plan
    inputs = found.inputs
    with plan.processes.fail_together():
        reached: list[Layer] = []
        for layer in stop.layers:
            if (
                skipped := _left_dense(layer, inputs.get(layer.name, InputStatistics()))
                if plan.observed
                else None
            ):
                run.done.skipped[layer.name] = skipped
            else:
                reached.append(layer)
        statistics = InputStatistics()
        for layers in _by_input(reached, inputs, plan):
            if (following := inputs.get(layers[0].name, InputStatistics())) is not statistics:
                statistics.forget_derived()
            statistics = following
            for pruned in _prune_layers(run, layers, statistics, found):
                run.done.layers[pruned.name] = pruned
                if pruned.name in plan.coupled:
                    run.done.layers |= _zero_units(run, pruned)
        run.done.few_tokens |= found.pooled


def _left_dense(layer: Layer, inputs: InputStatistics) -> SkippedMatrix | None:
    if inputs.count == 0 and layer.expert is not None:
        detail = "no calibration token was observed in any expert of the module"
        return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNROUTED, detail)
    if inputs.count == 0:
        return unreached(layer)
    if bool(inputs.inactive().all()):
        return SkippedMatrix(
            layer.name, layer.stored_shape, SkipReason.INACTIVE, "all its inputs were zero"
        )
    return None


_MAX_GROUP = 1 << 28  # weights: 1 GiB in float32, and up to four times that in the solver


def _by_input(
    layers: Iterable[Layer], inputs: Mapping[str, InputStatistics], plan: Plan
) -> Iterator[list[Layer]]:
    """Group layers that share one input, and have biases to fit or not; split a group that is too large for memory."""
    groups: dict[object, dict[tuple[str, bool], list[Layer]]] = {}
    for layer in layers:
        # Each expert is a group of its own, since a hundred of them may share pooled statistics. These groups follow
        # each other, so that what is derived from the statistics is computed once.
        shared = groups.setdefault(inputs.get(layer.name, layer.name), {})
        key = layer.name if layer.siblings else "", plan.fitted_bias(layer) is not None
        shared.setdefault(key, []).append(layer)
    for group in (group for shared in groups.values() for group in shared.values()):
        part: list[Layer] = []
        for layer in group:
            if part and sum(other.size for other in (*part, layer)) > _MAX_GROUP:
                yield part
                part = []
            part.append(layer)
        yield part


def _prune_layers(
    run: Run, layers: Sequence[Layer], inputs: InputStatistics, found: Observation
) -> Iterator[PrunedLayer]:
    """Solve layers that share one input, and write their weights."""
    weights = [layer.read() for layer in layers]
    biases = {
        layer.name: bias for layer in layers if (bias := run.plan.fitted_bias(layer)) is not None
    }
    # A mixed-precision Trainer's would round statistics.
    with torch.autocast(weights[0].device.type, enabled=False):
        fitted = inputs.centered() if biases else inputs
        selections = [run.selections[layer.name] for layer in layers]
        versions = [write_count(weight) for weight in weights]
        solved = run.plan.config.solver.solve_together(weights, fitted, selections)
        for layer, weight, version, (sparse, _) in zip(
            layers, weights, versions, solved, strict=True
        ):
            _check_solved(run, layer, sparse, weight, write_count(weight) == version)
    for layer, dense, (sparse, _) in zip(layers, weights, solved, strict=True):
        target = run.selections[layer.name].sparsity
        block = run.plan.inventory.blocks[layer.name]
        before = _share_of_zeros(dense)
        sparsity = _share_of_zeros(sparse)
        error = None
        if "gram" in inputs.sums:
            error = relative_error(dense, sparse, inputs.sums["gram"], fitted.sums["gram"])
        if layer.name in biases:  # the means of the outputs stay
            means = fitted.mean()
            # Autocast would round a product of matrices.
            lost = ((dense.to(means.dtype) - sparse) * means).sum(dim=1)
            biases[layer.name].add_(lost.to(biases[layer.name].dtype))
        layer.write(sparse)
        tokens = found.pooled.get(layer.name, inputs.count)
        note = "; ".join(_notes(run, layer, inputs, found))
        yield PrunedLayer(
            layer.name,
            layer.shape,
            target,
            sparsity,
            tokens,
            note,
            layer.siblings,
            before,
            block,
            error,
        )


def _check_solved(
    run: Run, layer: Layer, sparse: Tensor, dense: Tensor, is_unchanged: bool
) -> None:
    """Refuse a mistake of a method outside the package before it is written."""
    criterion = run.plan.config.shown("criterion")
    solver = run.plan.config.shown("solver")
    if not is_unchanged:
        raise UserError(
            f"{criterion} and {solver} must not change the weight that they receive, but one of them changed that of "
            f"{layer.name}. Work on a copy, such as weight.abs() or weight.clone(), and reload the model."
        )
    if sparse.shape != dense.shape or not sparse.isfinite().all():
        raise UserError(
            f"{solver} must return a finite weight of the shape {tuple(dense.shape)} for {layer.name}, but it returned "
            f"one of the shape {tuple(sparse.shape)}, with {int((~sparse.isfinite()).sum())} numbers that are NaN or "
            "infinite."
        )


def _zero_units(run: Run, read: PrunedLayer) -> dict[str, PrunedLayer]:
    """Set to zero what writes the units that a layer no longer reads; return its record and their writers'."""
    units = run.plan.coupled[read.name]
    before = {writer.name: _share_of_zeros(writer.read()) for writer in units.writers}
    zeros = units.slots[-1].zeros()
    units.zero(zeros)
    run.done.zero_units[read.name] = int(zeros.sum())
    unread = f"{run.done.zero_units[read.name]:,} of {units.width:,} hidden units are zero"
    records = {read.name: replace(read, note="; ".join(filter(None, (read.note, unread))))}
    for writer in units.writers:
        block = run.plan.inventory.blocks[writer.name]
        sparsity = _share_of_zeros(writer.read())
        record = PrunedLayer(
            writer.name, writer.shape, read.target, sparsity, read.tokens, block=block
        )
        # A layer between two others reads units and writes units.
        own = run.done.layers.get(writer.name)
        records[writer.name] = replace(
            own or replace(record, before=before[writer.name]), sparsity=sparsity
        )
    return records


def _share_of_zeros(weight: Tensor) -> float:
    return int((weight == 0).sum()) / weight.numel()


def _notes(run: Run, layer: Layer, inputs: InputStatistics, found: Observation) -> Iterator[str]:
    if run.permuted and layer.name in run.permuted.kept:
        before, after = run.permuted.kept[layer.name]
        yield f"inputs permuted: kept score {after / before - 1:+.2%}"
    has_energy = inputs.sums.keys() & {"square_sum", "gram"}
    if inputs.count and has_energy and (inactive := int(inputs.inactive().count_nonzero())):
        yield f"{inactive} inputs never active"
    if layer.name in found.padding_counted:
        yield "padding counted: the attention_mask does not show which inputs are padding"
    if layer.name in found.pooled:
        yield POOLED
