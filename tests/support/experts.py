"""Models whose experts are one parameter, and what is seen of them."""

from unittest import mock

import torch
import transformers as hf
from support.samples import samples_of
from support.tiny import tiny
from support.zoo import ZOO, is_experts
from torch import nn

from wanda_lightning.calibration.lockstep import whole_model_calls
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.core.statistics import SUMS
from wanda_lightning.models import find_layers

SPECIMENS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"]
BY_COLUMNS = ("gpt_oss", "llama4")


def experts_of(model):
    """Modules that hold experts, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def reasons(model, **choices):
    return {matrix.name: matrix.detail for matrix in find_layers(model, **choices).skipped}


def jetmoe():
    with torch.device("meta"):
        return hf.JetMoeForCausalLM(tiny(hf.JetMoeConfig, kv_channels=16))


class Stack(nn.Module):
    """Experts of remote code: what says what they are is up to the test."""

    def __init__(self, first=(4, 48, 32), second=(4, 32, 48), **declared):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(first) / 6)
        self.down_proj = nn.Parameter(torch.randn(second) / 6)
        for name, value in declared.items():
            setattr(self, name, value)


def observed(model, batches):
    unit = find_layers(model, "none").stops[0]
    alone = mock.patch("wanda_lightning.calibration.observer.MIN_EXPERT_TOKENS", 0)
    with calibration_mode(model), torch.no_grad(), alone:
        found = Observer(frozenset(SUMS))(unit, whole_model_calls(samples_of(model, batches)))
    return {name: value for name, value in found.inputs.items() if ".experts." in name}


def double(name, implementation="batched_mm"):
    model = ZOO[name].build().double()
    model.config._experts_implementation = implementation  # grouped_mm takes no float64
    return model


def starved():
    """To one expert of the first block, number 2, no token is routed."""
    model = ZOO["mixtral"].build()
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
    with torch.no_grad():
        gate.weight[2] = -10
    return model


def inside(module, index, x):
    """What enters the second matrix of an expert for a token, by the formula of its family."""
    first = module.gate_up_proj[index].detach()
    if type(module).__name__ == "GptOssExperts":
        both = x @ first + module.gate_up_proj_bias[index].detach()
        gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = (first.T if type(module).__name__ == "Llama4TextExperts" else first).mv(x).chunk(2)
    return module.act_fn(gate) * up


def routed_tokens(module, x, *routing):
    """The inputs of each expert's matrices, computed one token after the other."""
    found, tokens = {}, len(x) // len(module.down_proj)
    if routing:
        entries = [(expert, x[token]) for token in range(len(x)) for expert in routing[0][token].tolist()]
    else:  # Llama-4: a copy of all tokens for each expert, in which the tokens of other experts are zero
        entries = [(row // tokens, x[row]) for row in range(len(x)) if x[row].any()]
    for expert, vector in entries:
        for name, entering in (("gate_up_proj", vector), ("down_proj", inside(module, expert, vector))):
            found.setdefault((name, expert), []).append(entering.detach().double().numpy())
    return found
