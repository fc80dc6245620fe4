"""Measure what pruning costs, as ratios to a plain forward pass of the same batches in the same process.

    python benchmarks/pruning.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --save benchmarks/results
    python benchmarks/pruning.py --model timm:vit_small_patch16_224 --nsamples 128 --batch_size 32

Each number is a median over `--runs` after a warm-up, and the two sides of a ratio run alternately. Weights are
restored between runs, which is not timed.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measuring import Batches, medians, peak_mib, run_from_shell, seconds
from result import Result, Runs, Samples
from torch import nn

from wanda_lightning import CausalLMModule, ImageClassifierModule, prune
from wanda_lightning.core.patterns import NM


def load(
    name: str, nsamples: int, seqlen: int, batch_size: int
) -> tuple[nn.Module, Batches, Callable[[object], object]]:
    """Return the model, random batches, and the module for a forward pass."""
    generator = torch.Generator().manual_seed(0)
    if name.startswith("timm:"):
        model = ImageClassifierModule(name, pretrained=False).model.eval()  # time does not depend on weights
        pixels = torch.randn(nsamples, *model.pretrained_cfg["input_size"], generator=generator)
        return model, [{"x": part} for part in pixels.split(batch_size)], model
    text = CausalLMModule(name, dtype="float32")
    vocabulary = text.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (nsamples, seqlen), generator=generator)
    batches = [{"input_ids": part, "use_cache": False} for part in ids.split(batch_size)]
    return text.model.eval(), batches, text.model.base_model


def main(
    *, model: str, nsamples: int = 16, seqlen: int = 512, batch_size: int = 4, runs: int = 3, save: str | None = None
) -> None:
    """Measure the choices of `sequential`: seconds and memory."""
    record, calibration = Runs(save, "costs"), Samples("random tokens", nsamples, seqlen)
    planned = Result(model=Path(model).name, method="forward pass", calibration=calibration)
    model, batches, body = load(model, nsamples, seqlen, batch_size)
    dense = copy.deepcopy(model.state_dict())

    def call(batch: dict[str, torch.Tensor]) -> object:
        return body(**batch)

    def forward() -> float:
        with torch.no_grad():
            return seconds(lambda: [call(batch) for batch in batches])

    def pruning(sequential: str) -> float:
        model.load_state_dict(dense)
        return seconds(lambda: prune(model, batches, 0.5, sequential=sequential, forward=call, progress=False))

    record.save(planned, {"peak_mib": peak_mib(forward)})
    for sequential, passes in (("block", 2), ("layer", 1), ("none", 1)):
        plain, ours = medians(forward, partial(pruning, sequential), runs=runs)
        ratio, peak = ours / (passes * plain), peak_mib(partial(pruning, sequential))
        choice = {"sequential": sequential}
        own = replace(planned, method="wanda", sparsity=0.5, case=choice, arguments=choice)
        record.save(own, {"seconds": ours, "plain_seconds": passes * plain, "ratio": ratio, "peak_mib": peak})
    plain, ours = _seconds_of_mask(max(runs, 5))
    mask = Result(model="random matrix 4096 x 11008", method="2:4 mask", sparsity=0.5, pattern="2:4")
    record.save(mask, {"seconds": ours, "plain_seconds": plain, "ratio": ours / plain})


def _seconds_of_mask(runs: int) -> list[float]:
    """Return the median seconds of Wanda's scores, and of their 2:4 mask."""
    weight, norm = torch.randn(4096, 11008), torch.rand(11008)
    scores = weight.abs() * norm
    score, mask = (lambda: weight.abs().mul_(norm)), (lambda: NM(2, 4)(scores, 0.5))
    return medians(partial(seconds, score), partial(seconds, mask), runs=runs)


if __name__ == "__main__":
    run_from_shell(main)
