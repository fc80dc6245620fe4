"""Tables of pages, which can be sorted and searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wanda_lightning.report.facts import dense_by_reason, expert_tokens, mean_error
from wanda_lightning.report.pruning_report import PrunedLayer, PruningReport, note_of, share_of_zeros, text_range


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        text: Its heading.
        is_number: Align it to the right.
        is_code: Set it in letters of one width: names from a model.
        is_long: Let it have several lines.
    """

    text: str
    is_number: bool = False
    is_code: bool = False
    is_long: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with the number by which it is sorted if there is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns and rows."""

    headings: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def without_empty_columns(self) -> Table:
        """Return the table without the columns that have no text in any row."""
        full = [number for number in range(len(self.headings)) if any(row[number].text for row in self.rows)]
        return Table(
            [self.headings[number] for number in full], [[row[number] for number in full] for row in self.rows]
        )


def numbers(*names: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(name, is_number=True) for name in names]


def layers_table(report: PruningReport) -> Table:
    """Return a row for each pruned matrix; all experts of a module share a row."""
    headings = [
        Column("Layer", is_code=True),
        *numbers("Shape", "Weights", "Target", "Zeros", "Error", "Tokens"),
        Column("Note", is_long=True),
    ]
    rows = [_layer_row(name, layers) for name, layers in report.rows().items()]
    return Table(headings, rows).without_empty_columns()


def _layer_row(name: str, layers: Sequence[PrunedLayer]) -> list[Cell]:
    size, error = sum(layer.size for layer in layers), mean_error(layers)
    return [
        Cell(name),
        Cell(" \u00d7 ".join(map(str, layers[0].shape)), layers[0].size),
        Cell(f"{size:,}", size),
        Cell(text_range([layer.target for layer in layers], ".2%"), layers[0].target),
        Cell(text_range([layer.sparsity for layer in layers], ".2%"), share_of_zeros(layers)),
        Cell("" if error is None else f"{error:.2%}", error),
        Cell(text_range([layer.tokens for layer in layers], ","), layers[0].tokens),
        Cell(note_of(layers)),
    ]


def dense_table(report: PruningReport) -> Table:
    """Return a row for each reason to leave matrices dense."""
    rows = [
        [
            Cell(group.why),
            Cell(f"{len(group.matrices):,}", len(group.matrices)),
            Cell(f"{group.size:,}", group.size),
            Cell(group.matrices[0].name),
        ]
        for group in dense_by_reason(report)
    ]
    headings = [Column("Why", is_long=True), *numbers("Matrices", "Parameters"), Column("First", is_code=True)]
    return Table(headings, rows)


def experts_table(report: PruningReport) -> Table:
    """Return a row for each block with experts."""
    headings = [Column("Block", is_code=True), *numbers("Matrices", "Fewest tokens", "Median", "Most", "Pooled")]
    rows = []
    for each in expert_tokens(report):
        values = (each.experts, each.least, each.median, each.most, each.pooled)
        rows.append([Cell(each.name), *(Cell(f"{value:,.0f}", value) for value in values)])
    return Table(headings, rows)


def zero_shot_table(report: PruningReport) -> Table:
    """Return a row for each result of the pruned model on a zero-shot task."""
    tasks = report.run.zero_shot if report.run else {}
    rows = [
        [Cell(task), Cell(metric), Cell(f"{value:.2%}", value)]
        for task, results in tasks.items()
        for metric, value in results.items()
        if metric.startswith("acc") and not metric.endswith("_stderr")
    ]
    return Table([Column("Task"), Column("Metric"), *numbers("Pruned model")], rows)
