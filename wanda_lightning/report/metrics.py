"""The metrics that are measured before and after pruning, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Metric:
    """A metric of models."""

    name: str  # in `Run.metric` and in tables
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
        return f"{100 * (after - before):+.2f} points" if self.is_share else f"{after / before - 1:+.1%}"


_PERPLEXITIES, _ACCURACIES = ("val_perplexity", "test_perplexity"), ("val_accuracy", "test_accuracy")
PERPLEXITY = Metric("perplexity", "Perplexity", _PERPLEXITIES, "text-generation", "perplexity", "ppl_test")
TOP1 = Metric("top-1", "Top-1 accuracy", _ACCURACIES, "image-classification", "accuracy", "top1_test", is_share=True)
METRICS = {metric.name: metric for metric in (PERPLEXITY, TOP1)}
