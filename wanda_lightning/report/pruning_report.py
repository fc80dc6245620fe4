"""The report of a pruning: every matrix of the model, pruned or skipped with a reason."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.files import whole_file
from wanda_lightning.models import SkippedMatrix, SkipReason

REPORT_NAME = "pruning_report.json"
POOLED = "few tokens: pruned with the statistics of all experts"
"""The note of an expert's matrix whose own statistics were not used."""

_LIBRARIES = ("wanda_lightning", "torch", "lightning", "transformers", "timm", "datasets", "lm_eval")


@dataclass(frozen=True)
class TrainedPart:
    """A part of a block, such as its MLP, whose kept weights a recovery has trained toward the dense part.

    Attributes:
        name: The module's name in the model.
        before: The relative squared error of its outputs on held-out batches before the training.
        after: The same after the training.
    """

    name: str
    before: float
    after: float


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
        return "; ".join(filter(None, (self.note, trained)))


@dataclass(frozen=True)
class TrainingPass:
    """The losses of one pass over the calibration samples.

    Attributes:
        loss: Mean loss of the samples that were trained on, each before its step; None before training.
        held_out: Mean loss of the held-out samples after the pass; None if none are held out.
    """

    loss: float | None
    held_out: float | None


@dataclass(frozen=True)
class Training:
    """The training of a whole pruned model.

    Attributes:
        recovery: The recovery and its hyperparameters.
        trained: Number of samples that were trained on.
        held_out: Number of samples that were held out.
        passes: The losses before training and after each pass.
        stopped: Why training ended early; empty if it did not.
    """

    recovery: str
    trained: int
    held_out: int
    passes: tuple[TrainingPass, ...]
    stopped: str = ""


@dataclass(frozen=True)
class BatchNormCorrection:
    """The correction of the running statistics of BatchNorm layers.

    Attributes:
        layers: Number of layers that calibration batches reached.
        samples: Number of samples that gave the correction.
        held_out: Number of held-out samples.
        before: Mean distance of the pruned model's predictions from the dense ones on held-out samples, without the
            correction; None if none are held out.
        after: The same with the correction.
        kept: Whether the correction was kept.
    """

    layers: int
    samples: int
    held_out: int
    before: float | None
    after: float | None
    kept: bool


@dataclass
class Permuted:
    """The permutation of hidden units before pruning.

    Attributes:
        kept: For each layer whose inputs were permuted, the total of Wanda's scores that the pattern keeps, before and
            after.
        put_back: Blocks whose output changed, so that their units were put back in their original order.
        why_not: Why no units were sought; empty if they were.
    """

    kept: dict[str, tuple[float, float]] = field(default_factory=dict)
    put_back: list[str] = field(default_factory=list)
    why_not: str = ""


@dataclass(frozen=True)
class Sample:
    """The text that a language model writes after a prompt.

    Attributes:
        prompt: The prompt.
        before: The continuation by the dense model.
        after: The continuation by the pruned model.
    """

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ChangedImage:
    """An image to which the pruned model gives another class than the dense model.

    Attributes:
        png: A small version of the image: a PNG file in base64.
        label: Its class.
        before: The prediction of the dense model.
        after: The prediction of the pruned model.
    """

    png: str
    label: str
    before: str
    after: str


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
    calibration: str = ""
    zero_shot: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    images: tuple[ChangedImage, ...] = ()


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
        return share_of_zeros(self.layers)

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros over all parameters of the model."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def coverage(self) -> float:
        """Fraction of the model's parameters in pruned layers."""
        return sum(layer.size for layer in self.layers) / self.parameters if self.parameters else 0.0

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
        """The metrics for a logger: `sparsity/model`, `sparsity/pruned_layers` and `sparsity/<layer>`.

        All experts of a module share one metric.
        """
        return {
            "sparsity/model": self.model_sparsity,
            "sparsity/pruned_layers": self.sparsity,
            **{f"sparsity/{name}": share_of_zeros(layers) for name, layers in self.rows().items()},
        }

    def rows(self) -> dict[str, list[PrunedLayer]]:
        """The pruned layers by name; all experts of a module share a row."""
        rows: dict[str, list[PrunedLayer]] = {}
        for layer in self.layers:
            rows.setdefault(layer.siblings or layer.name, []).append(layer)
        return rows

    def to_json(self) -> str:
        """The whole report as JSON."""
        totals = {"sparsity": self.sparsity, "model_sparsity": self.model_sparsity, "coverage": self.coverage}
        return json.dumps({**totals, **asdict(self)}, indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Construct a report from the JSON that `to_json` returned."""
        fields: dict[str, Any] = json.loads(text)
        for derived in ("sparsity", "model_sparsity", "coverage"):
            fields.pop(derived)
        layers = [read_layer(layer) for layer in fields.pop("layers")]
        skipped = [read_skipped(matrix) for matrix in fields.pop("skipped")]
        if training := fields.pop("training", None):
            passes = tuple(TrainingPass(**each) for each in training.pop("passes"))
            fields["training"] = Training(**training, passes=passes)
        if run := fields.pop("run", None):
            fields["run"] = read_run(run)
        return cls(layers=layers, skipped=skipped, **fields)

    def to_html(self, path: str | Path) -> None:
        """Write a page with figures and tables: one file, which needs no network.

        Raises:
            ImportError: Unless the extra `report` is installed.
        """
        from wanda_lightning.report.page import write_html

        write_html(self, path)

    def to_png(self, path: str | Path) -> None:
        """Write the figures of the page into one picture.

        Raises:
            ImportError: Unless the extra `report` is installed.
        """
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
            targets = text_range([layer.target for layer in layers], ".2%")
            sparsities = text_range([layer.sparsity for layer in layers], ".2%")
            tokens = text_range([layer.tokens for layer in layers], ",")
            pruned.add_row(escape(name), shape, targets, sparsities, tokens, escape(note_of(layers)))
        console = Console(width=140, color_system=None, highlight=False, emoji=False)  # `N:M:` is not an emoji
        with console.capture() as capture:
            console.print(pruned)
            if self.skipped:
                console.print(skipped_table(self.skipped))
            for note in self.notes:
                console.print(f"Note: {note}", markup=False)
            console.print(self.summary())
        return capture.get()


def read_layer(fields: Mapping[str, Any]) -> PrunedLayer:
    """Construct a layer from the fields that JSON holds."""
    part = TrainedPart(**fields["part"]) if fields.get("part") else None
    return PrunedLayer(**{**fields, "shape": tuple(fields["shape"]), "part": part})


def read_skipped(fields: Mapping[str, Any]) -> SkippedMatrix:
    """Construct a skipped matrix from the fields that JSON holds."""
    return SkippedMatrix(fields["name"], tuple(fields["shape"]), SkipReason(fields["reason"]), fields["detail"])


def read_run(fields: Mapping[str, Any]) -> Run:
    """Construct a run from the fields that JSON holds."""
    samples = tuple(Sample(**each) for each in fields["samples"])
    images = tuple(ChangedImage(**each) for each in fields["images"])
    return Run(**{**fields, "samples": samples, "images": images})


def share_of_zeros(layers: Sequence[PrunedLayer]) -> float:
    """Return the fraction of zeros over several layers."""
    size = sum(layer.size for layer in layers)
    return sum(layer.zeros for layer in layers) / size if size else 0.0


def text_range(values: Sequence[float], form: str) -> str:
    """Return the smallest and the largest number, or one if they look the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} - {high}"


def note_of(layers: Sequence[PrunedLayer]) -> str:
    """Return the note of a layer; for experts, each distinct note with the numbers of the experts that have it."""
    if not (siblings := layers[0].siblings):
        return layers[0].remarks
    before, _, after = siblings.partition("*")
    experts: dict[str, list[str]] = {}
    for layer in layers:
        if layer.remarks:
            number = layer.name.removeprefix(before).removesuffix(after)
            experts.setdefault(layer.remarks, []).append(number)
    notes = [f"{', '.join(numbers)}: {note}" for note, numbers in experts.items()]
    return "; ".join([f"{len(layers)} experts", *notes])


def _table(title: str, *headings: str) -> Table:
    """An empty table: text columns, which are the outer ones, to the left, and numbers to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in (headings[0], headings[-1]) else "right", overflow="fold"
        )
    return table


def skipped_table(skipped: Sequence[SkippedMatrix]) -> Table:
    """A table of the skipped matrices with one row for each reason."""
    table = _table("Left as they are", "reason", "matrices", "parameters", "first")
    by_reason: dict[str, list[SkippedMatrix]] = {}
    for matrix in skipped:
        by_reason.setdefault(matrix.detail, []).append(matrix)
    for reason, matrices in by_reason.items():
        size = sum(matrix.size for matrix in matrices)
        table.add_row(escape(reason), str(len(matrices)), f"{size:,}", escape(matrices[0].name))
    return table


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
