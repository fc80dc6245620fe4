"""Tables keep their numbers on terminals of every width, and warnings are one line."""

import re
import sys
import warnings

import pytest
from rich.table import Table

from wanda_lightning.cli.output import print_line, print_table, readable_warnings


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_no_number_is_cut(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    made = Table()
    for heading in ("method", "sparsity", "dense perplexity", "pruned perplexity", "seconds to prune"):
        made.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    made.add_row("ablate_wanda_iter", "50.00%", "13243.37", "1234567.89", "1234.5")
    print_table(made)
    out = capsys.readouterr().out
    for number in ("50.00%", "13243.37", "1234567.89", "1234.5"):
        assert re.search(rf"(?<![\d.]){re.escape(number)}", out)
    assert ("sparsity: 50.00%" in out.splitlines()) == (width < 80)
    assert "…" not in out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_under_the_long_name_of_a_model(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    made = Table()
    made.add_column("")
    made.add_column("/models/of/the/laboratory/llama-2-7b-pruned-2-4", justify="right", overflow="fold")
    made.add_row("sparsity of the prunable layers of the model", "50.00% (+50.00)")
    print_table(made)
    assert "50.00% (+50.00)" in capsys.readouterr().out


def test_markup_in_names_is_text(capsys, monkeypatch):
    from rich.markup import escape

    monkeypatch.setenv("COLUMNS", "30")
    made = Table("name")
    made.add_column("weights", justify="right")
    made.add_row(escape("[red]a[/red]:smile:"), "1234567890123456789012345")
    print_table(made)
    print_line("layers [bold]x[/bold] of a name that is longer than the terminal is wide")
    out = capsys.readouterr().out
    assert "name: [red]a[/red]:smile:" in out
    assert "layers [bold]x[/bold] of a name that is longer than the terminal is wide\n" in out


def test_warnings_are_one_line_without_a_path(capsys):
    with warnings.catch_warnings(), readable_warnings():
        warnings.simplefilter("always")
        text = warnings.formatwarning("num_samples is 50", UserWarning, "/a/path.py", 3)
        sys.stderr.write(text)
    assert capsys.readouterr().err == "wanda-lightning: warning: num_samples is 50\n"
    assert "/a/path.py" in warnings.formatwarning("x", UserWarning, "/a/path.py", 3)
