"""Measure how the cost of pruning grows with calibration tokens, layers and width.

    python benchmarks/scaling.py --save benchmarks/results

The model is a random Llama in float32, pruned in memory to 50 % with `sequential="layer"`. Each line varies one size;
the others keep their defaults: 16 windows of 256 tokens, 2 blocks, width 512; by width, the model has one block.
Seconds are those of the processor, in one thread. Memory is what is needed beyond the model and the windows.
"""

import time
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from measuring import (
    cost_of,
    in_new_process,
    llama,
    random_model,
    random_windows,
    run_from_shell,
)
from result import Result, Runs, Samples
from tables import SCALED

from wanda_lightning import prune

DEFAULTS = {"windows": 16, "blocks": 2, "width": 512}
SIZES = {"windows": (4, 16, 64, 128), "blocks": (1, 4, 16), "width": (256, 512, 1024, 2048, 4096)}
LENGTH = 256
VOCABULARY = 1024
METHODS = SCALED[1:]


def measure(method, sizes):
    """Return the processor's seconds and the peak memory of a process that has done nothing else."""
    torch.set_num_threads(1)
    run(method, *build(4, 1, 128))  # what the first run loads does not count
    cost = cost_of(partial(run, method, *build(**sizes)))
    return {"processor_seconds": cost.result, "peak_mib": cost.peak_mib}


def build(windows, blocks, width):
    """Return a random model and its windows, in batches of four."""
    heads = width // 64
    config = llama(width, 11 * heads * 16, blocks, heads, heads, vocabulary=VOCABULARY)
    return random_model(config), random_windows(VOCABULARY, windows, LENGTH, batch_size=4)


def run(method, model, batches):
    """Prune, or run a plain forward pass, without logits. Return the processor's seconds."""

    def forward(batch):
        model.model(**batch, use_cache=False)

    started = time.process_time()
    if method in METHODS:
        choices = {"method": method, "sequential": "layer"}
        prune(model, batches, 0.5, **choices, forward=forward, progress=False)
    else:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    return time.process_time() - started


def main(*, save: str = ""):
    """Measure each size with each method."""
    runs = Runs(save, "scaling")
    for size, values in SIZES.items():
        for method, value in product(SCALED, values):
            sizes = {**DEFAULTS, size: value}
            if size == "width":
                sizes["blocks"] = 1
            planned = Result(
                model="random Llama",
                method=method,
                case={"by": size, "value": value},
                arguments={name: str(number) for name, number in sizes.items()},
                calibration=Samples("random tokens", sizes["windows"], LENGTH),
            )
            if method in METHODS:
                choices = {"method": method, "sequential": "layer"}
                planned = replace(planned, sparsity=0.5, arguments=choices | planned.arguments)
            runs(planned, partial(in_new_process, measure, method, sizes))


if __name__ == "__main__":
    run_from_shell(main)
