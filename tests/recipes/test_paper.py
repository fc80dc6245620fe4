"""The paper's tables as sweeps: the YAML files, what runs and what does not run again, what stands beside what."""

import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from support.cli import IGNORED_WARNINGS

from wanda_lightning import cli

pytestmark = IGNORED_WARNINGS

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
FAMILIES = sorted(PAPER.glob("*.yaml"))

spec = importlib.util.spec_from_file_location("paper_run", PAPER / "run.py")
sweep = importlib.util.module_from_spec(spec)
sys.modules["paper_run"] = sweep
spec.loader.exec_module(sweep)


@pytest.fixture(autouse=True)
def launch(monkeypatch):
    """The commands of cells run in this process, which is faster."""

    def in_this_process(command, output):
        with (
            output.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            return cli.main(list(command))

    monkeypatch.setattr(sweep, "launch", in_this_process)


@pytest.fixture
def family(inputs, tmp_path):
    """A family whose options run as they are; `change` edits it."""

    def write(change=lambda content: None):
        texts = {"calibration": f"{inputs}/long.txt", "eval": f"{inputs}/other.txt"}
        content = {
            "options": {"nsamples": 2, "seqlen": 32, "limit": 3, **texts},
            "models": {"1B": str(inputs / "llama")},
            "cells": {
                "magnitude_50": {"prune_method": "magnitude"},
                "wanda_2to4": {"sparsity_type": "2:4"},
            },
            "source": "Nobody 2024",
            "published": {"dense": {"1B": 111.5}, "wanda_2to4": {"1B": 222.25}},
        }
        change(content)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def run(*arguments):
    return sweep.main([str(argument) for argument in arguments])


def rows(out="out"):
    return json.loads(Path(out, "results.json").read_text())


def times(out="out"):
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for path in Path(out).rglob("*.*")
        if path.is_file()
    }


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_cell_is_a_command_that_prunes_as_the_cell_is_named_and_published_numbers_have_a_source(
    path,
):
    text = path.read_text()
    content = yaml.safe_load(text)
    cells = list(sweep.read_cells(path))
    assert f"\n#   python recipes/paper/run.py recipes/paper/{path.name} " in text
    assert "\n# Published: " in text
    published = content.get("published", {})
    assert published.keys() <= {"dense", *content["cells"]}
    assert all(numbers.keys() <= content["models"].keys() for numbers in published.values())
    assert not published or (content["source"] and content["options"]["seqlen"])
    assert len(cells) == len(content["models"]) * len(content["cells"])
    for cell in cells:
        assert re.fullmatch(r"(?!dense$)[\w.-]*\w", cell.name)  # it names a folder beside `dense`
        command, *arguments = cell.command(Path("out"))
        values = cli.parse_options(command, arguments)
        pruning = cli.parse([command, *arguments])[1]["pruning"]
        assert (values["model"], values["save"]) == (
            content["models"][cell.model],
            f"out/{cell.path}",
        )
        method, *_, last = cell.name.split("_")
        if method in ("magnitude", "sparsegpt", "wanda"):
            assert values["method"] == method
        if path.stem != "calibration":
            kinds = {"4to8": ("4:8", 0.5), "2to4": ("2:4", 0.5)}
            kind, ratio = kinds.get(last) or (
                "equal_share" if method == "variant" else "unstructured",
                int(last) / 100,
            )
            kind = (
                f"{kind}_{cell.options['prune_granularity']}"
                if "prune_granularity" in cell.options
                else kind
            )
            assert (pruning.choices["pattern"], values["sparsity"]) == (kind, ratio)


def test_a_sweep_resumes_and_shows_published_numbers_beside_what_was_measured_alike(family, capsys):
    path = family(lambda content: content["cells"].update(broken={"sparsity_type": "5:10"}))
    cells = ("magnitude_50", "wanda_2to4", "broken")
    # A cell that fails is named, and the others go on.
    assert run(path, "--out", "out", "--set", "batch_size=1") == 1
    shown = capsys.readouterr().out
    found = rows()
    started = [line.split()[:2] for line in shown.splitlines()[:3]]
    assert started == [
        [f"[{number}/3]", f"tiny/1B/{cell}:"] for number, cell in enumerate(cells, start=1)
    ]
    assert "tiny/1B/broken: failed with status 2: wanda-lightning: error: " in shown
    assert "multiple of 10" in Path("out/tiny/1B/broken/output.txt").read_text()
    assert all(
        text in shown
        for text in ("111.50", "222.25", f"{found[0]['ours']:.2f}", "Published: Nobody 2024")
    )
    assert [(row["cell"], row["published"]) for row in found] == list(
        zip(("dense", *cells), (111.5, None, 222.25, None), strict=True)
    )
    for row in found[1:3]:
        report = json.loads(Path("out/tiny/1B", row["cell"], "pruning_report.json").read_text())
        assert (row["ours"], found[0]["ours"], row["sparsity"]) == (
            report["run"]["after"],
            report["run"]["before"],
            0.5,
        )
    for change in ("limit=3", "seqlen=16", "dtype=float32"):  # even the same value: who knows
        plan = sweep.plan([path], (), None, dict([change.split("=")]))
        assert [cell.published for cell in plan] == [{}, {}, {}]

    before = times()
    Path("out/tiny/1B/wanda_2to4/cell.json").unlink()  # as if it had been interrupted at the end
    assert run(path, "--out", "out", "--set", "batch_size=1") == 1
    rerun = {
        Path(path).parts[2]
        for path, time in times().items()
        if "/" in path and before.get(path) != time
    }
    assert rerun == {"wanda_2to4", "broken"}
    before = times()
    assert run(path, "--out", "out", "--set", "limit=2") == 1
    assert (
        "tiny/1B/magnitude_50 has other options: batch_size was 1, is not given; limit"
        in capsys.readouterr().err
    )
    assert times() == before
    assert (
        run(path, "--out", "out", "--only", "magnitude_50", "--set", "limit=2", "--overwrite") == 0
    )
    assert rows()[1]["options"]["limit"] == "2"
