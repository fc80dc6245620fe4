"""Run `inspect`: show what `prune` would prune, from the configuration of the model alone."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.measuring import checked_seqlen
from wanda_lightning.cli.options import Model
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.common.words import as_size, counted
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.drop_experts import find_mixtures
from wanda_lightning.engine.notes import low_coverage, unfit_layers
from wanda_lightning.engine.plan import config_for, make_plan
from wanda_lightning.engine.refusals import refuse_nothing_to_prune
from wanda_lightning.models import Inventory, Unit, find_layers
from wanda_lightning.modules.loading import check_source, model_from_config
from wanda_lightning.report import skipped_table


def inspect(config: PruningConfig, options: Model) -> None:
    """Print the layers that would be pruned, by unit, and the other matrices, by reason."""
    source = options.source(options.model)
    if not options.is_image:
        check_source(source)
    model: Any = model_from_config(source)
    config = config_for(config, model)
    found = find_layers(model, config.sequential, config.skip, config.only, config.pattern)
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
    if not options.is_image:
        print_line(_memory(model, found, options.dtype))


def _memory(model: Any, found: Inventory, dtype: str) -> str:
    """Describe the memory that grows with the model and with the samples when a model is pruned from disk."""
    size = (getattr(torch, dtype) if dtype != "auto" else model.config.dtype or model.dtype).itemsize
    blocks = (model.get_submodule(name).parameters() for name in {*found.blocks.values()} if name)
    largest = size * max((sum(each.numel() for each in block) for block in blocks), default=0)
    seqlen, width = checked_seqlen(None, model.config), model.get_input_embeddings().weight.shape[-1]
    windows = 128
    waiting = size * windows * seqlen * width
    return (
        f"prune --stream holds {as_size(2 * largest + waiting)} for a while: twice the largest block "
        f"({as_size(largest)}), and the inputs of a block for {windows} windows of {seqlen} tokens."
    )


def _units_table(found: Inventory, model: str) -> Table:
    table = Table(title=f"{escape(model)}: would be pruned", title_justify="left")
    for heading in ("unit", "layers", "weights", "inside"):
        table.add_column(heading, justify="right" if heading in ("layers", "weights") else "left", overflow="fold")
    for alike, group in groupby(found.units, _row):  # most blocks of a model are alike
        first, *others = group
        names = escape(first.name) or "the whole model"
        if others:
            names += f" to {escape(others[-1].name)}, each of {len(others) + 1}"
        table.add_row(names, *alike)
    return table


def _row(unit: Unit) -> tuple[str, str, str]:
    """Return the number of layers and weights of a unit, and the layers inside, with one name for all experts."""
    inside = [(layer.siblings or layer.name).removeprefix(f"{unit.name}.") for layer in unit.layers]
    names = ", ".join(dict.fromkeys(inside)) if unit.name and inside != [unit.name] else ""
    return str(len(unit.layers)), f"{sum(layer.size for layer in unit.layers):,}", escape(names)
