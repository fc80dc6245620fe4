"""Measure what keeping zeros costs in training: time and peak memory of a step, as ratios in one process.

    python benchmarks/finetuning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results

The model is pruned by magnitude to 50 %; training costs the same after any other pruning. Times are medians over
`--runs` steps after a warm-up, and the two sides of a ratio run alternately. Memory is the peak of a step above the
model and the moments: activations, gradients and, with KeepZeros, its masks (one byte per weight).
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measuring import medians, peak_mib, run_from_shell, seconds
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
        return statistics.median(peak_mib(clock, self.ids.device) for _ in range(3))


def main(*, model: str, batch_size: int = 4, seqlen: int = 512, runs: int = 5, save: str | None = None) -> None:
    """Measure steps with and without kept zeros."""
    torch.manual_seed(0)
    training = Training(CausalLMModule(model, dtype="float32").model, batch_size, seqlen, runs)
    record, tokens = Runs(save, "keeping_zeros"), Samples("random tokens", batch_size, seqlen)
    own = {"method": "KeepZeros", "arguments": {"method": "magnitude"}}
    planned = Result(model=Path(model).name, sparsity=0.5, calibration=tokens, **own)
    record.save(planned, training.keep_zeros())
    for name in ADAPTERS:
        adapted = replace(planned, method="KeepZerosLoraConfig", case={"adapters": name})
        record.save(adapted, training.adapters(name))


if __name__ == "__main__":
    run_from_shell(main)
