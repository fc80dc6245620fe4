"""Measure what pruning costs, as ratios to a plain forward pass of the same batches in the same process.

    python benchmarks/pruning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results

Each number is a median over `--runs` after a warm-up, and the two sides of a ratio run alternately. Weights are
restored between runs, which is not timed.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measuring import cost_of, medians, random_windows, run_from_shell, seconds
from result import Result, Runs, Samples

from wanda_lightning import CausalLMModule, prune
from wanda_lightning.core.patterns import NM


def main(*, model: str, nsamples: int = 16, seqlen: int = 512, runs: int = 3, save: str = ""):
    """Measure the choices of `sequential`: seconds and memory."""
    record = Runs(save, "costs")
    calibration = Samples("random tokens", nsamples, seqlen)
    planned = Result(model=Path(model).name, method="forward pass", calibration=calibration)
    language = CausalLMModule(model, dtype="float32").model.eval()
    vocabulary = language.config.get_text_config().vocab_size
    batches = random_windows(vocabulary, nsamples, seqlen, batch_size=4)
    dense = copy.deepcopy(language.state_dict())

    def call(batch):
        return language.base_model(**batch, use_cache=False)

    def forward():
        with torch.no_grad():
            return seconds(lambda: [call(batch) for batch in batches])

    def pruning(**choices):
        language.load_state_dict(dense)
        step = partial(prune, language, batches, 0.5, **choices, forward=call, progress=False)
        return seconds(step)

    record.save(planned, {"peak_mib": cost_of(forward).peak_mib})
    for sequential, passes in (("block", 2), ("layer", 1), ("none", 1)):
        choices = {"sequential": sequential}
        pruning_time = partial(pruning, **choices)
        plain, ours = medians(forward, pruning_time, runs=runs)
        peak = cost_of(pruning_time).peak_mib
        row = replace(planned, method="wanda", sparsity=0.5, case=choices, arguments=choices)
        record.save(row, {"ratio": ours / (passes * plain), "peak_mib": peak})

    # How long the choice of the weights takes, beside their scores.
    weight = torch.randn(4096, 11008)
    norm = torch.rand(11008)
    scores = weight.abs() * norm

    def score():
        weight.abs().mul_(norm)

    def mask():
        NM(2, 4)(scores, 0.5)

    plain, ours = medians(partial(seconds, score), partial(seconds, mask), runs=max(runs, 5))
    masked = Result(
        model="random matrix 4096 x 11008", method="2:4 mask", sparsity=0.5, pattern="2:4"
    )
    record.save(masked, {"ratio": ours / plain})


if __name__ == "__main__":
    run_from_shell(main)
