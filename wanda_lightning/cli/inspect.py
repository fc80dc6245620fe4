"""`wanda-lightning inspect`: what would be pruned, from the configuration alone."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.options import InspectOptions
from wanda_lightning.cli.tables import print_note, print_table
from wanda_lightning.config import resolve_pattern
from wanda_lightning.models import Inventory, find_layers, model_from_config
from wanda_lightning.notes import low_coverage, unfit_layers
from wanda_lightning.report import skipped_table


def run(options: InspectOptions) -> None:
    """Print the layers that would be pruned, by units, and the other matrices, by reasons."""
    model = model_from_config(options.model, options.cache_dir, options.trust_remote_code)
    pattern = resolve_pattern(options.sparsity_type)
    choices = (options.sequential, options.skip, options.only, options.include_grouped, pattern)
    found = find_layers(model, *choices)
    print_table(_units_table(found, options.model))
    print_table(skipped_table(found.skipped))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(layer.size for layer in found.layers)
    Console().print(
        f"{_counted(len(found.layers), 'layer')} in {_counted(len(found.units), 'unit')} hold {weights:,} weights, "
        f"{weights / parameters:.1%} of the model's {parameters:,} parameters.",
        soft_wrap=True,
    )
    for note in (unfit_layers(found), low_coverage(found)):
        if note is not None:
            print_note(note.text)


def _units_table(found: Inventory, model: str) -> Table:
    table = Table(title=f"{escape(model)}: would be pruned", title_justify="left")
    for heading in ("unit", "layers", "weights", "inside"):
        table.add_column(heading, justify="right" if heading in ("layers", "weights") else "left", overflow="fold")
    for unit in found.units:
        # All experts of a module by one name: there may be hundreds.
        inside = [(layer.siblings or layer.name).removeprefix(f"{unit.name}.") for layer in unit.layers]
        names = ", ".join(dict.fromkeys(inside)) if unit.name and inside != [unit.name] else ""
        weights = f"{sum(layer.size for layer in unit.layers):,}"
        table.add_row(escape(unit.name) or "the whole model", str(len(unit.layers)), weights, escape(names))
    return table


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
