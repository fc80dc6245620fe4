"""Measure what keeping zeros costs in training: time and peak memory of a step, as ratios in one process.

    python benchmarks/finetuning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results

The model is pruned by magnitude to 50 %; training costs the same after any other pruning. Times are medians over
`--runs` steps after a warm-up, and the two sides of a ratio run alternately. Memory is the peak of a step above the
model and the moments: activations, gradients and, with KeepZeros, its masks (one byte per weight).
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measuring import MIB, PeakMemory, medians, seconds
from result import Result, Runs, Samples
from torch import nn

from wanda_lightning import CausalLMModule, Magnitude, prune
from wanda_lightning.training.held_zeros import HeldZeros

ADAPTERS = {
    "q_proj, v_proj, dropout 0.05": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "all-linear, no dropout": {"target_modules": "all-linear", "lora_dropout": 0.0},
}


class Training:
    """A model that is pruned by magnitude, and random tokens to train it on."""

    def __init__(self, model: nn.Module, batch_size: int, seqlen: int, runs: int) -> None:
        self.model, self.runs = model.train(), runs
        prune(model, None, 0.5, criterion=Magnitude(), progress=False)
        self.ids = torch.randint(model.config.get_text_config().vocab_size, (batch_size, seqlen)).to(model.device)

    def keep_zeros(self) -> dict[str, float]:
        """Measure a step of all weights with KeepZeros, and without."""
        pruned, zeros, step = copy.deepcopy(self.model.state_dict()), HeldZeros(), self._steps(self.model)

        def free() -> float:
            self.model.load_state_dict(pruned)  # a step without KeepZeros revives all zeros
            return step()

        def held() -> float:
            self.model.load_state_dict(pruned)
            zeros.hold_all(self.model)
            duration = step()
            zeros.release()
            return duration

        measured = self._compare(free, held)
        self.model.load_state_dict(pruned)
        return measured

    def adapters(self, name: str) -> dict[str, float]:
        """Measure a step of adapters that keep zeros, and of those that do not."""
        from peft import LoraConfig, get_peft_model

        from wanda_lightning.lora import KeepZerosLoraConfig

        arguments = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **ADAPTERS[name]}
        plain, keeping = (
            self._steps(get_peft_model(copy.deepcopy(self.model), config(**arguments)))
            for config in (LoraConfig, KeepZerosLoraConfig)
        )
        return self._compare(plain, keeping)

    def _steps(self, model: nn.Module) -> Callable[[], float]:
        """Return a clock for one step of AdamW on the trainable parameters."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

        def step() -> None:
            model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: seconds(step)

    def _compare(self, without: Callable[[], float], kept: Callable[[], float]) -> dict[str, float]:
        """Return the time and peak memory of a step without and with kept zeros."""
        plain, ours = medians(without, kept, runs=self.runs)
        memory = {"peak_mib": self._peak(kept), "plain_peak_mib": self._peak(without)}
        return {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain, **memory}

    def _peak(self, clock: Callable[[], float]) -> float:
        """Return the peak memory of a step after the first one, in MiB above the start: the median of three."""

        def once() -> float:
            with PeakMemory(self.ids.device) as memory:
                clock()
            return memory.peak / MIB

        return statistics.median(once() for _ in range(3))


def main() -> None:
    """Measure steps with and without kept zeros."""
    parser = argparse.ArgumentParser(description="Measure what keeping zeros costs in training.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = CausalLMModule(options.model, dtype="float32").model
    training = Training(model, options.batch_size, options.seqlen, options.runs)
    runs, tokens = Runs(options.save, "keeping_zeros"), Samples("random tokens", options.batch_size, options.seqlen)
    planned = Result(model=Path(options.model).name, method="KeepZeros", sparsity=0.5, calibration=tokens)
    planned = replace(planned, arguments={"method": "magnitude"})
    runs.save(planned, training.keep_zeros())
    for name in ADAPTERS:
        adapted = replace(planned, method="KeepZerosLoraConfig", case={"adapters": name})
        runs.save(adapted, training.adapters(name))


if __name__ == "__main__":
    main()
