"""Results of models as text."""

from wanda_lightning.report.metrics import PERPLEXITY, TOP1


def test_results_as_text():
    assert [TOP1.text(value) for value in (0.8125, None)] == ["81.25%", "not measured"]
    values = (16.058, 12345.6, float("inf"))
    assert [PERPLEXITY.text(value) for value in values] == ["16.06", "12,345.60", "not finite"]


def test_changes_are_in_points_for_a_fraction_and_else_in_percent():
    assert TOP1.change(0.9, 0.875) == "-2.50 points"
    assert PERPLEXITY.change(16.0, 20.0) == "+25.0%"
    assert PERPLEXITY.change(None, 20.0) == PERPLEXITY.change(16.0, float("inf")) == ""
