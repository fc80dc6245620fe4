"""Measure on one GPU, in one call of at most 10 minutes, what the other benchmarks measure on a CPU.

    python benchmarks/gpu.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --folder FOLDER --save benchmarks/results
    python benchmarks/gpu.py --device cpu --hidden 64 --mlp 128 --layers 2 --heads 4 --vocabulary 500 --samples 2 \
        --seqlen 32 --small_samples 2 --small_seqlen 32 --folder FOLDER     (tiny, to try it out)

The small model is that of `--model`, or a random one. The large model is random, in bfloat16, with the shape of Llama 2
7B. `ratio` is in forward passes of all calibration windows, without the output head, as in pruning. Peak memory
includes the model. Pruning from disk needs `--folder`, and 27 GB there for a while.

Steps run from the most to the least important, and each is saved as soon as it is measured. A step starts only if its
expected duration is left of `--minutes`. Called again with the same `--save`, the script measures what is missing.
"""

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from finetuning import ADAPTERS, Training
from measuring import MIB, Batches, PeakMemory, random_llama, random_windows, seconds
from result import Result, Runs, Samples
from steps import Step, measure_in_turn
from torch import Tensor, distributed
from torch.multiprocessing import start_processes

from wanda_lightning import CausalLMModule, Unstructured, Wanda, prune, prune_from_disk
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.training.held_zeros import prunable_layers

SPARSITY = 0.5
LARGE = {"hidden": 4096, "mlp": 11008, "layers": 32, "heads": 32, "vocabulary": 32000}
SMALL = {"hidden": 512, "mlp": 1408, "layers": 8, "heads": 8, "vocabulary": 32000}
COUNTS = {"samples": 128, "seqlen": 2048, "small_samples": 8, "small_seqlen": 512, "runs": 5}
PATIENCE = timedelta(minutes=3)  # with a process that the other one waits for

Measured = dict[str, float]


@dataclass(frozen=True)
class Recorded(Wanda):
    """Wanda that keeps a copy of all scores, in the order of the layers."""

    scores: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, weight: Tensor, inputs: Any) -> Tensor:
        """Score, and keep a copy."""
        found = super().__call__(weight, inputs)
        self.scores.append(found.to("cpu", copy=True))
        return found


class Pruned(NamedTuple):
    """Masks by layer; the scores, if the method is Wanda; the errors of the layers' outputs, if they are known."""

    masks: dict[str, Tensor]
    scores: list[Tensor]
    errors: list[float]


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the fraction of the entries of two models' masks that differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(mask.numel() for mask in one.values())


def near_ties(one: list[Tensor], other: list[Tensor]) -> Measured:
    """Return by how much scores differ, and how close to the threshold of a row they are where masks differ."""
    changes, distances = [], []
    for first, second in zip(one, other, strict=True):
        keep, other_keep = (Unstructured()(scores, SPARSITY) for scores in (first, second))
        threshold = first.masked_fill(keep, 0).amax(dim=1, keepdim=True)  # the largest score that is pruned
        distances.append(((first - threshold).abs() / threshold)[keep != other_keep])
        changes.append(((second - first).abs() / first)[first > 0].mean())
    ties = torch.cat(distances)
    change = torch.stack(changes).mean()
    return {"score_difference": float(change), "tie_distance": float(ties.sum()) / max(1, len(ties))}


class Small:
    """The language model of `--model`, or a random one no larger than `SMALL`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dense = options, dict[str, Any]()

    def plan(self, method: str, samples: int, **case: str) -> Result:
        """Describe a run."""
        name = Path(self.options.model).name if self.options.model else "small random Llama"
        tokens = Samples("random tokens", samples, self.options.small_seqlen)
        return Result(model=name, method=method, sparsity=SPARSITY, case=case, calibration=tokens)

    def step(self, method: str, dtype: str) -> Step:
        """Compare masks with those of the CPU."""
        planned = self.plan(method, self.options.small_samples, dtype=dtype, compared="CPU")
        return Step(planned, partial(self.against_cpu, method, dtype), lambda: 30)

    def load(self, dtype: str, device: str) -> Any:
        """Return a new copy of the dense model."""
        if dtype not in self.dense and self.options.model:
            self.dense[dtype] = CausalLMModule(self.options.model, dtype=dtype).model.eval()
        elif dtype not in self.dense:
            shape = {name: min(size, getattr(self.options, name)) for name, size in SMALL.items()}
            self.dense[dtype] = random_llama(shape, self.options.small_seqlen, dtype, "cpu")
        return copy.deepcopy(self.dense[dtype]).to(device)

    def pruned(self, method: str, dtype: str, device: str, processes: Processes = SINGLE_PROCESS) -> Pruned:
        """Prune the model with the windows of this process."""
        model, wanda = self.load(dtype, device), Recorded()
        vocabulary = model.config.get_text_config().vocab_size
        windows = random_windows(vocabulary, self.options.small_samples, self.options.small_seqlen)
        chosen: dict[str, Any] = {"method": method, **({"criterion": wanda} if method == "wanda" else {})}
        config, own = PruningConfig.from_names(SPARSITY, **chosen), windows[processes.rank :: processes.world_size]
        report = prune_as(config, model, own, progress=False, processes=processes)
        masks = {layer.name: (layer.weight != 0).cpu() for layer in prunable_layers(model)}
        return Pruned(masks, wanda.scores, [layer.error for layer in report.layers if layer.error is not None])

    def against_cpu(self, method: str, dtype: str) -> Measured:
        """Compare the masks with those of the CPU."""
        cpu, own = (self.pruned(method, dtype, device) for device in ("cpu", self.options.device))
        measured = {"mask_difference": difference(cpu.masks, own.masks)}
        if cpu.scores:
            measured |= near_ties(cpu.scores, own.scores)
        if cpu.errors:
            measured |= {"output_error": fmean(own.errors), "plain_output_error": fmean(cpu.errors)}
        return measured

    def two_processes(self) -> Measured:
        """Compare the masks of two processes, which share the device and the windows, with those of one."""
        with tempfile.TemporaryDirectory() as folder:
            start_processes(half, (self.options, folder), 2, start_method="forkserver")
            both = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
        alone = self.pruned("wanda", "float32", self.options.device).masks
        return {"mask_difference": max(difference(alone, masks) for masks in both)}

    @cached_property
    def training(self) -> Training:
        """The model in float32 on the device, pruned, and tokens to train it on."""
        return Training(self.load("float32", self.options.device), 4, self.options.small_seqlen, self.options.runs)

    def training_steps(self) -> Iterator[Step]:
        """Train with zeros that are kept, and without."""
        planned = replace(self.plan("KeepZeros", 4), arguments={"method": "magnitude"})
        yield Step(planned, lambda: self.training.keep_zeros(), lambda: 20)
        for name in ADAPTERS:
            lora = replace(planned, method="KeepZerosLoraConfig", case={"adapters": name})
            yield Step(lora, lambda name=name: self.training.adapters(name), lambda: 20)


def half(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Prune in one of two processes, and save the masks. Gloo, since NCCL refuses two processes on one GPU."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": 2, "timeout": PATIENCE}
    distributed.init_process_group("gloo", **meeting)
    masks = Small(options).pruned("wanda", "float32", options.device, Processes(distributed.group.WORLD)).masks
    torch.save(masks, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


class Large:
    """A random model with the shape that the options give, in bfloat16."""

    def __init__(self, options: argparse.Namespace, runs: Runs) -> None:
        self.options = options
        saved = runs.saved(self.plan("forward pass"))
        self.plain = saved.measured["seconds"] if saved else 0.0  # 0.0: not measured

    def plan(self, method: str, **case: str) -> Result:
        """Describe a run."""
        options, sparsity = self.options, 0.0 if method == "forward pass" else SPARSITY
        name, tokens = f"random Llama {options.layers} x {options.hidden}", (options.samples, options.seqlen)
        return Result(model=name, method=method, sparsity=sparsity, case=case, calibration=Samples("random", *tokens))

    def step(self, passes: float, **choices: str) -> Step:
        """Prune in memory, in about so many forward passes."""
        return Step(self.plan(**choices), partial(self.prune, **choices), lambda: 10 + passes * self.plain)

    def from_disk_step(self) -> Step:
        """Prune from disk."""
        choices = {"method": "wanda", "sequential": "layer"}
        obstacle = "" if self.options.folder else "pruning from disk needs --folder"
        planned = self.plan(**choices, source="disk")
        return Step(planned, partial(self.prune_from_disk, **choices), lambda: 60 + 4 * self.plain, obstacle)

    def build(self) -> Any:
        """Build the model on the device."""
        return random_llama(vars(self.options), self.options.seqlen, "bfloat16", self.options.device)

    @cached_property
    def batches(self) -> Batches:
        """The calibration windows."""
        return random_windows(self.options.vocabulary, self.options.samples, self.options.seqlen)

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

        def run(batches: Batches) -> None:
            for batch in batches:
                body(batch["input_ids"].to(body.device), use_cache=False)

        run(self.batches[:1])
        measured = self.measured(lambda: run(self.batches))
        self.plain = measured["seconds"]
        return measured

    def prune(self, **choices: str) -> Measured:
        """Prune in memory."""
        model = self.build()
        return self.measured(lambda: prune(model, self.batches, SPARSITY, **choices, progress=False))

    def prune_from_disk(self, **choices: str) -> Measured:
        """Write the dense model, which is not timed, and prune it from disk."""
        with tempfile.TemporaryDirectory(dir=self.options.folder) as folder:
            dense, output = Path(folder) / "dense", Path(folder) / "pruned"
            self.build().save_pretrained(dense)
            arguments = {**choices, "device": self.options.device, "progress": False}
            return self.measured(lambda: prune_from_disk(dense, output, self.batches, SPARSITY, **arguments))


def all_steps(small: Small, large: Large) -> Iterator[Step]:
    """Yield all steps, the most important first."""
    dtypes = ("float32", "bfloat16")
    yield from (small.step(method, dtype) for method in ("wanda", "balanced") for dtype in dtypes)
    yield Step(large.plan("forward pass"), large.forward, lambda: 30)
    yield large.step(2, method="wanda", sequential="layer")
    yield large.step(4, method="wanda", sequential="block")
    yield from small.training_steps()
    planned = small.plan("wanda", small.options.small_samples, dtype="float32", compared="one process")
    yield Step(planned, small.two_processes, lambda: 60)
    yield large.step(15, method="balanced")
    yield large.from_disk_step()
    yield large.step(15, method="sparsegpt")
    yield large.step(25, method="best")
    yield from (small.step(method, dtype) for method in ("sparsegpt", "best") for dtype in dtypes)


def main() -> int:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(description="Measure on one GPU.")
    parser.add_argument("--model", help="hub id, folder or .gguf file; by default a small random model")
    parser.add_argument("--device", default="cuda")
    for name, default in (LARGE | COUNTS).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=9.5, help="for the steps; imports come first")
    parser.add_argument("--folder", help="where the large model is written for a while, to prune it from disk")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    if torch.device(options.device).type != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device {options.device} needs an accelerator, but PyTorch finds none. Use --device cpu.")
    runs = Runs(options.save, "gpu")
    return measure_in_turn(all_steps(Small(options), Large(options, runs)), runs, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
