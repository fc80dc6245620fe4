"""Models whose experts are one parameter, and what they compute, slowly, token by token, from their formulas."""

from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from unittest import mock

import torch
from support.samples import calls_of, samples_of
from support.tiny import on_meta
from support.zoo import is_experts, model_of, seeded
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


jetmoe = partial(on_meta, "JetMoeForCausalLM", kv_channels=16)


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


def double(name):
    model = model_of(name).double()
    model.config._experts_implementation = "batched_mm"  # grouped_mm takes no float64
    return model


def starved():
    """A Mixtral that routes no token to expert number 2 of its first block."""
    model = model_of("mixtral")
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
    gate.weight.data[2] = -10
    return model


def inside(module, index, x):
    """What enters the second matrix of an expert for a token, by the formula of its family."""
    first = module.gate_up_proj[index].detach()
    if type(module).__name__ == "GptOssExperts":
        both = x @ first + module.gate_up_proj_bias[index].detach()
        gate = both[::2].clamp(max=module.limit)
        up = both[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    if type(module).__name__ == "Llama4TextExperts":
        first = first.T
    gate, up = first.mv(x).chunk(2)
    return module.act_fn(gate) * up


def routed_tokens(module, x, *routing):
    """The inputs of each expert's matrices, computed one token after the other."""
    entries = []  # the number of an expert, and a token that is routed to it
    if routing:
        for token, chosen in zip(x, routing[0].tolist(), strict=True):
            entries += [(expert, token) for expert in chosen]
    else:  # Llama-4: a copy of all tokens for each expert, in which the tokens of other experts are zero
        for expert, tokens in enumerate(x.chunk(len(module.down_proj))):
            entries += [(expert, token) for token in tokens if token.any()]

    inputs = {}
    for expert, token in entries:
        middle = inside(module, expert, token)
        for name, entering in (("gate_up_proj", token), ("down_proj", middle)):
            inputs.setdefault((name, expert), []).append(entering.detach().double().numpy())
    return inputs


def build(name, experts=8, **more):
    """A model of the zoo with another number of experts, and with biases where the router has any."""
    model = model_of(name)
    config = deepcopy(model.config)
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
    gate = router(block)
    logits = gate.weight @ x
    if getattr(gate, "bias", None) is not None:
        logits = logits + gate.bias
    if name == "deepseek_v3":
        return deepseek_gates(gate, block, logits)

    chosen = logits.argsort(descending=True)[:2].tolist()
    if name == "llama4":
        return {expert: logits[expert].sigmoid() for expert in chosen}
    shares = logits.softmax(0)
    if name != "qwen3_moe" or gate.norm_topk_prob:
        shares = shares / shares[chosen].sum()
    return {expert: shares[expert] for expert in chosen}


def deepseek_gates(gate, block, logits):
    """The two best experts of the better group, which is the one with the larger sum of its two best."""
    choices = (logits.sigmoid() + gate.e_score_correction_bias).chunk(2)
    sums = [choice.sort().values[-2:].sum() for choice in choices]
    best = sums.index(max(sums))
    chosen = choices[best].argsort(descending=True)[:2] + best * len(choices[0])
    scores = logits.sigmoid()[chosen]
    # In older transformers, the block has the factor.
    factor = getattr(gate, "routed_scaling_factor", None) or block.routed_scaling_factor
    return dict(zip(chosen.tolist(), factor * scores / scores.sum(), strict=True))


def expert(name, block, index, x):
    """What one expert returns for a token."""
    experts = block.experts
    second = experts.down_proj[index]
    middle = inside(experts, index, x)
    if name == "gpt_oss":
        return middle @ second + experts.down_proj_bias[index]
    if name == "llama4":
        return middle @ second
    return second @ middle


@torch.no_grad()
def slow_saliency(name, model, batches):
    """The mean over the tokens of each expert of its gate times the norm of its output; and the number of tokens."""
    norms = {key: {} for key in blocks(model)}  # by block and expert

    for batch in batches:
        for key, (arguments,) in calls_of(model, blocks(model), [batch]).items():
            tokens = arguments[0].flatten(0, -2)
            if isinstance(batch, dict):
                tokens = tokens[batch["attention_mask"].flatten().bool()]
            block = model.get_submodule(key)
            for token in tokens:
                for index, gate in gates(name, block, token).items():
                    if name == "llama4":  # it multiplies what enters the expert
                        norm = expert(name, block, index, gate * token).norm()
                    else:
                        norm = expert(name, block, index, token).norm() * gate
                    norms[key].setdefault(index, []).append(float(norm))
    return {
        key: {index: (sum(values) / len(values), len(values)) for index, values in experts.items()}
        for key, experts in norms.items()
    }


@contextmanager
def cannot_be_chosen(model, dropped):
    """Give the experts in `dropped`, lists by block, logits and biases with which no router chooses them."""
    linear = torch.nn.functional.linear
    rows = {}
    biases = []
    for name, indices in dropped.items():
        gate = router(model.get_submodule(name))
        rows[gate.weight.data_ptr()] = indices
        bias = getattr(gate, "e_score_correction_bias", None)
        if bias is not None:
            biases.append((bias, bias.clone()))
            bias[indices] = -1e9

    def lowered(x, weight, bias=None):
        result = linear(x, weight, bias)
        if weight.data_ptr() in rows:
            result[..., rows[weight.data_ptr()]] = -1e9
        return result

    with mock.patch("torch.nn.functional.linear", lowered):
        yield
    for bias, values in biases:
        bias.copy_(values)
