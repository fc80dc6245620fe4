"""Time the 2:4 weights of a pruned language model on sparse tensor cores against the same weights as dense ones.

    python recipes/llm/speed_2to4.py --model out/model

Cost: an NVIDIA GPU of compute capability 8.0 (Ampere) or later, with memory for both kinds of weights, and a PyTorch
with cuSPARSELt, as the CUDA wheels for Linux are. Result: tokens per second for a prompt and for generated tokens, as
the median and the range of five rounds in which both kinds take turns, and the largest difference of a logit. The parts
that run on a CPU are tested; the whole has not run on a GPU yet.
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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ROUNDS = 5

# PyTorch requires both sides of a float16 or bfloat16 weight to be multiples of this number.
MULTIPLE_OF = 16


def why_not() -> str:
    """Return why this machine cannot multiply by compressed weights; empty if it can."""
    needed = "needs an NVIDIA GPU of compute capability 8.0 or later and a PyTorch with cuSPARSELt"
    if not torch.cuda.is_available():
        return f"{needed}, but PyTorch {torch.__version__} finds no GPU. Run it on a machine with such a GPU."
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{needed}, but this GPU has {major}.{minor}. Run it on a machine with such a GPU."
    if not torch.backends.cusparselt.is_available():
        return f"{needed}, but PyTorch {torch.__version__} lacks cuSPARSELt. Install PyTorch's CUDA wheel for Linux."
    return ""


def layers_2to4(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers whose weights are 2:4, in a shape that PyTorch compresses."""
    return [
        module for module in model.modules() if type(module) is nn.Linear and is_2to4(module.weight)
    ]


def is_2to4(weight: Tensor) -> bool:
    """Whether at most two of every four weights in a row are not zero, and the shape fits."""
    if any(size % MULTIPLE_OF for size in weight.shape):
        return False
    nonzero = (weight.reshape(-1, 4) != 0).sum(dim=1)
    return bool((nonzero <= 2).all())


def compressed(weight: Tensor) -> nn.Parameter:
    """Compress a 2:4 weight, which must be on the GPU, in float16 or bfloat16."""
    # A kernel may look at bits, where -0.0 is not zero, so the zeros lose their signs.
    unsigned = weight.detach().masked_fill(weight == 0, 0).contiguous()
    return nn.Parameter(torch.sparse.to_sparse_semi_structured(unsigned), requires_grad=False)


def tokens_per_second(model: Any, prompt: Tensor, tokens: int) -> float:
    """Generate text, and return the number of tokens, with those of the prompt if only one is new, for each second."""
    torch.cuda.synchronize()  # the CPU only queues what a GPU computes
    started = time.perf_counter()
    model.generate(
        prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started

    counted = prompt.numel() if tokens == 1 else tokens
    return counted / seconds


@torch.no_grad()
def main() -> None:
    """Load the model, and time both kinds of weights in turn."""
    parser = argparse.ArgumentParser(description="Time 2:4 weights on sparse tensor cores.")
    parser.add_argument(
        "--model", required=True, help="folder of a language model that is pruned to 2:4"
    )
    parser.add_argument("--seqlen", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        sys.exit(f"speed_2to4.py {reason}")

    model: Any = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float16).cuda().eval()
    )
    layers = layers_2to4(model)
    if not layers:
        sys.exit(
            f"--model must have 2:4 weights, but {options.model} has none. Prune it with --pattern 2:4."
        )
    weights = {
        "dense": [layer.weight for layer in layers],
        "2:4": [compressed(layer.weight) for layer in layers],
    }

    prompt = torch.randint(
        model.config.get_text_config().vocab_size, (1, options.seqlen), device="cuda"
    )
    logits = {}
    speeds = defaultdict(list)
    for _ in range(ROUNDS):
        for kind, weights_of_kind in weights.items():
            for layer, weight in zip(layers, weights_of_kind, strict=True):
                layer.weight = weight
            logits[kind] = model(prompt).logits.float()  # also warms up
            speeds[f"prompt, {kind}"].append(tokens_per_second(model, prompt, 1))
            speeds[f"generated, {kind}"].append(tokens_per_second(model, prompt, options.tokens))

    for task, rounds in sorted(speeds.items()):
        print(f"{task}: {median(rounds):.1f} tokens/s ({min(rounds):.1f} to {max(rounds):.1f})")
    difference = (logits["2:4"] - logits["dense"]).abs().max()
    print(f"{len(layers)} layers; largest difference of a logit: {difference:.2g}")


if __name__ == "__main__":
    main()
