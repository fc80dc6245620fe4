"""`wanda-lightning inspect`: what would be pruned, from the configuration alone."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from wanda_lightning.cli.options import as_pattern, as_patterns
from wanda_lightning.config import resolve_pattern
from wanda_lightning.models import find_layers, model_from_config
from wanda_lightning.notes import low_coverage, unfit_layers
from wanda_lightning.report import skipped_table


def inspect_model(
    model: str,
    sequential: Literal["block", "layer", "none"] = "block",
    skip: str | list[str] = "",
    only: str | list[str] = "",
    include_grouped: bool = False,
    sparsity_type: str = "unstructured",
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show what would be pruned, what not, and why; no weight is loaded.

    Args:
        model: Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.
        sequential: What calibration batches stop at.
        skip: Layers to leave dense: names, globs or re: expressions, separated by commas or as a list.
        only: The layers to prune, likewise, where not all.
        include_grouped: Prune grouped convolutions, too, each group as a matrix of its own.
        sparsity_type: unstructured, or any N:M: layers whose input width M does not divide stay dense.
        cache_dir: Where downloads from the hub are kept.
        trust_remote_code: Run the code that comes with a hub model.
    """
    inspected: nn.Module = model_from_config(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    pattern = resolve_pattern(as_pattern(sparsity_type))
    found = find_layers(inspected, sequential, as_patterns(skip), as_patterns(only), include_grouped, pattern)
    table = Table(title=f"{model}: would be pruned", title_justify="left")
    for heading in ("unit", "layers", "weights", "inside"):
        table.add_column(heading, justify="right" if heading in ("layers", "weights") else "left", overflow="fold")
    for unit in found.units:
        # Experts by one name for all: there may be hundreds.
        inside = [(layer.siblings or layer.name).removeprefix(f"{unit.name}.") for layer in unit.layers]
        weights = sum(layer.size for layer in unit.layers)
        names = ", ".join(dict.fromkeys(inside)) if unit.name and inside != [unit.name] else ""
        table.add_row(unit.name or "the whole model", str(len(unit.layers)), f"{weights:,}", names)
    console = Console()
    console.print(table)
    console.print(skipped_table(found.skipped))
    parameters = sum(parameter.numel() for parameter in inspected.parameters())
    weights = sum(layer.size for layer in found.layers)
    console.print(
        f"{len(found.layers)} layers in {len(found.units)} units hold {weights:,} weights, "
        f"{weights / parameters:.1%} of the model's {parameters:,} parameters."
    )
    for note in (unfit_layers(found), low_coverage(found)):
        if note is not None:
            console.print(f"Note: {note.text}", markup=False)
