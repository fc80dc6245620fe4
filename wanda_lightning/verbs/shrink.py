"""Make a model smaller: `shrink`, and what the callback and the command call."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from wanda_lightning.calibration.batches import BatchFunction
from wanda_lightning.calibration.samples import forward_batch
from wanda_lightning.common.text_features import reads_texts
from wanda_lightning.config import PruningConfig, Unpack
from wanda_lightning.experts.mixture_checks import refuse_without_mixtures
from wanda_lightning.experts.remove_experts import remove_experts
from wanda_lightning.experts.size import fitting_sparsity, parse_size
from wanda_lightning.loop.plan import make_plan, refuse_unprunable
from wanda_lightning.loop.run import Run
from wanda_lightning.loop.steps import begin
from wanda_lightning.models import number_of_parameters
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import PruningReport
from wanda_lightning.shrink_config import ShrinkChoices, ShrinkConfig
from wanda_lightning.units.zero_units import refuse_parts_of_layers, take_out_zero_units
from wanda_lightning.verbs.prune_weights import prune_weights
from wanda_lightning.verbs.remove_units import remove_units

log = logging.getLogger(__name__)


def shrink(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    units: float | None = None,
    experts: float | None = None,
    max_size: str | None = None,
    forward: BatchFunction | None = None,
    progress: bool = True,
    **choices: Unpack[ShrinkChoices],
) -> PruningReport:
    """Make a model smaller in place: hidden units leave its layers, or experts its mixtures of experts.

    A hidden unit is what one layer reads and others write, such as the width inside an MLP. It is scored as in FASP
    (Hu et al. 2025, arXiv 2501.09412). An expert is scored by what it adds to the output of its mixture. Without
    `units` and `experts`, the units leave that are zero already, on both sides; the model then computes the same.

    The configuration of a model of transformers is adapted, so that a saved folder loads without this package.
    Optimizers and adapters of the larger model do not fit afterwards.

    Args:
        model: The model, in memory and not sharded.
        batches: Calibration batches as for `prune`. Without `units` and `experts`, the first one only shows that the
            model computes the same, and models of transformers, timm and sentence-transformers need none.
        units: Fraction of the hidden units that leave, above 0 and below 1.
        experts: Fraction of the experts that leave each mixture, above 0 and below 1. They leave after the units.
        max_size: Size of the new model, such as `"60GB"`, in place of `experts`: as many experts stay as fit.
        forward: Runs one batch through the model, by default as in `prune`.
        progress: Show a bar (plain lines if there is no terminal).
        **choices: The other arguments of `ShrinkConfig`: `by`, `refit`, `multiple_of`, `recovery`,
            `sequential`, `skip`, `only`, `keep_batch_norm`.

    Returns:
        The report, with the shapes of the larger model: what has left counts as sparsity.

    Raises:
        ValueError: If the model cannot be shrunk as asked, before any weight is written.
    """
    config = ShrinkConfig(units=units, experts=experts, max_size=max_size, **choices)
    if not config.parts:
        return _take_out_zeros(model, batches, forward, progress)
    parts = fitted_parts(config.parts, model, config.max_size, log.info)
    return carry_out(parts, model, batches, forward, progress=progress)


def _take_out_zeros(
    model: nn.Module, batches: Iterable[Any] | None, forward: BatchFunction | None, progress: bool
) -> PruningReport:
    started = time.perf_counter()
    if reads_texts(model):  # a small batch is made for it
        batches = None
    first = list(islice(batches or (), 1))
    run = partial(forward or partial(forward_batch, model), first[0]) if first else None
    taken = take_out_zero_units(model, run, progress)
    return taken.report(time.perf_counter() - started)


def fitted_parts(
    parts: Sequence[PruningConfig],
    model: nn.Module,
    max_size: str | None,
    say: Callable[[str], object],
    sizes: Mapping[str, int] = {},
) -> Sequence[PruningConfig]:
    """Return the choices with which as many experts stay as fit into a size, and say how many."""
    if max_size is None:
        return parts
    sizes = sizes or {name: weight.nbytes for name, weight in model.named_parameters()}
    sparsity, sentence = fitting_sparsity(model, sizes, parse_size(max_size))
    say(sentence)
    return (*parts[:-1], replace(parts[-1], sparsity=sparsity))


def carry_out(
    parts: Sequence[PruningConfig],
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    forward: BatchFunction | None = None,
    predict: BatchFunction | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
) -> PruningReport:
    """Prune or shrink as chosen, one part after the other, in one process or several.

    Args:
        parts: The choices of each part.
        model: The model, a full copy in each process.
        batches: Calibration batches of this process.
        forward: Runs one batch through the model.
        predict: Runs one batch and returns the logits; by default `forward`.
        progress: Show a bar in the first process.
        processes: All processes that call this.
    """
    refuse_parts(parts, model, processes)
    if len(parts) > 1 and batches is not None:
        batches = list(batches)
    reports = []
    for part in parts:
        run = begin(make_plan(part, model, processes), batches, forward, predict, progress)
        reports.append(_VERBS[part.pattern.removes](run))
    return _joined(reports)


def refuse_parts(
    parts: Sequence[PruningConfig], model: nn.Module, processes: Processes = SINGLE_PROCESS
) -> None:
    """Refuse a model that cannot be changed as chosen, as far as it shows before it runs."""
    for part in parts:
        plan = make_plan(part, model, processes)
        with processes.fail_together():
            refuse_unprunable(plan.layers)
            refuse_without_mixtures(part, model, plan.inventory)
            if part.pattern.removes == "units":
                refuse_parts_of_layers(model)


def _take_units_out(run: Run) -> PruningReport:
    """Set units to zero, then take out all that are zero, in all processes alike."""
    model = run.plan.model
    processes = run.plan.processes
    # Another sample could reach other layers, and so take out other units.
    sample = run.samples.common_sample()
    report = remove_units(run)
    assert sample is not None, "remove_units refuses to run without a sample"
    with run.clock.timed("shrink"), processes.fail_together():
        taken = take_out_zero_units(model, sample.forward, run.progress)
    size = number_of_parameters(model)
    if not processes.all_agree(processes.broadcast(size, 0) == size):
        raise RuntimeError("The processes took out different hidden units.")
    if taken.layers:
        report = report.marked_as_shrunk()
    return replace(report, seconds=dict(run.clock), notes=(*report.notes, *taken.notes()))


_VERBS = {"weights": prune_weights, "units": _take_units_out, "experts": remove_experts}


def _joined(reports: list[PruningReport]) -> PruningReport:
    """Return one report of all parts, with the layers and the parameters that the model had before the first."""
    joined = reports[0]
    for report in reports[1:]:
        layers = (*joined.layers, *report.layers)
        changed = {layer.name for layer in layers}
        joined = replace(
            joined,
            layers=layers,
            skipped=tuple(matrix for matrix in report.skipped if matrix.name not in changed),
            zeros=joined.zeros + report.zeros,
            seconds=dict(Counter(joined.seconds) + Counter(report.seconds)),
            config={**joined.config, "experts": report.config["sparsity"]},
            notes=(*joined.notes, *report.notes),
        )
    return joined
