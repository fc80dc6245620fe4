"""Compare pruning in one process with DDP and FSDP2: seconds, peak memory of a process, and masks.

    python benchmarks/processes.py --save benchmarks/results
    python benchmarks/processes.py --width 1024 --methods fast best --save benchmarks/results

The model is a random Llama in float32 with 8 blocks, pruned to 50 %. Each process has one thread; the processes share
the calibration windows and communicate by gloo. The time is that of the slowest process. The memory is that of the
process with most, beyond the weights that it holds, for pruning and for a plain forward pass over the same windows.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import MIB, PeakMemory, columns, random_llama, random_windows, seconds
from result import Result, Runs, Samples
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

BLOCKS, VOCABULARY = 8, 1024
ALONE, DDP, FSDP2 = "one process", "DDP", "FSDP2"


def build(options: argparse.Namespace, strategy: str, world_size: int) -> Any:
    """Return the model, sharded by FSDP2 if asked for."""
    heads = options.width // 64
    shape = {"hidden": options.width, "mlp": 11 * heads * 16, "layers": BLOCKS, "heads": heads}
    model = random_llama({**shape, "vocabulary": VOCABULARY}, options.length)
    if strategy == FSDP2:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter of which this process may hold a shard."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def held(model: nn.Module) -> float:
    """Return the MiB of the weights that this process holds."""
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def measure_once(
    options: argparse.Namespace, method: str, strategy: str, rank: int, world_size: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Prune a new model; return what was measured in this process, and the zeros of each matrix."""
    model = build(options, strategy, world_size)
    windows = random_windows(VOCABULARY, options.windows, options.length)[rank::world_size]
    config = PruningConfig.from_names(0.5, method=method)
    processes = SINGLE_PROCESS if strategy == ALONE else Processes(dist.group.WORLD)

    def forward(batch: dict[str, Tensor]) -> object:
        return model(**batch, use_cache=False)

    @torch.no_grad()
    def plain() -> None:
        for batch in windows:
            forward(batch)

    def prune() -> None:
        prune_as(config, model, windows, forward=forward, progress=False, processes=processes)

    plain()  # FSDP2 prepares itself in the first call
    with PeakMemory() as plain_memory:
        plain()
    with PeakMemory() as memory:
        duration = seconds(prune)
    peaks = {"peak_mib": memory.peak / MIB, "plain_peak_mib": plain_memory.peak / MIB}
    measured = {"seconds": duration, **peaks, "weights_mib": held(model)}
    return measured, {name: whole(p).detach() == 0 for name, p in model.named_parameters() if p.ndim == 2}


def worker(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    """Measure all methods in one of the processes. The first process writes the results of all into a folder."""
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", f"file://{here / f'group-{world_size}'}", rank=rank, world_size=world_size)
    for method in options.methods:
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.runs):
            for strategy in (ALONE,) if world_size == 1 else (DDP, FSDP2):
                measured, zeros = measure_once(options, method, strategy, rank, world_size)
                every: list[Any] = [None] * world_size
                dist.all_gather_object(every, measured)
                if rank == 0:
                    largest = {key: max(each[key] for each in every) for key in measured}
                    runs.setdefault(strategy, []).append(largest | {"mask_difference": others(here / method, zeros)})
        if rank == 0:
            torch.save(runs, here / f"{method}-{world_size}")
    dist.destroy_process_group()


def others(file: Path, zeros: dict[str, Tensor]) -> float:
    """Return the fraction of mask entries that differ from those of one process, which are saved first."""
    if not file.exists():
        torch.save(zeros, file)
    alone = torch.load(file)
    return sum(int((zeros[name] != alone[name]).sum()) for name in zeros) / sum(each.numel() for each in zeros.values())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Compare pruning in one process with DDP and FSDP2.")
    parser.add_argument("--methods", nargs="+", default=["fast", "balanced", "best"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="of which medians count")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    options = parser.parse_args()
    runs = Runs(options.save, "processes")
    headings = ("processes", "strategy", "seconds", "MiB", "MiB of a forward pass", "masks that differ")
    table = columns(f"width {options.width}", "method", *headings)
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, *options.processes):
            mp.spawn(worker, (world_size, options, folder), nprocs=world_size)
            for method in options.methods:
                found = torch.load(Path(folder) / f"{method}-{world_size}")
                for strategy, each in found.items():
                    measured = {key: statistics.median(run[key] for run in each) for key in each[0]}
                    planned = Result(
                        model="random Llama",
                        method=method,
                        sparsity=0.5,
                        case={"width": options.width, "processes": world_size, "strategy": strategy},
                        arguments={"method": method},
                        calibration=Samples("random tokens", options.windows, options.length),
                    )
                    runs.save(planned, measured)
                    shown = [f"{measured['seconds']:.2f}"]
                    shown += [f"{measured[name]:.0f}" for name in ("peak_mib", "plain_peak_mib")]
                    table.add_row(method, str(world_size), strategy, *shown, f"{measured['mask_difference']:.2e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
