"""Each module has its mode back after calibration, by its own `train` where it overrides that."""

from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from support.layers import assert_same
from support.tiny import on_meta
from support.zoo import model_of
from torch import nn
from transformers import PreTrainedModel

from wanda_lightning.calibration.pruning_mode import calibration_mode
from wanda_lightning.common.evaluation_mode import evaluating


class Merging(nn.Linear):
    """As in loralib: a product is part of the weight in evaluation mode, and apart from it in training."""

    def __init__(self):
        super().__init__(4, 4)
        self.merged = False
        self.calls = []

    def train(self, mode=True):
        self.calls.append(mode)
        super().train(mode)
        if mode == self.merged:
            self.weight.data *= 0.5 if mode else 2
            self.merged = not mode
        return self


class Frozen(nn.Module):
    """A part of it stays in evaluation mode whatever happens."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = Merging()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), Merging(), Frozen(), nn.Sequential(nn.Dropout(), Merging())
    ).train()


@pytest.mark.parametrize("context", [calibration_mode, evaluating])
@pytest.mark.parametrize(
    "set_up",
    [
        lambda model: model,
        nn.Module.eval,
        lambda model: model[3].eval(),
        lambda model: (model[0].eval(), model[2].layer.eval(), model[2].norm.train()),
    ],
)
def test_merged_weights_are_as_before_and_those_that_were_merged_are_not_touched(set_up, context):
    model = build()
    set_up(model)
    merging = [module for module in model.modules() if isinstance(module, Merging)]

    def state():
        return [module.training for module in model.modules()], [
            module.merged for module in merging
        ]

    before = state()
    weights = deepcopy(model.state_dict())
    for module in merging:
        module.calls.clear()
    with context(model):
        assert state() == ([False] * len(before[0]), [True] * 3)
    assert state() == before
    assert_same(model.state_dict(), weights)
    assert not model[3][1].merged or set(model[3][1].calls) <= {False}


# ---- the configurations of transformers


def test_nested_configurations_are_as_before():
    model = on_meta("Qwen3VLMoeForConditionalGeneration")
    model.set_experts_implementation({"": "grouped_mm", "text_config": "batched_mm"})
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [dict(vars(each.config)) for each in models]
    assert before[0] != before[-1]
    with suppress(OSError), calibration_mode(model):
        assert [vars(each.config) for each in models] != before
        raise OSError
    assert [vars(each.config) for each in models] == before


def test_key_value_caches_are_off():
    model = model_of("llama")
    with calibration_mode(model):
        assert model(torch.ones(1, 2, dtype=torch.long)).past_key_values is None
    assert model(torch.ones(1, 2, dtype=torch.long)).past_key_values is not None
