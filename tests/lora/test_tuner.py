"""Adding, deleting and combining adapters of a model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import TARGETS, config, llama, logits, randomize, two_adapters
from torch import nn
from torch.nn import functional as F

from wanda_lightning.lora import KeepZerosLinear


def test_deleting_an_adapter_leaves_the_other():
    model = two_adapters()
    first = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 6})])
def test_weighted_adapters_are_the_weighted_sum(kind, options):
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2))
    randomize(model)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type=kind, **options)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    expected = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("sum")
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + expected), rtol=1e-4, atol=1e-5)


def test_all_linear_leaves_out_the_head_as_in_peft():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    layers = [name for name, module in model.named_modules() if isinstance(module, KeepZerosLinear)]
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name for name in layers)


def test_no_zero_warns():
    with pytest.warns(UserWarning, match=r"Prune first, or use peft\.LoraConfig"):
        get_peft_model(llama(sparsity=0), config())


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        get_peft_model(model, config(target_modules=["0", "1"]))


# PEFT itself only warns of two adapters in one model.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_plain_and_keep_zeros_adapters_do_not_mix():
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=TARGETS))
    plain = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="without adapters of another type, but model"):
        get_peft_model(plain.base_model.model, config())
