"""Adapters of a CausalLMModule, trained in a Trainer."""

from copy import deepcopy

import pytest
import torch
from support.callbacks import WITHOUT_ADVICE, trainer
from support.lora import TARGETS, TOKENS, assert_zeros, llama, zeros_of
from support.quiet import prune
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from wanda_lightning import CausalLMModule, SavePretrained, WandaPrune
from wanda_lightning.lora import KeepZerosLinear

pytestmark = WITHOUT_ADVICE

ADAPTERS = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def fit(module, *callbacks, max_epochs=3):
    fitting = trainer(*callbacks, max_epochs=max_epochs)
    fitting.fit(module, DataLoader(TOKENS.repeat(4, 1), batch_size=2))


def test_prune_then_train_adapters_then_save(tmp_path):
    dense = llama(sparsity=0)
    module = CausalLMModule(deepcopy(dense), lr=1e-2, lora=ADAPTERS)
    pruning = WandaPrune(0.5, num_samples=8, skip=["model.layers.0.mlp", "*.1.mlp.up_proj"])
    fit(module, pruning, SavePretrained(tmp_path / "out"))
    by_hand = deepcopy(dense)
    skip = ["model.layers.0.mlp", "model.layers.1.mlp.up_proj"]
    report = prune(by_hand, [{"input_ids": TOKENS}] * 4, skip=skip)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out")

    assert_zeros(saved, zeros_of(by_hand))
    assert pruning.report.sparsity == report.sparsity
    assert [layer.name.removesuffix(".base_layer") for layer in pruning.report.layers] == [
        layer.name for layer in report.layers
    ]
    for name in zeros_of(by_hand):
        if name.endswith("proj.weight"):
            moved = not torch.equal(saved.get_parameter(name), by_hand.get_parameter(name))
            assert moved == (name.split(".")[-2] in TARGETS)


def test_a_module_gives_plain_adapters_too():
    model = llama()
    zeros = zeros_of(model)
    module = CausalLMModule(model, lr=1e-2, lora={"keep_zeros": False, **ADAPTERS})
    assert not any(isinstance(layer, KeepZerosLinear) for layer in module.modules())
    fit(module)
    module.merge(reprune=True)
    assert_zeros(module.model, zeros)
    module.merge()  # there is nothing to merge any more


def test_the_learning_rate_falls_to_zero():
    module = CausalLMModule(llama(), lr=1e-2, lr_decay=True)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    fit(module, max_epochs=1)
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
