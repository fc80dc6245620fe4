"""The options, and the folder of a saved adapter."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.lora import assert_zeros, config, llama, logits, randomize, zeros_of

from wanda_lightning.lora import KeepZerosLoraConfig, merge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported by KeepZerosLoraConfig"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=.* is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=.* is not supported"),
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
