"""Measure what pruning costs, as ratios to a plain forward pass of the same batches in the same process.

    python benchmarks/pruning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results
    python benchmarks/pruning.py --model timm:vit_small_patch16_224 --nsamples 128 --batch_size 32

Each number is a median over `--runs` after a warm-up, and the two sides of a ratio run alternately. Weights are
restored between runs, which is not timed.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, PeakMemory, medians, seconds
from result import Result, Runs, Samples
from torch import nn

from wanda_lightning import CausalLMModule, ImageClassifierModule, prune
from wanda_lightning.core.patterns import NM

Batches = list[dict[str, torch.Tensor]]


def load(options: argparse.Namespace) -> tuple[nn.Module, Batches, Callable[[object], object]]:
    """Return the model, random batches, and the module for a forward pass."""
    generator = torch.Generator().manual_seed(0)
    if options.model.startswith("timm:"):
        model = ImageClassifierModule(options.model, pretrained=False).model.eval()  # time does not depend on weights
        pixels = torch.randn(options.nsamples, *model.pretrained_cfg["input_size"], generator=generator)
        return model, [{"x": part} for part in pixels.split(options.batch_size)], model
    text = CausalLMModule(options.model, dtype="float32")
    vocabulary = text.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (options.nsamples, options.seqlen), generator=generator)
    return text.model.eval(), [{"input_ids": part} for part in ids.split(options.batch_size)], text.model.base_model


def main() -> None:
    """Measure the choices of `sequential`, and taking hidden units out: seconds and memory."""
    parser = argparse.ArgumentParser(description="Measure what pruning costs, in forward passes.")
    parser.add_argument("--model", required=True, help="hub id, folder, .gguf file or timm:NAME with random weights")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    model, batches, body = load(options)
    dense = copy.deepcopy(model.state_dict())

    def forward() -> float:
        with torch.no_grad():
            return seconds(lambda: [_call(body, batch) for batch in batches])

    def pruning(choices: dict[str, Any]) -> Callable[[], float]:
        def run() -> float:
            model.load_state_dict(dense)
            return seconds(lambda: prune(model, batches, **choices, forward=one, progress=False))

        def one(batch: dict[str, torch.Tensor]) -> object:
            return _call(body, batch)

        return run

    def measure(own: Result, choices: dict[str, Any], passes: int) -> None:
        plain, ours = medians(forward, pruning(choices), runs=options.runs)
        ratio, peak = ours / (passes * plain), _peak(pruning(choices))
        runs.save(own, {"seconds": ours, "plain_seconds": passes * plain, "ratio": ratio, "peak_mib": peak})

    runs, calibration = Runs(options.save, "costs"), Samples("random tokens", options.nsamples, options.seqlen)
    planned = Result(model=Path(options.model).name, method="forward pass", calibration=calibration)
    runs.save(planned, {"peak_mib": _peak(forward)})
    for sequential, passes in (("block", 2), ("layer", 1), ("none", 1)):
        choice = {"sequential": sequential}
        own = replace(planned, method="wanda", sparsity=0.5, case=choice, arguments=choice)
        measure(own, {"sparsity": 0.5, **choice}, passes)
    units = {"sparsity": 0.25, "pattern": "structured"}
    measure(replace(planned, method="structured", **units), units, 1)
    plain, ours = _seconds_of_mask(max(options.runs, 5))
    mask = Result(model="random matrix 4096 x 11008", method="2:4 mask", sparsity=0.5, pattern="2:4")
    runs.save(mask, {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain})


def _seconds_of_mask(runs: int) -> list[float]:
    """Return the median seconds of Wanda's scores, and of their 2:4 mask."""
    weight, norm = torch.randn(4096, 11008), torch.rand(11008)
    scores = weight.abs() * norm
    score, mask = (lambda: weight.abs().mul_(norm)), (lambda: NM(2, 4)(scores, 0.5))
    return medians(partial(seconds, score), partial(seconds, mask), runs=runs)


def _peak(step: Callable[[], object]) -> float:
    """Return the peak memory of a step above the loaded model, in MiB."""
    with PeakMemory() as memory:
        step()
    return memory.peak / MIB


def _call(body: Callable[..., object], batch: dict[str, torch.Tensor]) -> object:
    return body(**batch, use_cache=False) if "input_ids" in batch else body(**batch)


if __name__ == "__main__":
    main()
