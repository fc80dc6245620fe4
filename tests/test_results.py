"""The runs in benchmarks/results, and the tables and figures that are made from them."""

import json
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from statistics import stdev
from xml.etree import ElementTree

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import figures  # noqa: E402
import pages  # noqa: E402
import quality  # noqa: E402
import tables  # noqa: E402
from result import FOLDER, OURS, QUANTITIES, Result, read_table  # noqa: E402

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
VERSIONS = re.findall(
    r"(?:^## |During development the version number was )(\d+\.\d+\.\d+)", CHANGELOG, re.MULTILINE
)
TABLES = sorted(folder.name for folder in FOLDER.iterdir())
DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


@pytest.mark.parametrize("table", TABLES)
def test_every_run_says_when_and_how_it_was_made(table):
    for run in read_table(table):
        assert date.fromisoformat(run.date), run.name
        if run.code not in (OURS, "plain") and not run.command:  # not a script of this repository
            assert run.note, run.name
            continue
        assert run.versions[OURS] in VERSIONS, run.name
        program, script, *_ = shlex.split(run.command.removeprefix("OMP_NUM_THREADS=1 "))
        assert program in ("make", "wanda-lightning") or (ROOT / script).is_file(), run.command


@pytest.mark.parametrize("table", TABLES)
def test_every_file_has_the_name_and_the_numbers_of_its_run(table):
    assert sorted([f"{run.name}.json" for run in read_table(table) if run.measured]) == sorted(
        file.name for file in (FOLDER / table).iterdir()
    )


@pytest.mark.parametrize("table", TABLES)
def test_every_run_has_a_sparsity_a_pattern_and_numbers_that_are_described(table):
    for run in read_table(table):
        assert run.measured.keys() <= QUANTITIES.keys(), run.name
        assert 0 <= run.sparsity < 1, run.name
        assert re.fullmatch(r"(un)?structured|experts|\d+:\d+", run.pattern), run.name


def test_the_benchmark_of_all_methods_can_repeat_the_runs():
    for run in read_table("methods"):
        if run.method != "dense":
            assert run.method in quality.TEXT, run.name
            assert quality.is_for(run.method, run.goal), run.name


@pytest.mark.parametrize("page", pages.FILES, ids=lambda page: page.stem)
def test_a_page_has_the_numbers_of_the_runs_and_the_options_of_the_package(page):
    text = page.read_text(encoding="utf-8")
    assert pages.fill(text) == text, "out of date: make results"


def test_the_pages_use_every_part():
    used = set()
    for page in pages.FILES:
        parts = pages.PART.findall(page.read_text("utf-8"))
        used.update(pages.named(heading)[0] for _, heading, _ in parts)
    assert used == set(pages.PARTS)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_shows_the_runs_and_can_be_drawn(name, tmp_path):
    collect, draw = figures.FIGURES[name]
    (description,) = ElementTree.parse(ROOT / "docs" / f"{name}.svg").iterfind(DESCRIPTION)
    assert json.loads(description.text) == json.loads(json.dumps(collect())), (
        "out of date: make results"
    )
    matplotlib.use("svg")
    draw(collect()).savefig(tmp_path / "figure.svg")


def cells_of(text):
    """The cells of each row in tables of Markdown."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_the_table_of_all_methods_has_the_numbers_of_the_files():
    head, *rows = cells_of(str(tables.METHODS))
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    runs = [run for run in read_table("methods") if run.goal in head]
    assert len(runs) > 30
    repeated = 0
    for run in runs:
        cell, _, _ = shown[tables.LABELS[run.method]][run.goal].partition(", ")
        of_cell = (run.method, run.goal, run.model)
        draws = [run, *(r for r in read_table("draws") if (r.method, r.goal, r.model) == of_cell)]
        values = [run.measured["perplexity"] for run in draws]
        mean, *deviation = map(float, cell.split(" ± "))
        assert mean == pytest.approx(sum(values) / len(values), rel=1e-3)
        if len(values) > 1 and run.method != "dense":
            repeated += 1
            assert deviation == [pytest.approx(stdev(values), abs=0.06)]
    assert repeated >= 15


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({"perplexity": 65.296}, "65.30"),
        ({"perplexity": 2780.27}, "2780"),
        ({"perplexity": 162.27, "perplexity_deviation": 0.66}, "162.3 ± 0.7"),
        ({"top1": 0.7231, "top1_deviation": 0.0071}, "72.3 ± 0.7 %"),
        ({"seconds": 294.2}, "294 s"),
        ({"seconds": 1.52}, "1.5 s"),
        ({"divergence": 0.0000299}, "2.99e-05"),
    ],
)
def test_a_number_has_its_digits_its_deviation_and_its_unit(measured, shown):
    quantity, *_ = measured
    run = Result(model="m", method="wanda", measured=measured)
    assert tables.number(run, quantity) == shown


def test_what_pays_says_it_in_short_cells():
    page = (ROOT / "docs" / "worth.md").read_text(encoding="utf-8")
    cells = [cell for row in cells_of(page) for cell in row]
    assert len(cells) > 100
    assert [cell for cell in cells if len(cell.split()) > 30] == []


SAME = {"loads": 1, "continuations": 4, "same_continuations": 4}


@pytest.mark.parametrize(
    ("measured", "note", "cell"),
    [
        (SAME, None, "yes"),
        ({**SAME, "same_continuations": 3}, None, "yes, 3 of 4 equal"),
        ({**SAME, "requests_1": 1.206, "requests_16": 1.35}, None, "yes, 1.21 / 1.35"),
        ({"loads": 0}, "ValueError: no such class", "no: ValueError: no such class"),
        (
            {"loads": 0},
            "ValueError: Expected shape (1536, 576) but received shape (992, 576) for parameter a.weight",
            "no: it has one width for all layers",
        ),
    ],
)
def test_a_cell_of_the_servers_says_how_a_model_runs_there(measured, note, cell):
    run = Result(model="m", method="dense", measured=measured, note=note)
    assert tables.served(run) == cell


def test_the_table_of_servers_has_a_column_for_each_version():
    head, *rows = cells_of(tables.text("serving"))
    for run in read_table("serving"):
        server = run.case["server"]
        column = head.index(f"{server} {run.versions[server]}")
        assert tables.served(run) in [row[column] for row in rows]
