"""Compute what pruning takes for the shapes of Llama 2 with 7 and 70 billion parameters. Nothing is measured here.

    python benchmarks/larger.py

Memory is the estimate of `wanda-lightning inspect --stream`. Operations count a multiplication and an addition as two;
those of factorizations and triangular solves are from Golub and Van Loan, Matrix Computations, chapters 3 and 4.
"""

import torch
from rich.console import Console
from tables import LABELS, markdown
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from wanda_lightning import ADMM
from wanda_lightning.config import PruningConfig
from wanda_lightning.streaming.memory_estimate import Memory, Samples, memory_to_prune

METHODS = ("wanda", "sparsegpt", "admm")
SAMPLES = Samples(128, 2048, 1)
SHAPES = {
    "7B": LlamaConfig(num_hidden_layers=32),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def inputs_of_block(config: LlamaConfig) -> list[tuple[int, int]]:
    """Return, for each distinct input of the layers of a block, its width and the number of outputs of its readers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    return [(hidden, hidden + 2 * keys), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]


def operations(config: LlamaConfig) -> dict[str, float]:
    """Return the operations of a forward pass, of Gram matrices and of each solver, for all blocks."""
    tokens = SAMPLES.count * SAMPLES.length
    layers = inputs_of_block(config)
    attention = 4 * tokens * SAMPLES.length * config.hidden_size
    solver = ADMM()
    each = {
        "forward pass": attention + sum(2 * tokens * n * rows for n, rows in layers),
        "Gram matrices": sum(2 * tokens * n**2 for n, _ in layers),
        # The inverse from one Cholesky factor, and the factor of the inverse; then the rows, column by column.
        "sparsegpt": sum(n**3 / 3 + 2 * n**3 / 3 + n**3 / 3 + rows * n**2 for n, rows in layers),
        # Each iteration factorizes, and solves with the factor and its transpose; the refit multiplies.
        "admm": sum(
            solver.iterations * (n**3 / 3 + 2 * rows * n**2) + (1 + solver.refit_steps) * 2 * rows * n**2
            for n, rows in layers
        ),
    }
    return {name: count * config.num_hidden_layers for name, count in each.items()}


def memory(model: nn.Module, method: str, park: str) -> Memory:
    """Return the estimate for a model on the meta device, pruned from disk."""
    return memory_to_prune(model, PruningConfig.from_names(0.5, method=method, sequential="layer"), SAMPLES, park)


def larger() -> str:
    """Return the table."""
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for config in SHAPES.values()]
    counted = [operations(config) for config in SHAPES.values()]
    rows = [["a forward pass, 10^15 operations", *(f"{each['forward pass'] / 1e15:.1f}" for each in counted)]]
    for name, label in {"Gram matrices": "Gram matrices", **{m: f"{LABELS[m]}, solving" for m in METHODS[1:]}}.items():
        rows.append([f"{label} / a forward pass", *(f"{each[name] / each['forward pass']:.2f}" for each in counted)])
    for method in METHODS:
        needed = [memory(model, method, "memory") for model in models]
        whole = [
            2 * model.num_parameters() + each.activations + each.work
            for model, each in zip(models, needed, strict=True)
        ]
        parked = [memory(model, method, "disk").total for model in models]
        streamed = [each.total for each in needed]
        for place, sizes in {
            "model in memory": whole,
            "from disk": streamed,
            "from disk, activations on disk": parked,
        }.items():
            rows.append([f"{LABELS[method]}, {place}, GiB", *(f"{size / 2**30:.0f}" for size in sizes)])
    return markdown((f"computed for {SAMPLES.count} x {SAMPLES.length} tokens", *SHAPES), rows)


if __name__ == "__main__":
    Console(width=140, markup=False).print(larger())
