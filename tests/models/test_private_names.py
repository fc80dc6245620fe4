"""The private names and conventions of other libraries on which `models/`, `units/` and `checkpoint.py` rely.

Each is used in one place. The id of a test that fails says what a new version has changed.
"""

import inspect

import pytest
import timm
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models._utils import IntermediateLayerGetter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def old_weight_norm():
    (hook,) = torch.nn.utils.weight_norm(nn.Linear(1, 1))._forward_pre_hooks.values()
    return type(hook).__module__


LOADING = inspect.signature(hf.PreTrainedModel._load_pretrained_model).parameters
FACTS = {
    "torch.compile holds the module as _orig_mod": (
        lambda: "_orig_mod" in torch.compile(nn.Linear(1, 1), backend="eager")._modules
    ),
    "convolutions of torch hold the padding of both sides in _reversed_padding_repeated_twice": (
        lambda: (
            [*nn.Conv2d(1, 1, 1, padding=(0, 2))._reversed_padding_repeated_twice] == [2, 2, 0, 0]
        )
    ),
    "hooks of torch.nn.utils that recompute a weight are forward pre-hooks": (
        lambda: old_weight_norm().startswith("torch.nn.utils.")
    ),
    "parametrizations of torch are in a ParametrizationList": (
        lambda: "parametrizations" in parametrizations.weight_norm(nn.Linear(1, 1))._modules
    ),
    "torchvision's IntermediateLayerGetter is a ModuleDict": (
        lambda: issubclass(IntermediateLayerGetter, nn.ModuleDict)
    ),
    "the blocks of transformers are GradientCheckpointingLayer": (
        lambda: issubclass(LlamaDecoderLayer, GradientCheckpointingLayer)
    ),
    "the auto classes of transformers have a _model_mapping": (
        lambda: (
            modeling_auto.AutoModelForCausalLM._model_mapping[hf.LlamaConfig] is hf.LlamaForCausalLM
        )
    ),
    "from_pretrained loads weights by _load_pretrained_model(model, state_dict, files, config)": (
        lambda: list(LOADING)[:3] == ["model", "state_dict", "checkpoint_files"]
    ),
    "timm's registry holds names that list_models leaves out in _deprecated_models": (
        lambda: isinstance(timm.models._registry._deprecated_models, dict)
    ),
    "models of timm hold their arguments in _model_args": (
        lambda: timm.create_model("test_vit", num_classes=3)._model_args == {"num_classes": 3}
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("fact", FACTS)
def test_private_names_are_what_they_were(fact):
    assert FACTS[fact](), f"No longer true: {fact}."
