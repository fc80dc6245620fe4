"""Metrics, methods and results in words, for pages and model cards."""

from collections.abc import Mapping
from math import isfinite
from pathlib import PurePath
from typing import Any, NamedTuple

from wanda_lightning.common.wording import abbreviated
from wanda_lightning.report.records import Measured, ReportData

_Config = Mapping[str, Any]  # of a report
_PATTERNS = {"equalshare": "equal share of the scores", "structured": "hidden units"}
_NEUTRAL = ("ZeroOut", "Uniform", "NoRecovery")  # choices that change nothing


class Metric(NamedTuple):
    """A metric of models."""

    name: str  # in `Circumstances.metric` and in tables
    title: str  # at the start of a sentence
    logged: tuple[str, str]  # the names under which modules log it, in validation and in test
    task: str  # of the models that it measures, in the vocabulary of the Hugging Face hub
    on_hub: str  # its name on the hub
    column: str  # its name in the log files of the reference code
    is_share: bool = False  # whether it is a fraction, which is shown in percent
    in_points: bool = False  # whether its changes are differences, of percent for a fraction

    def text(self, value: float | None, error: float | None = None) -> str:
        """Return a result of a model as text, such as `81.25%` or `16.06 ± 0.12` with its standard error."""
        if value is None:
            return "not measured"
        if not isfinite(value):
            return "not finite"
        text = f"{value:.2%}" if self.is_share else f"{value:,.2f}"
        return text if error is None else f"{text} ± {100 * error if self.is_share else error:,.2f}"

    def change(self, before: float | None, after: float | None) -> str:
        """Return how a result changed: in points or in percent; empty if it is not known."""
        if before is None or after is None or not isfinite(before + after) or not before:
            return ""
        if self.in_points:
            return f"{(100 if self.is_share else 1) * (after - before):+.2f} points"
        return f"{after / before - 1:+.1%}"


PERPLEXITY = Metric(
    name="perplexity",
    title="Perplexity",
    logged=("val_perplexity", "test_perplexity"),
    task="text-generation",
    on_hub="perplexity",
    column="ppl_test",
)
TOP1 = Metric(
    name="top-1",
    title="Top-1 accuracy",
    logged=("val_accuracy", "test_accuracy"),
    task="image-classification",
    on_hub="accuracy",
    column="top1_test",
    is_share=True,
    in_points=True,
)
SPEARMAN = Metric(
    name="spearman",
    title="Spearman correlation",
    logged=("val_spearman", "test_spearman"),
    task="sentence-similarity",
    on_hub="spearman_cosine",
    column="spearman_test",
    in_points=True,
)
METRICS = {metric.name: metric for metric in (PERPLEXITY, TOP1, SPEARMAN)}


class AgreementMetric(NamedTuple):
    """A metric of how near the predictions of a pruned model are to those of the dense one."""

    title: str
    meaning: str  # half a sentence
    is_share: bool = False

    def text(self, value: float, error: float | None) -> str:
        """Return a value with its standard error, such as `81.25% ± 0.39` or `0.0312 ± 0.0004`."""
        if not isfinite(value):
            return "not finite"
        if self.is_share:
            text = f"{value:.2%}"
            return text if error is None else f"{text} ± {100 * error:.2f}"
        form = ".2g" if 0 < value < 0.001 else ".4f"
        text = f"{value:{form}}"
        return text if error is None else f"{text} ± {error:{form}}"


AGREEMENT_METRICS = {
    "same_top": AgreementMetric(
        "Same top prediction",
        "the share of predictions whose most likely token or class is that of the dense model",
        is_share=True,
    ),
    "kl_divergence": AgreementMetric(
        "KL divergence",
        "how far the predicted probabilities are from the dense ones, in nats; 0 if they are equal",
    ),
    "kl_divergence_p99": AgreementMetric(
        "KL divergence, 99th percentile", "1 % of the predictions have a larger divergence"
    ),
    "cosine": AgreementMetric(
        "Cosine to the dense embedding", "1 if both embeddings have the same direction"
    ),
}


TASK_METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy (acc_norm)",
    "right_to_wrong": "answers that were right and are wrong",
    "wrong_to_right": "answers that were wrong and are right",
}


class MeasuredAgreement(NamedTuple):
    """The value of an `AgreementMetric`, in words."""

    title: str
    value: str
    error: str  # with the sign ±; empty if it is not known
    meaning: str


def agreement_of(result: Measured) -> list[MeasuredAgreement]:
    """Return how near the predictions on one data set are to the dense ones, in words; empty if it is not known."""
    measured = []
    for name, metric in AGREEMENT_METRICS.items():
        value = result.agreement.get(name)
        if value is None:
            continue
        text = metric.text(value, result.agreement.get(f"{name}_stderr"))
        number, sign, error = text.partition("± ")
        measured.append(
            MeasuredAgreement(metric.title, number.strip(), sign + error, metric.meaning)
        )
    return measured


def agreement_in_a_sentence(result: Measured) -> str:
    """Return the same as a sentence; empty if it is not known."""
    words = [f"{title} {value} {error}".strip() for title, value, error, _ in agreement_of(result)]
    if not words:
        return ""
    data = result.data.partition(", ")[0]
    predictions = f"{result.agreement['predictions']:,.0f} predictions"
    return f"Compared with the dense model on {data} ({predictions}): {'; '.join(words)}."


def title_of(report: ReportData) -> str:
    """Return the name of the model without its folder, or its size if the name is unknown."""
    name = report.run.model if report.run else ""
    # The folders of a path say nothing about the model, but may be private.
    if name.startswith(("/", ".", "~")) or name.endswith(".gguf"):
        name = PurePath(name).name
    return name or f"A model of {abbreviated(report.parameters)} parameters"


def fate(report: ReportData) -> str:
    """Return what has become of the pruned weights in the saved model."""
    is_smaller = choice_of(report.config, "pattern") == "Experts"
    return "were taken out" if is_smaller or report.shrunk else "are zero"


def change_of(metric: Metric, result: Measured) -> str:
    """Return a sentence on the change of a metric on one data set."""
    data, _, amount = result.data.partition(", ")
    subject = metric.title
    if data:
        subject += f" on {data}"
    if amount:
        subject += f" ({amount})"
    old = result.before
    new = result.after
    before = metric.text(old)
    after = metric.text(new)

    if old is None:
        return f"{subject} is {after} afterward."
    if new is None or not isfinite(old + new):
        return f"{subject} is {after} afterward ({before} before)."
    if before == after:
        return f"{subject} stayed at {after}."
    verb = "rose" if new > old else "fell"
    return f"{subject} {verb} from {before} to {after}."


def cost_of(result: Measured) -> str:
    """Return a sentence on what both models cost, such as their size."""
    return f"{result.data[0].upper()}{result.data[1:]}: {result.after:,.1f} (dense: {result.before:,.1f})."


def change_in_words(report: ReportData) -> str:
    """Return how a model was changed: `Pruned with SparseGPT (2:4)`, or `Shrunk: Refit (hidden units)`."""
    verb = "Pruned with" if fate(report) == "are zero" else "Shrunk:"
    return f"{verb} {method_in_words(report.config)}"


def method_in_words(config: _Config) -> str:
    """Return a method with its choices, such as `best (ADMM, unstructured, Fisher)` or `SparseGPT (2:4, OWL)`."""
    name, others = method_of(config)
    return f"{name} ({others})" if others else name


def method_of(config: _Config) -> tuple[str, str]:
    """Return the preset, or else the criterion or solver, and the other choices."""
    choices = choices_of(config)
    if config.get("preset"):
        return config["preset"], choices
    name, _, others = choices.partition(", ")
    return name, others


def choices_of(config: _Config) -> str:
    """Return the choices of a pruning in words, such as `SparseGPT, 2:4, OWL`."""
    method = choice_of(config, "solver") or choice_of(config, "criterion")
    pattern = choice_of(config, "pattern").lower()
    if pattern == "nm":
        pattern = f"{config['pattern']['n']}:{config['pattern']['m']}"
    pattern = _PATTERNS.get(pattern, pattern)

    words = [method, pattern, choice_of(config, "allocation"), choice_of(config, "recovery")]
    return ", ".join(filter(None, words))


def choice_of(config: _Config, option: str) -> str:
    """Return the name of a choice; empty if it changes nothing."""
    choice = config.get(option)
    if not isinstance(choice, Mapping) or choice.get("name") in _NEUTRAL:
        return ""
    return str(choice.get("name", ""))
