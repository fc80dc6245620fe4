"""The length of windows against the context of a model, and where a command saves a model."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wanda_lightning.cli import measure
from wanda_lightning.cli.measure import checked_seqlen, refuse_long_windows
from wanda_lightning.common.model_source import ModelSource


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
    assert "meanwhile, so the model is in" in " ".join(capsys.readouterr().out.split())


def test_a_disk_that_is_too_small_for_the_weights(tmp_path, monkeypatch):
    out, usage = str(tmp_path / "out"), measure.refuse_full.__globals__["shutil"].disk_usage(tmp_path)
    for free, fits in ((1_001_000, True), (1_000_999, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            measure.refuse_no_space(out, Model())
        else:
            with pytest.raises(OSError, match=r"out needs 1\.00 MB, but 1\.00 MB are free on its disk"):
                measure.refuse_no_space(out, Model())


def config(context):
    inner = SimpleNamespace() if context is None else SimpleNamespace(max_position_embeddings=context)
    return SimpleNamespace(get_text_config=lambda: inner)


@pytest.mark.parametrize(
    ("seqlen", "context", "expected"),
    [(None, 64, 64), (None, 4096, 2048), (None, None, 2048), (32, 64, 32), (64, 64, 64)],
)
def test_the_context_is_the_default_and_the_limit(seqlen, context, expected):
    assert checked_seqlen(seqlen, config(context), 2048) == expected


def test_long_windows_are_refused_without_the_weights(inputs, tmp_path):
    shutil.copytree(inputs / "llama", tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    refuse_long_windows(None, ModelSource("gone"))
    refuse_long_windows(64, ModelSource("weightless"))
    with pytest.raises(ValueError, match="--seqlen must be at most 64"):
        refuse_long_windows(65, ModelSource("weightless"))
