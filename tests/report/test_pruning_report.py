"""The report: what a logger gets, and that it can be written and read back."""

import json
import math
from dataclasses import replace

import pytest
from support.quiet import prune
from support.refusals import refuses
from support.reports import llama_report
from support.zoo import batches_of, model_of

from wanda_lightning import PruningReport
from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.report import Circumstances, PrunedLayer, TrainedPart


def test_experts_of_a_module_share_one_metric():
    report = prune(model_of("mixtral"), batches_of("mixtral"), 0.5)
    experts = [layer for layer in report.layers if layer.siblings]
    metrics = report.metrics()
    of_experts = {name: value for name, value in metrics.items() if ".experts." in name}
    assert of_experts.keys() == {f"sparsity/{layer.siblings}" for layer in experts}
    assert len(of_experts) < len(experts)
    for name, value in of_experts.items():
        same = [layer for layer in experts if f"sparsity/{layer.siblings}" == name]
        assert value == sum(layer.zeros for layer in same) / sum(layer.size for layer in same)
    assert len(metrics) == 2 + len(of_experts) + sum(not layer.siblings for layer in report.layers)


def test_a_report_survives_json():
    report = llama_report(1)
    assert PruningReport.from_json(report.to_json()) == report
    assert all(kind.__dataclass_params__.frozen for kind in (PruningReport, PrunedLayer))


def test_a_report_of_another_version_is_read():
    report = prune(model_of("llama"), batches_of("llama"), skip=["model.layers.0"])
    content = json.loads(report.to_json())
    assert content.pop("version") == 1
    assert content.pop("run") is None
    for layer in content["layers"]:
        del layer["block"]
        layer["unknown"] = "a field of a later version"
    again = PruningReport.from_json(json.dumps(content))
    assert str(again) == str(report)
    assert {layer.block for layer in again.layers} == {""}
    assert all(isinstance(matrix.reason, SkipReason) for matrix in again.skipped)


def test_a_report_is_printed_as_a_summary_and_its_rows_as_a_table():
    report = llama_report(30)
    lines = str(report).splitlines()
    assert len(lines) == 7  # with two texts and a note
    assert repr(report) == str(report)
    assert all(layer.name in report.table() for layer in report.layers)
    assert not any(layer.name in str(report) for layer in report.layers)


def small(**fields):
    layer = PrunedLayer("a", (2, 4), 0.5, 0.5, 8, part=TrainedPart("mlp", 0.5, 0.25))
    skipped = SkippedMatrix("b", (3,), SkipReason.ADAPTER, "an adapter")
    return replace(
        PruningReport((layer,), (skipped,), parameters=11, zeros=4, seconds={}, config={}), **fields
    )


def test_numbers_that_are_not_finite_become_null():
    part = TrainedPart("mlp", math.nan, 0.25)
    layer = PrunedLayer("a", (2, 4), 0.5, 0.5, 8, error=math.inf, part=part)
    run = Circumstances(before=12.5, after=-math.inf)
    text = small(layers=(layer,), seconds={"prune": math.inf}, run=run).to_json()
    json.loads(text, parse_constant=pytest.fail)

    again = PruningReport.from_json(text)
    assert (again.layers[0].error, again.run.before, again.run.after) == (None, 12.5, None)
    assert math.isnan(again.layers[0].part.before)
    assert math.isnan(again.seconds["prune"])


def test_infinity_in_a_report_of_0_2_0_is_read():
    content = json.loads(small().to_json())
    content["run"] = {"before": 12.5, "after": math.inf}
    assert PruningReport.from_json(json.dumps(content)).run.after == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "at most 1"),
        ({"layers": [7]}, ""),
        ({"zeros": ...}, "'zeros'"),
        ({"notes": 7, "shrunk": ...}, ""),
    ],
)
def test_what_is_not_a_report_is_refused_by_the_name_of_the_file(tmp_path, change, message):
    content = json.loads(small().to_json()) | change
    content = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "pruning_report.json").write_text(json.dumps(content))
    with refuses(rf"pruning_report\.json is not a report: .*{message}"):
        PruningReport.load(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(PruningReport, "_page", lambda report: "a page")
    monkeypatch.setattr(PruningReport, "_picture", lambda report: b"a picture")


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("out/a.json", "out/a.json"),
        ("out/A.HTML", "out/A.HTML"),
        ("a.png", "a.png"),
        ("llama-3.1", "llama-3.1/pruning_report.json"),
        ("folder.html", "folder.html/pruning_report.json"),
    ],
)
def test_the_suffix_decides_what_is_saved(tmp_path, undrawn, path, file):
    (tmp_path / "folder.html").mkdir()
    report = small()
    contents = {".json": report.to_json(), ".html": "a page", ".png": "a picture"}
    written = report.save(tmp_path / path)
    assert written == tmp_path / file
    assert written.read_text() == contents[written.suffix.lower()]
