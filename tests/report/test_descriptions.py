"""Numbers and methods in words."""

import pytest
from support.reports import llama_report
from support.zoo import ZOO

from wanda_lightning import prune
from wanda_lightning.report import Measured
from wanda_lightning.report.descriptions import PERPLEXITY, TOP1, change_of, method_in_words


def test_results_and_their_changes():
    assert [TOP1.text(value) for value in (0.8125, None)] == ["81.25%", "not measured"]
    values = (16.058, 12345.6, float("inf"))
    assert [PERPLEXITY.text(value) for value in values] == ["16.06", "12,345.60", "not finite"]
    assert TOP1.change(0.9, 0.875) == "-2.50 points"
    assert PERPLEXITY.change(16.0, 20.0) == "+25.0%"
    assert PERPLEXITY.change(None, 20.0) == PERPLEXITY.change(16.0, float("inf")) == ""


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "Wanda (unstructured)"),
        ({"method": "sparsegpt", "pattern": "2:4"}, "SparseGPT (2:4)"),
        (
            {"method": "magnitude", "allocation": "owl", "pattern": "equal_share"},
            "Magnitude (equal share of the scores, OWL)",
        ),
        ({"method": "best"}, "best (ADMM, unstructured, Fisher)"),
        ({"method": "best", "allocation": "uniform"}, "ADMM (unstructured)"),
    ],
)
def test_methods_in_words(choices, words):
    report = prune(ZOO["llama"].build(), ZOO["llama"].batches(), progress=False, **choices)
    assert method_in_words(report.config) == words


def test_reports_in_words():
    report = llama_report(1)
    assert method_in_words(report.config) == "SparseGPT (unstructured, Fisher, Distil)"
    result = Measured("digits, 360 images", 0.9, 0.875)
    assert change_of(TOP1, result) == "Top-1 accuracy on digits (360 images) fell from 90.00% to 87.50%."
