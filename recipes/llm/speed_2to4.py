"""Time the 2:4 weights of a pruned language model on sparse tensor cores against the same weights as dense ones.

    python recipes/llm/speed_2to4.py --model out/model

Cost: a CUDA device of compute capability 8.0 or later, with memory for both kinds of weights. Result: tokens per second
for a prompt and for generated tokens, as the median and the range of five rounds in which both kinds take turns, and
the largest difference of a logit. This script has not run on a GPU yet.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon leave the cores to others

import torch
from torch import nn
from transformers import AutoModelForCausalLM

ROUNDS = 5


def layers_2to4(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers with 2:4 weights in a shape that sparse tensor cores accept."""
    linears = (module for module in model.modules() if type(module) is nn.Linear)
    fitting = (each for each in linears if each.out_features % 32 == 0 and each.in_features % 64 == 0)
    return [each for each in fitting if ((each.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()]


def compressed(weight: torch.Tensor) -> nn.Parameter:
    """Compress a 2:4 weight. The zeros lose their signs first, or -0.0 could be taken for a weight."""
    return nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.masked_fill(weight == 0, 0)), requires_grad=False)


def tokens_per_second(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Generate text, and return the number of tokens, with those of the prompt if only one is new, for each second."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    torch.cuda.synchronize()
    return (prompt.numel() if tokens == 1 else tokens) / (time.perf_counter() - started)


@torch.no_grad()
def main() -> None:
    """Load the model, and time both kinds of weights in turn."""
    parser = argparse.ArgumentParser(description="Time 2:4 weights on sparse tensor cores.")
    parser.add_argument("--model", required=True, help="folder of a language model that is pruned to 2:4")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit("speed_2to4.py needs a CUDA device of compute capability 8.0 or later, but PyTorch finds none.")
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float16).cuda().eval()
    layers = layers_2to4(model)
    if not layers:
        sys.exit(f"--model must have 2:4 weights, but {options.model} has none. Prune it with --pattern 2:4.")
    prompt = torch.randint(model.config.get_text_config().vocab_size, (1, options.seqlen), device="cuda")
    weights = {"dense": [layer.weight for layer in layers], "2:4": [compressed(layer.weight) for layer in layers]}
    logits, speeds = {}, defaultdict(list)
    for _ in range(ROUNDS):
        for kind, chosen in weights.items():
            for layer, weight in zip(layers, chosen, strict=True):
                layer.weight = weight
            logits[kind] = model(prompt).logits.float()  # also warms up
            for what, tokens in (("prompt", 1), ("generated", options.tokens)):
                speeds[f"{what}, {kind}"].append(tokens_per_second(model, prompt, tokens))
    for what, found in sorted(speeds.items()):
        print(f"{what}: {median(found):.1f} tokens/s ({min(found):.1f} to {max(found):.1f})")
    print(f"{len(layers)} layers; largest difference of a logit: {(logits['2:4'] - logits['dense']).abs().max():.2g}")


if __name__ == "__main__":
    main()
