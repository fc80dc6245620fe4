"""`wanda-lightning inspect`: what `prune` would prune, from the configuration of the model alone."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import psutil
from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.common_options import PAPER_SEQLEN, PAPER_SEQUENCES, SEQUENCES_AT_ONCE
from wanda_lightning.cli.explain import as_usage_errors
from wanda_lightning.cli.measure import checked_seqlen
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.pruning_options import InspectOptions
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.memory import free_memory
from wanda_lightning.common.words import as_gib, counted
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.drop_experts import find_mixtures
from wanda_lightning.engine.notes import low_coverage, unfit_layers
from wanda_lightning.engine.plan import config_for, make_plan
from wanda_lightning.engine.refusals import refuse_nothing_to_prune
from wanda_lightning.models import Inventory, find_layers
from wanda_lightning.modules.loading import model_from_config
from wanda_lightning.report import skipped_table
from wanda_lightning.streaming import Memory, Samples, memory_to_measure, memory_to_prune
from wanda_lightning.streaming.from_disk import refuse_whole_model


def run(options: InspectOptions) -> None:
    """Print the layers that would be pruned, by unit, and the other matrices, by reason."""
    if options.stream:
        with as_usage_errors():
            refuse_whole_model(options.config)
    model: Any = model_from_config(options.source(options.model))
    config = config_for(options.config, model)
    found = find_layers(model, config.sequential, config.skip, config.only, config.include_grouped, config.pattern)
    print_table(_units_table(found, options.model))
    print_table(skipped_table(found.skipped))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(layer.size for layer in found.layers)
    print_line(
        f"{counted(len(found.layers), 'layer')} in {counted(len(found.units), 'unit')} hold {weights:,} weights, "
        f"{weights / parameters:.1%} of the model's {parameters:,} parameters, with --sequential {config.sequential}."
    )
    for note in (unfit_layers(found), low_coverage(found)):
        if note is not None:
            print_line(f"Note: {note.text}")
    if config.pattern.prunes_units:
        print_line(
            "Note: --pattern structured prunes only those of these layers that write or read hidden units. prune finds "
            "them by running the blocks."
        )
    refuse_nothing_to_prune(config, found)
    if config.pattern.drops_experts:
        find_mixtures(make_plan(config, model, has_weights=False))
    if options.stream:
        _print_memory(options, model, config)


def _print_memory(options: InspectOptions, model: Any, config: PruningConfig) -> None:
    """Print the memory that `prune --stream` needs; refuse a machine that has less."""
    import torch

    is_given = options.dtype not in (None, "auto")
    model.to(getattr(torch, str(options.dtype)) if is_given else model.config.dtype or model.dtype)
    seqlen = checked_seqlen(options.seqlen, model.config, PAPER_SEQLEN)
    batch_size = options.batch_size or SEQUENCES_AT_ONCE
    samples = Samples(options.num_samples or PAPER_SEQUENCES, seqlen, batch_size)
    prune = memory_to_prune(model, config, samples, options.park)
    measure = memory_to_measure(model, seqlen, batch_size, options.park)
    libraries = psutil.Process().memory_info().rss  # this process has loaded them, too
    print_table(_memory_table(libraries, prune, measure))
    needed = libraries + max(prune.total, measure.total)
    free = libraries + free_memory()
    needs = f"prune --stream needs about {as_gib(needed)} with {samples}"
    if needed > free:
        raise UserError(
            f"{needs}, but {as_gib(free)} are free. Use fewer or shorter samples (--num_samples, --seqlen), "
            "smaller batches (--batch_size), --park disk, --method wanda (no Gram matrices), or the other "
            "--sequential: block holds fewer activations, layer fewer Gram matrices."
        )
    print_line(f"{needs}, and {as_gib(free)} are free.")


def _memory_table(libraries: int, *memories: Memory) -> Table:
    table = Table(title="GiB of memory with --stream", title_justify="left")
    for heading in ("", "to prune", "to measure perplexity"):
        table.add_column(heading, justify="right" if heading else "left")
    labels = (
        "Python and its libraries",
        "weights outside of the blocks",
        "two blocks",
        "activations of waiting batches",
        "statistics and workspace, or logits",
        "sum",
    )
    columns = [(libraries, *astuple(memory), libraries + memory.total) for memory in memories]
    for label, *sizes in zip(labels, *columns, strict=True):
        table.add_row(label, *(f"{size / 2**30:.2f}" for size in sizes))
    return table


def _units_table(found: Inventory, model: str) -> Table:
    table = Table(title=f"{escape(model)}: would be pruned", title_justify="left")
    for heading in ("unit", "layers", "weights", "inside"):
        table.add_column(heading, justify="right" if heading in ("layers", "weights") else "left", overflow="fold")
    for unit in found.units:
        # One name for all experts of a module, which may have hundreds.
        inside = [(layer.siblings or layer.name).removeprefix(f"{unit.name}.") for layer in unit.layers]
        names = ", ".join(dict.fromkeys(inside)) if unit.name and inside != [unit.name] else ""
        weights = f"{sum(layer.size for layer in unit.layers):,}"
        table.add_row(escape(unit.name) or "the whole model", str(len(unit.layers)), weights, escape(names))
    return table
