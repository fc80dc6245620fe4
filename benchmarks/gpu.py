"""Measure on one GPU, in one call of at most 10 minutes: masks beside those of the CPU, seconds, and memory.

    python benchmarks/gpu.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --folder FOLDER --save benchmarks/results
    python benchmarks/gpu.py --device cpu --blocks 1 --samples 2 --seqlen 32 --model MODEL --folder FOLDER  (trial)

Masks are those of `--model`. The large model is random, in bfloat16, with the shape of Llama 2 7B. The
forward pass covers all calibration windows, without the output head, as in pruning. Peak memory includes the model.
Pruning from disk needs 27 GB in `--folder` for a while. Steps run from the most to the least important, none starts
after `--minutes`, and the same command again measures what is missing.
"""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from cyclopts import Parameter
from measuring import cost_of, random_model, random_windows, run_from_shell
from result import Result, Runs, Samples
from sizes import SHAPES

from wanda_lightning import CausalLMModule, prune, prune_from_disk
from wanda_lightning.models import find_layers

SMALL = (8, 512)  # windows and tokens for the masks
# Methods and `sequential` of the runs in memory, the most important first.
MEMORY = (
    ("wanda", "layer"),
    ("wanda", "block"),
    ("balanced", "layer"),
    ("sparsegpt", "layer"),
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this program."""

    model: str
    folder: str
    device: str = "cuda"
    blocks: int = 32
    samples: int = 128
    seqlen: int = 2048
    minutes: float = 8
    save: str = ""


def pruned(options, method, dtype, device):
    """Return the masks of all layers of `--model`, and the errors of the layers' outputs that are known."""
    model = CausalLMModule(options.model, dtype=dtype).model.eval().to(device)
    windows = random_windows(model.config.get_text_config().vocab_size, *SMALL)
    report = prune(model, windows, 0.5, method=method, progress=False)
    masks = torch.cat([(layer.weight != 0).flatten().cpu() for layer in find_layers(model).layers])
    return masks, [layer.error for layer in report.layers if layer.error is not None]


def against_cpu(options, method, dtype):
    """Compare masks and errors with those of the CPU."""
    masks_cpu, errors_cpu = pruned(options, method, dtype, "cpu")
    masks, errors = pruned(options, method, dtype, options.device)
    measured = {"mask_difference": int((masks_cpu != masks).sum()) / len(masks_cpu)}
    if errors:
        measured["output_error"] = fmean(errors)
        measured["plain_output_error"] = fmean(errors_cpu)
    return measured


def costs(step, device):
    """Return the seconds and the peak memory."""
    cost = cost_of(step, device)
    return {"seconds": cost.seconds, "device_mib": cost.start_mib + cost.peak_mib}


@torch.no_grad()
def forward(build, batches, device):
    """Run all windows through the blocks, after a warm-up with one."""
    body = build().base_model

    def run(count):
        for batch in batches[:count]:
            body(batch["input_ids"].to(device), use_cache=False)

    run(1)
    return costs(lambda: run(len(batches)), device)


def in_memory(build, batches, device, **choices):
    """Prune in memory."""
    step = partial(prune, build(), batches, 0.5, **choices, progress=False)
    return costs(step, device)


def from_disk(build, batches, device, parent):
    """Write the dense model, which is not timed, and prune it from disk."""
    choices = {"method": "wanda", "sequential": "layer", "device": device, "progress": False}
    with TemporaryDirectory(dir=parent) as folder:
        dense = f"{folder}/dense"
        build().save_pretrained(dense)
        step = partial(prune_from_disk, dense, f"{folder}/pruned", batches, 0.5, **choices)
        return costs(step, device)


def main(options: Options):
    """Measure the steps that are not saved yet, while there is time."""
    runs = Runs(options.save, "gpu")
    until = time.monotonic() + 60 * options.minutes
    device = options.device
    config = copy.deepcopy(SHAPES["Llama 2 7B"])
    config.num_hidden_layers = options.blocks
    build = partial(random_model, config, torch.bfloat16, device)
    batches = random_windows(config.vocab_size, options.samples, options.seqlen)
    large = (build, batches, device)
    samples = Samples("random tokens", options.samples, options.seqlen)
    case = {"blocks": options.blocks}
    passes = Result(model="Llama 2 7B", method="forward pass", case=case, calibration=samples)
    planned = replace(passes, sparsity=0.5)
    samples = Samples("random tokens", *SMALL)
    small = replace(planned, model=Path(options.model).name, calibration=samples)

    def masks(*methods):
        for method, dtype in product(methods, ("float32", "bfloat16")):
            row = replace(small, method=method, case={"dtype": dtype})
            steps.append((row, partial(against_cpu, options, method, dtype)))

    steps = []
    masks("wanda", "balanced")
    steps.append((passes, partial(forward, *large)))
    for method, sequential in MEMORY:
        row = replace(planned, method=method, case={**case, "sequential": sequential})
        choices = {"method": method, "sequential": sequential}
        steps.append((row, partial(in_memory, *large, **choices)))
    disk = replace(planned, method="wanda", case={**case, "source": "disk"})
    steps.append((disk, partial(from_disk, *large, options.folder)))
    best = replace(planned, method="best")
    steps.append((best, partial(in_memory, *large, method="best")))
    masks("sparsegpt", "best")

    for row, measure in steps:
        if time.monotonic() < until:
            runs(row, measure)
        else:
            print(f"not measured: {row.name}")


if __name__ == "__main__":
    run_from_shell(main)
