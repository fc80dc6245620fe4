"""Compute what pruning takes for the shapes of Llama 2 with 7 and 70 billion parameters. Nothing is measured here.

    python benchmarks/larger.py

Memory is the estimate of `wanda-lightning inspect --stream`. Operations count a multiplication and an addition as two;
those of factorizations and triangular solves are from Golub and Van Loan, Matrix Computations, chapters 3 and 4.
"""

import torch
from rich.console import Console
from tables import LABELS, markdown
from transformers import LlamaConfig, LlamaForCausalLM

from wanda_lightning import ADMM
from wanda_lightning.config import PruningConfig
from wanda_lightning.streaming.memory_estimate import Samples, memory_to_prune

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


def memory(config: LlamaConfig, method: str, park: str) -> tuple[float, float]:
    """Return GiB with the model in memory, and from disk."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    needed = memory_to_prune(model, PruningConfig.from_names(0.5, method=method, sequential="layer"), SAMPLES, park)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return (weights + needed.activations + needed.work) / 2**30, needed.total / 2**30


def larger() -> str:
    """Return the table."""
    rows: list[list[str]] = []
    counted = {shape: operations(config) for shape, config in SHAPES.items()}
    rows.append(["a forward pass, 10^15 operations", *(f"{c['forward pass'] / 1e15:.1f}" for c in counted.values())])
    for name, label in {"Gram matrices": "Gram matrices", **{m: LABELS[m] + ", solving" for m in METHODS[1:]}}.items():
        shares = (f"{c[name] / c['forward pass']:.2f}" for c in counted.values())
        rows.append([f"{label} / a forward pass", *shares])
    for method in METHODS:
        both = [memory(config, method, "memory") for config in SHAPES.values()]
        rows.append([f"{LABELS[method]}, model in memory, GiB", *(f"{inside:.0f}" for inside, _ in both)])
        rows.append([f"{LABELS[method]}, from disk, GiB", *(f"{streamed:.0f}" for _, streamed in both)])
        parked = [memory(config, method, "disk")[1] for config in SHAPES.values()]
        rows.append([f"{LABELS[method]}, from disk, activations on disk, GiB", *(f"{value:.0f}" for value in parked)])
    return markdown((f"computed for {SAMPLES.count} x {SAMPLES.length} tokens", *SHAPES), rows)


if __name__ == "__main__":
    Console(width=140, markup=False).print(larger())
