"""Unreachable data sets of the hub, and files that would end the process, raise one clear error."""

import datasets
import pytest
from support.refusals import refuses

from wanda_lightning import TextDataModule
from wanda_lightning.data.dataset_files import load


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("source", ["c4", "wikitext2", "some/texts"])
def test_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch, tokenizer, source, knows):
    """Whether or not huggingface_hub knows that it is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", knows)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", knows)
    monkeypatch.setattr("time.sleep", pytest.fail)
    data = TextDataModule(tokenizer, source, cache_dir=str(tmp_path))
    with pytest.raises(OSError, match=r"^The data of .* cannot be loaded: ") as error:
        data.setup("fit")
    message = str(error.value)
    assert ("hub cannot be reached" in message) == (not knows)
    assert isinstance(error.value.__cause__, ConnectionError)
    assert "no file or folder" not in message
    assert ("Without a network, use --calibration python-docs (in Python, " in message) == (
        source in ("c4", "wikitext2")
    )


def test_files_in_a_folder_may_not_be_nested_too_deeply(tmp_path):
    """pyarrow would end the process."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text('{"text": ' + "[" * 20_000 + "]" * 20_000 + "}")
    with refuses(
        r"The data of .*train.a\.json' cannot be loaded: line 1 is nested more than",
    ):
        load(str(tmp_path))
