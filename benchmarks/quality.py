"""Every method on one model and data: perplexity, seconds and memory of each at several sparsities, in one table.

    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 512 --limit 40 --save results.json
    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --held_out
    python benchmarks/quality.py --model M.gguf --baseline --goals 50 2:4
    python benchmarks/quality.py --images --save images.json

Windows are those of `wanda-lightning prune`, seed 0, in batches of 4, in float32. With `--save` the same command again
measures only what the file lacks or what was made with other choices. `--held_out` measures on what the calibration
windows leave of their own text, to choose hyperparameters by. `--baseline` times our SparseGPT and `balanced` against a
SparseGPT written out by hand. `--images` trains the two models of recipes/vision/demo.py and prunes those.
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, PeakMemory, medians, seconds
from rich.console import Console
from rich.table import Table
from sparsegpt_by_hand import prune_by_hand
from torch import Tensor, nn

from wanda_lightning import (
    OWL,
    CausalLMModule,
    EqualShare,
    Fisher,
    PruningCallback,
    PruningConfig,
    TextDataModule,
    prune,
)
from wanda_lightning.core.patterns import pattern_named
from wanda_lightning.data.text_sources import calibration_source
from wanda_lightning.files import whole_file
from wanda_lightning.methods import METHODS, PRESETS, Method
from wanda_lightning.modules import WindowPerplexity
from wanda_lightning.pruning import plan

TEXT = {
    **{name: method for name, method in METHODS.items() if not name.startswith("ablate_")},
    "variant": METHODS["wanda"],
    "owl": METHODS["wanda"]._replace(allocation=OWL()),
    "fisher": METHODS["wanda"]._replace(allocation=Fisher(num_samples=8)),
    **PRESETS,
}
UNSTRUCTURED = ("variant", "owl", "fisher")  # not for N:M
IMAGES = {
    "magnitude": METHODS["magnitude"]._replace(sequential="none"),
    "wanda, row": METHODS["wanda"]._replace(sequential="none"),
    "wanda, layer": METHODS["wanda"]._replace(sequential="none", group="layer"),
    "sparsegpt": METHODS["sparsegpt"]._replace(sequential="none"),
    "best": PRESETS["best"],
}
GOALS = {False: ("50", "60", "70", "4:8", "2:4"), True: ("50", "70", "2:4")}  # by whether they are images
BASELINE = "sparsegpt by hand"
AGAINST_BASELINE = {
    "sparsegpt": METHODS["sparsegpt"],
    "sparsegpt at layer": METHODS["sparsegpt"]._replace(sequential="layer"),
    "balanced": PRESETS["balanced"],
}

Cell = dict[str, Any]


def choices(name: str, method: Method, goal: str) -> dict[str, Any]:
    """What `prune` is given for a goal: a percentage, or N:M."""
    if ":" in goal:
        return {"sparsity": pattern_named(goal).sparsity, **method.choices(goal)}
    pattern = EqualShare() if name == "variant" else "unstructured"
    return {"sparsity": float(goal) / 100, **method.choices(pattern)}


def in_short(cell: Cell) -> str:
    """The figures of a cell, on one line."""
    figures = (
        f"({in_short(x)})" if isinstance(x, dict) else f"{x:.4g}" if isinstance(x, float) else x for x in cell.values()
    )
    return ", ".join(f"{key} {figure}" for key, figure in zip(cell, figures, strict=True))


class Results:
    """Cells by method and goal, on disk after each.

    Raises:
        ValueError: If the file holds what was made with other options.
    """

    def __init__(self, file: str | None, options: Mapping[str, object]) -> None:
        self.file, self.options, self.cells = file, dict(options), {}
        if file and Path(file).exists():
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            if found["options"] != self.options:
                raise ValueError(
                    f"{file} holds what was measured with {found['options']}, but {self.options} was asked for. "
                    "Give those options again, or --save to another file."
                )
            self.cells = found["cells"]

    def __call__(self, name: str, goal: str, made: object, measure: Callable[[], Cell]) -> Cell:
        """A cell of the file, or measured now; `made` is with what."""
        cells = self.cells.setdefault(name, {})
        if cells.get(goal, {}).get("made") != str(made):
            measured = measure()
            print(f"{name:<12} {goal:>4}  {in_short(measured)}", flush=True)
            cells[goal] = {"made": str(made), **measured}
            if self.file:
                with whole_file(self.file) as new:
                    content = {"options": self.options, "cells": self.cells}
                    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return cells[goal]


def refusal(model: nn.Module, chosen: Mapping[str, Any]) -> str:
    """Why a model cannot be pruned so, in short; empty if it can."""
    try:
        plan(PruningConfig.from_names(**chosen), model)
    except ValueError as error:
        return str(error).partition(", but ")[0].partition(". ")[0]
    return ""


def held_out(data: TextDataModule) -> Tensor:
    """Windows side by side in what the calibration windows leave of their text, as many as the limit allows."""
    text, seqlen = calibration_source(data.calibration), data.seqlen
    if not isinstance(text, str):
        raise ValueError(f"--held_out needs a calibration text (.txt), but {data.calibration} holds documents.")
    ids = torch.tensor(data.tokenizer(text, verbose=False).input_ids)
    free = torch.ones(len(ids), dtype=torch.bool)
    for window in data.calibration_windows:
        starts = torch.arange(len(ids) - seqlen + 1)
        for offset, token in enumerate(window):
            starts = starts[ids[starts + offset] == token]
        for start in starts.tolist():  # all of them: what the text repeats was seen too
            free[start : start + seqlen] = False
    windows, start = [], 0
    while start + seqlen <= len(ids) and len(windows) != data.limit:
        taken = (~free[start : start + seqlen]).nonzero()
        if not len(taken):
            windows.append(ids[start : start + seqlen])
        start += int(taken[-1]) + 1 if len(taken) else seqlen
    if not windows:
        raise ValueError(f"The calibration windows leave no {seqlen} tokens of {data.calibration}: use fewer of them.")
    return torch.stack(windows)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Of the windows of all batches."""
    metric = WindowPerplexity()
    for batch in batches:
        metric.update(model(**batch, use_cache=False).logits, batch["input_ids"])
    return float(metric.compute())


class LanguageModel:
    """A model and its windows; each measurement starts from the dense weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        module = CausalLMModule(options.model, dtype="float32")
        sources = (options.calibration, options.calibration if options.held_out else options.eval)
        windows = {"seqlen": options.seqlen, "num_samples": options.nsamples, "limit": options.limit}
        data = TextDataModule(module.tokenizer, *sources, **windows, batch_size=4, seed=0)
        if options.held_out:
            data.evaluation_windows = held_out(data)
        self.model, self.samples = module.model.eval(), data.calibration_windows
        self.calibration, self.evaluation = list(data.calibration_dataloader()), data.val_dataloader()
        self.dense = copy.deepcopy(self.model.state_dict())

    def prune(self, chosen: Mapping[str, Any]) -> float:
        """The sparsity of the pruned layers."""

        def forward(batch: Mapping[str, Tensor]) -> object:
            return self.model(**batch, use_cache=False)

        return prune(self.model, self.calibration, **chosen, forward=forward, progress=False).sparsity

    def measure_dense(self) -> Cell:
        """Of the model as it came."""
        return {"perplexity": perplexity(self.model, self.evaluation)}

    def measure(self, chosen: Mapping[str, Any]) -> Cell:
        """One cell of the table."""
        self.model.load_state_dict(self.dense)
        if reason := refusal(self.model, chosen):
            return {"refused": reason}
        sparsities: list[float] = []
        with PeakMemory() as memory:
            duration = seconds(lambda: sparsities.append(self.prune(chosen)))
        measured = {"perplexity": perplexity(self.model, self.evaluation), "seconds": duration}
        return {**measured, "MiB": memory.peak / MIB, "sparsity": sparsities[0]}

    def against_baseline(self, methods: Mapping[str, Mapping[str, Any]], runs: int, warm_up: bool) -> Cell:
        """Seconds and perplexity of SparseGPT by hand and of the methods, taking turns."""
        perplexities: dict[str, float] = {}
        first = next(iter(methods.values()))
        group = {name: getattr(first["pattern"], name, 0) for name in ("n", "m")}

        def clock(name: str, step: Callable[[], object]) -> Callable[[], float]:
            def run() -> float:
                self.model.load_state_dict(self.dense)
                duration = seconds(step)
                if name not in perplexities:
                    perplexities[name] = perplexity(self.model, self.evaluation)
                return duration

            return run

        by_hand = clock(BASELINE, lambda: prune_by_hand(self.model, self.samples, first["sparsity"], **group))
        clocks = [clock(name, partial(self.prune, chosen)) for name, chosen in methods.items()]
        times = medians(by_hand, *clocks, runs=runs, warm_up=warm_up)
        names = (BASELINE, *methods)
        return {"seconds": dict(zip(names, times, strict=True)), "perplexity": perplexities}


def columns(title: str, *headings: str) -> Table:
    """A table whose numbers are on the right."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def measure_text(options: argparse.Namespace, results: Results, console: Console) -> None:
    """All methods on a language model."""
    language = LanguageModel(options)
    table = columns(f"{options.model}: perplexity (seconds of pruning)", "method", *options.goals, "peak MiB")
    dense = results("dense", "", "", language.measure_dense)
    table.add_row("dense", *[f"{dense['perplexity']:.2f}"] * len(options.goals), "")
    cells: dict[tuple[str, str], Cell] = {}
    for name in options.methods:
        for goal in options.goals:
            if not (":" in goal and name in UNSTRUCTURED):
                chosen = choices(name, TEXT[name], goal)
                cells[name, goal] = results(name, goal, chosen, partial(language.measure, chosen))
        row = [text_cell(cells.get((name, goal)), goal) for goal in options.goals]
        peaks = [cells[name, goal]["MiB"] for goal in options.goals if "MiB" in cells.get((name, goal), {})]
        table.add_row(name, *row, f"{max(peaks):.0f}" if peaks else "")
    console.print(table)
    for name in options.methods:
        pairs = {goal: (cells.get((name, goal), {}), cells.get(("wanda", goal), {})) for goal in options.goals}
        lost = [goal for goal, (a, b) in pairs.items() if a.get("perplexity", 0) > b.get("perplexity", torch.inf)]
        if lost:
            console.print(f"{name} loses to wanda at {', '.join(lost)}", highlight=False)


def text_cell(cell: Cell | None, goal: str) -> str:
    """Perplexity and seconds; and the sparsity, where a method missed its goal."""
    if cell is None or "refused" in cell:
        return "-" if cell is None else cell["refused"]
    missed = ":" not in goal and abs(cell["sparsity"] - float(goal) / 100) > 0.005
    duration = f"{cell['seconds']:.{0 if cell['seconds'] >= 10 else 1}f} s"
    return f"{cell['perplexity']:.2f} ({duration})" + (f" at {cell['sparsity']:.1%}" if missed else "")


def measure_baseline(options: argparse.Namespace, results: Results, console: Console) -> None:
    """SparseGPT by hand, and ours."""
    language = LanguageModel(options)
    table = columns(f"{options.model}: SparseGPT by hand, and ours", "method", "goal", "seconds", "ratio", "perplexity")
    for goal in options.goals:
        methods = {name: choices(name, method, goal) for name, method in AGAINST_BASELINE.items()}
        if reason := refusal(language.model, methods["sparsegpt"]):
            raise ValueError(reason)
        made = {**methods, "runs": options.runs, "warm_up": options.warm_up}
        measure = partial(language.against_baseline, methods, options.runs, options.warm_up)
        cell = results(BASELINE, goal, made, measure)
        for name, duration in cell["seconds"].items():
            ratio = f"{duration / cell['seconds'][BASELINE]:.3f}"
            table.add_row(name, goal, f"{duration:.2f}", ratio, f"{cell['perplexity'][name]:.2f}")
    console.print(table)


def measure_images(options: argparse.Namespace, results: Results, console: Console) -> None:
    """A ViT and a ConvNeXt, trained on digits."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    for name in demo.MODELS:
        module, data, accuracy = demo.train(name, options.epochs)
        dense = copy.deepcopy(module.state_dict())
        table = columns(f"{name}: top-1; dense {accuracy:.2%}", "method", *options.goals)

        def measure(chosen: Mapping[str, Any], module=module, data=data, dense=dense) -> Cell:
            module.load_state_dict(dense)
            if reason := refusal(module.model, chosen):
                return {"refused": reason}
            return {"accuracy": demo.run(module, data, PruningCallback(**chosen, num_samples=data.num_samples))}

        for method in options.methods:
            row = []
            for goal in options.goals:
                chosen = choices(method, IMAGES[method], goal)
                made = {**chosen, "dense": accuracy}
                cell = results(f"{name}, {method}", goal, made, partial(measure, chosen))
                row.append(cell.get("refused") or f"{cell['accuracy']:.2%}")
            table.add_row(method, *row)
        console.print(table)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description="The quality of every method, in one table.")
    parser.add_argument("--model", help="hub id, folder or .gguf file")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--eval", default="python-docs")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40, help="windows to measure on")
    parser.add_argument("--held_out", action="store_true", help="measure on the rest of the calibration text")
    parser.add_argument("--goals", nargs="+", help="percentages for unstructured pruning, and N:M")
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(TEXT)}; with --images {', '.join(IMAGES)}")
    parser.add_argument("--baseline", action="store_true", help="only against a SparseGPT by hand")
    parser.add_argument("--runs", type=int, default=1, help="of --baseline, medians of which count")
    parser.add_argument("--warm_up", action="store_true", help="one more run of each before those of --baseline")
    parser.add_argument("--images", action="store_true", help="image classifiers instead of a language model")
    parser.add_argument("--epochs", type=int, default=30, help="of the training of --images")
    parser.add_argument("--save", help="FILE.json, written after each cell and read at the start")
    options = parser.parse_args()
    if options.baseline and (options.methods or options.images):
        parser.error(
            f"--baseline measures {', '.join(AGAINST_BASELINE)} on a language model: without --methods, --images"
        )
    known = IMAGES if options.images else TEXT
    options.methods, options.goals = options.methods or list(known), options.goals or GOALS[options.images]
    if unknown := [name for name in options.methods if name not in known]:
        parser.error(f"no method is called {unknown[0]!r}: use some of {', '.join(known)}")
    for goal in options.goals:
        if not re.fullmatch(r"\d+:\d+", goal) and not (re.fullmatch(r"\d+(\.\d+)?", goal) and 0 < float(goal) < 100):
            parser.error(f"a goal is a percentage such as 50, or N:M such as 2:4, but {goal!r} was given")
    if not (options.model or options.images):
        parser.error("give --model, or --images")
    used = ("epochs",) if options.images else ("model", "calibration", "nsamples", "seqlen", "limit", "held_out")
    used += () if options.images or options.held_out else ("eval",)
    try:
        results = Results(options.save, {name: getattr(options, name) for name in used})
    except ValueError as error:
        parser.error(str(error))
    run = measure_images if options.images else measure_baseline if options.baseline else measure_text
    run(options, results, Console(width=130))


if __name__ == "__main__":
    main()
