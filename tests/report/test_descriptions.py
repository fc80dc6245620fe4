"""Numbers and methods in words."""

import pytest

from wanda_lightning import PruningConfig
from wanda_lightning.report import Measured
from wanda_lightning.report.descriptions import PERPLEXITY, TOP1, change_of, method_in_words


def test_results_and_their_changes():
    assert [TOP1.text(value) for value in (0.8125, None)] == ["81.25%", "not measured"]
    values = (16.058, 12345.6, float("inf"))
    assert [PERPLEXITY.text(value) for value in values] == ["16.06", "12,345.60", "not finite"]
    assert (TOP1.change(0.9, 0.875), PERPLEXITY.change(16.0, 20.0)) == ("-2.50 points", "+25.0%")
    assert PERPLEXITY.change(None, 20.0) == PERPLEXITY.change(16.0, float("inf")) == ""
    result = Measured("digits, 360 images", 0.9, 0.875)
    assert change_of(TOP1, result) == "Top-1 accuracy on digits (360 images) fell from 90.00% to 87.50%."


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "Wanda (unstructured)"),
        ({"method": "sparsegpt", "pattern": "2:4"}, "SparseGPT (2:4)"),
        ({"allocation": "owl", "pattern": "equal_share"}, "Wanda (equal share of the scores, OWL)"),
        ({"method": "best"}, "best (ADMM, unstructured, Fisher)"),
        ({"method": "best", "allocation": "uniform", "recovery": "distil"}, "ADMM (unstructured, Distil)"),
    ],
)
def test_methods_in_words(choices, words):
    config = PruningConfig.from_names(**choices)
    assert method_in_words({**config.describe(), "preset": config.preset}) == words
