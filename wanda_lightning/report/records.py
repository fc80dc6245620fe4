"""The records of a report, and how they are written as JSON and read back."""

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import EnumMeta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import nan
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from wanda_lightning.common.grouping import grouped
from wanda_lightning.models import SkippedMatrix

POOLED = "few tokens: pruned with the statistics of all experts"
"""The note on a matrix of an expert that received too few tokens for statistics of its own."""

_LIBRARIES = (
    "wanda_lightning",
    "torch",
    "lightning",
    "transformers",
    "timm",
    "datasets",
    "sentence_transformers",
    "lm_eval",
)


@cache  # reading them takes 20 ms
def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def as_json(value: Any) -> str:
    """Return plain data as JSON, which has no NaN and no infinity: they become null."""
    # Python writes NaN and Infinity as words, which can be replaced while they are read back.
    with_nan = json.dumps(value, default=str)
    return json.dumps(json.loads(with_nan, parse_constant=lambda _: None), indent=1)


def from_parsed(kind: Any, value: Any) -> Any:
    """Construct an object of an annotated type from its parsed JSON; ignore keys that are not fields.

    A null for a number that is not optional was NaN or infinity. Content of another shape is a ValueError.
    """
    try:
        return _converted(kind, value)
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _converted(kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        arguments = {
            name: _converted(field_type, value[name])
            for name, field_type in get_type_hints(kind).items()
            if name in value
        }
        return kind(**arguments)  # type: ignore[operator]
    if origin is UnionType and value is not None:  # the other type is None
        return _converted(get_args(kind)[0], value)
    if origin in (list, tuple):
        return origin(_converted(get_args(kind)[0], item) for item in value)
    if origin in (dict, Mapping):
        return {name: _converted(get_args(kind)[1], item) for name, item in value.items()}
    if isinstance(kind, EnumMeta):
        return kind(value)
    if kind is float and value is None:
        return nan
    return value


@dataclass(frozen=True)
class TrainedPart:
    """A part of a block, such as its MLP, that a recovery trained to reproduce the dense part."""

    name: str  # of the module, in the model
    before: float  # relative squared error of its outputs on held-out batches before the training
    after: float  # the same after the training
    stopped: str = ""  # why training ended early or did not take place


@dataclass(frozen=True)
class PrunedLayer:
    """One matrix that was pruned."""

    name: str  # of the layer in the model
    shape: tuple[int, int]  # (d_out, d_in) of the matrix view
    target: float  # the sparsity that was asked for
    sparsity: float  # fraction of its weights that are zero
    tokens: int  # number of calibration tokens that entered it; 0 if none were needed
    note: str = ""
    siblings: str = ""  # for a matrix of an expert: a glob that matches this matrix of every expert of its module
    before: float = 0.0  # fraction of its weights that were zero before pruning
    block: str = ""  # the block that contains it; its own module if it lies in no block
    # The relative squared error of its outputs on the calibration tokens, before any recovery. None if the method
    # collects no Gram matrix to compute it from, or several processes hold the rows.
    error: float | None = None
    part: TrainedPart | None = None  # the part of the block in which a recovery trained it
    saliency: float | None = None  # of its expert, if whole experts leave

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
        remarks = [self.note]
        if part:
            remarks.append(f"error of {part.name} {part.before:.2%}, trained {part.after:.2%}")
            if part.stopped:
                remarks.append(f"training stopped: {part.stopped}")
        return "; ".join(filter(None, remarks))


class Layers(list[PrunedLayer]):
    """Layers shown as one in tables and figures, such as the same layer of all experts of a module."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(layer.size for layer in self)

    @property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return sum(layer.zeros for layer in self)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero."""
        return self.zeros / (self.size or 1)

    @property
    def error(self) -> float | None:
        """Mean of the errors that are known; None if none is."""
        errors = [layer.error for layer in self if layer.error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def remarks(self) -> str:
        """The remarks about the layer; for experts, all different ones with the number of their experts."""
        if not self[0].siblings:
            return self[0].remarks

        words = [f"{len(self)} experts"]
        for remarks, number in Counter(layer.remarks for layer in self).items():
            if remarks:
                words.append(f"{number} of them: {remarks}")
        return "; ".join(words)

    def range(self, field: str, form: str) -> str:
        """Return the smallest and the largest value of a field as text, or one if they look the same."""
        values = [getattr(layer, field) for layer in self]
        ends = dict.fromkeys(format(end, form) for end in (min(values), max(values)))
        return " - ".join(ends)


@dataclass(frozen=True)
class TrainingPass:
    """The mean losses of one pass over the calibration samples."""

    # Of the samples that were trained on, each before its step; None before training.
    loss: float | None
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
    # Mean distance of predictions from the dense ones on held-out samples, without the correction.
    before: float | None
    after: float | None  # the same with the correction; both are None if no samples are held out
    kept: bool  # whether the correction was kept


@dataclass(frozen=True)
class Continuations:
    """A prompt, and its continuations by the dense and by the pruned language model."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Measured:
    """The results of the dense and of the pruned model on one data set; None if unknown."""

    data: str
    before: float | None
    after: float | None
    # Standard errors.
    before_error: float | None = None
    after_error: float | None = None
    # How near the predictions of the pruned model are to the dense ones, by measure; see `modules.agreement`.
    agreement: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Circumstances:
    """The run that pruned the model: its data and results. Unknown values are empty or None."""

    command: str = ""  # the shell command that repeats it; empty for a run from Python
    model: str = ""  # name of the dense model, with the file of its weights in parentheses if the name loads no weights
    metric: str = ""  # "perplexity"; "spearman", times 100; or "top-1", a fraction of the images
    before: float | None = None  # result of the dense model
    after: float | None = None  # result of the pruned model
    # As in `Measured`.
    before_error: float | None = None
    after_error: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    data: str = ""  # on which both were measured
    others: tuple[Measured, ...] = ()  # results on other data
    costs: tuple[Measured, ...] = ()  # such as the size of both models; `data` is the unit
    calibration: str = ""  # the calibration data; also empty if the method reads none
    # Metrics of the pruned and of the dense model, by zero-shot task.
    zero_shot: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    dense_zero_shot: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Continuations, ...] = ()  # text by both models
    date: str = ""  # on which both models were measured, as in ISO 8601

    @property
    def results(self) -> tuple[Measured, ...]:
        """The results that are known, of the first data first."""
        first = Measured(**{entry.name: getattr(self, entry.name) for entry in fields(Measured)})
        results = (first, *self.others)
        return tuple(result for result in results if (result.before, result.after) != (None, None))


@dataclass(frozen=True)
class ReportData:
    """The content of a report, and the totals that follow from it."""

    layers: tuple[PrunedLayer, ...]  # the pruned matrices
    skipped: tuple[SkippedMatrix, ...]  # all other matrices, each with its reason
    parameters: int  # number of parameters of the whole model
    zeros: int  # number of zeros among them
    seconds: Mapping[str, float]  # time per stage
    config: Mapping[str, Any]  # the configuration, in full
    notes: tuple[str, ...] = ()  # sentences for people about the pruning as a whole
    shrunk: bool = False  # whether the hidden units that became zero have left the model
    training: Training | None = None  # of the whole pruned model
    run: Circumstances | None = None  # None from `prune()`, which measures nothing
    versions: Mapping[str, str] = field(default_factory=versions)  # of Python and the libraries

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the pruned layers."""
        return Layers(self.layers).sparsity

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros over all parameters of the model."""
        return self.zeros / (self.parameters or 1)

    @property
    def coverage(self) -> float:
        """Fraction of the model's parameters in pruned layers."""
        return Layers(self.layers).size / (self.parameters or 1)

    @property
    def total_seconds(self) -> float:
        """Time of all stages."""
        return sum(self.seconds.values())

    def rows(self) -> dict[str, Layers]:
        """The pruned layers by name; all experts of a module share a row."""
        rows = grouped(self.layers, lambda layer: layer.siblings or layer.name)
        return {name: Layers(layers) for name, layers in rows.items()}
