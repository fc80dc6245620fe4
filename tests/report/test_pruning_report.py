"""The report: what a logger gets, and that it can be written and read back."""

import json

from support.reports import llama_report
from support.zoo import ZOO

from wanda_lightning import PruningReport, prune
from wanda_lightning.models import SkipReason


def test_experts_of_a_module_share_one_metric():
    specimen = ZOO["mixtral"]
    report = prune(specimen.build(), specimen.batches(), 0.5, progress=False)
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
    specimen = ZOO["llama"]
    report = prune(specimen.build(), specimen.batches(), 0.5, skip=["model.layers.0"], progress=False)
    again = PruningReport.from_json(report.to_json())
    assert again == report
    assert all(isinstance(matrix.reason, SkipReason) for matrix in again.skipped)
    assert str(again) == str(report)
    fields = json.loads(report.to_json())
    assert fields.pop("run") is None  # a report from before there were runs
    assert PruningReport.from_json(json.dumps(fields)) == report
    report = llama_report(1)
    assert PruningReport.from_json(report.to_json()) == report


def test_reports_without_errors_and_blocks_can_be_read():
    specimen = ZOO["llama"]
    report = prune(specimen.build(), specimen.batches(), 0.5, method="sparsegpt", progress=False)
    assert all(0 < layer.error < 1 for layer in report.layers)
    assert PruningReport.from_json(report.to_json()) == report
    fields = json.loads(report.to_json())
    for layer in fields["layers"]:
        del layer["error"], layer["block"]
        layer["unknown"] = "a field of a later version"
    again = PruningReport.from_json(json.dumps(fields))
    assert [layer.sparsity for layer in again.layers] == [layer.sparsity for layer in report.layers]
    assert {(layer.error, layer.block) for layer in again.layers} == {(None, "")}
