"""The sparsity of a model, and the results of several models as a table and as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import Module

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import write_text
from wanda_lightning.models import find_layers
from wanda_lightning.models.quantized import can_be_read, quantizer, read_weight
from wanda_lightning.report import versions
from wanda_lightning.report.descriptions import AGREEMENT_METRICS
from wanda_lightning.report.records import as_json

Metrics = dict[str, float]
"""Values by metric; fractions are in [0, 1], and `spearman` is a correlation times 100."""
Results = dict[str, Metrics]
"""Metrics by text, task or data set."""

_COUNTS = ("windows", "documents", "images", "pairs")  # metrics that are the number of samples
_PREDICTIONS = "predictions"  # the number that stands beside `AGREEMENT_METRICS`
_ERROR = "_stderr"  # suffix of a metric's standard error
# Metrics that may be below 1, but are no fractions.
_NO_SHARES = ("perplexity", "spearman", "bits_per_byte")
# Metrics that are shown in other words.
_WORDS = {
    "layers": "of prunable layers",
    "model": "of the model",
    "right_to_wrong": "right to wrong",
    "wrong_to_right": "wrong to right",
}


def sparsity_of(model: Module) -> Metrics:
    """Return the fractions of zeros: `layers`, of the weights that can be pruned; `model`, of all parameters.

    Quantized weights count as if they could be pruned, and are dequantized one at a time.
    """
    prunable = {id(layer.parameter) for layer in find_layers(model).layers}
    zeros = Counter[str]()
    sizes = Counter[str]()
    # Without weights that are tied to another one.
    for path, parameter in model.named_parameters():
        module_name, _, name = path.rpartition(".")
        module = model.get_submodule(module_name)
        weight: Tensor = parameter
        kinds = ["model"]
        is_quantized = name == "weight" and quantizer(module, parameter) is not None
        if is_quantized and can_be_read(module):
            weight = read_weight(module)
            kinds.append("layers")
        elif id(parameter) in prunable:
            kinds.append("layers")
        for kind in kinds:
            zeros[kind] += int((weight.detach() == 0).count_nonzero())
            sizes[kind] += weight.numel()
    return {kind: zeros[kind] / max(1, sizes[kind]) for kind in ("layers", "model")}


def share_error(name: str, share: float, count: int) -> Metrics:
    """Return the standard error of a share of independent samples; none for 0 and 1, where it would be 0."""
    if not 0 < share < 1:
        return {}
    return {name + _ERROR: (share * (1 - share) / count) ** 0.5}


@dataclass
class Evaluation:
    """Results of several models, in order, that were evaluated in the same way, with the options of the evaluation.

    If there is a `dense` model, the others are compared with it.
    """

    models: dict[str, Results]
    dense: str | None = None
    config: Kwargs = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> str:
        """Return all numbers, unrounded; those that are not finite are null."""
        return as_json(asdict(self))

    def save(self, path: StrPath) -> None:
        """Write a JSON file atomically."""
        write_text(path, self.to_json())

    def table(self) -> Table:
        """Return a table with a row for each metric and a column for each model.

        A row's heading has the number of windows, documents or images. A value is followed by its standard error, if
        it has one, and by its difference to the dense model in parentheses.
        """
        table = Table()
        table.add_column("")
        for name in self.models:
            table.add_column(escape(name), justify="right", overflow="fold")

        for data, metric in self._rows():
            metrics = {name: results.get(data, {}) for name, results in self.models.items()}
            dense = metrics.get(self.dense or "", {}).get(metric)
            cells = []
            for name, values in metrics.items():
                reference = None if name == self.dense else dense
                cells.append(_cell(metric, values, reference))
            table.add_row(escape(_heading(data, metric, metrics.values())), *cells)
        return table

    def _rows(self) -> Iterable[tuple[str, str]]:
        """Return data and metric of each row, in order of first occurrence."""
        rows: dict[tuple[str, str], None] = {}
        for results in self.models.values():
            for data, metrics in results.items():
                for metric in metrics:
                    is_count = metric in (*_COUNTS, _PREDICTIONS)
                    if not is_count and not metric.endswith(_ERROR):
                        rows[data, metric] = None
        return rows


def _heading(data: str, metric: str, of_models: Iterable[Metrics]) -> str:
    """Return the heading of a row, such as `rte acc (277 documents)`."""
    names: Sequence[str] = _COUNTS
    words = _WORDS.get(metric, metric)
    if metric in AGREEMENT_METRICS:
        names = [_PREDICTIONS]
        words = AGREEMENT_METRICS[metric].title
    counts = set()
    for values in of_models:
        counts |= {f"{int(values[name]):,} {name}" for name in names if name in values}
    heading = f"{data} {words}"
    if counts:
        heading += f" ({' or '.join(sorted(counts))})"
    return heading


def _cell(metric: str, values: Metrics, dense: float | None) -> str:
    """Format a value with its standard error and its difference to the dense model: `50.00% ± 1.25 (-12.50)`."""
    if metric not in values:
        return ""
    value = values[metric]
    if metric in AGREEMENT_METRICS:
        return AGREEMENT_METRICS[metric].text(value, values.get(metric + _ERROR))
    is_share = metric not in _NO_SHARES and 0 <= value <= 1
    scale = 100 if is_share else 1
    unit = "%" if is_share else ""
    cell = f"{scale * value:.2f}{unit}"
    error = values.get(metric + _ERROR)
    if error:
        cell += f" ± {scale * error:.2f}"
    if dense is not None:
        cell += f" ({scale * (value - dense):+.2f})"
    return cell
