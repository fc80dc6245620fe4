"""Compare pruning in one process with DDP and FSDP2: seconds, peak memory of a process, and masks.

    python benchmarks/processes.py --save benchmarks/results
    python benchmarks/processes.py --width 1024 --methods fast balanced --windows 8 --length 128 --processes 4
    python benchmarks/processes.py --methods fast --processes 4 --blocks 32

The model is a random Llama in float32, with 8 blocks unless `--blocks` says otherwise, pruned to 50 %. Each process has
one thread; the processes share the calibration windows and communicate by gloo. The time is that of the slowest
process. The memory is that of the process that needs most, beyond the weights that it holds, for pruning and for a
plain forward pass over its windows.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import MIB, Batches, PeakMemory, random_llama, random_windows
from result import Result, Runs, Samples
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, local
from wanda_lightning.report import PruningReport

BLOCKS, VOCABULARY = 8, 1024
ALONE, DDP, FSDP2 = "one process", "DDP", "FSDP2"


def build(width: int, blocks: int, length: int, strategy: str, world_size: int) -> Any:
    """Return the model, sharded by FSDP2 if asked for."""
    heads = width // 64
    shape = {"hidden": width, "mlp": 11 * heads * 16, "layers": blocks, "heads": heads, "vocabulary": VOCABULARY}
    model = random_llama(shape, length)
    if strategy == FSDP2:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class Run:
    """One model in one of the processes, and its share of the windows."""

    def __init__(self, model: Any, windows: Batches, method: str, processes: Processes) -> None:
        self.model, self.windows, self.processes = model, windows, processes
        self.config = PruningConfig.from_names(0.5, method=method)

    def forward(self, batch: Mapping[str, Tensor]) -> object:
        """Run one window through the model."""
        return self.model(**batch, use_cache=False)

    @torch.no_grad()
    def plain(self) -> None:
        """Run all windows of this process through the model."""
        for batch in self.windows:
            self.forward(batch)

    def prune(self) -> PruningReport:
        """Prune the model."""
        shared = {"forward": self.forward, "progress": False, "processes": self.processes}
        return prune_as(self.config, self.model, self.windows, **shared)


def worker(rank: int, options: argparse.Namespace, method: str, strategy: str, world_size: int, folder: str) -> None:
    """Measure one run in one of the processes; the first writes the result of all into the folder."""
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", f"file://{here / 'group'}", rank=rank, world_size=world_size)
    processes = SINGLE_PROCESS if strategy == ALONE else Processes(dist.group.WORLD)
    small, few = build(128, BLOCKS, 32, strategy, world_size), random_windows(VOCABULARY, 2 * world_size, 32)
    Run(small, few[rank::world_size], method, processes).prune()  # what the first run loads does not count
    model = build(options.width, options.blocks, options.length, strategy, world_size)
    windows = random_windows(VOCABULARY, options.windows, options.length)
    run = Run(model, windows[rank::world_size], method, processes)
    run.plain()  # FSDP2 prepares itself in the first call
    with PeakMemory() as plain:
        run.plain()
    dist.barrier()
    with PeakMemory(start=plain.start) as memory:
        started = time.perf_counter()
        report = run.prune()
        taken = time.perf_counter() - started
    held = sum(own.numel() * own.element_size() for own in map(local, model.parameters()))
    sizes = {"plain_peak_mib": plain.peak, "peak_mib": memory.peak, "weights_mib": held}
    measured = {"seconds": taken, **{name: size / MIB for name, size in sizes.items()}}
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, measured)
    zeros = {}
    for layer in report.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        zeros[layer.name] = (weight.full_tensor() if isinstance(weight, DTensor) else weight) == 0
    if rank == 0:
        largest = {key: max(each[key] for each in every) for key in measured}
        file = here / f"masks-{method}"
        if strategy == ALONE:
            torch.save(zeros, file)
        else:
            largest |= differences(torch.load(file), zeros)
        torch.save(largest, here / "measured")
    dist.destroy_process_group()


def differences(alone: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fractions of mask entries that differ from those of one process."""
    others = {name: float((zeros[name] != alone[name]).double().mean()) for name in zeros}
    first = next((fraction for fraction in others.values() if fraction), 0.0)
    sizes = [each.numel() for each in zeros.values()]
    mean = sum(size * other for size, other in zip(sizes, others.values(), strict=True)) / sum(sizes)
    return {"mask_difference": mean, "first_mask_difference": first}


def measure(options: argparse.Namespace, method: str, strategy: str, count: int, folder: str) -> dict[str, float]:
    """Measure one run in new processes."""
    (Path(folder) / "group").unlink(missing_ok=True)
    mp.spawn(worker, (options, method, strategy, count, folder), nprocs=count)
    found: dict[str, float] = torch.load(Path(folder) / "measured")
    return found


def main() -> None:
    """Measure each method with each strategy."""
    parser = argparse.ArgumentParser(description="Compare pruning in one process with DDP and FSDP2.")
    parser.add_argument("--methods", nargs="+", default=["fast", "balanced", "best"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="number of runs, of which medians are reported")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    runs = Runs(options.save, "processes")
    deeper = {} if options.blocks == BLOCKS else {"blocks": options.blocks}
    cases = [(1, ALONE), *((count, strategy) for count in options.processes for strategy in (DDP, FSDP2))]
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            for count, strategy in cases:
                found = [measure(options, method, strategy, count, folder) for _ in range(options.runs)]
                measured = {key: statistics.median(run[key] for run in found) for key in found[-1]}
                planned = Result(
                    model="random Llama",
                    method=method,
                    sparsity=0.5,
                    case={"width": options.width, "processes": count, "strategy": strategy, **deeper},
                    arguments={"method": method},
                    calibration=Samples("random tokens", options.windows, options.length),
                )
                runs.save(planned, measured)


if __name__ == "__main__":
    main()
