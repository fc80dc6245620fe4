"""Measure pruning from disk: memory, time, bytes read and written.

    python benchmarks/streaming.py memory FOLDER --shape 7b --method wanda --sequential layer  (13.5 GB of disk, twice)
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --method sparsegpt admm --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 8 16 32 --method sparsegpt --sequential block
    python benchmarks/streaming.py memory FOLDER --shape 1.1b --layers 2 --allocation alpha
    python benchmarks/streaming.py memory FOLDER --shape narrow --sequential layer --samples 64 --length 512
    python benchmarks/streaming.py seconds FOLDER --model SmolLM2.gguf --samples 16 --length 512
    python benchmarks/streaming.py seconds FOLDER --shape 1.1b --samples 16 --length 512

`--shape` writes a random Llama in bfloat16 to FOLDER, file by file; `--model` exports a folder or GGUF file there.
`memory` prunes in a new process for each row, and takes the peak of its resident memory, with PyTorch and
transformers. `seconds` prunes alternately from disk and in memory.
"""

import argparse
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import MIB, PeakMemory, medians, seconds
from result import Result, Runs
from result import Samples as Data
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wanda_lightning import CausalLMModule, prune, prune_from_disk

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


def source(options: argparse.Namespace, layers: int | None = None) -> Path:
    """Return the folder of the model, written now if it is not there."""
    name = Path(options.model).stem if options.model else f"{options.shape}-{layers or 'all'}"
    folder = Path(options.folder) / name
    if not folder.exists() and options.model:
        CausalLMModule(options.model, dtype="bfloat16").save_pretrained(folder)
    elif not folder.exists():
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


def choices(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the arguments of `prune`; `method` may also be a solver."""
    given = {name: getattr(options, name) for name in OTHERS if getattr(options, name) is not None}
    named = {"solver" if method == "admm" else "method": method, "sequential": options.sequential, **given}
    return {**named, "progress": False}


def stream(folder: Path, options: argparse.Namespace, method: str, name: str = "pruned") -> tuple[float, ...]:
    """Prune from disk; return the seconds, the peak memory, and the bytes read and written."""
    output = Path(options.folder) / name
    with PeakMemory() as memory:
        duration = seconds(
            lambda: prune_from_disk(folder, output, batches(folder, options), 0.5, **choices(options, method))
        )
    moved = psutil.Process().io_counters()
    return duration, memory.start + memory.peak, moved.read_chars, moved.write_chars


def plan(options: argparse.Namespace, method: str, **case: object) -> Result:
    """Describe a run."""
    others = {name: getattr(options, name) for name in OTHERS if getattr(options, name) is not None}
    pattern = others.pop("pattern", "unstructured")
    return Result(
        model=Path(options.model).name if options.model else f"random Llama {options.shape}",
        method=method,
        sparsity=0.5,
        pattern=pattern,
        case={**case, "sequential": options.sequential, **others},
        calibration=Data("random tokens", options.samples, options.length),
    )


def in_new_process(function: Any, *arguments: object) -> Any:
    """Call a function in a process of its own, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_memory(options: argparse.Namespace) -> None:
    """Prune in a new process for each run."""
    for layers in options.layers or [None]:
        folder = source(options, layers)
        for method in options.method:
            shutil.rmtree(Path(options.folder) / "pruned", ignore_errors=True)
            duration, peak, *moved = in_new_process(stream, folder, options, method)
            number = AutoConfig.from_pretrained(folder).num_hidden_layers
            read, written = (size / 1e9 for size in moved)
            numbers = {"seconds": duration, "peak_rss_mib": peak / MIB}
            planned = plan(options, method, layers=number)
            Runs(options.save, "streaming_memory").save(planned, {**numbers, "read_gb": read, "written_gb": written})


def measure_seconds(options: argparse.Namespace) -> None:
    """Prune alternately from disk and in memory."""
    folder, disk, memory = source(options), Path(options.folder) / "pruned", Path(options.folder) / "memory"
    samples = batches(folder, options)

    def in_memory(method: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        prune(model, samples, 0.5, **choices(options, method))
        model.save_pretrained(memory)

    def from_disk(method: str) -> None:
        prune_from_disk(folder, disk, samples, 0.5, **choices(options, method))

    def clock(step: Any, place: Path, method: str) -> float:
        shutil.rmtree(place, ignore_errors=True)
        return seconds(lambda: step(method))

    for method in options.method:
        streamed, loaded = medians(
            lambda method=method: clock(from_disk, disk, method),
            lambda method=method: clock(in_memory, memory, method),
            runs=options.runs,
        )
        first, second = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (disk, memory))
        assert all(torch.equal(first[key], second[key]) for key in first)
        measured = {"seconds": streamed, "plain_seconds": loaded, "ratio": streamed / loaded}
        Runs(options.save, "streaming_seconds").save(plan(options, method), measured)


def main() -> None:
    """Read the options, and measure."""
    commands = {"memory": measure_memory, "seconds": measure_seconds}
    parser = argparse.ArgumentParser(description="Measure pruning from disk.")
    parser.add_argument("command", choices=commands)
    parser.add_argument("folder", help="where models are written")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES, help="shape of a random model")
    which.add_argument("--model", help="folder or GGUF file")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, instead of that of the shape")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", nargs="+", default=["wanda"])
    parser.add_argument("--sequential", default="block", choices=("block", "layer"))
    for name in OTHERS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--runs", type=int, default=3, help="of each clock, after a warm-up")
    parser.add_argument("--save", help="FOLDER in which each run of memory and seconds becomes a file")
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
