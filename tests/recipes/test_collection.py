"""A collection of models: what a run leaves for each, what it does not do again, and which entries it refuses."""

import fcntl
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from support.cli import IGNORED_WARNINGS
from support.recipes import RECIPES, in_this_process, script

from wanda_lightning import PruningReport

pytestmark = IGNORED_WARNINGS

collection = script("collection")

CONTENT = """
options: {nsamples: 2, seqlen: 32, limit: 3, calibration: INPUTS/long.txt, evaluation: INPUTS/other.txt}
models:
  half: {model: INPUTS/llama, method: magnitude, stream: true}
  second: {model: INPUTS/llama, pattern: 5:10}
  pairs: {model: INPUTS/llama, pattern: 2:4, skip: [lm_head, "*.q_proj"]}
"""


PAIRS = {"pattern": "2:4"}  # with it, the second model does not fail


@pytest.fixture
def launched(monkeypatch):
    """The models whose commands ran. Their pages have no figures and no text, which take longer than pruning."""
    names = []
    monkeypatch.setattr("wanda_lightning.report.figures.to_svg", lambda *_: "<svg></svg>")
    monkeypatch.setattr("wanda_lightning.cli.sample_text.PROMPTS", ())

    def launch(command, output):
        names.append(Path(output.name).parent.name)
        return in_this_process(command, output)

    monkeypatch.setattr(collection, "launch", launch)
    return names


@pytest.fixture
def run(inputs, launched):
    """Runs the collection with other options of its second model, and returns the exit status."""

    def main(changes=None, *arguments):
        content = yaml.load(CONTENT.replace("INPUTS", str(inputs)), yaml.BaseLoader)
        content["models"]["second"] |= changes or {}
        Path("models.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return collection.main(["models.yaml", "--out=out", *arguments])

    return main


def test_a_model_that_fails_does_not_stop_the_others(run, capsys):
    assert run() == 1
    out, err = capsys.readouterr()
    assert "[2/3] second: failed with status 2: wanda-lightning: error: " in out
    assert err == "1 of 3 failed: second\n"
    for name, layers in (("half", 14), ("pairs", 12)):
        report = PruningReport.load(f"out/{name}")
        assert (report.sparsity, len(report.layers)) == (0.5, layers)
        assert f" to {report.run.after:,.2f}." in out
        assert Path(f"out/{name}/{name}/README.md").is_file()


def test_the_same_command_goes_on_where_it_was_interrupted(run, launched, monkeypatch):
    with monkeypatch.context() as patch:
        last_step = "wanda_lightning.streaming.output_folder.Shards.write_rest"
        patch.setattr(last_step, lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(PAIRS) == 130
    weights = next(Path("out/half").rglob("*.safetensors"))
    written = weights.stat().st_mtime_ns
    for _ in range(2):
        assert run(PAIRS) == 0
    assert weights.stat().st_mtime_ns == written
    assert launched == ["half", "half", "second", "pairs"]


def test_a_command_that_a_killed_run_left_behind_is_waited_for(run, launched):
    run()
    Path("out/half/pruning_report.json").rename("report")
    with open("out/half/output.txt") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        left_behind = "(sleep 2; mv report out/half/pruning_report.json) &"
        subprocess.run(["sh", "-c", left_behind], stdout=output, check=True)
    run()
    assert launched == ["half", "second", "pairs", "second"]


def test_a_finished_model_is_replaced_only_if_that_is_asked_for(run, launched, capsys):
    run(PAIRS)
    other = {**PAIRS, "method": "magnitude"}
    assert run(other) == 1
    message = "second: out/second has other options: method was not given, is magnitude. Use"
    assert message in capsys.readouterr().err
    assert run(other, "--overwrite") == 0
    assert launched == ["half", "second", "pairs", "second"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "no/such/folder", "second: The model no/such/folder does not exist"),
        ("sparsity", "2", "second: sparsity (0.02 for 2 %) must be"),
        ("patern", "2:4", "second: Unknown option"),
        ("save", "here", "second: save must be left out"),
    ],
)
def test_a_wrong_entry_is_named_before_anything_runs(run, launched, capsys, option, value, message):
    assert run({option: value}) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert launched == []


def test_the_example_is_a_collection():
    for entry in collection.read(RECIPES / "collection.yaml", Path("out")):
        collection.parse(entry.command())
