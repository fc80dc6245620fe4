"""`wanda-lightning compare`: several prunings side by side."""

import json
import re

import pytest
from support.cli import SEQLEN, run
from support.reports import Page, llama_report

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

ONE = "out/pruning_report.json"


def test_prunings_are_compared_on_the_terminal_and_as_a_page(inputs, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    for method in ("magnitude", "wanda"):
        texts = ["--calibration", inputs / "long.txt", "--eval", inputs / "other.txt", "--seqlen", SEQLEN, "--limit", 3]
        options = ["--nsamples", 2, "--prune_method", method, "--sparsity_ratio", 0.5, "--save", f"out/{method}"]
        assert run("prune", "--model", inputs / "llama", *options, *texts) == 0
    capsys.readouterr()
    files = [f"out/{method}/pruning_report.json" for method in ("magnitude", "wanda")]
    assert run("compare", files[0], "out/wanda", "--report", "compare.html") == 0
    out = capsys.readouterr().out
    page = Page(tmp_path / "compare.html")
    for file, method in zip(files, ("magnitude", "wanda"), strict=True):
        measured = json.loads((tmp_path / file).read_text())["run"]
        row = next(line for line in out.splitlines() if re.match(rf"\W+{method}\b", line))
        for value in (measured["before"], measured["after"]):
            assert f" {value:,.2f} " in row
            assert f" {value:,.2f} " in page.text
        assert "50.00%" in row
        assert measured["command"] in page.text
    assert "The comparison is in compare.html." in out


def test_the_page_is_not_needed(capsys):
    llama_report(1).save("out/one")
    assert run("compare", "out/one/pruning_report.json") == 0
    out, err = capsys.readouterr()
    assert "SparseGPT (unstructured, Fisher, Distil)" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "REPORT is required: give the pruning_report.json of each pruning to compare, or its folder."),
        (["none.json"], 2, "REPORT none.json does not exist. Check the path."),
        (["empty"], 1, "empty has no pruning_report.json. Give a folder of prune --save or report_dir."),
        (["other.json"], 1, "other.json is not the report of a pruning."),
        (
            [ONE, "--report", "a.pdf"],
            2,
            "--report must end with .html or .png, but it is 'a.pdf'.",
        ),
        ([ONE, "--report", "old.html"], 2, "--report old.html already exists."),
        (
            [ONE, "--report", "other.json/a.html"],
            2,
            "--report other.json/a.html cannot be written",
        ),
    ],
)
def test_wrong_arguments_are_refused(capsys, tmp_path, arguments, status, message):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    llama_report(1).save("out")
    (tmp_path / "empty").mkdir()
    for name in ("other.json", "old.html"):
        (tmp_path / name).write_text("old")
    assert run("compare", *arguments) == status
    assert message in capsys.readouterr().err
    assert (tmp_path / "old.html").read_text() == "old"


def test_a_page_is_replaced_on_request(tmp_path):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    llama_report(1).save("out")
    (tmp_path / "old.html").write_text("old")
    assert run("compare", "out/pruning_report.json", "--report", "old.html", "--overwrite") == 0
    assert "1 pruning compared" in (tmp_path / "old.html").read_text()
