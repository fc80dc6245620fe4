"""Measure pruning from disk: memory, bytes read and written.

    python benchmarks/streaming.py memory FOLDER --shape 7b --method wanda --sequential layer  (13.5 GB of disk, twice)
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --method sparsegpt admm --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 8 16 32 --method sparsegpt --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 2 --recovery reconstruct
    python benchmarks/streaming.py memory FOLDER --shape narrow --sequential layer --samples 64 --length 512

`--shape` writes a random Llama in bfloat16 to FOLDER, file by file. Each row is pruned in a new process, whose peak of
resident memory counts, with PyTorch and transformers.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from cyclopts import Parameter
from measuring import (
    SHAPES,
    cost_of,
    in_new_process,
    llama,
    random_windows,
    run_from_shell,
)
from result import Result, Runs, Samples
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from wanda_lightning import prune_from_disk

CHOICES = ("sequential", "pattern", "recovery")


def build(folder, config):
    """Write a random model, one file for each block."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    parts = {}
    for name, tensor in model.state_dict().items():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        parts.setdefault(block, {})[name] = tensor.shape

    generator = torch.Generator().manual_seed(0)
    index = {}
    folder.mkdir(parents=True)
    for number, shapes in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weights = {}
        for name, shape in shapes.items():
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) > 1:
                weights[name].normal_(0, 0.02, generator=generator)
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)

    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this program."""

    shape: str
    """One of `SHAPES`."""
    layers: Sequence[int] = (0,)
    """Numbers of layers; 0 is that of the shape."""
    samples: int = 4
    length: int = 256
    method: Sequence[str] = ("wanda",)
    sequential: str = "block"
    pattern: str = ""
    recovery: str = ""
    save: str = ""


def stream(folder, output, samples, choices):
    """Prune from disk; return the seconds, the peak memory, and the bytes read and written."""
    shutil.rmtree(output, ignore_errors=True)
    cost = cost_of(lambda: prune_from_disk(folder, output, samples, 0.5, **choices, progress=False))
    moved = psutil.Process().io_counters()
    return {
        "seconds": cost.seconds,
        "peak_rss_mib": cost.start_mib + cost.peak_mib,
        "read_gb": moved.read_chars / 1e9,
        "written_gb": moved.write_chars / 1e9,
    }


def main(command: Literal["memory"], folder: Path, /, *, options: Options):
    """Prune in a new process for each run; models are written to a folder unless they are there."""
    values = {name: getattr(options, name) for name in CHOICES}
    choices = {name: value for name, value in values.items() if value}

    for layers in options.layers:
        source = folder / f"{options.shape}-{layers or 'all'}"
        config = llama(*SHAPES[options.shape])
        config.num_hidden_layers = layers or config.num_hidden_layers
        if not source.exists():
            build(source, config)
        samples = random_windows(config.vocab_size, options.samples, options.length)

        for method in options.method:
            case = {"layers": config.num_hidden_layers, **choices}
            planned = Result(
                model=f"random Llama {options.shape}",
                method=method,
                sparsity=0.5,
                pattern=case.pop("pattern", "unstructured"),
                case=case,
                calibration=Samples("random tokens", options.samples, options.length),
            )
            arguments = {"solver" if method == "admm" else "method": method, **choices}
            numbers = in_new_process(stream, source, folder / "pruned", samples, arguments)
            Runs(options.save, "streaming_memory").save(planned, numbers)


if __name__ == "__main__":
    run_from_shell(main)
