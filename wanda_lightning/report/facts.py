"""Select and group what pages and figures show of a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.report.pruning_report import POOLED, PrunedLayer, PruningReport, share_of_zeros

_GROUP = re.compile(r"(^|\.)group\d+$")  # each group of a grouped convolution is a layer
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Grid:
    """One value for each kind of layer in each block; None where a block has no such layer, or no value is known.

    Attributes:
        kinds: Names of the rows, such as `self_attn.q_proj`.
        blocks: Names of the columns, in model order.
        values: A row for each kind.
    """

    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    @property
    def known(self) -> list[float]:
        """All values that are known."""
        return [value for row in self.values for value in row if value is not None]

    @property
    def labels(self) -> tuple[str, ...]:
        """The shortest ends of the kinds that differ from each other, without the numbers of experts."""
        return _shortest_ends([kind.replace(".*", "") for kind in self.kinds])

    @property
    def stacks(self) -> dict[str, int]:
        """The lists that contain the blocks, such as `encoder.block`, with the number of their first column."""
        first: dict[str, int] = {}
        for column, block in enumerate(self.blocks):
            first.setdefault(block.rpartition(".")[0], column)
        return first


def sparsity_grid(report: PruningReport) -> Grid:
    """Return the fraction of zeros by kind and block."""
    return _grid(report, share_of_zeros)


def error_grid(report: PruningReport) -> Grid:
    """Return the mean relative output error by kind and block."""
    return _grid(report, mean_error)


def part_grid(report: PruningReport) -> Grid:
    """Return the errors of the parts of each block before and after a recovery has trained them."""
    cells: dict[tuple[str, str], float] = {}
    for layer in report.layers:
        if part := layer.part:
            kind = part.name.removeprefix(f"{layer.block}.") if part.name != layer.block else "block"
            cells[f"{kind} before", layer.block] = part.before
            cells[f"{kind} after", layer.block] = part.after
    return _as_grid(cells)


def mean_error(layers: Sequence[PrunedLayer]) -> float | None:
    """Return the mean of the relative output errors that are known; None if none is."""
    errors = [layer.error for layer in layers if layer.error is not None]
    return sum(errors) / len(errors) if errors else None


def _grid(report: PruningReport, value: Callable[[Sequence[PrunedLayer]], float | None]) -> Grid:
    cells: dict[tuple[str, str], list[PrunedLayer]] = {}
    for layer in report.layers:
        if kind := _kind_in_block(layer):
            cells.setdefault((kind, layer.block), []).append(layer)
    return _as_grid({cell: value(layers) for cell, layers in cells.items()})


def _as_grid(cells: Mapping[tuple[str, str], float | None]) -> Grid:
    """Arrange values by kind and block, in the order in which these are first named."""
    kinds = tuple(dict.fromkeys(kind for kind, _ in cells))
    blocks = tuple(dict.fromkeys(block for _, block in cells))
    return Grid(kinds, blocks, tuple(tuple(cells.get((kind, block)) for block in blocks) for kind in kinds))


def _kind_in_block(layer: PrunedLayer) -> str:
    """Return the name of a layer within its block; empty if it lies in no block."""
    name, block = layer.siblings or layer.name, f"{layer.block}."
    return _GROUP.sub("", name.removeprefix(block)) if layer.block and name.startswith(block) else ""


def _shortest_ends(names: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest end of each name that is not the end of another one."""
    return tuple(_shortest_end(name, [other for other in names if other != name]) for name in names)


def _shortest_end(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name)


@dataclass(frozen=True)
class Weights:
    """The numbers of weights of one kind of matrix.

    Attributes:
        name: The kind of layer, or why the matrices are left dense.
        zeros: Number of zeros in pruned layers.
        kept: Number of other weights in pruned layers.
        dense: Number of weights in matrices that are left dense.
    """

    name: str
    zeros: int = 0
    kept: int = 0
    dense: int = 0

    @property
    def size(self) -> int:
        """Number of all weights."""
        return self.zeros + self.kept + self.dense


def weights_by_kind(report: PruningReport, most: int = 14) -> list[Weights]:
    """Return where the parameters of the model are, largest kinds first; those after `most` are added up."""
    pruned: dict[str, list[PrunedLayer]] = {}
    for layer in report.layers:
        kind = _kind_in_block(layer) or _NUMBER.sub(r"\1*", _GROUP.sub("", layer.name))
        kind = kind.replace(".*", "") or kind
        pruned.setdefault(kind, []).append(layer)
    found = []
    for kind, layers in zip(_shortest_ends(list(pruned)), pruned.values(), strict=True):
        zeros = sum(layer.zeros for layer in layers)
        found.append(Weights(kind, zeros, sum(layer.size for layer in layers) - zeros))
    dense: dict[str, int] = {}
    for matrix in report.skipped:
        if matrix.reason is not SkipReason.TIED:  # its weights are those of another matrix
            name = matrix.reason.value.replace("_", " ")
            dense[name] = dense.get(name, 0) + matrix.size
    found += [Weights(name, dense=size) for name, size in dense.items()]
    if (rest := report.parameters - sum(each.size for each in found)) > 0:
        found.append(Weights("norms, biases", dense=rest))
    found.sort(key=lambda each: -each.size)
    if len(found) <= most:
        return found
    others = found[most - 1 :]
    sums = (sum(getattr(each, name) for each in others) for name in ("zeros", "kept", "dense"))
    return [*found[: most - 1], Weights(f"{len(others)} others", *sums)]


@dataclass(frozen=True)
class ExpertTokens:
    """The numbers of calibration tokens that the experts of one module received.

    Attributes:
        name: The module, or the block that contains it.
        experts: Number of matrices.
        least: Tokens of the expert that received fewest.
        median: Median over the experts.
        most: Tokens of the expert that received most.
        pooled: Number of matrices that were pruned with the statistics of all experts.
    """

    name: str
    experts: int
    least: int
    median: float
    most: int
    pooled: int


def expert_tokens(report: PruningReport) -> list[ExpertTokens]:
    """Return the tokens of the experts in each block; empty for a model without experts."""
    blocks: dict[str, list[PrunedLayer]] = {}
    for layer in report.layers:
        if layer.siblings:
            blocks.setdefault(layer.block or layer.siblings.partition(".*")[0], []).append(layer)
    found = []
    for name, layers in blocks.items():
        tokens = [layer.tokens for layer in layers]
        pooled = sum(POOLED in layer.note for layer in layers)
        found.append(ExpertTokens(name, len(layers), min(tokens), median(tokens), max(tokens), pooled))
    return found


@dataclass(frozen=True)
class Dense:
    """Matrices that are left dense for the same reason."""

    why: str
    matrices: tuple[SkippedMatrix, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(matrix.size for matrix in self.matrices)


def dense_by_reason(report: PruningReport) -> list[Dense]:
    """Return the matrices that are left dense, grouped by reason, most weights first."""
    groups: dict[str, list[SkippedMatrix]] = {}
    for matrix in report.skipped:
        groups.setdefault(matrix.detail, []).append(matrix)
    return sorted((Dense(why, tuple(found)) for why, found in groups.items()), key=lambda group: -group.size)


def method_in_words(config: Mapping[str, Any]) -> str:
    """Return a method with its choices, such as `best (ADMM, unstructured, Fisher)` or `SparseGPT (2:4, OWL)`."""
    name, others = method_of(config)
    return f"{name} ({others})" if others else name


def method_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the preset, or else the criterion or solver, and the other choices."""
    words, preset = choices_of(config), config.get("preset", "")
    name, _, others = words.partition(", ")
    return (preset, words) if preset else (name, others)


def choices_of(config: Mapping[str, Any]) -> str:
    """Return the choices of a pruning in words, such as `SparseGPT, 2:4, OWL`."""
    names = {choice: _name(config.get(choice)) for choice in ("criterion", "solver", "allocation", "recovery")}
    method = names["criterion"] if names["solver"] in ("", "ZeroOut") else names["solver"]
    others = [names[choice] for choice in ("allocation", "recovery") if names[choice] not in _NEUTRAL]
    if _name(config.get("permutation")) not in _NEUTRAL:
        others.append("permuted")
    return ", ".join(filter(None, [method, _pattern(config.get("pattern")), *others]))


_NEUTRAL = ("", "Uniform", "NoRecovery", "NoPermutation")


def _name(choice: Any) -> str:
    return str(choice.get("name", "")) if isinstance(choice, Mapping) else ""


def _pattern(pattern: Any) -> str:
    if _name(pattern) == "NM":
        return f"{pattern['n']}:{pattern['m']}"
    return _name(pattern).lower().replace("equalshare", "equal share of the scores")


def settings(
    config: Mapping[str, Any], leave_out: Sequence[str] = ("command", "measured")
) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each setting as text."""
    for name, value in config.items():
        if name not in leave_out:
            yield name, _as_text(value)


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        inside = ", ".join(f"{name}={_as_text(each)}" for name, each in value.items() if name != "name")
        return f"{value['name']}({inside})"
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    return str(value)
