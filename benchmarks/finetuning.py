"""Measure what keeping zeros costs in training: time and peak memory of a step, as ratios in one process.

    python benchmarks/finetuning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --batch_size 4 --seqlen 512

The model is pruned by magnitude to 50 %; training costs the same after any other pruning. Times are medians over
`--runs` steps after a warm-up, and the two sides of a ratio run alternately. Memory is the peak of a step above the
model and the moments: activations, gradients and, with KeepZeros, its masks (one byte per weight).
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from measuring import MIB, PeakMemory, medians, seconds
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from wanda_lightning import CausalLMModule, Magnitude, prune
from wanda_lightning.callbacks.keep_zeros import HeldZeros
from wanda_lightning.lora import KeepZerosLoraConfig

ADAPTERS = {
    "q_proj, v_proj, dropout 0.05": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "all-linear, no dropout": {"target_modules": "all-linear", "lora_dropout": 0.0},
}


def training(model: nn.Module, ids: torch.Tensor) -> Callable[[], float]:
    """Return a clock for one step of AdamW on the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(step)


def peak(clock: Callable[[], float]) -> float:
    """Return the peak memory of a step after the first one, in MiB above the start: the median of three."""

    def once() -> float:
        with PeakMemory() as memory:
            clock()
        return memory.peak / MIB

    return statistics.median(once() for _ in range(3))


def row(without: float, kept: float, digits: int = 2) -> tuple[str, str, str]:
    """Return two numbers and their ratio as table cells."""
    return f"{without:.{digits}f}", f"{kept:.{digits}f}", f"{kept / without:.3f}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure what keeping zeros costs in training.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = CausalLMModule(options.model, dtype="float32").model.train()
    report = prune(model, None, 0.5, criterion=Magnitude(), progress=False)
    pruned = copy.deepcopy(model.state_dict())
    ids = torch.randint(model.config.get_text_config().vocab_size, (options.batch_size, options.seqlen))
    table = Table(title=f"A step of AdamW, {options.batch_size} x {options.seqlen} tokens")
    for heading in ("what", "without (s)", "with (s)", "ratio", "without (MiB)", "with (MiB)", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    zeros, step = HeldZeros(), training(model, ids)

    def free() -> float:
        model.load_state_dict(pruned)  # a step without KeepZeros revives all zeros
        return step()

    def held() -> float:
        model.load_state_dict(pruned)
        zeros.hold(model, layers)
        duration = step()
        zeros.release()
        return duration

    layers = [layer.name for layer in report.layers]
    without, kept = medians(free, held, runs=options.runs)
    table.add_row("KeepZeros, all weights", *row(without, kept), *row(peak(free), peak(held), 0))
    model.load_state_dict(pruned)

    for name, arguments in ADAPTERS.items():
        arguments = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **arguments}
        plain = training(get_peft_model(copy.deepcopy(model), LoraConfig(**arguments)), ids)
        keeping = training(get_peft_model(copy.deepcopy(model), KeepZerosLoraConfig(**arguments)), ids)
        without, kept = medians(plain, keeping, runs=options.runs)
        cells = *row(without, kept), *row(peak(plain), peak(keeping), 0)
        table.add_row(f"KeepZerosLora / LoRA: {name}", *cells)
        del plain, keeping
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
