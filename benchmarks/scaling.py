"""Measure how processor time and memory of pruning grow with calibration tokens, layers and width.

    python benchmarks/scaling.py --save benchmarks/results

The model is a random Llama in float32, pruned in memory to 50 % with `sequential="layer"`. Each line varies one size.
Processor seconds are those of all threads. Peak memory is what a run needs beside the model and the batches. The
exponent is the slope of a line through the last three points, both axes logarithmic: 1 is linear.
"""

import argparse
import time
from collections.abc import Callable

import torch
from measuring import MIB, PeakMemory, columns, random_llama
from result import Result, Runs, Samples
from rich.console import Console
from tables import exponent

from wanda_lightning import prune

METHODS = ("wanda", "sparsegpt", "admm")
FORWARD = "forward pass"
LENGTH, VOCABULARY = 512, 1024
SIZES = {  # what varies, and the other sizes
    "windows": ((4, 8, 16, 32, 64, 128), {"blocks": 2, "width": 512}),
    "blocks": ((2, 4, 8, 16), {"windows": 16, "width": 512}),
    "width": ((256, 512, 1024, 2048, 4096), {"windows": 4, "blocks": 1}),
}


def measure(method: str, windows: int, blocks: int, width: int) -> dict[str, float]:
    """Return processor seconds and peak memory of one method, or of a forward pass of all windows."""
    heads = width // 64
    shape = {"hidden": width, "mlp": 11 * width // 4, "layers": blocks, "heads": heads, "vocabulary": VOCABULARY}
    model = random_llama(shape, LENGTH)
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, LENGTH))} for _ in range(windows // 4)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(**batch, use_cache=False)

    def pruning() -> None:
        prune(model, batches, 0.5, method=method, sequential="layer", progress=False)

    step: Callable[[], None] = forward if method == FORWARD else pruning
    with PeakMemory() as memory:
        started = time.process_time()
        step()
        took = time.process_time() - started
    return {"processor_seconds": took, "peak_mib": memory.peak / MIB}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Measure how pruning grows with tokens, layers and width.")
    parser.add_argument("--save", help="FOLDER of runs; a run that it holds is not measured again")
    options = parser.parse_args()
    console, runs = Console(width=140), Runs(options.save, "scaling")
    measure(METHODS[0], 4, 1, 256)  # warm up
    for size, (values, others) in SIZES.items():
        table = columns("processor seconds (peak MiB)", f"by {size}", *map(str, values), "exponents")
        for method in (FORWARD, *METHODS):
            found = []
            for value in values:
                sizes = {**others, size: value}
                planned = Result(
                    model="random Llama",
                    method=method,
                    sparsity=0.5 if method in METHODS else 0.0,
                    case={"by": size, "value": value},
                    arguments={"method": method, "sequential": "layer"} if method in METHODS else {},
                    calibration=Samples("random tokens", sizes["windows"], LENGTH),
                )
                found.append(runs(planned, lambda method=method, sizes=sizes: measure(method, **sizes)).measured)
            slopes = [
                exponent([(value, run[kind]) for value, run in zip(values, found, strict=True)])
                for kind in ("processor_seconds", "peak_mib")
            ]
            cells = [f"{run['processor_seconds']:.2f} ({run['peak_mib']:.0f})" for run in found]
            table.add_row(method, *cells, " (".join(f"{slope:.2f}" for slope in slopes) + ")")
        console.print(table)


if __name__ == "__main__":
    main()
