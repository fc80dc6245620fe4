"""What a pruning callback shows, logs and saves."""

import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import (
    LAYERS,
    Net,
    loader,
    rows_of,
    same,
    trainer,
)

from wanda_lightning import (
    NM,
    LinearSchedule,
    WandaPrune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_metrics_reach_the_logger(tmp_path, loop):
    module, callback = Net(), WandaPrune(num_samples=12, skip=["layers.2"])
    run = trainer(callback, logger=CSVLogger(tmp_path), max_steps=3, log_every_n_steps=1)
    getattr(run, loop)(module, loader())
    (row,) = [row for row in rows_of(tmp_path) if row.get("sparsity/model")]
    assert row["step"] == "0"
    assert {name for name in row if name.startswith("sparsity/") and row[name]} == {
        "sparsity/model",
        "sparsity/pruned_layers",
        "sparsity/layers.0",
        "sparsity/layers.4",
    }
    assert float(row["sparsity/layers.0"]) == 0.5
    size = sum(p.numel() for p in module.parameters())
    assert float(row["sparsity/model"]) == pytest.approx((64 * 32 / 2 + 16 * 64 / 2) / size)


def test_the_report_is_written(tmp_path):
    callback = WandaPrune(num_samples=12, pattern=NM(2, 4), report_dir=tmp_path / "reports")
    trainer(callback).validate(Net(), loader())
    report = json.loads((tmp_path / "reports" / "pruning_report.json").read_text())
    assert report["sparsity"] == 0.5
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert report["config"]["pattern"] == {"name": "NM", "n": 2, "m": 4}


@pytest.mark.parametrize("loop", ["validate", "fit"])
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_file_where_the_report_folder_should_be_is_refused_at_the_start(tmp_path, loop, at_step):
    (tmp_path / "file").write_text("mine")
    module = Net()
    callback = WandaPrune(num_samples=12, report_dir=tmp_path / "file", at_step=at_step)
    with pytest.raises(FileExistsError, match="file"):
        getattr(trainer(callback, max_steps=3), loop)(module, loader())
    assert same(module, Net())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_progress_is_shown_with_the_trainers_bar(capfd, loop):
    options = {"max_steps": 1} if loop == "fit" else {}
    getattr(trainer(WandaPrune(num_samples=12), **options), loop)(Net(), loader())
    assert "Pruning" not in "".join(capfd.readouterr())
    getattr(trainer(WandaPrune(num_samples=12), enable_progress_bar=True, **options), loop)(Net(), loader())
    assert "Pruning 3/3 done" in capfd.readouterr().err


def test_nothing_is_printed_without_a_progress_bar(capsys):
    trainer(WandaPrune(num_samples=12)).validate(Net(), loader(), verbose=False)
    assert "WandaPrune" not in "".join(capsys.readouterr())


def test_each_stage_reaches_the_logger(tmp_path):
    callback = WandaPrune(0.5, num_samples=12, schedule=LinearSchedule(0, 4, every=2))
    trainer(callback, logger=CSVLogger(tmp_path), max_steps=6, log_every_n_steps=1).fit(Net(), loader())
    rows = [row for row in rows_of(tmp_path) if row.get("sparsity/pruned_layers")]
    assert [(int(row["step"]), float(row["sparsity/pruned_layers"])) for row in rows] == [(2, 0.25), (4, 0.5)]


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not know this Python")
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_layers_of_a_compiled_part_keep_their_names(tmp_path, sequential):
    def run(folder, compiles):
        module = Net()
        if compiles:
            module.layers = torch.compile(module.layers, backend="eager")
        callback = WandaPrune(num_samples=12, skip=["layers.2"], sequential=sequential, at_step=1)
        trainer(callback, logger=CSVLogger(folder), max_steps=4, log_every_n_steps=1).fit(module, loader())
        names = [layer.name for layer in callback.report.layers]
        (logged,) = [row for row in rows_of(folder) if row.get("sparsity/model")]
        return names, list(logged), callback.state_dict()["zeros"], [*module.parameters()]

    *told, weights = run(tmp_path / "compiled", True)
    *expected, without = run(tmp_path / "plain", False)
    assert told == expected
    assert told[0] == ["layers.0", "layers.4"]
    assert all(map(torch.equal, weights, without))
