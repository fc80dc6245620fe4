"""Measure pruning from disk: memory, bytes read and written.

    python benchmarks/streaming.py memory FOLDER --shape 7b --method wanda --sequential layer  (13.5 GB of disk, twice)
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --method sparsegpt admm --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 8 16 32 --method sparsegpt --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 2 --allocation owl
    python benchmarks/streaming.py memory FOLDER --shape narrow --sequential layer --samples 64 --length 512

`--shape` writes a random Llama in bfloat16 to FOLDER, file by file. Each row is pruned in a new process, whose peak of
resident memory counts, with PyTorch and transformers.
"""

import argparse
import json
import shutil
from pathlib import Path

import psutil
import torch
from measuring import MIB, PeakMemory, in_new_process, seconds
from result import Result, Runs, Samples as Data
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from wanda_lightning import prune_from_disk

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "narrow": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
}
OTHERS = ("pattern", "allocation", "permutation", "recovery")  # choices besides the method


def build(folder: Path, config: LlamaConfig) -> None:
    """Write a random model, one file for each block."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "", {})[name] = tensor
    total, index = 0, {}
    folder.mkdir(parents=True)
    for number, tensors in enumerate(parts.values()):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        values = {}
        for name, tensor in tensors.items():
            values[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
            if tensor.ndim > 1:
                values[name].normal_(0, 0.02, generator=generator)
            total += tensor.numel() * 2
            index[name] = file
        save_file(values, folder / file, metadata={"format": "pt"})
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with (folder / "model.safetensors.index.json").open("w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)


def source(options: argparse.Namespace, layers: int | None) -> Path:
    """Return the folder of the model, written now if it is not there."""
    folder = Path(options.folder) / f"{options.shape}-{layers or 'all'}"
    if not folder.exists():
        shape = SHAPES[options.shape] | ({"num_hidden_layers": layers} if layers else {})
        build(folder, LlamaConfig(**shape, vocab_size=32000))
    return folder


def batches(folder: Path, options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return random windows, each a batch."""
    vocabulary, generator = AutoConfig.from_pretrained(folder).vocab_size, torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(vocabulary, (1, options.length), generator=generator)}
        for _ in range(options.samples)
    ]


def stream(folder: Path, options: argparse.Namespace, method: str) -> tuple[float, ...]:
    """Prune from disk; return the seconds, the peak memory, and the bytes read and written."""
    given = {name: getattr(options, name) for name in OTHERS if getattr(options, name) is not None}
    named = {"solver" if method == "admm" else "method": method, "sequential": options.sequential, **given}
    output, samples = Path(options.folder) / "pruned", batches(folder, options)
    shutil.rmtree(output, ignore_errors=True)
    with PeakMemory() as memory:
        duration = seconds(lambda: prune_from_disk(folder, output, samples, 0.5, **named, progress=False))
    moved = psutil.Process().io_counters()
    return duration, memory.start + memory.peak, moved.read_chars, moved.write_chars


def plan(options: argparse.Namespace, method: str, **case: object) -> Result:
    """Describe a run."""
    others = {name: getattr(options, name) for name in OTHERS if getattr(options, name) is not None}
    pattern = others.pop("pattern", "unstructured")
    return Result(
        model=f"random Llama {options.shape}",
        method=method,
        sparsity=0.5,
        pattern=pattern,
        case={**case, "sequential": options.sequential, **others},
        calibration=Data("random tokens", options.samples, options.length),
    )


def main() -> None:
    """Prune in a new process for each run."""
    parser = argparse.ArgumentParser(description="Measure pruning from disk.")
    parser.add_argument("command", choices=["memory"])
    parser.add_argument("folder", help="where models are written")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="shape of a random model")
    parser.add_argument("--layers", type=int, nargs="+", default=[None], help="instead of the number of the shape")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", nargs="+", default=["wanda"])
    parser.add_argument("--sequential", default="block", choices=("block", "layer"))
    for name in OTHERS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    for layers in options.layers:
        folder = source(options, layers)
        for method in options.method:
            duration, peak, read, written = in_new_process(stream, folder, options, method)
            numbers = {
                "seconds": duration,
                "peak_rss_mib": peak / MIB,
                "read_gb": read / 1e9,
                "written_gb": written / 1e9,
            }
            planned = plan(options, method, layers=AutoConfig.from_pretrained(folder).num_hidden_layers)
            Runs(options.save, "streaming_memory").save(planned, numbers)


if __name__ == "__main__":
    main()
