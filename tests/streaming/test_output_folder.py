"""Runs that were interrupted go on where they were, and with nothing else than they began with."""

import shutil
import signal
from dataclasses import replace

import pytest
import torch
from support import forks
from support.disk import (
    CHOICES,
    add_predictions,
    batches,
    contents,
    interrupted,
    prune_until_killed,
    same,
    stream,
    weights,
)
from support.pairwise import with_nightly
from support.refusals import refuses
from support.reports import read_json
from transformers import AutoModelForCausalLM

from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.from_disk import pruned_from_disk
from wanda_lightning.streaming.output_folder import PROGRESS_NAME, OutputFolder, PartRecord, Shards

pytestmark = pytest.mark.filterwarnings("ignore")

WANDA = {"method": "wanda"}


@forks.IN_ONE_WORKER
@pytest.mark.parametrize("name", with_nightly(["owl_sparsegpt", "experts_block"], ["experts"]))
def test_a_killed_run_continues_where_it_was(source_for, streamed, out, name):
    expected, whole = streamed(name)
    for after in (1, 2, 4, 5):
        assert (
            forks.run(prune_until_killed, source_for(name), out, after, CHOICES[name]).returncode
            == -signal.SIGKILL
        )
        assert (out / "config.json").exists() == (after == 5)
        assert len(read_json(out / PROGRESS_NAME)["written"]) == after
    report = stream(source_for(name), out, batches(), **CHOICES[name])
    assert contents(out) == contents(whole)
    assert replace(report, seconds={}) == replace(expected, seconds={})


@forks.IN_ONE_WORKER
def test_a_killed_run_continues_before_its_units_leave_and_while_they_do(
    source, streamed, out, monkeypatch
):
    expected, whole = streamed("units")
    killed = forks.run(prune_until_killed, source, out, 1, CHOICES["units"])
    assert killed.returncode == -signal.SIGKILL
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "write_rest", interrupt_second(Shards.write_rest))
        with pytest.raises(KeyboardInterrupt):
            stream(source, out, batches(), **CHOICES["units"])
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 64  # with zeros
    report = stream(source, out, batches(), **CHOICES["units"])
    assert contents(out) == contents(whole)
    assert replace(report, seconds={}) == replace(expected, seconds={})


def interrupt_second(function):
    """A function that is interrupted when it is called again."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


@pytest.mark.parametrize(
    ("name", "passes", "repeated"),
    with_nightly(
        [
            ("magnitude", 1, 0),
            ("units", 2, 1),
            ("experts_block", 1, 0),
        ],
        [("none", 3, 1), ("per_layer", 2, 0), ("owl without statistics", 3, 0)],
    ),
)
def test_a_continued_run_does_not_allocate_again(
    source_for, streamed, out, monkeypatch, name, passes, repeated
):
    source = source_for(name)
    loads = []
    load = Checkpoint.load

    def counting(self, part, stored=None):
        loads.append((part, stored is None))
        return load(self, part, stored)

    expected, whole = streamed(name)
    monkeypatch.setattr(Checkpoint, "load", counting)
    interrupted(source, out, monkeypatch, at="model.layers.2", **CHOICES[name])
    blocks = [f"model.layers.{index}" for index in range(4)]
    assert [loads.count((block, True)) for block in blocks[:3]] == [passes] * 3
    loads.clear()
    report = stream(source, out, batches(), **CHOICES[name])
    from_source = [(block, True) for block in blocks]
    taken_out = [("", True), *from_source] if name == "units" else []
    assert (
        loads[1:] == from_source * repeated + [(b, i > 1) for i, b in enumerate(blocks)] + taken_out
    )
    assert (report.layers, report.config) == (expected.layers, expected.config)
    assert len({layer.target for layer in report.layers}) > 1 or "allocation" not in CHOICES[name]
    assert contents(out) == contents(whole)


def test_a_continued_run_has_no_written_block_in_memory(source_for, out, monkeypatch):
    """Taking experts out of weights that are not in memory makes tensors that are."""
    source = source_for("experts_block")
    interrupted(source, out, monkeypatch, at="model.layers.3", **CHOICES["experts_block"])
    in_memory = []
    load = Checkpoint.load

    def listing(self, part, *args):
        weights_now = self.model.named_parameters()
        in_memory.append({self.part_of(k) for k, weight in weights_now if not is_unloaded(weight)})
        return load(self, part, *args)

    monkeypatch.setattr(Checkpoint, "load", listing)
    stream(source, out, batches(), **CHOICES["experts_block"])
    # The first is the load of what lies outside of the blocks; the model is on the meta device then.
    assert all(len(parts - {""}) <= 1 for parts in in_memory[1:])
    assert len(in_memory) > 4


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_was_interrupted_while_it_copied_tensors_continues(
    copied, tmp_path, out, monkeypatch, number
):
    predictions = add_predictions(copied)
    expected = stream(copied, tmp_path / "whole", batches(), **WANDA)
    interrupted(
        copied,
        out,
        monkeypatch,
        at=f"copied from {sorted(copied.glob('*.safetensors'))[-number].name}",
        method="wanda",
    )
    assert not (out / "config.json").exists()
    report = stream(copied, out, batches(), **WANDA)
    assert contents(out) == contents(tmp_path / "whole")
    assert predictions.keys() < weights(out).keys()
    assert report.notes == expected.notes


def test_a_run_that_ended_before_its_report_was_used_gives_it_again(
    source, streamed, tmp_path, monkeypatch
):
    config = PruningConfig(method="wanda")
    arguments = (tmp_path, batches())
    run = pruned_from_disk(config, ModelSource(source), *arguments, progress=False)
    with pytest.raises(KeyboardInterrupt), run as first:
        raise KeyboardInterrupt
    assert (tmp_path / PROGRESS_NAME).is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path)  # it is complete
    left = tmp_path.with_name("left")
    shutil.copytree(tmp_path, left)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "as_stored", None)  # nothing is pruned again
        assert stream(source, *arguments, **WANDA) == first
    assert not (tmp_path / PROGRESS_NAME).exists()
    next(left.glob("model-00003-*.safetensors")).unlink()  # a block that is missing is pruned again
    assert stream(source, left, batches(), **WANDA).layers == first.layers
    assert same(weights(left), weights(streamed("wanda")[1]))


def test_a_block_that_cannot_be_written_is_an_error(source, out, monkeypatch):
    save = OutputFolder.save
    calls = []

    def failing(self, part, *args):
        calls.append(part)
        if len(calls) == 4:
            raise OSError("no space left")
        save(self, part, *args)

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "save", failing)
        with pytest.raises(OSError, match="no space left") as caught:
            stream(source, out, batches(), **WANDA)
    assert any("start again with the same choices" in note for note in caught.value.__notes__)
    assert not (out / "config.json").exists()


def test_other_choices_are_refused(source, copied, tmp_path, out, monkeypatch):
    interrupted(source, out, monkeypatch, method="wanda")
    before = sorted(tmp_path.rglob("*"))

    for changed, message in (
        ({"batches": batches(seed=1)}, "calibration data"),
        ({"method": "magnitude"}, "criterion, pattern"),
        ({"sparsity": 0.6}, "sparsity"),
        ({"dtype": "float32"}, "dtype, config.json"),
        ({"source": copied}, ".*weights in model-0000.*"),  # written later
    ):
        arguments = {
            "source": source,
            "output": out,
            "batches": batches(),
            **WANDA,
            **changed,
        }
        with refuses(f"begun with other choices, data or weights: {message}. Use the same"):
            stream(**arguments)
        assert sorted(tmp_path.rglob("*")) == before
    (out / ".wanda-left").mkdir()  # of a run that was killed while it finished
    whole = out / ".wanda-whole"  # of one that was killed while it replaced the folder
    whole.mkdir()
    (whole / "model.safetensors").touch()
    stream(source, out, batches(), **WANDA)
    assert list(out.glob(".wanda-*")) == [whole]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:90], "Unterminated|Expecting"),
        (
            lambda text: text.replace(": 0.5", ": 5"),
            "must be a number of at least 0 and below 1, but it is 5",
        ),
    ],
)
def test_a_damaged_record_is_refused_and_left(source, out, monkeypatch, damage, message):
    interrupted(source, out, monkeypatch, at="model.layers.2", method="magnitude")
    file = out / PROGRESS_NAME
    file.write_text(damage(file.read_text()))
    before = contents(out)
    with refuses(rf"json is not the record of an interrupted run.*({message}).* begin anew"):
        stream(source, out, batches(), method="magnitude")
    assert contents(out) == before


def test_parts_that_are_missing_are_written_again(source_for, streamed, tmp_path, monkeypatch):
    for name in ("owl", "experts"):
        out = tmp_path / name
        interrupted(source_for(name), out, monkeypatch, **CHOICES[name])
        sorted(out.glob("*.safetensors"))[3].unlink()
        (out / ".wanda-00000000-0.safetensors").write_bytes(b"half")  # of a killed run
        stream(source_for(name), out, batches(), **CHOICES[name])
        assert contents(out) == contents(streamed(name)[1])


def test_two_runs_do_not_mix_their_parts(tmp_path):
    first, second = (
        OutputFolder(tmp_path, {"sparsity": sparsity}, ["a", "b"]) for sparsity in (0.5, 0.75)
    )
    first.save("a", {"x": torch.zeros(1)}, PartRecord())
    with refuses("must be written by one run, but another one has"):
        second.save("b", {"y": torch.zeros(1)}, PartRecord())
    first.forget()  # it has ended
    with refuses("must be written by one run, but another one has"):
        second.save("b", {"y": torch.zeros(1)}, PartRecord())


def test_batches_that_could_not_run_refuse_no_others(source, streamed, out):
    """Also if the sparsities were known, and stored, before the first batch ran."""
    choices = CHOICES["per_layer"]
    with pytest.raises(Exception, match="input_ids must be from 0 to 63"):
        stream(source, out, [{"input_ids": torch.full((1, 8), 99)}], **choices)
    stream(source, out, batches(), **choices)
    assert contents(out) == contents(streamed("per_layer")[1])
