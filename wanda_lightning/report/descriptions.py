"""Metrics, methods and results in words, for pages and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath
from typing import Any

from wanda_lightning.common.wording import abbreviated, quantity
from wanda_lightning.report.records import Measured, ReportData

LEFT_OUT = (
    "the hidden units that became zero are not in the saved model, "
    "so its matrices are smaller than in this report"
)
"""The note on a pruned model that was saved without them."""

_NEUTRAL = ("ZeroOut", "Uniform", "NoRecovery", "NoPermutation")  # choices that change nothing


@dataclass(frozen=True)
class Metric:
    """A metric of models."""

    name: str  # in `Circumstances.metric` and in tables
    title: str  # at the start of a sentence
    logged: tuple[str, str]  # the names under which modules log it, in validation and in test
    task: str  # of the models that it measures, in the vocabulary of the Hugging Face hub
    on_hub: str  # its name on the hub
    column: str  # its name in the log files of the reference code
    is_share: bool = False  # whether it is a fraction, which is shown in percent

    def text(self, value: float | None) -> str:
        """Return a result of a model as text, such as `81.25%` or `16.06`."""
        if value is None or not isfinite(value):
            return "not measured" if value is None else "not finite"
        return f"{value:.2%}" if self.is_share else f"{value:,.2f}"

    def change(self, before: float | None, after: float | None) -> str:
        """Return how a result changed: in points for a fraction, else in percent; empty if it is not known."""
        if before is None or after is None or not isfinite(before + after) or not before:
            return ""
        return (
            f"{100 * (after - before):+.2f} points"
            if self.is_share
            else f"{after / before - 1:+.1%}"
        )


_PERPLEXITIES = ("val_perplexity", "test_perplexity")
_ACCURACIES = ("val_accuracy", "test_accuracy")
PERPLEXITY = Metric(
    "perplexity", "Perplexity", _PERPLEXITIES, "text-generation", "perplexity", "ppl_test"
)
TOP1 = Metric(
    "top-1",
    "Top-1 accuracy",
    _ACCURACIES,
    "image-classification",
    "accuracy",
    "top1_test",
    is_share=True,
)
METRICS = {metric.name: metric for metric in (PERPLEXITY, TOP1)}


def title_of(report: ReportData) -> str:
    """Return the name of the model without its folder, or its size if the name is unknown."""
    name = report.run.model if report.run else ""
    is_path = name.startswith(("/", ".", "~")) or name.endswith(".gguf")
    return (
        PurePath(name).name if is_path else name
    ) or f"A model of {abbreviated(report.parameters)} parameters"


def fate(report: ReportData) -> str:
    """Return what has become of the pruned weights in the saved model."""
    is_smaller = choice_of(report.config, "pattern") == "Experts" or LEFT_OUT in report.notes
    return "were taken out" if is_smaller else "are zero"


def change_of(metric: Metric, result: Measured) -> str:
    """Return a sentence on the change of a metric on one data set."""
    data, _, amount = result.data.partition(", ")
    subject = metric.title + (f" on {data}" if data else "") + (f" ({amount})" if amount else "")
    before = metric.text(result.before)
    after = metric.text(result.after)
    if result.before is None or result.after is None or not isfinite(result.before + result.after):
        dense = "" if result.before is None else f" ({before} before)"
        return f"{subject} is {after} afterward{dense}."
    if before == after:
        return f"{subject} stayed at {after}."
    return (
        f"{subject} {'rose' if result.after > result.before else 'fell'} from {before} to {after}."
    )


def cost_of(result: Measured) -> str:
    """Return a sentence on the size or the speed of both models."""
    return f"{result.data[0].upper()}{result.data[1:]}: {result.after:,.1f} (dense: {result.before:,.1f})."


def limits_of(report: ReportData) -> str:
    """Return a sentence on the layers at which the allocation has reached its limits; empty if there are none."""
    if "allocation_limits" not in report.config:
        return ""
    least, most = report.config["allocation_limits"]

    # A target is rounded to whole weights of each row, so closer limits have no meaning.
    steps = [(layer.target, 1 / layer.shape[1]) for layer in report.layers]
    steps = [(target, step) for target, step in steps if step < (most - least) / 2]
    at_most = sum(target > most - step for target, step in steps)
    at_least = sum(target < least + step for target, step in steps)
    if not at_most + at_least:
        return ""

    return (
        f"{choice_of(report.config, 'allocation')} gives no layer more than {most:.2%} or less than {least:.2%}: "
        f"{quantity(at_most, 'layer')} reached the upper limit, and {quantity(at_least, 'layer')} the lower."
    )


def method_in_words(config: Mapping[str, Any]) -> str:
    """Return a method with its choices, such as `best (ADMM, unstructured, Fisher)` or `SparseGPT (2:4, OWL)`."""
    name, others = method_of(config)
    return f"{name} ({others})" if others else name


def method_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the preset, or else the criterion or solver, and the other choices."""
    name, _, others = (choices := choices_of(config)).partition(", ")
    return (config["preset"], choices) if config.get("preset") else (name, others)


def choices_of(config: Mapping[str, Any]) -> str:
    """Return the choices of a pruning in words, such as `SparseGPT, 2:4, OWL`."""
    method = choice_of(config, "solver") or choice_of(config, "criterion")
    pattern = (
        choice_of(config, "pattern").lower().replace("equalshare", "equal share of the scores")
    )
    if pattern == "nm":
        pattern = f"{config['pattern']['n']}:{config['pattern']['m']}"
    permuted = "permuted" if choice_of(config, "permutation") else ""
    words = [
        method,
        pattern,
        choice_of(config, "allocation"),
        choice_of(config, "recovery"),
        permuted,
    ]
    return ", ".join(filter(None, words))


def choice_of(config: Mapping[str, Any], option: str) -> str:
    """Return the name of a choice; empty if it changes nothing."""
    choice = config.get(option)
    name = str(choice.get("name", "")) if isinstance(choice, Mapping) else ""
    return "" if name in _NEUTRAL else name
