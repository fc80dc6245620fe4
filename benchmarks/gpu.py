"""Measure on one GPU, in one call of at most 10 minutes: masks beside those of the CPU, seconds, and memory.

    python benchmarks/gpu.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --folder FOLDER --save benchmarks/results
    python benchmarks/gpu.py --device cpu --hidden 64 --mlp 128 --layers 2 --heads 4 --vocabulary 500 --samples 2 \
        --seqlen 32 --model MODEL --folder FOLDER     (tiny, to try it out)

Masks are those of `--model`. The large model is random, in bfloat16, with the shape of Llama 2 7B. `ratio` is in
forward passes of all calibration windows, without the output head, as in pruning. Peak memory includes the model.
Pruning from disk needs 27 GB in `--folder` for a while. Steps run from the most to the least important, none starts
after `--minutes`, and the same command again measures what is missing.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cyclopts import Parameter
from measuring import MIB, PeakMemory, random_llama, random_windows, run_from_shell, seconds
from result import Result, Runs, Samples
from torch import Tensor

from wanda_lightning import CausalLMModule, prune, prune_from_disk
from wanda_lightning.models import find_layers

SMALL = (8, 512)  # windows and tokens for the masks
Measured = dict[str, float]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this program. The numbers are those of the large model and its windows."""

    model: str
    folder: str
    device: str = "cuda"
    hidden: int = 4096
    mlp: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    samples: int = 128
    seqlen: int = 2048
    minutes: float = 8
    save: str | None = None


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the fraction of the entries of two models' masks that differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(mask.numel() for mask in one.values())


def pruned(options: Options, method: str, dtype: str, device: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return the masks of `--model` by layer, and the errors of the layers' outputs that are known."""
    model = CausalLMModule(options.model, dtype=dtype).model.eval().to(device)
    windows = random_windows(model.config.get_text_config().vocab_size, *SMALL)
    report = prune(model, windows, 0.5, method=method, progress=False)
    masks = {layer.name: (layer.weight != 0).cpu() for layer in find_layers(model).layers}
    return masks, [layer.error for layer in report.layers if layer.error is not None]


def against_cpu(options: Options, method: str, dtype: str) -> Measured:
    """Compare masks and errors with those of the CPU."""
    (cpu, plain), (own, errors) = (pruned(options, method, dtype, device) for device in ("cpu", options.device))
    known = {"output_error": fmean(errors), "plain_output_error": fmean(plain)} if errors else {}
    return {"mask_difference": difference(cpu, own), **known}


class Large:
    """The random model, and its calibration windows."""

    def __init__(self, options: Options, plain: Result | None) -> None:
        self.options, self.plain = options, plain.measured["seconds"] if plain else 0.0
        self.batches = random_windows(options.vocabulary, options.samples, options.seqlen)

    def build(self) -> Any:
        """Build the model on the device."""
        return random_llama(vars(self.options), self.options.seqlen, "bfloat16", self.options.device)

    def measured(self, step: Callable[[], object]) -> Measured:
        """Return the seconds, also in forward passes, and the peak memory."""
        with PeakMemory(self.options.device) as memory:
            took = seconds(step)
        relative = {"plain_seconds": self.plain, "ratio": took / self.plain} if self.plain else {}
        return {"seconds": took, **relative, "device_mib": (memory.start + memory.peak) / MIB}

    @torch.no_grad()
    def forward(self) -> Measured:
        """Run all windows through the blocks, after a warm-up with one."""
        body = self.build().base_model

        def run(count: int) -> None:
            for batch in self.batches[:count]:
                body(batch["input_ids"].to(body.device), use_cache=False)

        run(1)
        measured = self.measured(lambda: run(len(self.batches)))
        self.plain = measured["seconds"]
        return measured

    def prune(self, **choices: str) -> Measured:
        """Prune in memory."""
        model = self.build()
        return self.measured(lambda: prune(model, self.batches, 0.5, **choices, progress=False))

    def from_disk(self, **choices: str) -> Measured:
        """Write the dense model, which is not timed, and prune it from disk."""
        with TemporaryDirectory(dir=self.options.folder) as folder:
            dense, output = Path(folder) / "dense", Path(folder) / "pruned"
            self.build().save_pretrained(dense)
            arguments = {**choices, "device": self.options.device, "progress": False}
            return self.measured(lambda: prune_from_disk(dense, output, self.batches, 0.5, **arguments))


def main(options: Options) -> None:
    """Measure the steps that are not saved yet, while there is time."""
    runs, until = Runs(options.save, "gpu"), time.monotonic() + 60 * options.minutes
    name, tokens = f"random Llama {options.layers} x {options.hidden}", (options.samples, options.seqlen)
    passes = Result(model=name, method="forward pass", calibration=Samples("random tokens", *tokens))
    large = Large(options, runs.saved(passes))

    def run(model: str, method: str, measure: Callable[[], Measured], samples: tuple[int, int], **case: str) -> None:
        planned = Result(
            model=model, method=method, sparsity=0.5, case=case, calibration=Samples("random tokens", *samples)
        )
        if time.monotonic() < until:
            runs(planned, measure)
        else:
            print(f"not measured: {planned.name}")

    def masks(*methods: str) -> None:
        for method in methods:
            for dtype in ("float32", "bfloat16"):
                step = partial(against_cpu, options, method, dtype)
                run(Path(options.model).name, method, step, SMALL, dtype=dtype)

    masks("wanda", "balanced")
    runs(passes, large.forward)
    for method, order in (("wanda", "layer"), ("wanda", "block"), ("balanced", "layer"), ("sparsegpt", "layer")):
        run(name, method, partial(large.prune, method=method, sequential=order), tokens, sequential=order)
    run(name, "wanda", partial(large.from_disk, method="wanda", sequential="layer"), tokens, source="disk")
    run(name, "best", partial(large.prune, method="best"), tokens)
    masks("sparsegpt", "best")


if __name__ == "__main__":
    run_from_shell(main)
