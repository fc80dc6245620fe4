"""Warnings of a command, and where it saves a model."""

import sys
import warnings

import pytest
import torch
from torch import nn

from wanda_lightning.cli import measure


def test_warnings_are_one_line_without_a_path(capsys):
    with warnings.catch_warnings(), measure.readable_messages():
        warnings.simplefilter("always")
        text = warnings.formatwarning("num_samples is 50", UserWarning, "/a/path.py", 3)
        sys.stderr.write(text)
    assert capsys.readouterr().err == "wanda-lightning: warning: num_samples is 50\n"
    assert "/a/path.py" in warnings.formatwarning("x", UserWarning, "/a/path.py", 3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1000, 250)  # 1 MB and a little
        self.again = self.inner

    def save_pretrained(self, folder, overwrite):
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "config.json")


def test_a_second_run_saves_beside_the_first(tmp_path, capsys):
    model = Model()
    measure.save_model(model, None, False)
    for _ in range(2):
        measure.save_model(model, str(tmp_path / "out"), False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]
    assert "meanwhile. The model is in" in " ".join(capsys.readouterr().out.split())


def test_a_disk_that_is_too_small_for_the_weights(tmp_path, monkeypatch):
    usage = measure.refuse_full.__globals__["shutil"].disk_usage(tmp_path)
    for free, fits in ((1_001_000, True), (1_000_999, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            measure.refuse_no_space(str(tmp_path / "out"), Model())
        else:
            with pytest.raises(OSError, match=r"out needs 1\.00 MB, but 1\.00 MB are free on its disk"):
                measure.refuse_no_space(str(tmp_path / "out"), Model())
