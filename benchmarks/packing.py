"""Measure packing: sizes of a pruned model, and speed against safetensors and zstd.

    python benchmarks/packing.py sizes FOLDER --model SmolLM2.gguf --save benchmarks/results  (1 GB of disk)
    python benchmarks/packing.py speed FOLDER --megabytes 1000 --save benchmarks/results  (twice this on disk)
    PYTHONPATH=tests python benchmarks/packing.py families FOLDER

`sizes` prunes the model by magnitude in bfloat16, which needs no data: how many weights are kept decides the size, not
which. It packs the model, and loads it again to compare every weight. `speed` packs and unpacks one matrix in memory,
and folders on a disk that the operating system caches, in one thread. All speeds are bytes of dense weights per second.
Both compare with zstd at its default level (pip install zstandard). `families` packs one tiny model of every family of
language models in transformers, and compares what is loaded with the dense model.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from measuring import medians, seconds
from result import Result, Runs
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zstandard import ZstdCompressor, ZstdDecompressor

from wanda_lightning import CausalLMModule, pack, prune, unpack
from wanda_lightning.cli.pack import zstd_size
from wanda_lightning.packing import codec

PATTERNS: Mapping[str, dict] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
}
WIDTH = 4096
STEPS = ("choose", "pack", "unpack", "pack_folder", "unpack_folder", "load", "zstd", "unzstd")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "speed", "families"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="for sizes")
    parser.add_argument("--megabytes", type=int, default=512, help="for speed")
    parser.add_argument("--runs", type=int, default=3, help="for speed")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, for a machine that does other work, too")
    parser.add_argument("--save", help="FOLDER in which each run becomes a file")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "sizes":
        sizes(arguments.folder, arguments.model, Runs(arguments.save, "packing"))
    elif arguments.what == "families":
        families(arguments.folder)
    else:
        clock = cpu_seconds if arguments.cpu else seconds
        runs = Runs(arguments.save, "packing")
        speed(arguments.folder, arguments.megabytes * 10**6, arguments.runs, clock, runs)


def sizes(folder: Path, name: str, runs: Runs) -> None:
    """Print the sizes of a model that is pruned to each pattern."""
    table = Table(title=f"{name} in bfloat16: bytes after / bytes before", title_justify="left")
    for heading in ("pattern", "packed matrices", "whole file", "zstd, whole file", "code", "same after loading"):
        table.add_column(heading, justify="left" if heading == "pattern" else "right")
    for pattern, choices in PATTERNS.items():
        module = CausalLMModule(name, dtype="bfloat16")
        prune(module.model, [], method="magnitude", progress=False, **choices)
        for place in ("dense", "packed"):
            shutil.rmtree(folder / place, ignore_errors=True)
        module.save_pretrained(folder / "dense")
        size = pack(folder / "dense", folder / "packed")
        dense, packed = (AutoModelForCausalLM.from_pretrained(folder / place) for place in ("dense", "packed"))
        pairs = zip(dense.state_dict().values(), packed.state_dict().values(), strict=True)
        is_same = all(a.view(torch.int16).equal(b.view(torch.int16)) for a, b in pairs)
        codes = ", ".join(sorted(set(size.codes.values())))
        planned = planned_run(Path(name).name, pattern, "bfloat16", {"method": "magnitude", "code": codes})
        measured = {
            "packed_matrices": size.packed_matrices / size.dense_matrices,
            "packed_file": size.packed / size.dense,
            "zstd_file": zstd_size(folder / "dense") / size.dense,
        }
        ratios = [f"{ratio:.4f}" for ratio in runs.save(planned, measured).measured.values()]
        table.add_row(pattern, *ratios, codes, "yes" if is_same else "NO")
    Console(width=120).print(table)


def planned_run(model: str, pattern: str, dtype: str, arguments: dict[str, str]) -> Result:
    """Describe a run."""
    choices = PATTERNS[pattern]
    kind, case = choices.get("pattern", "unstructured"), {"dtype": dtype}
    described = {"sparsity": choices["sparsity"], "pattern": kind, "case": case, "arguments": arguments}
    return Result(model=model, method="packed", **described)


def speed(folder: Path, size: int, repeats: int, clock: Callable, runs: Runs) -> None:
    """Print how fast weights are packed and unpacked."""
    table = Table(title="Sizes relative to dense, and GB of dense weights per second, one thread", title_justify="left")
    columns = [
        "",
        "packed size",
        "zstd size",
        "choose code",
        "pack",
        "unpack",
        "pack folder",
        "unpack folder",
        "load dense file",
        "zstd",
        "unzstd",
    ]
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left")
    for dtype in (torch.bfloat16, torch.float32):
        for pattern in PATTERNS:
            *ratios, clocks = measured(folder, size // dtype.itemsize, dtype, pattern, repeats, clock)
            name = str(dtype).removeprefix("torch.")
            speeds = {f"{step}_gb_per_second": size / 1e9 / each for step, each in zip(STEPS, clocks, strict=True)}
            numbers = {"packed_matrices": ratios[0], "zstd_file": ratios[1], **speeds}
            runs.save(planned_run("random matrix", pattern, name, {}), numbers)
            rates = [f"{size / 1e9 / elapsed:.2f}" for elapsed in clocks]
            sizes = [f"{ratio:.4f}" for ratio in ratios]
            table.add_row(f"{name} {pattern}", *sizes, *rates)
    Console(width=160).print(table)


def measured(
    folder: Path, number: int, dtype: torch.dtype, pattern: str, runs: int, clock: Callable
) -> tuple[float, float, list[float]]:
    """Return the sizes when packed and compressed, relative to dense, and the seconds of each step."""
    rows = number // WIDTH
    matrix = sparse(rows, dtype, pattern)
    words = matrix.view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy().view(f"u{dtype.itemsize}").ravel()
    code, _ = codec.cheapest(words, matrix.shape)
    packed = codec.pack(words, matrix.shape, code)
    for place in ("dense", "packed", "again"):
        shutil.rmtree(folder / place, ignore_errors=True)
    (folder / "dense").mkdir()
    save_file({"weight": matrix}, folder / "dense" / "model.safetensors")
    pack(folder / "dense", folder / "packed")
    sample = words[: 32 * 10**6 // words.itemsize].tobytes()  # zstd is slow, and its speed is the same on a part
    compressed, share = ZstdCompressor().compress(sample), len(sample) / words.nbytes
    steps = [
        lambda: codec.cheapest(words, matrix.shape),
        lambda: codec.pack(words, matrix.shape, code),
        lambda: codec.unpack(*packed, matrix.shape, code),
        lambda: in_new_folder(pack, folder / "dense", folder / "again"),
        lambda: in_new_folder(unpack, folder / "packed", folder / "again"),
        lambda: load_file(folder / "dense" / "model.safetensors")["weight"].view(torch.int8).count_nonzero(),
        lambda: ZstdCompressor().compress(sample),
        lambda: ZstdDecompressor().decompress(compressed),
    ]
    times = medians(*(lambda step=step: clock(step) for step in steps), runs=runs)
    packed_size = sum(piece.nbytes for piece in packed) / words.nbytes
    return packed_size, len(compressed) / len(sample), [*times[:-2], *(elapsed / share for elapsed in times[-2:])]


def families(folder: Path) -> None:
    """Print how many families load packed as they load dense, and why the others do not."""
    from support.tiny import tiny

    transformers.logging.set_verbosity_error()
    outcomes: dict[str, str] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for place in ("dense", "packed"):
            shutil.rmtree(folder / place, ignore_errors=True)
        try:
            model = AutoModelForCausalLM.from_config(tiny(type(AutoConfig.for_model(name))))
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data[torch.rand(parameter.shape) < 0.6] = 0
            model.save_pretrained(folder / "dense")
            dense = AutoModelForCausalLM.from_pretrained(folder / "dense").state_dict()
        except Exception as error:  # whatever transformers raises
            outcomes[name] = f"not built: {str(error)[:80]!r}"
            continue
        pack(folder / "dense", folder / "packed")
        try:
            packed = AutoModelForCausalLM.from_pretrained(folder / "packed").state_dict()
        except ValueError as error:
            outcomes[name] = f"refused: {error}"
            continue
        is_same = dense.keys() == packed.keys() and all(dense[key].equal(packed[key]) for key in dense)
        outcomes[name] = "same" if is_same else "DIFFERENT"
    for name, outcome in outcomes.items():
        if outcome != "same":
            print(f"{name}: {outcome}")
    print(f"{list(outcomes.values()).count('same')} of {len(outcomes)} families load as they do from dense files")


def sparse(rows: int, dtype: torch.dtype, pattern: str) -> torch.Tensor:
    """Return a random matrix with zeros in a pattern, made piece by piece."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.empty(rows, WIDTH, dtype=dtype)
    for piece in matrix.split(256):
        scores = torch.rand(piece.shape, generator=generator)
        values = torch.randn(piece.shape, generator=generator)
        if pattern == "2:4":
            values.view(-1, 4).scatter_(1, scores.view(-1, 4).argsort(1)[:, :2], 0)
        else:
            values[scores < PATTERNS[pattern]["sparsity"]] = 0
        piece.copy_(values)
    return matrix


def in_new_folder(step: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    """Run a step that writes a new folder."""
    shutil.rmtree(target, ignore_errors=True)
    step(source, target)


def cpu_seconds(step: Callable[[], object]) -> float:
    """Return the CPU time that a step takes."""
    started = time.process_time()
    step()
    return time.process_time() - started


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
