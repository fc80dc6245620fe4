"""Measure how far zstd compresses a pruned model, beside the dense one.

    python recipes/vision/get_efficientnet.py .cache
    python benchmarks/file_size.py --model timm:local-dir:.cache/efficientnet_lite0 --save benchmarks/results

Prunes by magnitude, which needs no data: how many weights are kept decides the size, not which. The numbers are bytes
of the compressed file divided by those of the dense file in the same dtype (pip install zstandard).
"""

import argparse
import io
import tempfile
from pathlib import Path

import torch
from measuring import columns
from result import Result, Runs, sparsity_of
from rich.console import Console
from safetensors.torch import save_model
from zstandard import ZstdCompressor

from wanda_lightning import CausalLMModule, ImageClassifierModule, prune

LEVELS = (3, 19)


def compressed(dense: bytes, level: int) -> int:
    """Return the number of bytes after compression, as the program zstd writes them."""
    target = io.BytesIO()
    ZstdCompressor(level=level).copy_stream(io.BytesIO(dense), target, size=len(dense))
    return target.tell()


def main() -> None:
    """Prune, and compress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file; or timm:NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--goals", nargs="+", default=["dense", "50", "60", "2:4"])
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    runs, name = Runs(options.save, "file_size"), Path(options.model.removeprefix("timm:local-dir:")).name
    table = columns("bytes / bytes of the dense file", "", *(f"zstd -{level}" for level in LEVELS))
    for dtype in options.dtypes:
        for goal in options.goals:
            chosen = {} if goal == "dense" else sparsity_of(goal)

            def measure(dtype: str = dtype, chosen: dict = chosen) -> dict[str, float]:
                module = ImageClassifierModule if options.model.startswith("timm:") else CausalLMModule
                model = module(options.model).model.to(getattr(torch, dtype))
                if chosen:
                    prune(model, None, criterion="magnitude", progress=False, **chosen)
                with tempfile.TemporaryDirectory() as folder:
                    save_model(model, f"{folder}/model.safetensors")  # stores tied weights once
                    dense = Path(folder, "model.safetensors").read_bytes()
                return {f"zstd_{level}": compressed(dense, level) / len(dense) for level in LEVELS}

            method = "magnitude" if chosen else "dense"
            result = runs(Result(model=name, method=method, case={"dtype": dtype}, **chosen), measure)
            table.add_row(f"{dtype}, {result.goal}", *(f"{value:.3f}" for value in result.measured.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
