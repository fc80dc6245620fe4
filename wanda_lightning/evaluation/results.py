"""The sparsity of a model, and the results of several models as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.models import find_layers
from wanda_lightning.models.quantized import can_be_read, quantizer, read_weight
from wanda_lightning.report import versions
from wanda_lightning.report.records import as_json

Results = dict[str, dict[str, float]]
"""Text, task or data set -> metric -> value; fractions are in [0, 1]."""

_COUNTS = ("windows", "documents", "images")  # metrics that give the number of samples
_ERROR = "_stderr"  # suffix of a metric's standard error
_SPARSITY = {"layers": "of prunable layers", "model": "of the model"}


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """Return the fractions of zeros: `layers`, of the weights that can be pruned; `model`, of all parameters.

    Quantized weights count as if they could be pruned, and are dequantized one at a time.
    """
    prunable = {id(layer.parameter) for layer in find_layers(model).layers}
    zeros = Counter[str]()
    sizes = Counter[str]()
    seen = set[int]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_quantized = (
                name == "weight"
                and quantizer(module, parameter) is not None
                and can_be_read(module)
            )
            weight = read_weight(module) if is_quantized else parameter
            for kind in (
                ("layers", "model") if is_quantized or id(parameter) in prunable else ("model",)
            ):
                zeros[kind] += int((weight.detach() == 0).count_nonzero())
                sizes[kind] += weight.numel()
    return {kind: zeros[kind] / max(1, sizes[kind]) for kind in ("layers", "model")}


@dataclass
class Evaluation:
    """Results of several models, in order, that were evaluated in the same way, with the options of the evaluation.

    If there is a `dense` model, the others are compared with it.
    """

    models: dict[str, Results]
    dense: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> str:
        """Return all numbers, unrounded; those that are not finite are null."""
        return as_json(asdict(self))

    def save(self, path: str | Path) -> None:
        """Write a JSON file atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def table(self) -> Table:
        """Return a table with a row for each metric and a column for each model.

        A row's heading has the number of windows, documents or images. A value is followed by its standard error, if
        it has one, and by its difference to the dense model in parentheses.
        """
        table = Table()
        table.add_column("")
        for name in self.models:
            table.add_column(escape(name), justify="right", overflow="fold")
        rows = dict.fromkeys(
            (what, metric)
            for results in self.models.values()
            for what in results
            for metric in results[what]
        )
        for what, metric in rows:
            if metric in _COUNTS or metric.endswith(_ERROR):
                continue
            found = {name: results.get(what, {}) for name, results in self.models.items()}
            dense = found.get(self.dense or "", {}).get(metric)
            cells = [
                _cell(
                    metric,
                    values.get(metric),
                    values.get(metric + _ERROR),
                    None if name == self.dense else dense,
                )
                for name, values in found.items()
            ]
            table.add_row(escape(_heading(what, metric, found.values())), *cells)
        return table


def _heading(what: str, metric: str, found: Iterable[dict[str, float]]) -> str:
    """Return the heading of a row, such as `rte acc (277 documents)`."""
    counts = {
        f"{int(values[count]):,} {count}"
        for values in found
        for count in _COUNTS
        if count in values
    }
    return f"{what} {_SPARSITY.get(metric, metric)}" + (
        f" ({' or '.join(sorted(counts))})" if counts else ""
    )


def _cell(metric: str, value: float | None, error: float | None, dense: float | None) -> str:
    """Format a value with its standard error and its difference to the dense model: `50.00% ± 1.25 (-12.50)`."""
    if value is None:
        return ""
    scale, unit = (1, "") if metric == "perplexity" else (100, "%")
    uncertainty = "" if error is None else f" ± {scale * error:.2f}"
    difference = "" if dense is None else f" ({scale * (value - dense):+.2f})"
    return f"{scale * value:.2f}{unit}{uncertainty}{difference}"
