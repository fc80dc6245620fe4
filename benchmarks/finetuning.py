"""Measure what keeping zeros costs in training: time and peak memory of a step, as ratios in one process.

    python benchmarks/finetuning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results

The model is pruned by magnitude to 50 %; training costs the same after any other pruning. Times are medians over
`--runs` steps after a warm-up, and the two sides of a ratio run alternately. Memory is the peak of a step above the
model and the moments: activations, gradients and, with KeepZeros, its masks (one byte per weight).
"""

import copy
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from measuring import cost_of, medians, random_windows, run_from_shell, seconds
from peft import LoraConfig, get_peft_model
from result import Result, Runs, Samples

from wanda_lightning import CausalLMModule, keep_zeros, prune
from wanda_lightning.core import Magnitude
from wanda_lightning.lora import KeepZerosLoraConfig

ADAPTERS = {
    "q_proj, v_proj, dropout 0.05": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "all-linear, no dropout": {"target_modules": "all-linear", "lora_dropout": 0.0},
}
WINDOWS = (4, 512)  # windows in a step, and their tokens


def clock(model, ids, keeping=False):
    """Return a clock for one step of AdamW on the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed():
        with keep_zeros(model) if keeping else nullcontext():
            return seconds(step)

    return timed


def compare(plain, keeping, runs):
    """Return the ratio of the times of a step that keeps zeros and one that does not, and their peak memory."""
    without, kept = medians(plain, keeping, runs=runs)
    return {
        "ratio": kept / without,
        "peak_mib": median_peak(keeping),
        "plain_peak_mib": median_peak(plain),
    }


def median_peak(step):
    """Return the median of the peak memory of three steps."""
    return statistics.median(cost_of(step).peak_mib for _ in range(3))


def main(*, model: str, runs: int = 5, save: str = ""):
    """Measure steps with and without kept zeros."""
    torch.manual_seed(0)
    pruned = CausalLMModule(model, dtype="float32").model.train()
    record = Runs(save, "keeping_zeros")
    prune(pruned, None, 0.5, criterion=Magnitude(), progress=False)
    vocabulary = pruned.config.get_text_config().vocab_size
    (batch,) = random_windows(vocabulary, *WINDOWS, batch_size=WINDOWS[0])
    ids = batch["input_ids"]

    planned = Result(
        model=Path(model).name,
        method="KeepZeros",
        sparsity=0.5,
        arguments={"method": "magnitude"},
        calibration=Samples("random tokens", *WINDOWS),
    )
    plain = clock(copy.deepcopy(pruned), ids)
    keeping = clock(copy.deepcopy(pruned), ids, keeping=True)
    record.save(planned, compare(plain, keeping, runs))

    def adapted(config, choices):
        adapters = config(r=8, lora_alpha=16, task_type="CAUSAL_LM", **choices)
        return clock(get_peft_model(copy.deepcopy(pruned), adapters), ids)

    for name, choices in ADAPTERS.items():
        row = replace(planned, method="KeepZerosLoraConfig", case={"adapters": name})
        plain = adapted(LoraConfig, choices)
        keeping = adapted(KeepZerosLoraConfig, choices)
        record.save(row, compare(plain, keeping, runs))


if __name__ == "__main__":
    run_from_shell(main)
