"""Measure what pruning costs, as ratios to a plain forward pass of the same batches in the same process.

    python benchmarks/pruning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --nsamples 16 --seqlen 512

Each number is a median over `--runs` after a warm-up, and the two sides of a ratio run alternately. Weights are
restored between runs, which is not timed.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from measuring import MIB, PeakMemory, medians, seconds
from rich.console import Console
from rich.table import Table
from torch import nn

from wanda_lightning import CausalLMModule, ImageClassifierModule, prune
from wanda_lightning.core.patterns import NM


def load(options: argparse.Namespace) -> tuple[nn.Module, list[dict[str, torch.Tensor]], Callable[[object], object]]:
    """Return the model, random batches (time does not depend on their values), and the module for a forward pass."""
    generator = torch.Generator().manual_seed(0)
    if options.model.startswith("timm:"):
        images = ImageClassifierModule(options.model, pretrained=False)
        size = images.model.pretrained_cfg["input_size"]
        pixels = torch.randn(options.nsamples, *size, generator=generator)
        return images.model.eval(), [{"x": part} for part in pixels.split(options.batch_size)], images.model
    text = CausalLMModule(options.model, dtype="float32")
    vocabulary = text.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (options.nsamples, options.seqlen), generator=generator)
    return text.model.eval(), [{"input_ids": part} for part in ids.split(options.batch_size)], text.model.base_model


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure what pruning costs, in forward passes.")
    parser.add_argument("--model", required=True, help="hub id, folder, .gguf file or timm:NAME")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()

    model, batches, body = load(options)
    dense = copy.deepcopy(model.state_dict())

    def forward() -> float:
        with torch.no_grad():
            return seconds(lambda: [_call(body, batch) for batch in batches])

    def pruning(sequential: str) -> Callable[[], float]:
        def run() -> float:
            model.load_state_dict(dense)
            return seconds(lambda: prune(model, batches, 0.5, sequential=sequential, forward=one, progress=False))

        def one(batch: dict[str, torch.Tensor]) -> object:
            return _call(body, batch)

        return run

    table = Table(title=f"{options.model}: {options.nsamples} samples in batches of {options.batch_size}")
    for heading in ("what", "plain (s)", "ours (s)", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    for sequential, passes in (("block", 2), ("layer", 1), ("none", 1)):
        plain, ours = medians(forward, pruning(sequential), runs=options.runs)
        name = f"sequential={sequential} / {passes} forward pass{'es' if passes > 1 else ''}"
        table.add_row(name, f"{passes * plain:.2f}", f"{ours:.2f}", f"{ours / (passes * plain):.3f}")

    weight, norm = torch.randn(4096, 11008), torch.rand(11008)
    scores = weight.abs() * norm
    plain, ours = medians(
        lambda: seconds(lambda: weight.abs().mul_(norm)),
        lambda: seconds(lambda: NM(2, 4)(scores, 0.5)),
        runs=max(options.runs, 5),
    )
    table.add_row("2:4 keep of 4096 x 11008 / |W| * ||x||", f"{plain:.3f}", f"{ours:.3f}", f"{ours / plain:.2f}")
    console = Console()
    console.print(table)

    memory = Table(title="Peak resident memory above the loaded model (MiB)")
    for heading in ("what", "MiB"):
        memory.add_column(heading, justify="left" if heading == "what" else "right")
    with PeakMemory() as peak:
        forward()
    memory.add_row("plain forward pass, batch by batch", f"{peak.peak / MIB:.0f}")
    for sequential in ("block", "layer", "none"):
        run = pruning(sequential)
        with PeakMemory() as peak:
            run()
        memory.add_row(f"sequential={sequential}", f"{peak.peak / MIB:.0f}")
    console.print(memory)


def _call(body: Callable[..., object], batch: dict[str, torch.Tensor]) -> object:
    return body(**batch, use_cache=False) if "input_ids" in batch else body(**batch)


if __name__ == "__main__":
    main()
