"""Models whose experts are one parameter, and what they compute, slowly, token by token, from their formulas."""

import copy
from contextlib import contextmanager
from unittest import mock

import torch
import transformers as hf
from support.samples import calls_of, samples_of
from support.tiny import tiny
from support.zoo import ZOO, is_experts, seeded
from torch import nn

from wanda_lightning.calibration.lockstep import whole_model_calls
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.pruning_mode import calibration_mode
from wanda_lightning.core.statistics import SUMS
from wanda_lightning.models import find_layers

NUMBERS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
    "llama4": "num_local_experts",
}
SPECIMENS = [*NUMBERS]
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
        self.up_proj, self.down_proj = (
            nn.Parameter(torch.randn(shape) / 6) for shape in (first, second)
        )
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
        gate = both[::2].clamp(max=module.limit)
        up = both[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = (first.T if type(module).__name__ == "Llama4TextExperts" else first).mv(x).chunk(2)
    return module.act_fn(gate) * up


def routed_tokens(module, x, *routing):
    """The inputs of each expert's matrices, computed one token after the other."""
    found = {}
    tokens = len(x) // len(module.down_proj)
    if routing:
        entries = [
            (expert, x[token]) for token in range(len(x)) for expert in routing[0][token].tolist()
        ]
    else:  # Llama-4: a copy of all tokens for each expert, in which the tokens of other experts are zero
        entries = [(row // tokens, x[row]) for row in range(len(x)) if x[row].any()]
    for expert, vector in entries:
        for name, entering in (
            ("gate_up_proj", vector),
            ("down_proj", inside(module, expert, vector)),
        ):
            found.setdefault((name, expert), []).append(entering.detach().double().numpy())
    return found


def build(name, experts=8, **more):
    """A model of the zoo with another number of experts, and with biases where the router has any."""
    model = ZOO[name].build()
    config = copy.deepcopy(model.config)
    for key, value in {NUMBERS[name]: experts, **more}.items():
        setattr(config, key, value)
    built = seeded(lambda: type(model)(config))
    for key, buffer in built.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    return built


def blocks(model):
    """The modules with experts, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "experts")}


def router(block):
    return block.gate if hasattr(block, "gate") else block.router


def gates(name, block, x):
    """The gate of each expert to which a token is routed."""
    own = router(block)
    logits = own.weight @ x + (own.bias if getattr(own, "bias", None) is not None else 0)
    if name == "deepseek_v3":
        scores = logits.sigmoid()
        choice = logits.sigmoid() + own.e_score_correction_bias
        size = len(logits) // 2
        best = max(
            range(2), key=lambda group: choice[group * size :][:size].sort().values[-2:].sum()
        )
        chosen = choice[best * size :][:size].argsort(descending=True)[:2] + best * size
        own = own if hasattr(own, "routed_scaling_factor") else block  # in older transformers
        return {
            int(e): own.routed_scaling_factor * scores[e] / scores[chosen].sum() for e in chosen
        }
    chosen = logits.argsort(descending=True)[:2]
    if name == "llama4":
        return {int(e): logits[e].sigmoid() for e in chosen}
    shares = logits.softmax(0)
    divide = name != "qwen3_moe" or own.norm_topk_prob
    return {int(e): shares[e] / (shares[chosen].sum() if divide else 1) for e in chosen}


def expert(name, block, index, x):
    """What one expert returns for a token."""
    own = block.experts
    second = own.down_proj[index]
    middle = inside(own, index, x)
    if name in BY_COLUMNS:
        return middle @ second + (own.down_proj_bias[index] if name == "gpt_oss" else 0)
    return second @ middle


@torch.no_grad()
def slow_saliency(name, model, batches):
    """The mean over the tokens of each expert of its gate times the norm of its output; and the number of tokens."""
    found = {}
    for batch in batches:
        inputs = {key: args[0] for key, (args,) in calls_of(model, blocks(model), [batch]).items()}
        for key, block in blocks(model).items():
            real = batch["attention_mask"].flatten().bool() if isinstance(batch, dict) else None
            for position, x in enumerate(inputs[key].flatten(0, -2)):
                for index, gate in (
                    gates(name, block, x).items() if real is None or real[position] else ()
                ):
                    adds = expert(name, block, index, gate * x if name == "llama4" else x)
                    norm = float(adds.norm() * (1 if name == "llama4" else gate))
                    found.setdefault(key, {}).setdefault(index, []).append(norm)
    return {
        key: {index: (sum(norms) / len(norms), len(norms)) for index, norms in of_block.items()}
        for key, of_block in found.items()
    }


@contextmanager
def cannot_be_chosen(model, dropped):
    """Give the experts in `dropped`, lists by block, logits and biases with which no router chooses them."""
    linear = torch.nn.functional.linear
    rows = {}
    biases = []
    for name, indices in dropped.items():
        own = router(model.get_submodule(name))
        rows[own.weight.data_ptr()] = indices
        if hasattr(own, "e_score_correction_bias"):
            biases.append((own.e_score_correction_bias, own.e_score_correction_bias.clone()))
            own.e_score_correction_bias[indices] = -1e9

    def lowered(x, weight, bias=None):
        result = linear(x, weight, bias)
        if weight.data_ptr() in rows:
            result[..., rows[weight.data_ptr()]] = -1e9
        return result

    with mock.patch("torch.nn.functional.linear", lowered):
        yield
    for bias, values in biases:
        bias.copy_(values)
