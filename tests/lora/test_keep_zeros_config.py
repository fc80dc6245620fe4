"""The options, and the folder of a saved adapter."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from support.lora import assert_zeros, config, llama, logits, randomize, two_adapters, zeros_of

from wanda_lightning.lora import KeepZerosLoraConfig, merge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported by KeepZerosLoraConfig"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of True, .*, but it is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be one of True, .*, but it is 'olora'"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is not supported"),
    ],
)
def test_options_that_cannot_keep_zeros_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**options)


def test_a_saved_adapter_can_be_loaded(tmp_path):
    model = randomize(get_peft_model(llama(), config(target_modules="all-linear", lora_dropout=0.1)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"].startswith("WANDA_LIGHTNING_KEEP_ZEROS_LORA ")

    base = llama()
    zeros = zeros_of(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.peft_config["default"], KeepZerosLoraConfig)
    assert isinstance(KeepZerosLoraConfig.from_pretrained(tmp_path), KeepZerosLoraConfig)
    assert torch.equal(logits(loaded), expected)
    assert_zeros(merge(loaded), zeros)

    further = get_peft_model(llama(), config(target_modules=["q_proj"]))
    further.load_adapter(tmp_path, "other", is_trainable=True)
    further.set_adapter("other")
    assert torch.equal(logits(further), expected)
    assert any(p.requires_grad for n, p in further.named_parameters() if ".other." in n)


def test_every_saved_folder_says_once_how_to_load_it(tmp_path):
    model = two_adapters()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        readme = (folder / "README.md").read_text()
        assert readme.count("import wanda_lightning.lora") == 1
        assert "import wanda_lightning.lora" in json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.library_name == "peft"  # PEFT's own card is still there
    assert "### Framework versions" in card
