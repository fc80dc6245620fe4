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
    """The commands of cells run in this process, which is faster; how they are run otherwise."""
    original = sweep.launch

    def in_this_process(command, output):
        with output.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return cli.main(list(command))

    monkeypatch.setattr(sweep, "launch", in_this_process)
    return original


@pytest.fixture
def small(inputs):
    """What makes a family of language models run on a tiny one."""
    sizes = ["nsamples=2", "seqlen=32", "limit=3"]
    return ["--model", inputs / "llama", "--set", *sizes, f"calibration={inputs}/long.txt", f"eval={inputs}/other.txt"]


@pytest.fixture
def family(inputs, tmp_path):
    """A family whose options run as they are; `change` edits it."""

    def write(change=lambda content: None, name="tiny"):
        text = {"calibration": f"{inputs}/long.txt", "eval": f"{inputs}/other.txt"}
        content = {
            "options": {"nsamples": 2, "seqlen": 32, "limit": 3, **text},
            "models": {"1B": str(inputs / "llama")},
            "cells": {"magnitude_50": {"prune_method": "magnitude"}, "wanda_2to4": {"sparsity_type": "2:4"}},
            "source": "Nobody 2024",
            "published": {"dense": {"1B": 111.5}, "wanda_2to4": {"1B": 222.25}},
        }
        change(content)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def run(*arguments):
    return sweep.main([str(argument) for argument in arguments])


def rows(out="out"):
    return json.loads(Path(out, "results.json").read_text())


def times(out="out"):
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in Path(out).rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_cell_is_a_command_that_prune_reads_as_the_cell_is_named_and_published_numbers_have_a_source(path):
    cells, text = list(sweep.read_cells(path)), path.read_text()
    assert f"\n#   python recipes/paper/run.py recipes/paper/{path.name} " in text
    assert "\n# Published: " in text
    content = yaml.safe_load(text)
    for name, own in content["cells"].items():
        assert re.fullmatch(r"[\w.-]*\w", name)  # it names a folder
        assert name != "dense"  # that row is measured by each cell
        assert not own.keys() & {"seqlen", "eval", "limit", "data_path"}
    for row, numbers in content.get("published", {}).items():
        assert row in ("dense", *content["cells"])
        assert numbers.keys() <= content["models"].keys()
        assert content["source"]
        assert content["options"]["seqlen"]
    assert len(cells) == len(content["models"]) * len(content["cells"])
    for cell in cells:
        command, *arguments = cell.command(Path("out"))
        assert command == "prune"
        values = cli.parse_options("prune", arguments)
        values["pattern"] = cli.parse(["prune", *arguments])[1]["pruning"].choices["pattern"]
        assert values["model"] == content["models"][cell.model]
        method, *_, last = cell.name.split("_")
        if method in ("magnitude", "sparsegpt", "wanda"):
            assert values["method"] == method
        kinds = {"4to8": ("4:8", 0.5), "2to4": ("2:4", 0.5)}
        if path.stem != "calibration":
            kind, ratio = kinds.get(last) or ("equal_share" if method == "variant" else "unstructured", int(last) / 100)
            kind = f"{kind}_{cell.options['prune_granularity']}" if "prune_granularity" in cell.options else kind
            assert (values["pattern"], values["sparsity"]) == (kind, ratio)
        assert values["save"] == f"out/{path.stem}/{cell.model}/{cell.name}"


def test_published_numbers_of_one_model_agree_and_have_one_context():
    seen = {}
    for path in FAMILIES:
        content = yaml.safe_load(path.read_text())
        for cell, numbers in content.get("published", {}).items():
            for model, number in numbers.items():
                own = {"prune_method": "wanda", **content["options"], **content["cells"].get(cell, {})}
                own = {} if cell == "dense" else own
                method, kind = own.get("prune_method"), own.get("sparsity_type", "unstructured")
                grouped = own.get("prune_granularity", "layer" if method == "magnitude" else "row")
                key = (content["models"][model], method, kind, grouped)
                what = (content["options"]["seqlen"], content["options"]["eval"], number)
                assert seen.setdefault(key, what) == what
    contexts = {key[0].split("/")[0]: what[0] for key, what in seen.items()}
    assert contexts == {"huggyllama": 2048, "meta-llama": 4096}


def test_a_sweep_on_a_small_model_resumes_and_hides_what_is_not_comparable(inputs, small, capsys):
    llama = [PAPER / "llama.yaml", "--out", "out", *small]
    only = ["--only", "magnitude_50", "llama/*/wanda_2to4"]
    assert run(*llama, *only) == 0
    shown = capsys.readouterr().out
    started = [" ".join(line.split()[:2]) for line in shown.splitlines()[:2]]
    assert started == ["[1/2] llama/llama/magnitude_50:", "[2/2] llama/llama/wanda_2to4:"]
    assert "windows of 2048" not in shown
    assert "5.68" not in shown
    assert "not shown" in shown
    assert "32 tokens" in " ".join(shown.split())  # the title wraps at its path
    found = rows()
    assert [row["cell"] for row in found] == ["dense", "magnitude_50", "wanda_2to4"]
    for row in found[1:]:
        report = json.loads(Path("out/llama/llama", row["cell"], "pruning_report.json").read_text())
        assert report["config"]["command"]["method"] == row["cell"].split("_")[0]
        assert (row["ours"], found[0]["ours"]) == (report["run"]["after"], report["run"]["before"])
        assert (row["published"], row["sparsity"]) == (None, 0.5)
    assert f"{found[2]['ours']:.2f}" in shown

    before = times()
    Path("out/llama/llama/wanda_2to4/cell.json").unlink()  # as if it had been interrupted at the end
    assert run(*llama, *only) == 0
    lines = capsys.readouterr().out.splitlines()[:2]
    assert [line.endswith("there already") for line in lines] == [True, False]
    after = times()
    rerun = {Path(path).parts[2] for path, time in after.items() if path != "results.json" and before.get(path) != time}
    assert rerun == {"wanda_2to4"}
    assert [row | {"seconds": 0} for row in rows()] == [row | {"seconds": 0} for row in found]


def test_other_options_are_refused_or_made_again(family, capsys):
    path = family()
    assert run(path, "--out", "out", "--only", "magnitude_50") == 0
    before = times()
    assert run(path, "--out", "out", "--set", "limit=2") == 1
    error = capsys.readouterr().err
    assert "tiny/1B/magnitude_50 has other options: limit was 3, is 2" in error
    assert times() == before
    assert run(path, "--out", "out", "--only", "magnitude_50", "--set", "limit=2", "--overwrite") == 0
    assert rows()[1]["options"]["limit"] == "2"


def test_published_numbers_stand_beside_what_was_measured_alike(family, capsys):
    path = family()
    assert run(path, "--out", "out", "--set", "batch_size=1") == 0
    out = capsys.readouterr().out
    assert [row["published"] for row in rows()] == [111.5, None, 222.25]
    lines = {line.split("│")[2].strip(): line.split("│") for line in out.splitlines() if line.startswith("│")}
    assert [lines[cell][5].strip() for cell in ("dense", "magnitude_50", "wanda_2to4")] == ["111.50", "", "222.25"]
    assert float(lines["dense"][4]) == pytest.approx(rows()[0]["ours"], abs=0.01)
    assert "Published: Nobody 2024" in out
    for change in ("limit=3", "seqlen=16", "nsamples=1", "dtype=float32", "seed=1"):  # even the same value: who knows
        cells = sweep.plan([path], (), None, dict([change.split("=")]))
        assert [cell.published for cell in cells] == [{}, {}]


def test_a_cell_that_fails_is_named_and_the_others_go_on(family, capsys):
    path = family(lambda content: content["cells"].update(broken={"sparsity_type": "5:10"}))
    assert run(path, "--out", "out", "--only", "broken", "magnitude_50") == 1
    shown = capsys.readouterr().out
    assert "tiny/1B/broken: failed with status 2: wanda-lightning: error: " in shown
    assert "multiple of 10" in Path("out/tiny/1B/broken/output.txt").read_text()
    assert not Path("out/tiny/1B/broken/cell.json").exists()
    assert [(row["cell"], row["ours"] is None) for row in rows()] == [
        *(("dense", False), ("magnitude_50", False), ("broken", True)),
    ]


def test_a_cell_is_a_process_of_its_own(launch):
    output = Path("output.txt")
    output.write_text("before\n")
    assert launch(["prune", "--model", "gone.gguf"], output) == 2
    before, command, error = output.read_text().splitlines()
    assert (before, command) == ("before", "$ wanda-lightning prune --model gone.gguf")
    assert error.startswith("wanda-lightning: error: The model gone.gguf does not exist")


def test_accuracies_of_image_classifiers_are_in_percent(inputs, capsys):
    options = ["--set", f"data_path={inputs}/images", "nsamples=4", f"resume={inputs}/test_vit.safetensors"]
    only = ["--only", "wanda_80"]
    assert run(PAPER / "vision.yaml", "--out", "out", "--model", "timm:test_vit", *options, *only) == 0
    dense, wanda = rows()
    report = json.loads(Path("out/vision/timm_test_vit/wanda_80/pruning_report.json").read_text())
    assert report["run"]["metric"] == "top-1"
    assert wanda["ours"] == report["run"]["after"]
    assert wanda["sparsity"] == pytest.approx(0.8, abs=0.01)
    out = capsys.readouterr().out
    assert f"top-1on{inputs}/images" in "".join(out.split())  # a long title is wrapped
    assert f" {100 * dense['ours']:.2f} " in out


def test_dry_run_prints_commands_and_writes_nothing(capsys):
    assert run(PAPER / "llama2.yaml", "--out", "out", "--only", "70B/*_2to4", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("wanda-lightning prune --model=meta-llama/Llama-2-70b-hf") for line in lines)
    assert all("--seqlen=4096" in line for line in lines)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.yaml"], "gone.yaml"),
        (["--only", "tiny/1B/wanda_50"], "matches no cell. Did you mean tiny/1B/wanda_2to4"),
        (["--set", "nsample=3"], "nsample"),
        (["--set", "save=here"], "--set save cannot be used"),
        (["--set", "sparsity_type=4:8"], "--set sparsity_type would make tiny/1B/wanda_2to4 another cell"),
        ([lambda c: c.update(option={})], "tiny.yaml must have the keys cells, models, options"),
        ([lambda c: c["options"].update(seq_len=3)], "tiny/1B/magnitude_50: "),
        ([lambda c: c["published"]["dense"].update({"1B": "low"})], "low"),
    ],
)
def test_bad_arguments_and_families_are_refused_before_anything_runs(family, capsys, arguments, message):
    change = [each for each in arguments if callable(each)]
    assert run(family(*change), *(each for each in arguments if not callable(each)), "--out", "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("run.py: error: ")
    assert not Path("out").exists()


def test_two_families_of_one_name_are_refused(family, capsys):
    Path("other").mkdir()
    assert run(family(), family(name="other/tiny"), "--out", "out") == 1
    assert "the same name" in capsys.readouterr().err
