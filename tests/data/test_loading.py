"""Unreachable data sets of the hub raise one clear error."""

import datasets
import pytest
from support.data import vit

from wanda_lightning import ImageDataModule, TextDataModule


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("source", ["c4", "wikitext2", "cifar10", "some/images"])
def test_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch, tokenizer, source, knows):
    """Whether or not huggingface_hub knows that it is offline."""
    changes = {"HF_HUB_OFFLINE": knows, "ENDPOINT": "http://127.0.0.1:9"}
    for name, value in changes.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", knows)
    monkeypatch.setattr("time.sleep", pytest.fail)
    is_text = source in ("c4", "wikitext2")
    options = {"cache_dir": str(tmp_path)}
    data = TextDataModule(tokenizer, source, **options) if is_text else ImageDataModule(source, vit(), **options)
    with pytest.raises(OSError, match=r"^The data of .* cannot be loaded: ") as error:
        data.setup("fit")
    assert ("hub cannot be reached" in str(error.value)) == (not knows)
    assert isinstance(error.value.__cause__, ConnectionError)
