"""The options of adapters, layers that cannot take one, and the folder of a saved one."""

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
from support.refusals import refuses
from support.reports import read_json
from torch import nn

from wanda_lightning.lora import KeepZerosLoraConfig, merge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported by KeepZerosLoraConfig"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=.* is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
    ],
)
def test_options_that_cannot_keep_zeros_are_refused_by_name(options, message):
    with refuses(f"^{message}"):
        config(**options)


@pytest.fixture
def adapted():
    options = config(target_modules="all-linear", lora_dropout=0.1)
    return randomize(get_peft_model(llama(), options))


def test_a_saved_adapter_can_be_loaded(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert isinstance(loaded.peft_config["default"], KeepZerosLoraConfig)
    assert torch.equal(logits(loaded), logits(adapted))
    assert_zeros(merge(loaded), zeros_of(llama()))
    assert isinstance(KeepZerosLoraConfig.from_pretrained(tmp_path), KeepZerosLoraConfig)
    saved = read_json(tmp_path / "adapter_config.json")
    # As version 0.3 wrote it.
    assert saved["peft_type"] == (
        "WANDA_LIGHTNING_KEEP_ZEROS_LORA "
        "(run 'import wanda_lightning.lora' before loading this adapter)"
    )


@forks.IN_ONE_WORKER
def test_a_process_without_this_package_says_what_to_import(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    code = f"from peft import PeftModel; PeftModel.from_pretrained(None, {str(tmp_path)!r})"
    *_, error = forks.run(forks.execute, code).stderr.strip().splitlines()
    assert "run 'import wanda_lightning.lora' before loading this adapter" in error


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with refuses("0 and 1 share one weight"):
        get_peft_model(model, config(target_modules=["0", "1"]))


@pytest.mark.filterwarnings("ignore")  # PEFT itself only warns of two adapters in one model
def test_plain_and_keep_zeros_adapters_do_not_mix():
    plain = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with refuses("without adapters of another type, but model"):
        get_peft_model(plain.base_model.model, config())


BOTH = ["0", "1"]
BITS = nn.Linear(8, 8)
BITS.weight = CodesParameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
OTHER = r"but 1 is a {}\. Remove it from target_modules"


@pytest.mark.parametrize(
    ("layer", "targets", "message"),
    [
        (BITS, BOTH, r"1 is a quantized layer .* Load the model without quantization"),
        # PEFT finds them by a private function, after the model is prepared.
        (BITS, "all-linear", "1 is a quantized layer"),
        (nn.Embedding(8, 8), BOTH, OTHER.format("Embedding")),
        (nn.Conv2d(3, 8, 3), BOTH, OTHER.format("Conv2d")),
        (nn.MultiheadAttention(8, 2), BOTH, OTHER.format("MultiheadAttention")),
        (nn.MultiheadAttention(8, 2).out_proj, BOTH, r"inside nn\.MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name_before_anything_changes(layer, targets, message):
    model = nn.Sequential(sparse_layer("linear"), layer)
    with refuses(message):
        get_peft_model(model, config(target_modules=targets))
    assert type(model[0]) is nn.Linear
