"""The options of adapters, layers that cannot take one, and the folder of a saved one."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import forks
from support.lora import (
    TARGETS,
    CodesParameter,
    assert_zeros,
    config,
    llama,
    logits,
    randomize,
    sparse_layer,
    zeros_of,
)
from torch import nn

from wanda_lightning.lora import KeepZerosLoraConfig, merge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported by KeepZerosLoraConfig"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=.* is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=.* is not supported"),
    ],
)
def test_options_that_cannot_keep_zeros_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**options)


def test_a_saved_adapter_can_be_loaded(tmp_path):
    model = randomize(
        get_peft_model(llama(), config(target_modules="all-linear", lora_dropout=0.1))
    )
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"].startswith("WANDA_LIGHTNING_KEEP_ZEROS_LORA ")

    done = forks.run(
        forks.execute,
        f"from peft import PeftModel; PeftModel.from_pretrained(None, {str(tmp_path)!r})",
    )
    *_, error = done.stderr.strip().splitlines()  # of a process that has not imported the package
    assert "run 'import wanda_lightning.lora' before loading this adapter" in error
    base = llama()
    zeros = zeros_of(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.peft_config["default"], KeepZerosLoraConfig)
    assert isinstance(KeepZerosLoraConfig.from_pretrained(tmp_path), KeepZerosLoraConfig)
    assert torch.equal(logits(loaded), expected)
    assert_zeros(merge(loaded), zeros)


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        get_peft_model(model, config(target_modules=["0", "1"]))


@pytest.mark.filterwarnings("ignore")  # PEFT itself only warns of two adapters in one model
def test_plain_and_keep_zeros_adapters_do_not_mix():
    plain = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="without adapters of another type, but model"):
        get_peft_model(plain.base_model.model, config())


BITS = nn.Linear(8, 8)
BITS.weight = CodesParameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
OTHER = r"but 1 is a {}\. Remove it from target_modules"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (BITS, r"1 is a quantized layer .* Load the model without quantization"),
        (nn.Embedding(8, 8), OTHER.format("Embedding")),
        (nn.Conv2d(3, 8, 3), OTHER.format("Conv2d")),
        (nn.MultiheadAttention(8, 2), OTHER.format("MultiheadAttention")),
        (nn.MultiheadAttention(8, 2).out_proj, r"inside nn\.MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name_before_anything_changes(layer, message):
    model = nn.Sequential(sparse_layer("linear"), layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
