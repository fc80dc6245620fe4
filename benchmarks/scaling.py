"""Measure how the cost of pruning grows with calibration tokens, layers and width.

    python benchmarks/scaling.py --save benchmarks/results

The model is a random Llama in float32, pruned in memory to 50 % with `sequential="layer"`. Each line varies one size;
the others keep their defaults: 16 windows of 256 tokens, 2 blocks, width 512; by width, the model has one block.
Seconds are those of the processor, in one thread. Memory is what is needed beyond the model and the windows. The
exponent is the slope of a line through the three largest sizes, both axes logarithmic: 1 is linear.
"""

import argparse
import time
from typing import Any

import torch
from measuring import MIB, PeakMemory, random_llama
from result import Result, Runs, Samples
from rich.console import Console
from rich.table import Table
from tables import SCALED, exponent

from wanda_lightning import prune

DEFAULTS = {"windows": 16, "blocks": 2, "width": 512}
SIZES = {"windows": (4, 16, 64, 128), "blocks": (1, 4, 16), "width": (256, 512, 1024, 2048, 4096)}
LENGTH, VOCABULARY = 256, 1024
METHODS = SCALED[1:]


def measure(method: str, windows: int, blocks: int, width: int) -> dict[str, float]:
    """Return the processor's seconds and the peak memory of a forward pass, or of pruning."""
    heads = width // 64
    shape = {"hidden": width, "mlp": 11 * heads * 16, "layers": blocks, "heads": heads, "vocabulary": VOCABULARY}
    model = random_llama(shape, LENGTH)
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, LENGTH))} for _ in range(windows // 4)]

    def forward(batch: dict[str, Any]) -> None:
        model.model(**batch, use_cache=False)

    def run() -> None:
        if method in METHODS:
            prune(model, batches, 0.5, method=method, sequential="layer", forward=forward, progress=False)
            return
        with torch.no_grad():
            for batch in batches:
                forward(batch)

    with PeakMemory() as memory:
        started = time.process_time()
        run()
        taken = time.process_time() - started
    return {"processor_seconds": taken, "peak_mib": memory.peak / MIB}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Measure how pruning grows with tokens, layers and width.")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file; a run that it holds is not repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, runs = Console(width=120), Runs(options.save, "scaling")
    for size, values in SIZES.items():
        table = Table("seconds by", *(f"{size} {value}" for value in values), "exponent")
        for name in SCALED:
            points = []
            for value in values:
                sizes = {**DEFAULTS, **({"blocks": 1} if size == "width" else {}), size: value}
                planned = Result(
                    model="random Llama",
                    method=name,
                    sparsity=0.5 if name in METHODS else 0.0,
                    case={"by": size, "value": value},
                    arguments={"method": name, "sequential": "layer"} if name in METHODS else {},
                    calibration=Samples("random tokens", sizes["windows"], LENGTH),
                )
                found = runs(planned, lambda name=name, sizes=sizes: measure(name, **sizes))
                points.append((value, found.measured["processor_seconds"]))
            table.add_row(name, *(f"{taken:.2f}" for _, taken in points), f"{exponent(points):.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
