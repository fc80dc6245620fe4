"""Unreachable data sets of the hub raise one clear error."""

import datasets
import pytest

from wanda_lightning import TextDataModule


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("source", ["c4", "wikitext2", "some/texts"])
def test_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch, tokenizer, source, knows):
    """Whether or not huggingface_hub knows that it is offline."""
    changes = {"HF_HUB_OFFLINE": knows, "ENDPOINT": "http://127.0.0.1:9"}
    for name, value in changes.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", knows)
    monkeypatch.setattr("time.sleep", pytest.fail)
    data = TextDataModule(tokenizer, source, cache_dir=str(tmp_path))
    with pytest.raises(OSError, match=r"^The data of .* cannot be loaded: ") as error:
        data.setup("fit")
    assert ("hub cannot be reached" in str(error.value)) == (not knows)
    assert isinstance(error.value.__cause__, ConnectionError)
    is_ours = source in ("c4", "wikitext2")
    assert ("Without a network, use --calibration python-docs (in Python, " in str(error.value)) == is_ours
