"""The report of a pruning: every matrix of the model, pruned or skipped with a reason, as JSON and as text."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.files import whole_file
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.report.fields import as_json, from_fields

REPORT_NAME = "pruning_report.json"
_VERSION = 1  # of the JSON; a report without a version is older, and has the same fields
POOLED = "few tokens: pruned with the statistics of all experts"  # note of an expert's matrix
_Item = TypeVar("_Item")
_LIBRARIES = ("wanda_lightning", "torch", "lightning", "transformers", "timm", "datasets", "lm_eval")


def grouped(items: Iterable[_Item], key: Callable[[_Item], Any]) -> dict[Any, list[_Item]]:
    """Return the items by key, in the order in which the keys first occur."""
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


@dataclass(frozen=True)
class TrainedPart:
    """A part of a block, such as its MLP, whose kept weights a recovery has trained toward the dense part."""

    name: str  # of the module, in the model
    before: float  # relative squared error of its outputs on held-out batches before the training
    after: float  # the same after the training
    stopped: str = ""  # why training ended early or did not take place


@dataclass
class PrunedLayer:
    """One matrix that was pruned.

    Attributes:
        name: The layer's name in the model.
        shape: (d_out, d_in) of the matrix view.
        target: The sparsity that was asked for.
        sparsity: The fraction of its weights that are zero.
        tokens: Number of calibration tokens that entered it; 0 if none were needed.
        note: Remarks about this layer, or an empty string.
        siblings: For a matrix of an expert, a glob that matches this matrix of every expert of its module.
        before: The fraction of its weights that were zero before pruning.
        block: The block of the model that contains it; its own module if it lies in no block.
        error: The relative squared error of its outputs on the calibration tokens, before any recovery; None if the
            method collects no Gram matrix to compute it from, or several processes hold the rows.
        part: The part of the block in which a recovery trained it; None without such a recovery.
    """

    name: str
    shape: tuple[int, int]
    target: float
    sparsity: float
    tokens: int
    note: str = ""
    siblings: str = ""
    before: float = 0.0
    block: str = ""
    error: float | None = None
    part: TrainedPart | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return round(self.sparsity * self.size)

    @property
    def remarks(self) -> str:
        """The note, and the errors of the part that was trained."""
        part = self.part
        trained = f"error of {part.name} {part.before:.2%}, trained {part.after:.2%}" if part else ""
        stopped = f"training stopped: {part.stopped}" if part and part.stopped else ""
        return "; ".join(filter(None, (self.note, trained, stopped)))


class Layers(list[PrunedLayer]):
    """Layers that tables and figures show as one, such as the same layer of all experts of a module."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(layer.size for layer in self)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero."""
        return sum(layer.zeros for layer in self) / (self.size or 1)

    @property
    def error(self) -> float | None:
        """Mean of the errors that are known; None if none is."""
        errors = [layer.error for layer in self if layer.error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def remarks(self) -> str:
        """The remarks about the layer; for experts, all different ones with the numbers of their experts."""
        if not (siblings := self[0].siblings):
            return self[0].remarks
        before, _, after = siblings.partition("*")
        found = [f"{len(self)} experts"]
        for remarks, layers in grouped(self, lambda layer: layer.remarks).items():
            if remarks:
                numbers = (layer.name.removeprefix(before).removesuffix(after) for layer in layers)
                found.append(f"{', '.join(numbers)}: {remarks}")
        return "; ".join(found)

    def range(self, field: str, form: str) -> str:
        """Return the smallest and the largest value of a field as text, or one if they look the same."""
        values = [getattr(layer, field) for layer in self]
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} - {high}"


@dataclass(frozen=True)
class TrainingPass:
    """The mean losses of one pass over the calibration samples."""

    loss: float | None  # of the samples that were trained on, each before its step; None before training
    held_out: float | None  # of the held-out samples after the pass; None if none are held out


@dataclass(frozen=True)
class Training:
    """The training of a whole pruned model."""

    recovery: str  # with its hyperparameters
    trained: int  # number of samples that were trained on
    held_out: int  # number of samples that were held out
    passes: tuple[TrainingPass, ...]  # the first one has the losses before training
    stopped: str = ""  # why training ended early; empty if it did not


@dataclass(frozen=True)
class BatchNormCorrection:
    """The correction of the running statistics of BatchNorm layers."""

    layers: int  # number of layers that calibration batches reached
    samples: int  # number of samples that gave the correction
    held_out: int  # number of held-out samples
    before: float | None  # mean distance of predictions from the dense ones on held-out samples, without the correction
    after: float | None  # the same with the correction; both are None if no samples are held out
    kept: bool  # whether the correction was kept


@dataclass
class Permuted:
    """The permutation of hidden units before pruning."""

    # by layer whose inputs were permuted: the sum of Wanda's scores that the pattern keeps, before and after
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)
    put_back: list[str] = field(default_factory=list)  # blocks whose output changed: their units have the old order
    why_not: str = ""  # why no units were sought; empty if they were


@dataclass(frozen=True)
class Sample:
    """A prompt, and its continuations by the dense and by the pruned language model."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ChangedImage:
    """An image to which the pruned model gives another class than the dense model."""

    png: str  # a small version of the image: a PNG file in base64
    label: str  # its class
    before: str  # the prediction of the dense model
    after: str  # the prediction of the pruned model


@dataclass(frozen=True)
class Measured:
    """The results of the dense and of the pruned model on some data; None if they are not known."""

    data: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Run:
    """The run that pruned the model: on which data, and with which result. What is not known is empty or None.

    Attributes:
        command: The shell command that repeats it; empty for a run that was started from Python.
        model: Name of the dense model, and in parentheses the file of its weights if the name alone does not load them.
        metric: What was measured: "perplexity", or "top-1", a fraction of the images.
        before: The result of the dense model.
        after: The result of the pruned model.
        data: The data on which both were measured.
        others: Results on further data.
        calibration: The calibration data; also empty if the method reads none.
        zero_shot: For each zero-shot task, the results of the pruned model.
        samples: Text by both models.
        images: Images of which the prediction changed.
    """

    command: str = ""
    model: str = ""
    metric: str = ""
    before: float | None = None
    after: float | None = None
    data: str = ""
    others: tuple[Measured, ...] = ()
    calibration: str = ""
    zero_shot: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    images: tuple[ChangedImage, ...] = ()

    @property
    def results(self) -> tuple[Measured, ...]:
        """The results that are known, of the first data first."""
        found = (Measured(self.data, self.before, self.after), *self.others)
        return tuple(each for each in found if (each.before, each.after) != (None, None))


@dataclass
class PruningReport:
    """Every matrix of the model, pruned or skipped, with totals, times, configuration and versions.

    `str()` gives a table with one row for all experts of a module; `save()` writes `pruning_report.json`.

    Attributes:
        layers: The pruned matrices.
        skipped: All other matrices, each with its reason.
        parameters: Number of parameters of the whole model.
        zeros: Number of zeros among them.
        seconds: Time per stage.
        config: The configuration, in full.
        versions: Versions of Python and the libraries.
        notes: Sentences about the pruning as a whole.
        training: The training of the whole pruned model; None if there was none.
        run: The run that pruned the model; None from `prune()`, which measures nothing.
    """

    layers: list[PrunedLayer]
    skipped: list[SkippedMatrix]
    parameters: int
    zeros: int
    seconds: dict[str, float]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    training: Training | None = None
    run: Run | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the pruned layers."""
        return Layers(self.layers).sparsity

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros over all parameters of the model."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def coverage(self) -> float:
        """Fraction of the model's parameters in pruned layers."""
        return Layers(self.layers).size / self.parameters if self.parameters else 0.0

    @property
    def total_seconds(self) -> float:
        """Time of all stages."""
        return sum(self.seconds.values())

    def summary(self) -> str:
        """The totals as text."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return (
            f"{len(self.layers)} layers hold {self.coverage:.1%} of {self.parameters:,} parameters. "
            f"Sparsity: {self.sparsity:.2%} of the pruned layers, {self.model_sparsity:.2%} of the model. "
            f"{self.total_seconds:.1f} s ({stages})."
        )

    def metrics(self) -> dict[str, float]:
        """The metrics for a logger: `sparsity/model`, `sparsity/pruned_layers`, and one for each of `rows()`."""
        return {
            "sparsity/model": self.model_sparsity,
            "sparsity/pruned_layers": self.sparsity,
            **{f"sparsity/{name}": layers.sparsity for name, layers in self.rows().items()},
        }

    def rows(self) -> dict[str, Layers]:
        """The pruned layers by name; all experts of a module share a row."""
        rows = grouped(self.layers, lambda layer: layer.siblings or layer.name)
        return {name: Layers(layers) for name, layers in rows.items()}

    def to_json(self) -> str:
        """The whole report as JSON."""
        totals = {"sparsity": self.sparsity, "model_sparsity": self.model_sparsity, "coverage": self.coverage}
        return as_json({"version": _VERSION, **totals, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Construct a report from the JSON that `to_json` returned, now or in an older version.

        Raises:
            ValueError: If the text is not such JSON. The message names the field.
        """
        content = json.loads(text)
        version = content.get("version", 0) if isinstance(content, dict) else 0
        if version not in range(_VERSION + 1):
            raise UserError(
                f"version must be at most {_VERSION}, but it is {version!r}. Read this report with the version of "
                "wanda_lightning that wrote it, or a newer one."
            )
        return from_fields(cls, content)

    @classmethod
    def load(cls, path: str | Path) -> PruningReport:
        """Read a file that `save` wrote, or the one in a folder.

        Raises:
            OSError: If there is no such file.
            ValueError: If the file is not a report. The message names the file and the field.
        """
        path = Path(path)
        file = path / REPORT_NAME if path.is_dir() else path
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not a report: {error}") from error

    def to_html(self, path: str | Path) -> None:
        """Write a page with figures and tables: one file, which needs no network. Needs the extra `report`."""
        from wanda_lightning.report.page import write_html

        write_html(self, path)

    def to_png(self, path: str | Path) -> None:
        """Write the figures of the page into one picture. Needs the extra `report`."""
        from wanda_lightning.report.page import write_png

        write_png(self, path)

    def save(self, folder: str | Path) -> Path:
        """Write `pruning_report.json` into a folder, atomically, and return its path."""
        path = Path(folder) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return path

    def __str__(self) -> str:
        """The report as a table."""
        pruned = _table("Pruned layers", "layer", "shape", "target", "sparsity", "tokens", "note")
        for name, layers in self.rows().items():
            shape = " x ".join(map(str, layers[0].shape))
            numbers = layers.range("target", ".2%"), layers.range("sparsity", ".2%"), layers.range("tokens", ",")
            pruned.add_row(escape(name), shape, *numbers, escape(layers.remarks))
        console = Console(width=140, color_system=None, highlight=False, emoji=False)  # `N:M:` is not an emoji
        with console.capture() as capture:
            console.print(pruned)
            if self.skipped:
                console.print(skipped_table(self.skipped))
            for note in self.notes:
                console.print(f"Note: {note}", markup=False)
            console.print(self.summary())
        return capture.get()


def _table(title: str, *headings: str) -> Table:
    """An empty table: text columns, which are the outer ones, to the left, and numbers to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_text = heading in (headings[0], headings[-1])
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    return table


def skipped_table(skipped: Sequence[SkippedMatrix]) -> Table:
    """A table of the skipped matrices with one row for each reason."""
    table = _table("Left as they are", "reason", "matrices", "parameters", "first")
    for reason, matrices in grouped(skipped, lambda matrix: matrix.detail).items():
        size = sum(matrix.size for matrix in matrices)
        table.add_row(escape(reason), str(len(matrices)), f"{size:,}", escape(matrices[0].name))
    return table


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that numbers depend on."""
    found = {"python": platform.python_version(), **dict.fromkeys(_LIBRARIES, "not installed")}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
