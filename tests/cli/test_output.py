"""Tables keep their numbers on terminals of every width, and warnings are one line."""

import re
import subprocess
import sys
import warnings

import pytest
from rich.table import Table

from wanda_lightning.cli.output import print_line, print_table, readable_warnings

RESULTS = {
    **{"method": "ablate_wanda_iter", "sparsity": "50.00%", "dense perplexity": "13243.37"},
    **{"pruned perplexity": "1234567.89", "seconds to prune": "1234.5"},
}
LONG = {"": "sparsity of the prunable layers", "/models/of/the/laboratory/llama-2-7b-pruned-2-4": "50.00% (+50.00)"}


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("cells", [RESULTS, LONG])
def test_no_number_is_cut(cells, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    first, *numbers = cells
    made = Table(first)
    for heading in numbers:
        made.add_column(heading, justify="right", overflow="fold")
    made.add_row(*cells.values())
    print_table(made)
    out = capsys.readouterr().out
    for heading in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(cells[heading])}", out)
    if cells is RESULTS:
        assert ("sparsity: 50.00%" in out.splitlines()) == (width < 80)
    assert "…" not in out


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


@pytest.mark.nightly
def test_lightning_does_not_log_the_hardware():
    """In a fresh interpreter, since Lightning sets its level when it is imported."""
    code = "from wanda_lightning.cli.output import quiet_libraries; quiet_libraries()\n"
    code += "import lightning as L; L.Trainer(accelerator='cpu', logger=False, enable_checkpointing=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "available" not in done.stdout + done.stderr


def test_warnings_are_one_line_without_a_path(capsys):
    with warnings.catch_warnings(), readable_warnings():
        warnings.simplefilter("always")
        text = warnings.formatwarning("num_samples is 50", UserWarning, "/a/path.py", 3)
        sys.stderr.write(text)
    assert capsys.readouterr().err == "wanda-lightning: warning: num_samples is 50\n"
    assert "/a/path.py" in warnings.formatwarning("x", UserWarning, "/a/path.py", 3)
