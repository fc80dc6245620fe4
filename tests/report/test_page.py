"""The page of a report: complete, in one file, and readable without scripts and network."""

import re
from dataclasses import replace

import pytest
from support.reports import Page, llama_report


def page_of(report, folder):
    report.save(folder / "out" / "report.html")
    page = Page(folder / "out" / "report.html")
    assert page.open == []
    assert [file.name for file in (folder / "out").iterdir()] == ["report.html"]
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    return page


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Draw no figure, which takes longer than the rest of a page."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("wanda_lightning.report.figures.to_svg", lambda *_: "<svg></svg>")
        yield


@pytest.fixture(scope="module")
def report():
    return llama_report(4)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return page_of(report, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize(
    "sentence",
    [
        "Pruned with SparseGPT (unstructured, Fisher, Distill) in 1 min 36 s: 43.07% of the weights",
        "Perplexity on sklearn-docs (24 windows of 512 tokens) rose from 16.06 to 18.93.",
        "Perplexity on python-docs (32 windows of 512 tokens) rose from 12.95 to 14.72.",
        "Same top prediction 71.23% ± 0.42, compared with the dense model",
        "KL divergence 0.2567 ± 0.0031, compared with the dense model",
        "MiB of weights 513.1 dense 513.1 Times as fast 1.23 ± 0.04 dense 1.00",
        "12,264 predictions on sklearn-docs, 24 windows of 512 tokens, compared with those of the dense model",
        "Perplexity: 16.06 ± 0.31 before, 18.93 ± 0.41 afterward.",
        "KL divergence 0.2567 ± 0.0031 how far the predicted probabilities are from the dense ones",
        "KL divergence, 99th percentile 2.5000 1 % of the predictions have a larger divergence",
        "Training after pruning",
        "0 0.61 1 0.52 0.44 2 0.43 0.41 3 0.4 0.395",
        "boolq accuracy 60.00% 56.25%",
        "boolq answers that were right and are wrong 5.00%",
        "down_proj 0.001235",
    ],
)
def test_the_page_shows_what_was_measured(page, sentence):
    assert sentence in page.text


def test_the_page_compares_with_the_dense_model_once(page):
    assert (
        page.text.count("compared with those of the dense model") == 1
    )  # the other text has no such results


def test_the_page_shows_every_matrix(report, page):
    for layer in report.layers:
        assert f" {layer.name} " in page.text
        assert f" {layer.error:.2%} " in page.text
        assert f" {layer.sparsity:.2%} " in page.text
    for matrix in report.skipped:
        assert matrix.name in page.text
        assert matrix.detail in page.text


def test_the_page_shows_how_the_model_was_pruned(report, page):
    for text in (*report.notes, report.run.command, report.run.calibration):
        assert text in page.text
    for name, version in report.versions.items():
        assert f"{name} {version}" in page.text


def test_the_page_shows_the_texts(report, page):
    for sample in report.run.samples:
        for text in (sample.prompt, sample.before, sample.after):
            assert " ".join(text.split()) in page.text
    # Without the space that joins it to the prompt.
    assert "<p>is &lt;b&gt;open&lt;/b&gt;.</p>" in page.source
    # With its indentation, without the line break.
    assert "<p>    return</p>" in page.source


def test_the_page_says_nothing_about_what_was_not_measured(tmp_path):
    report = llama_report(2)
    layers = tuple(replace(layer, error=None) for layer in report.layers)
    page = page_of(replace(report, layers=layers, run=None, training=None), tmp_path)
    assert "Error of the outputs" not in page.text
    assert not re.search("not available|no measured", page.text, re.IGNORECASE)


def test_the_page_of_a_smaller_model_does_not_say_that_its_units_are_zero(tmp_path):
    page = page_of(llama_report(2).marked_as_shrunk(), tmp_path)
    assert not re.search("are zero|[Zz]eros (in|by)", page.text)
    assert "Taken out of pruned layers" in page.text
