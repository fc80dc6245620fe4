"""Run `inspect`: show what would be pruned, without the weights."""

from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.options import Model
from wanda_lightning.cli.printing import print_line, print_table
from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.lightning_modules.model_loading import check_source, model_from_config
from wanda_lightning.loop.coverage import low_coverage, unfit_layers
from wanda_lightning.loop.plan import config_for, refuse_nothing_to_prune
from wanda_lightning.models import Inventory, Stop, find_layers, number_of_parameters
from wanda_lightning.report import skipped_table


def inspect(config: PruningConfig, options: Model) -> None:
    """Print the layers that would be pruned, by stop, and the other matrices, by reason."""
    source = options.source(options.model)
    if options.is_language:
        check_source(source, weights=False)
    model: Any = model_from_config(source)
    config = config_for(config, model)
    inventory = find_layers(model, config.sequential, config.skip, config.only, config.pattern)
    print_table(_stops_table(inventory, options.model))
    print_table(skipped_table(inventory.skipped))

    parameters = number_of_parameters(model)
    weights = sum(layer.size for layer in inventory.layers)
    layers = quantity(len(inventory.layers), "layer")
    stops = quantity(len(inventory.stops), "stop")
    print_line(
        f"{layers} at {stops} hold {weights:,} weights, "
        f"{weights / parameters:.1%} of the model's {parameters:,} parameters, with --sequential {config.sequential}."
    )
    if config.sequential != "none":
        print_line(
            "A stop is where all calibration batches wait until the layers inside are pruned."
        )
    for note in (*unfit_layers(inventory), *low_coverage(inventory)):
        print_line(f"Note: {note.text}")
    refuse_nothing_to_prune(config, inventory)


def _stops_table(inventory: Inventory, model: str) -> Table:
    """Return a table with a row for each stop; stops that differ only in their names share a row."""
    table = Table(title=f"{escape(model)}: would be pruned", title_justify="left")
    table.add_column("stop", overflow="fold")
    table.add_column("layers", justify="right", overflow="fold")
    table.add_column("weights", justify="right", overflow="fold")
    table.add_column("inside", overflow="fold")
    for cells, stops in groupby(inventory.stops, _cells):
        first, *others = stops
        names = escape(first.name) or "the whole model"
        if others:
            names += f" to {escape(others[-1].name)}, each of {len(others) + 1}"
        table.add_row(names, *cells)
    return table


def _cells(stop: Stop) -> tuple[str, str, str]:
    """Return the number of layers and weights of a stop, and the layers inside, with one name for all experts."""
    inside = [(layer.siblings or layer.name).removeprefix(f"{stop.name}.") for layer in stop.layers]
    names = ""
    # The whole model has too many layers to list, and a stop that is a layer has no others inside.
    if stop.name and inside != [stop.name]:
        names = ", ".join(dict.fromkeys(inside))
    return str(len(stop.layers)), f"{sum(layer.size for layer in stop.layers):,}", escape(names)
