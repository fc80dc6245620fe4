"""The metrics that are measured before and after pruning, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Metric:
    """A metric of models.

    Attributes:
        name: Its name in `Run.metric` and in tables.
        title: Its name at the start of a sentence.
        logged: The names under which modules log it, in validation and in test.
        is_share: Whether it is a fraction, which is shown in percent.
        task: What a model does that is measured by it, as the Hugging Face hub calls it.
        on_hub: Its name on the hub.
        column: Its name in the log files of the reference code.
    """

    name: str
    title: str
    logged: tuple[str, str]
    is_share: bool
    task: str
    on_hub: str
    column: str

    @property
    def scale(self) -> int:
        """The factor of values in figures, which are in percent for a fraction."""
        return 100 if self.is_share else 1

    def text(self, value: float | None) -> str:
        """Return a result of a model.

        >>> TOP1.text(0.8125), PERPLEXITY.text(16.058), PERPLEXITY.text(12345.6), TOP1.text(None)
        ('81.25%', '16.06', '12,345.60', 'not measured')
        >>> PERPLEXITY.text(float("inf"))
        'not finite'
        """
        if value is None or not isfinite(value):
            return "not measured" if value is None else "not finite"
        return f"{value:.2%}" if self.is_share else f"{value:,.2f}"

    def change(self, before: float | None, after: float | None) -> str:
        """Return how a result changed: in points for a fraction, else in percent; empty if it is not known.

        >>> TOP1.change(0.9, 0.875), PERPLEXITY.change(16.0, 20.0)
        ('-2.50 points', '+25.0%')
        """
        if before is None or after is None or not isfinite(before + after) or not before:
            return ""
        return f"{100 * (after - before):+.2f} points" if self.is_share else f"{after / before - 1:+.1%}"


PERPLEXITY = Metric(
    "perplexity",
    "Perplexity",
    ("val_perplexity", "test_perplexity"),
    is_share=False,
    task="text-generation",
    on_hub="perplexity",
    column="ppl_test",
)
TOP1 = Metric(
    "top-1",
    "Top-1 accuracy",
    ("val_accuracy", "test_accuracy"),
    is_share=True,
    task="image-classification",
    on_hub="accuracy",
    column="top1_test",
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (PERPLEXITY, TOP1)}
