"""Prune a random Llama on a GPU, and measure seconds and peak device memory beside those of plain forward passes.

    python benchmarks/gpu.py                       (the shape of Llama 2 7B in bfloat16, 128 x 2048 tokens; 40 GB)
    python benchmarks/gpu.py --folder FOLDER       (also from disk, which needs 27 GB of disk there)
    python benchmarks/gpu.py --device cpu --hidden 64 --mlp 172 --layers 2 --heads 4 --vocabulary 1000 --samples 4 \
        --seqlen 64                                (the same on a small model, to try it out)

The model is built on the device. `block` prunes with two forward passes, `layer` with one: `forward passes`
divides the time of pruning by that of so many plain forward passes. Peak memory is that of the device and includes the
model; on a CPU, it is that of the process. With `--folder`, the model is saved there and also pruned from disk; the
time then includes reading and writing. Activations of waiting batches are on the device or, with `park cpu`, in memory
of the CPU. `equal` says whether the weights equal those pruned in memory.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import MIB, PeakMemory, seconds
from result import machine
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wanda_lightning import prune, prune_from_disk

METHODS = ("wanda", "sparsegpt", "admm")
PASSES = {"block": 2, "layer": 1}


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    """Build a random model on the device, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocabulary,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def measured(options: argparse.Namespace, step: Callable[[], object]) -> tuple[float, str]:
    """Return the seconds of a step, with all kernels it has started, and the peak memory in MiB."""

    def synchronized() -> None:
        step()
        if options.device != "cpu":
            torch.accelerator.synchronize()

    with PeakMemory(options.device) as memory:
        took = seconds(synchronized)
    return took, f"{(memory.start + memory.peak) / MIB:.0f}"


@torch.no_grad()
def forward(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> None:
    """Run all batches through the blocks; the output head is left out, as in pruning."""
    for batch in batches:
        model.model(**batch, use_cache=False)


def same(model: LlamaForCausalLM, folder: Path) -> bool:
    """Whether a saved model has the weights of a model, bit for bit."""
    weights, saved = model.state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(weights[key].cpu(), saved[key]) for key in weights)


def main() -> None:
    """Measure each method at each granularity."""
    parser = argparse.ArgumentParser(description="Prune a random Llama on a GPU.")
    parser.add_argument("--device", default="cuda")
    for name, default in {"hidden": 4096, "mlp": 11008, "layers": 32, "heads": 32, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--folder", help="where to save the model, to prune it from disk, too")
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(options.vocabulary, (1, options.seqlen), generator=generator).to(options.device)}
        for _ in range(options.samples)
    ]
    title = f"{machine()}, {options.samples} x {options.seqlen}"
    table = Table("", "seconds", "peak MiB", "forward passes", "equal", title=title)
    model = build(options)
    forward(model, batches[:1])  # warm up, as does the next line
    prune(build(options), batches[:1], method=options.method[0], sequential="layer", progress=False)
    plain, peak = measured(options, lambda: forward(model, batches))
    table.add_row("forward", f"{plain:.2f}", peak, "", "")
    streamed: tuple[str, ...] = ()
    if options.folder:
        streamed = ("memory",) if options.device == "cpu" else ("memory", "cpu")
        source, output = Path(options.folder) / "dense", Path(options.folder) / "pruned"
        build(options).save_pretrained(source)
    for method in options.method:
        for sequential, passes in PASSES.items():
            del model
            model = build(options)  # a pruned model would be pruned faster
            choices = {"method": method, "sequential": sequential, "progress": False}
            took, peak = measured(options, partial(prune, model, batches, options.sparsity, **choices))
            relative = f"{took / (passes * plain):.3f} x {passes}"
            table.add_row(f"{method} {sequential}", f"{took:.2f}", peak, relative, "")
            if options.folder:
                model.cpu()  # for the comparison; its place on the device is free meanwhile
            for park in streamed:
                shutil.rmtree(output, ignore_errors=True)
                from_disk = partial(prune_from_disk, source, output, batches, options.sparsity, device=options.device)
                took, peak = measured(options, partial(from_disk, park=park, **choices))
                relative = f"{took / (passes * plain):.3f} x {passes}"
                table.add_row(f"  from disk, park {park}", f"{took:.2f}", peak, relative, str(same(model, output)))
    Console().print(table)


if __name__ == "__main__":
    main()
