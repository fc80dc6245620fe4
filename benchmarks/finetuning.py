"""Measure what keeping zeros costs in training: time and peak memory of a step, as ratios in one process.

    python benchmarks/finetuning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results

The model is pruned by magnitude to 50 %; training costs the same after any other pruning. Times are medians over
`--runs` steps after a warm-up, and the two sides of a ratio run alternately. Memory is the peak of a step above the
model and the moments: activations, gradients and, with KeepZeros, its masks (one byte per weight).
"""

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from measuring import cost_of, medians, random_windows, run_from_shell, seconds
from peft import LoraConfig, get_peft_model
from result import Result, Runs, Samples
from torch import Tensor, nn

from wanda_lightning import CausalLMModule, Magnitude, keep_zeros, prune
from wanda_lightning.lora import KeepZerosLoraConfig

ADAPTERS = {
    "q_proj, v_proj, dropout 0.05": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "all-linear, no dropout": {"target_modules": "all-linear", "lora_dropout": 0.0},
}
WINDOWS = (4, 512)  # windows in a step, and their tokens


def clock(model: nn.Module, ids: Tensor, keeping: bool = False) -> Callable[[], float]:
    """Return a clock for one step of AdamW on the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed() -> float:
        with keep_zeros(model) if keeping else nullcontext():
            return seconds(step)

    return timed


def compare(
    plain: Callable[[], float], keeping: Callable[[], float], runs: int
) -> dict[str, float]:
    """Return the ratio of the times of a step that keeps zeros and one that does not, and their peak memory."""
    without, kept = medians(plain, keeping, runs=runs)
    ours, theirs = (
        statistics.median(cost_of(each).peak_mib for _ in range(3)) for each in (keeping, plain)
    )
    return {"ratio": kept / without, "peak_mib": ours, "plain_peak_mib": theirs}


def main(*, model: str, runs: int = 5, save: str | None = None) -> None:
    """Measure steps with and without kept zeros."""
    torch.manual_seed(0)
    pruned = CausalLMModule(model, dtype="float32").model.train()
    record = Runs(save, "keeping_zeros")
    prune(pruned, None, 0.5, criterion=Magnitude(), progress=False)
    (batch,) = random_windows(
        pruned.config.get_text_config().vocab_size, *WINDOWS, batch_size=WINDOWS[0]
    )
    ids = batch["input_ids"]
    own = {"method": "KeepZeros", "arguments": {"method": "magnitude"}}
    planned = Result(
        model=Path(model).name, sparsity=0.5, calibration=Samples("random tokens", *WINDOWS), **own
    )

    clocks = [clock(copy.deepcopy(pruned), ids, keeping) for keeping in (False, True)]
    record.save(planned, compare(*clocks, runs))
    for name, chosen in ADAPTERS.items():
        arguments = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **chosen}
        configs = (config(**arguments) for config in (LoraConfig, KeepZerosLoraConfig))
        clocks = [clock(get_peft_model(copy.deepcopy(pruned), config), ids) for config in configs]
        adapted = replace(planned, method="KeepZerosLoraConfig", case={"adapters": name})
        record.save(adapted, compare(*clocks, runs))


if __name__ == "__main__":
    run_from_shell(main)
