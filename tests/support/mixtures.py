"""Mixtures of experts computed slowly, token by token, from the formulas of each family."""

import copy
from contextlib import contextmanager
from unittest.mock import patch

import torch
from support.experts import BY_COLUMNS, inside
from support.samples import calls_of
from support.zoo import ZOO, seeded

NUMBERS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
    "llama4": "num_local_experts",
}


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
        scores, choice, size = logits.sigmoid(), logits.sigmoid() + own.e_score_correction_bias, len(logits) // 2
        best = max(range(2), key=lambda group: choice[group * size :][:size].sort().values[-2:].sum())
        chosen = choice[best * size :][:size].argsort(descending=True)[:2] + best * size
        own = own if hasattr(own, "routed_scaling_factor") else block  # in older transformers
        return {int(e): own.routed_scaling_factor * scores[e] / scores[chosen].sum() for e in chosen}
    chosen = logits.argsort(descending=True)[:2]
    if name == "llama4":
        return {int(e): logits[e].sigmoid() for e in chosen}
    shares = logits.softmax(0)
    divide = name != "qwen3_moe" or own.norm_topk_prob
    return {int(e): shares[e] / (shares[chosen].sum() if divide else 1) for e in chosen}


def expert(name, block, index, x):
    """What one expert returns for a token."""
    own = block.experts
    second, middle = own.down_proj[index], inside(own, index, x)
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
                for index, gate in gates(name, block, x).items() if real is None or real[position] else ():
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
    linear, rows, biases = torch.nn.functional.linear, {}, []
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

    with patch("torch.nn.functional.linear", lowered):
        yield
    for bias, values in biases:
        bias.copy_(values)
