"""The runs in benchmarks/results, and the tables and figures that are made from them."""

import json
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import figures  # noqa: E402
import pages  # noqa: E402
import quality  # noqa: E402
import tables  # noqa: E402
from result import FOLDER, OURS, read_table  # noqa: E402

DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


@pytest.mark.parametrize("table", sorted(folder.name for folder in FOLDER.iterdir()))
def test_every_run_says_when_and_how_it_was_made(table):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = {*re.findall(r"^## (\d+\.\d+\.\d+) - ", changelog, re.MULTILINE)}
    versions |= {
        *re.findall(r"During development the version number was (\d+\.\d+\.\d+)", changelog)
    }
    assert len(versions) >= 2
    runs = read_table(table)
    assert {file.name for file in (FOLDER / table).iterdir()} == {
        f"{run.name}.json" for run in runs if run.measured
    }
    for run in runs:
        assert date.fromisoformat(run.date), run.name
        if run.code in (OURS, "plain") or run.command:  # a script of this repository
            assert run.versions[OURS] in versions, run.name
            program, script, *_ = shlex.split(run.command.removeprefix("OMP_NUM_THREADS=1 "))
            assert program in ("make", "wanda-lightning") or (ROOT / script).is_file(), run.command
        else:
            assert run.note, run.name


@pytest.mark.parametrize("table", ["methods", "tasks", "own_text"])
def test_the_benchmark_of_all_methods_can_repeat_the_runs(table):
    can = {"dense"} | quality.TEXT.keys()
    for run in read_table(table):
        assert run.method in can, run.name
        if run.method in quality.TEXT:
            assert run.method not in (
                quality.UNSTRUCTURED if ":" in run.goal else quality.PERMUTED
            ), run.name


def test_the_pages_have_the_numbers_of_the_runs_and_the_options_of_the_package():
    texts = {file: file.read_text(encoding="utf-8") for file in pages.FILES}
    used = {part.split()[0] for text in texts.values() for _, part, _ in pages.PART.findall(text)}
    assert used == set(pages.PARTS)
    for file, text in texts.items():
        assert pages.fill(text) == text, f"{file.name} is out of date: make results"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_shows_the_runs_and_can_be_drawn(name, tmp_path):
    collect, draw = figures.FIGURES[name]
    (description,) = ElementTree.parse(ROOT / "docs" / f"{name}.svg").iterfind(DESCRIPTION)
    assert json.loads(description.text) == json.loads(json.dumps(collect())), (
        "out of date: make results"
    )
    matplotlib.use("svg")
    draw(collect()).savefig(tmp_path / "figure.svg")


def test_the_table_of_all_methods_has_the_numbers_of_the_files():
    head, *rows = [
        line.split(" | ") for line in tables.methods().splitlines() if line.startswith("| ")
    ]
    cells = {
        (row[0].removeprefix("| "), goal): cell
        for row in rows
        for goal, cell in zip(head, row, strict=False)
    }
    runs = [run for run in read_table("methods") if run.goal in head]
    assert len(runs) > 30
    for run in runs:
        shown = float(cells[tables.LABELS[run.method], run.goal])
        assert shown == pytest.approx(run.measured["perplexity"], rel=1e-3)


def test_what_pays_says_it_in_short_cells():
    page = (ROOT / "docs" / "worth.md").read_text(encoding="utf-8")
    cells = [
        cell
        for line in page.splitlines()
        if line.startswith("| ")
        for cell in line.strip("| ").split(" | ")
    ]
    assert len(cells) > 100
    assert [cell for cell in cells if len(cell.split()) > 30] == []
