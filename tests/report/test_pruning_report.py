"""The report: what a logger gets, and that it can be written and read back."""

import json
import math

import pytest
from support.reports import llama_report
from support.zoo import ZOO

from wanda_lightning import PruningReport, prune
from wanda_lightning.models import SkippedMatrix, SkipReason
from wanda_lightning.report import Circumstances, Permuted, PrunedLayer, TrainedPart


def test_experts_of_a_module_share_one_metric():
    report = prune(ZOO["mixtral"].build(), ZOO["mixtral"].batches(), 0.5, progress=False)
    experts = [layer for layer in report.layers if layer.siblings]
    metrics = report.metrics()
    of_experts = {name: value for name, value in metrics.items() if ".experts." in name}
    assert of_experts.keys() == {f"sparsity/{layer.siblings}" for layer in experts}
    assert len(of_experts) < len(experts)
    for name, value in of_experts.items():
        same = [layer for layer in experts if f"sparsity/{layer.siblings}" == name]
        assert value == sum(layer.zeros for layer in same) / sum(layer.size for layer in same)
    assert len(metrics) == 2 + len(of_experts) + sum(not layer.siblings for layer in report.layers)


def test_a_report_survives_json_also_that_of_an_older_version():
    report = prune(
        ZOO["llama"].build(), ZOO["llama"].batches(), skip=["model.layers.0"], progress=False
    )
    for each in (report, llama_report(1)):
        assert PruningReport.from_json(each.to_json()) == each
    assert all(kind.__dataclass_params__.frozen for kind in (PruningReport, PrunedLayer, Permuted))
    fields = json.loads(report.to_json())
    assert (fields.pop("version"), fields.pop("run")) == (1, None)
    for layer in fields["layers"]:
        del layer["block"]
        layer["unknown"] = "a field of a later version"
    again = PruningReport.from_json(json.dumps(fields))
    assert all(isinstance(matrix.reason, SkipReason) for matrix in again.skipped)
    assert (str(again), {layer.block for layer in again.layers}) == (str(report), {""})


def small(**fields):
    layer = PrunedLayer("a", (2, 4), 0.5, 0.5, 8, part=TrainedPart("mlp", 0.5, 0.25))
    skipped = SkippedMatrix("b", (3,), SkipReason.ADAPTER, "an adapter")
    return PruningReport(
        **{"layers": [layer], "skipped": [skipped], "parameters": 11, "zeros": 4} | fields,
        config={},
    )


def test_numbers_that_are_not_finite_become_null():
    layer = PrunedLayer(
        "a", (2, 4), 0.5, 0.5, 8, error=math.inf, part=TrainedPart("mlp", math.nan, 0.25)
    )
    report = small(
        layers=(layer,),
        seconds={"prune": math.inf},
        run=Circumstances(before=12.5, after=-math.inf),
    )
    text = report.to_json()
    json.loads(text, parse_constant=pytest.fail)
    again = PruningReport.from_json(text)
    assert (again.layers[0].error, again.run.before, again.run.after) == (None, 12.5, None)
    assert math.isnan(again.layers[0].part.before)
    of_0_2_0 = json.dumps({**json.loads(text), "run": {"before": 12.5, "after": math.inf}})
    assert PruningReport.from_json(of_0_2_0).run.after == math.inf
    assert math.isnan(again.seconds["prune"])


def test_what_is_not_a_report_is_refused_by_the_name_of_the_file(tmp_path):
    report = json.loads(small(seconds={"prune": 1.5}).to_json())
    for change, message in (
        ({"version": 2}, "at most 1"),
        ({"layers": [7]}, ""),
        ({"zeros": ...}, "'zeros'"),
    ):
        changed = {name: value for name, value in (report | change).items() if value is not ...}
        (tmp_path / "pruning_report.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"pruning_report\.json is not a report: .*{message}"):
            PruningReport.load(tmp_path)
