"""`wanda-lightning check`: the zeros that a model has lost, by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.options import CheckOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.streaming.lost_zeros import LayerZeros, count_lost_zeros

_ROWS = 20


def run(options: CheckOptions) -> None:
    """Print the layers that lost zeros, worst first, and end with status 1 if there is one."""
    hub = {"cache_dir": options.cache_dir, "trust_remote_code": options.trust_remote_code}
    counts = count_lost_zeros(options.folder, options.against, hub)
    worst = sorted((layer for layer in counts if layer.lost), key=lambda layer: -layer.lost / layer.zeros)
    zeros, lost = sum(layer.zeros for layer in counts), sum(layer.lost for layer in counts)
    if not worst:
        print_line(f"{options.folder} keeps all {zeros:,} zeros of the {len(counts)} layers of {options.against}.")
        return
    print_table(_table(worst[:_ROWS], options.folder))
    if len(worst) > _ROWS:
        print_line(f"{len(worst) - _ROWS} more layers lost zeros.")
    print_line(
        f"{options.folder} lost {lost:,} of the {zeros:,} zeros of {options.against} ({lost / zeros:.2%}), in "
        f"{len(worst)} of {len(counts)} layers."
    )
    raise SystemExit(1)


def _table(layers: Sequence[LayerZeros], model: str) -> Table:
    table = Table(title=f"{escape(model)}: lost zeros", title_justify="left")
    for heading in ("layer", "zeros", "lost", "share"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in layers:
        table.add_row(escape(layer.name), f"{layer.zeros:,}", f"{layer.lost:,}", f"{layer.lost / layer.zeros:.2%}")
    return table
