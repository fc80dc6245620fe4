"""Prune a random Llama from disk, and measure memory, time, and bytes read and written.

    python benchmarks/streaming.py FOLDER                                      (the shape of Llama 2 7B: 13.5 GB twice)
    python benchmarks/streaming.py FOLDER --hidden 2048 --mlp 5632 --layers 22 --method sparsegpt --in_memory

The model is written to FOLDER/dense shard by shard, and pruned to FOLDER/pruned. Both are deleted at the end, unless
`--keep`. Peak memory is the resident memory of the process, with PyTorch and transformers. `--in_memory` then loads the
same model, prunes it with the same batches, and compares time and weights.
"""

import argparse
import ctypes
import gc
import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import torch
from measuring import MIB, seconds
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wanda_lightning import prune, prune_from_disk


def build(folder: Path, config: LlamaConfig) -> int:
    """Write a random model, one file for each block, and return its size in bytes."""
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
    return total


class Resident:
    """Samples the resident memory of this process; `peak` in bytes."""

    def __enter__(self) -> "Resident":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process, self._stop = psutil.Process(), threading.Event()
        self.start = self.peak = self._process.memory_info().rss
        self._io = self._process.io_counters()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        io = self._process.io_counters()
        self.written = io.write_chars - self._io.write_chars


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a model."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def main() -> None:
    """Build, stream, and compare."""
    parser = argparse.ArgumentParser(description="Prune a random Llama from disk.")
    parser.add_argument("folder")
    for name, default in {"hidden": 4096, "mlp": 11008, "layers": 32, "heads": 32, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sequential", default="layer", choices=("block", "layer"))
    parser.add_argument("--in_memory", action="store_true", help="also prune in memory, and compare")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    options = parser.parse_args()
    dense, pruned = Path(options.folder) / "dense", Path(options.folder) / "pruned"
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocabulary,
    )
    if not dense.exists():
        print(f"writing {build(dense, config) / 1e9:.2f} GB to {dense}", flush=True)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(options.vocabulary, (1, options.seqlen), generator=generator)}
        for _ in range(options.samples)
    ]
    choices = {"method": options.method, "sequential": options.sequential}
    shutil.rmtree(pruned, ignore_errors=True)
    table = Table("", "seconds", "peak MiB", "above the start", "GB written")
    with Resident() as memory:
        started = time.perf_counter()
        report = prune_from_disk(dense, pruned, batches, 0.5, **choices)
        duration = time.perf_counter() - started
    row = (f"{memory.peak / MIB:.0f}", f"{(memory.peak - memory.start) / MIB:.0f}", f"{memory.written / 1e9:.2f}")
    table.add_row("from disk", f"{duration:.1f}", *row)
    print(report.summary(), flush=True)
    if options.in_memory:
        with Resident() as memory:
            started = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(dense)
            print(f"pruning in memory: {seconds(lambda: prune(model, batches, 0.5, **choices)):.1f} s", flush=True)
            model.save_pretrained(Path(options.folder) / "memory")
            in_memory = time.perf_counter() - started
        row = (f"{memory.peak / MIB:.0f}", f"{(memory.peak - memory.start) / MIB:.0f}", f"{memory.written / 1e9:.2f}")
        table.add_row("in memory: load, prune, save", f"{in_memory:.1f}", *row)
        del model
        first, second = weights(pruned), weights(Path(options.folder) / "memory")
        equal = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        print(f"equal weights: {equal}; from disk / in memory: {duration / in_memory:.2f}")
        shutil.rmtree(Path(options.folder) / "memory")
    Console(width=100).print(table)
    if not options.keep:
        shutil.rmtree(dense)
        shutil.rmtree(pruned)


if __name__ == "__main__":
    main()
