"""`wanda-lightning inspect`: what `prune` would prune, from the configuration of the model alone."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.pruning_options import InspectOptions
from wanda_lightning.common.words import counted
from wanda_lightning.engine.drop_experts import find_mixtures
from wanda_lightning.engine.notes import low_coverage, unfit_layers
from wanda_lightning.engine.plan import config_for, make_plan
from wanda_lightning.engine.refusals import refuse_nothing_to_prune
from wanda_lightning.models import Inventory, find_layers
from wanda_lightning.modules.loading import model_from_config
from wanda_lightning.report import skipped_table


def run(options: InspectOptions) -> None:
    """Print the layers that would be pruned, by unit, and the other matrices, by reason."""
    model: Any = model_from_config(options.source(options.model))
    config = config_for(options.config, model)
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
