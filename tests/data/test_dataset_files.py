"""Unreachable data sets of the hub, and files that would end the process, raise one clear error."""

import datasets
import pytest

from wanda_lightning import TextDataModule


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
