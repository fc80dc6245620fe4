"""Measure how the seconds of pruning grow with calibration tokens, layers and width.

    python benchmarks/scaling.py --save benchmarks/results

The model is a random Llama in float32, pruned in memory to 50 % with `sequential="layer"`. Each line varies one size;
the others keep their defaults: 16 windows of 512 tokens, 8 blocks, width 512. The exponent is the slope of a line
through the points, both axes logarithmic: 1 is linear.
"""

import argparse
import math

import torch
from measuring import medians, random_llama, seconds
from result import Result, Runs, Samples
from rich.console import Console
from rich.table import Table

from wanda_lightning import prune

METHODS = ("wanda", "sparsegpt", "admm")
DEFAULTS = {"windows": 16, "blocks": 8, "width": 512}
SIZES = {"windows": (8, 16, 32, 64), "blocks": (8, 16, 32), "width": (256, 512, 1024)}
LENGTH, VOCABULARY = 512, 1024


def measure(windows: int, blocks: int, width: int, runs: int) -> dict[str, float]:
    """Return the median seconds of a forward pass and of each method, measured alternately."""
    heads = width // 64
    shape = {"hidden": width, "mlp": 11 * heads * 16, "layers": blocks, "heads": heads, "vocabulary": VOCABULARY}
    model = random_llama(shape, LENGTH)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, LENGTH))} for _ in range(windows // 4)]

    def forward() -> float:
        with torch.no_grad():
            return seconds(lambda: [model.model(**batch, use_cache=False) for batch in batches])

    def pruning(method: str) -> float:
        model.load_state_dict(dense)
        return seconds(lambda: prune(model, batches, 0.5, method=method, sequential="layer", progress=False))

    clocks = [forward, *(lambda method=method: pruning(method) for method in METHODS)]
    return dict(zip(("forward pass", *METHODS), medians(*clocks, runs=runs, warm_up=False), strict=True))


def exponent(points: list[tuple[int, float]]) -> float:
    """Return the slope of a line through the points, fitted to their logarithms."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Measure how pruning grows with tokens, layers and width.")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    console, runs = Console(width=120), Runs(options.save, "scaling")
    for size, values in SIZES.items():
        table = Table("seconds by", *(f"{size} {value}" for value in values), "exponent")
        lines: dict[str, list[tuple[int, float]]] = {name: [] for name in ("forward pass", *METHODS)}
        for value in values:
            sizes = {**DEFAULTS, size: value}
            for name, duration in measure(**sizes, runs=options.runs).items():
                lines[name].append((value, duration))
                planned = Result(
                    model="random Llama",
                    method=name,
                    sparsity=0.5 if name in METHODS else 0.0,
                    case={"by": size, "value": value},
                    arguments={"method": name, "sequential": "layer"} if name in METHODS else {},
                    calibration=Samples("random tokens", sizes["windows"], LENGTH),
                )
                runs.save(planned, {"seconds": duration})
        for name, points in lines.items():
            table.add_row(name, *(f"{duration:.2f}" for _, duration in points), f"{exponent(points):.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
