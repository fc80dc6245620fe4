"""Numbers and methods in words."""

from dataclasses import replace

import pytest
from support.reports import AGREEMENT, llama_report

from wanda_lightning import PruningConfig
from wanda_lightning.report import Measured
from wanda_lightning.report.descriptions import (
    AGREEMENT_METRICS,
    PERPLEXITY,
    TOP1,
    agreement_in_a_sentence,
    change_in_words,
    change_of,
    method_in_words,
)


def test_results_and_their_changes():
    assert [TOP1.text(value) for value in (0.8125, None)] == ["81.25%", "not measured"]
    assert TOP1.text(0.8125, 0.0125) == "81.25% ± 1.25"
    values = (16.058, 12345.6, float("inf"))
    assert [PERPLEXITY.text(value) for value in values] == ["16.06", "12,345.60", "not finite"]
    assert (TOP1.change(0.9, 0.875), PERPLEXITY.change(16.0, 20.0)) == ("-2.50 points", "+25.0%")
    assert PERPLEXITY.change(None, 20.0) == PERPLEXITY.change(16.0, float("inf")) == ""
    result = Measured("digits, 360 images", 0.9, 0.875)
    assert (
        change_of(TOP1, result)
        == "Top-1 accuracy on digits (360 images) fell from 90.00% to 87.50%."
    )


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.25674, 0.00312, "0.2567 ± 0.0031"),
        (3.21e-05, 1.14e-06, "3.2e-05 ± 1.1e-06"),
        (0.0, None, "0.0000"),
        (-0.5, None, "-0.5000"),
    ],
)
def test_small_divergences_keep_their_digits(value, error, text):
    assert AGREEMENT_METRICS["kl_divergence"].text(value, error) == text


def test_agreement_with_the_dense_model_in_a_sentence():
    result = Measured("wikitext2, 83 windows of 2,048 tokens", 16.0, 18.0, agreement=AGREEMENT)
    assert agreement_in_a_sentence(result) == (
        "Compared with the dense model on wikitext2 (12,264 predictions): Same top prediction 71.23% ± 0.42; "
        "KL divergence 0.2567 ± 0.0031; KL divergence, 99th percentile 2.5000."
    )
    embeddings = Measured(
        "stsb, 1,379 pairs", 82.0, 81.0, agreement={"cosine": 0.95, "predictions": 2758}
    )
    assert "Cosine to the dense embedding 0.9500." in agreement_in_a_sentence(embeddings)
    assert agreement_in_a_sentence(Measured("wikitext2", 16.0, 18.0)) == ""


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "Wanda (unstructured)"),
        ({"method": "sparsegpt", "pattern": "2:4"}, "SparseGPT (2:4)"),
        ({"allocation": "owl", "pattern": "equal_share"}, "Wanda (equal share of the scores, OWL)"),
        ({"method": "best"}, "best (ADMM, unstructured, Fisher)"),
        (
            {"method": "best", "allocation": "uniform", "recovery": "distill"},
            "ADMM (unstructured, Distill)",
        ),
    ],
)
def test_methods_in_words(choices, words):
    config = PruningConfig(**choices)
    assert method_in_words({**config.describe(), "preset": config.preset}) == words


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"solver": {"name": "Refit"}, "allocation": {"name": "Fisher"}},
            "Refit (hidden units, Fisher)",
        ),
        ({"solver": {"name": "Refit"}, "experts": 0.25}, "Refit (hidden units)"),
        ({}, "hidden units"),  # they were zero already
        ({"pattern": {"name": "Experts"}, "criterion": {"name": "REAP"}}, "REAP (experts)"),
    ],
)
def test_what_left_a_smaller_model_in_words(config, words):
    config = {"pattern": {"name": "Structured"}, **config}
    report = replace(llama_report(1), config=config, shrunk=True)
    assert change_in_words(report) == f"Shrunk: {words}"
