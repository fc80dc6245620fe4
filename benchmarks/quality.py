"""Compare all methods with one model and its data: perplexity, seconds and memory at several sparsities, in one table.

    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 512 --limit 40 --save benchmarks/results
    python benchmarks/quality.py --model M.gguf --calibration self --eval wikitext2_test.raw.txt --goals 60
    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --held_out
    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --draw 1
    python benchmarks/quality.py --model M.gguf --baseline --goals 50 2:4
    python benchmarks/quality.py --images --save benchmarks/results
    python benchmarks/quality.py --photos .cache/efficientnet_lite0 --data imagenet_sample --nsamples 512

Windows are those of `wanda-lightning prune` with seed 0, in batches of 4, in float32. With `--save`, each cell is a
file (benchmarks/result.py), and the same command again measures only cells that are missing or used other choices.
With `--calibration self`, the dense model writes the windows, and the files are in a table of their own. `--draw` draws
the calibration windows with another seed, measures on a second text as well, and also has a table of its own.
`--held_out` measures on the part of the calibration text that calibration does not use, to choose hyperparameters.
`--baseline` compares our SparseGPT and `balanced` with a plain implementation of SparseGPT. `--images` trains and
prunes the models of recipes/vision/demo.py, and `--photos` prunes a timm model with its weights.
"""

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from measuring import MIB, PeakMemory, columns, fingerprint, medians, seconds
from result import Result, Runs, Samples, sparsity_of, to_hexadecimal
from rich.console import Console
from rich.table import Table
from sparsegpt_by_hand import prune_by_hand
from torch import Tensor, nn

from wanda_lightning import (
    NM,
    OWL,
    CausalLMModule,
    Distil,
    EqualShare,
    Fisher,
    ImageClassifierModule,
    ImageDataModule,
    PruningCallback,
    PruningConfig,
    TextDataModule,
    Unstructured,
    prune,
    sample_windows,
)
from wanda_lightning.core.losses import divergence
from wanda_lightning.data.text_sources import OWN_TEXT, SELF, calibration_source
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.methods import METHODS, PRESETS
from wanda_lightning.modules import WindowPerplexity

Choices = dict[str, Any]  # arguments of `prune`, without the sparsity
Measured = dict[str, float]

TEXT: dict[str, Choices] = {
    **{name: {"method": name} for name in METHODS if not name.startswith("ablate_")},
    "variant": {"method": "wanda", "pattern": EqualShare()},
    "owl": {"method": "wanda", "allocation": OWL()},
    "alpha": {"method": "wanda", "allocation": "alpha"},
    "fisher": {"method": "wanda", "allocation": Fisher(num_samples=8)},
    **{name: {"method": name} for name in PRESETS},
    "thorough, 3 passes": {"method": "thorough", "recovery": Distil(passes=3)},
    **{f"{name}+distil": {"method": name, "recovery": "distil"} for name in ("wanda", "balanced")},
    "admm+reconstruct": {"method": "admm", "recovery": "reconstruct"},
    "wanda+permutation": {"method": "wanda", "permutation": "assignment"},
    "balanced+permutation": {"method": "balanced", "permutation": "assignment"},
    "best-permutation": {"method": "best", "permutation": "none"},
    "best-row_weights": {"method": "best", "pattern": Unstructured("layer")},
}
UNSTRUCTURED = ("variant", "owl", "alpha", "fisher", "best-row_weights", "best+row_weights")  # not for N:M
PERMUTED = ("wanda+permutation", "balanced+permutation", "best-permutation")  # only for N:M
BIASES_KEPT = {  # methods whose solver would fit biases, with `intercept=False`
    f"{name}, biases kept": {"method": name, "solver": replace(method.solver(), intercept=False)}
    for name, method in {**METHODS, **PRESETS}.items()
    if name in ("refit", "balanced", "best")
}
IMAGES: dict[str, Choices] = {
    "magnitude": {"method": "magnitude"},
    "wanda, row": {"method": "wanda"},
    "wanda, layer": {"method": "wanda", "pattern": Unstructured("layer")},
    "sparsegpt": {"method": "sparsegpt"},
    "refit": {"method": "refit"},
    **{name: {"method": name} for name in PRESETS if name != "fast"},  # it is Wanda within rows
    **BIASES_KEPT,
    "best+row_weights": {"method": "best", "pattern": Unstructured("layer", weigh_rows=True)},
    **{f"{name} at layer": {"method": name, "sequential": "layer"} for name in ("wanda", "balanced", "best")},
    "best+distil at layer": {"method": "best", "recovery": Distil(blocks=False), "sequential": "layer"},
    "best+reconstruct": {"method": "best", "recovery": "reconstruct"},
}
GOALS = {
    "text": ("50", "60", "70", "4:8", "2:4"),
    "digits": ("50", "70", "80", "90", "2:4"),
    "photos": ("50", "60", "70", "2:4"),
}
PHOTOS = {name: IMAGES[name] for name in ("wanda, row", "sparsegpt", "balanced", "best", "thorough")}
PHOTOS |= {name: choices for name, choices in IMAGES.items() if name.startswith("best+") or " at " in name}
PHOTOS |= {
    "best-permutation": TEXT["best-permutation"],
    "best-permutation at layer": {**TEXT["best-permutation"], "sequential": "layer"},
}
WINDOWS = 16  # for calibration, in the table of all methods
CALIBRATION_PHOTOS = 512  # likewise
SECOND_TEXT = "python-docs"  # unlike the web text of calibration and WikiText-2, and part of every installation
BASELINE = "sparsegpt by hand"
AGAINST_BASELINE: dict[str, Choices] = {
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt at layer": {"method": "sparsegpt", "sequential": "layer"},
    "balanced": {"method": "balanced"},
}


def choices(method: Choices, goal: str) -> Choices:
    """Return the arguments of `prune` for a goal: a percentage, or N:M."""
    if ":" not in goal:
        return {**method, "sparsity": float(goal) / 100}
    pattern = NM(*map(int, goal.split(":")))
    return {**method, "sparsity": pattern.sparsity, "pattern": pattern}


def arguments(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return arguments of `prune` as text, without the sparsity and N:M."""
    return {name: str(value) for name, value in chosen.items() if name != "sparsity" and not isinstance(value, NM)}


def refusal(model: nn.Module, chosen: Mapping[str, Any]) -> str:
    """Return in short why a model cannot be pruned with these choices, or an empty string."""
    try:
        make_plan(PruningConfig.from_names(**chosen), model)
    except ValueError as error:
        return str(error).partition(", but ")[0].partition(". ")[0]
    return ""


def held_out(data: TextDataModule) -> Tensor:
    """Return windows of the calibration text that no calibration window overlaps, at most `limit`."""
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


def in_batches(windows: Tensor) -> list[dict[str, Tensor]]:
    """Return windows in batches of 4."""
    return [{"input_ids": part} for part in windows.split(4)]


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the perplexity over the windows of all batches."""
    metric = WindowPerplexity()
    for batch in batches:
        metric.update(model(**batch, use_cache=False).logits, batch["input_ids"])
    return float(metric.compute())


class LanguageModel:
    """A model and its windows. Each measurement starts from the dense weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        module = CausalLMModule(options.model, dtype="float32")
        sources = (options.calibration, options.calibration if options.held_out else options.eval)
        windows = {"seqlen": options.seqlen, "num_samples": options.nsamples, "limit": options.limit}
        texts = tuple(dict.fromkeys((sources[1], SECOND_TEXT)))  # the second is only read with `draw`
        data = TextDataModule(module.tokenizer, sources[0], texts, **windows, seed=options.draw or 0)
        self.tokenizer, self.model = module.tokenizer, module.model.eval()
        if options.calibration == SELF:  # no Trainer runs the model
            self.samples = sample_windows(self.model, self.tokenizer, options.nsamples, options.seqlen)
        else:
            self.samples = data.calibration_windows
        evaluated_on = held_out(data) if options.held_out else data.evaluation_windows
        self.calibration, self.evaluation = in_batches(self.samples), in_batches(evaluated_on)
        self.texts = {"perplexity": self.evaluation}
        if options.draw is not None:
            self.texts["perplexity_second"] = in_batches(data.windows_of(SECOND_TEXT))
        self.dense = copy.deepcopy(self.model.state_dict())
        named = {SELF: OWN_TEXT, "python-docs": "python-docs"}
        names = [named.get(source, Path(source).name) for source in sources]
        evaluated = f"{names[1]}, held out" if options.held_out else names[1]
        case: dict[str, Any] = {"calibration": options.calibration} if options.calibration == SELF else {}
        if options.nsamples != WINDOWS:
            case["windows"] = options.nsamples
        if options.draw is not None:
            case["draw"] = options.draw
        self.planned = Result(
            model=Path(options.model).name,
            method="dense",
            case=case,
            calibration=Samples(names[0], options.nsamples, options.seqlen),
            evaluation=Samples(evaluated, options.limit, options.seqlen),
        )

    def plan(self, name: str, goal: str, chosen: Mapping[str, Any]) -> Result:
        """Describe a run."""
        return replace(self.planned, method=name, **sparsity_of(goal), arguments=arguments(chosen))

    def refusal(self, chosen: Mapping[str, Any]) -> str:
        """Return in short why the model cannot be pruned with these choices, or an empty string."""
        self.model.load_state_dict(self.dense)
        return refusal(self.model, chosen)

    def prune(self, chosen: Mapping[str, Any]) -> float:
        """Prune, and return the sparsity of the pruned layers."""

        def forward(batch: Mapping[str, Tensor]) -> object:
            return self.model(**batch, use_cache=False)

        return prune(self.model, self.calibration, **chosen, forward=forward, progress=False).sparsity

    def measure_perplexity(self) -> Measured:
        """Return the perplexity of the model in its present state on each text."""
        return {name: perplexity(self.model, windows) for name, windows in self.texts.items()}

    def measure(self, chosen: Mapping[str, Any]) -> Measured:
        """Prune, and return one cell of the table."""
        self.model.load_state_dict(self.dense)
        sparsities: list[float] = []
        with PeakMemory() as memory:
            duration = seconds(lambda: sparsities.append(self.prune(chosen)))
        cost = {"seconds": duration, "peak_mib": memory.peak / MIB}
        return {**self.measure_perplexity(), **cost, "sparsity": sparsities[0]}

    def against_baseline(
        self, methods: Mapping[str, Mapping[str, Any]], runs: int, warm_up: bool
    ) -> dict[str, Measured]:
        """Measure the plain SparseGPT and the methods alternately: seconds and perplexity of each."""
        perplexities: dict[str, float] = {}
        first = next(iter(methods.values()))
        group = {name: getattr(first.get("pattern"), name, 0) for name in ("n", "m")}

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
        plain = {"plain_seconds": times[0]}
        return {
            name: {"perplexity": perplexities[name], "seconds": duration}
            | ({} if name == BASELINE else {**plain, "ratio": duration / times[0]})
            for name, duration in zip((BASELINE, *methods), times, strict=True)
        }


def measure_text(options: argparse.Namespace, console: Console) -> None:
    """Measure all methods with a language model."""
    table_name = "methods" if options.nsamples == WINDOWS else "windows"
    table_name = "draws" if options.draw is not None else table_name
    table_name = "held_out" if options.held_out else "own_text" if options.calibration == SELF else table_name
    language, runs = LanguageModel(options), Runs(options.save, table_name)
    table = columns(f"{options.model}: perplexity (seconds of pruning)", "method", *options.goals, "peak MiB")
    dense = runs(replace(language.planned, case={}, calibration=None), language.measure_perplexity)
    table.add_row("dense", *[f"{dense.measured['perplexity']:.2f}"] * len(options.goals), "")
    cells: dict[tuple[str, str], Result] = {}
    for name in options.methods:
        row = []
        for goal in options.goals:
            if name in (UNSTRUCTURED if ":" in goal else PERMUTED):
                row.append("-")
                continue
            chosen = choices(TEXT[name], goal)
            if reason := language.refusal(chosen):
                row.append(reason)
                continue
            cells[name, goal] = runs(language.plan(name, goal, chosen), partial(language.measure, chosen))
            row.append(text_cell(cells[name, goal]))
        peaks = [
            run.measured["peak_mib"]
            for (method, _), run in cells.items()
            if method == name and "peak_mib" in run.measured
        ]
        table.add_row(name, *row, f"{max(peaks):.0f}" if peaks else "")
    console.print(table)


def text_cell(run: Result) -> str:
    """Return perplexity and seconds, and the sparsity if it is not that of the goal."""
    measured = run.measured
    sparsity = measured.get("sparsity", run.sparsity)
    missed = run.pattern == "unstructured" and abs(sparsity - run.sparsity) > 0.005
    duration = f"{tables.seconds(run)} s" if "seconds" in measured else "not timed"
    return f"{measured['perplexity']:.2f} ({duration})" + (f" at {sparsity:.1%}" if missed else "")


def measure_baseline(options: argparse.Namespace, console: Console) -> None:
    """Compare our SparseGPT with the plain implementation."""
    language, runs = LanguageModel(options), Runs(options.save, "sparsegpt")
    table = columns(f"{options.model}: SparseGPT by hand, and ours", "method", "goal", "seconds", "ratio", "perplexity")
    for goal in options.goals:
        methods = {name: choices(method, goal) for name, method in AGAINST_BASELINE.items()}
        if reason := language.refusal(methods["sparsegpt"]):
            raise ValueError(reason)
        planned = {name: language.plan(name, goal, chosen) for name, chosen in {BASELINE: {}, **methods}.items()}
        planned[BASELINE] = replace(planned[BASELINE], code="plain")
        results = {name: runs.saved(run) for name, run in planned.items()}
        if None in results.values():
            measured = language.against_baseline(methods, options.runs, options.warm_up)
            results = {name: runs.save(run, measured[name]) for name, run in planned.items()}
        for name, run in results.items():
            ratio = f"{run.measured.get('ratio', 1):.3f}"
            table.add_row(name, goal, f"{run.measured['seconds']:.2f}", ratio, f"{run.measured['perplexity']:.2f}")
    console.print(table)


def measure_images(options: argparse.Namespace, console: Console) -> None:
    """Measure all methods with a ViT and a ConvNeXt that are trained on digits."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    runs = Runs(options.save, "images")

    def measure_one(name: str) -> None:
        module, data, accuracy = demo.train(name, options.epochs)
        dense = copy.deepcopy(module.state_dict())
        trained = Result(
            model=name, method="dense", case={"weights": fingerprint(module)}, evaluation=Samples("digits", 360)
        )
        runs(trained, lambda: {"top1": accuracy})

        expected = _outputs(module.eval(), data.val_dataloader())

        def measure(chosen: Mapping[str, Any]) -> Measured:
            top1 = demo.run(module, data, PruningCallback(**chosen, num_samples=data.num_samples))
            found = _outputs(module.eval(), data.val_dataloader())
            return {"top1": top1, "divergence": float(divergence(found, expected)[0]) / len(expected)}

        def cell(method: str, goal: str) -> str:
            chosen = choices(IMAGES[method], goal)
            module.load_state_dict(dense)
            if reason := refusal(module.model, chosen):
                return reason
            planned = replace(trained, method=method, **sparsity_of(goal), arguments=arguments(chosen))
            planned = replace(planned, calibration=Samples("digits", data.num_samples))
            return f"{runs(planned, partial(measure, chosen)).measured['top1']:.2%}"

        print_cells(columns(f"{name}: top-1; dense {accuracy:.2%}", "method", *options.goals), options, cell, console)

    for name in demo.MODELS:
        measure_one(name)


def print_cells(table: Table, options: argparse.Namespace, cell: Callable[[str, str], str], console: Console) -> None:
    """Print a table of image classifiers, with one row for each method; `-` is what a method is not for."""
    for method in options.methods:
        goals = options.goals
        row = ("-" if method in (UNSTRUCTURED if ":" in goal else PERMUTED) else cell(method, goal) for goal in goals)
        table.add_row(method, *row)
    console.print(table)


def measure_photos(options: argparse.Namespace, console: Console) -> None:
    """Measure presets with a classifier and its weights, on images in the layout of ImageNet."""
    module = ImageClassifierModule(f"timm:local-dir:{options.photos}")
    usual = options.nsamples == CALIBRATION_PHOTOS
    runs = Runs(options.save, "photos" if usual else "more_photos")
    data = ImageDataModule(options.data, module, num_samples=options.nsamples)
    data.setup("validate")
    model, name = module.model.eval(), Path(options.data).name
    calibration, evaluated = [images for images, _ in data.calibration_dataloader()], list(data.val_dataloader())
    dense = copy.deepcopy(model.state_dict())
    expected = _outputs(model, evaluated)
    labels = torch.cat([labels for _, labels in evaluated])

    def scored(outputs: Tensor) -> dict[str, Any]:
        correct = (outputs.argmax(dim=1) == labels).tolist()
        return {"top1": sum(correct) / len(correct), "correct": to_hexadecimal(correct)}

    def measure(chosen: Mapping[str, Any]) -> dict[str, Any]:
        model.load_state_dict(dense)
        duration = seconds(lambda: prune(model, calibration, **chosen, progress=False))
        found = _outputs(model, evaluated)
        differs = float(divergence(found, expected)[0]) / len(labels)
        return {**scored(found), "divergence": differs, "seconds": duration}

    planned = Result(model=Path(options.photos).name, method="dense", evaluation=Samples(name, len(labels)))
    known = runs(planned, lambda: scored(expected)).measured["top1"]
    table = columns(f"{planned.model}: top-1 (divergence); dense {known:.2%}", "method", *options.goals)

    def cell(method: str, goal: str) -> str:
        chosen = choices(PHOTOS[method], goal)
        case = {} if usual else {"images": options.nsamples}
        run = replace(planned, method=method, case=case, **sparsity_of(goal), arguments=arguments(chosen))
        run = runs(replace(run, calibration=Samples(name, options.nsamples)), partial(measure, chosen))
        return f"{run.measured['top1']:.2%} ({run.measured['divergence']:.3f})"

    print_cells(table, options, cell, console)


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([model(part) for images, _ in batches for part in images.split(16)])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a language model, its windows and the table."""
    parser.add_argument("--model", help="hub id, folder or .gguf file")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--eval", default="python-docs")
    parser.add_argument("--nsamples", type=int, default=WINDOWS, help="other numbers are saved in a table of their own")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40, help="windows to measure on")
    parser.add_argument("--goals", nargs="+", help="percentages for unstructured pruning, and N:M, such as: 50 2:4")
    parser.add_argument("--save", help="FOLDER of runs; a run that it holds is not measured again")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, known: Iterable[str]) -> None:
    """End the program with a message if a method or a goal is unknown."""
    if unknown := [name for name in options.methods if name not in known]:
        parser.error(f"--methods must be from: {shlex.join(known)}; but {unknown[0]!r} is not.")
    for goal in options.goals:
        if not re.fullmatch(r"\d+:\d+", goal) and not (re.fullmatch(r"\d+(\.\d+)?", goal) and 0 < float(goal) < 100):
            parser.error(f"--goals must be percentages such as 50, or N:M such as 2:4, but one is {goal!r}.")


def main() -> None:
    """Measure the missing cells and print the table."""
    parser = argparse.ArgumentParser(description="Compare the quality of all methods in one table.")
    add_options(parser)
    parser.set_defaults(nsamples=None)
    parser.add_argument("--held_out", action="store_true", help="measure on the unused part of the calibration text")
    parser.add_argument(
        "--draw", type=int, help="another seed of the calibration windows; also measures on a second text"
    )
    parser.add_argument("--methods", nargs="+", help=f"of: {shlex.join(TEXT)}; with --images of: {shlex.join(IMAGES)}")
    parser.add_argument("--baseline", action="store_true", help="only compare with a plain SparseGPT")
    parser.add_argument("--runs", type=int, default=1, help="runs of --baseline, of which medians count")
    parser.add_argument("--warm_up", action="store_true", help="run each once before those of --baseline")
    parser.add_argument("--images", action="store_true", help="image classifiers instead of a language model")
    parser.add_argument("--photos", help="folder of a timm model with its weights")
    parser.add_argument("--data", help="images for --photos: a folder with train/CLASS and val/CLASS")
    parser.add_argument("--epochs", type=int, default=30, help="training epochs of --images")
    options = parser.parse_args()
    if options.nsamples is None:
        options.nsamples = CALIBRATION_PHOTOS if options.photos else WINDOWS
    if options.baseline and (options.methods or options.images):
        parser.error(
            f"--baseline compares {', '.join(AGAINST_BASELINE)} with a language model. Remove --methods and --images."
        )
    kind = "digits" if options.images else "photos" if options.photos else "text"
    known = {"digits": IMAGES, "photos": PHOTOS, "text": TEXT}[kind]
    options.methods, options.goals = options.methods or list(known), options.goals or GOALS[kind]
    check_options(parser, options, known)
    if kind == "photos" and not options.data:
        parser.error("--photos needs --data, a folder with train/CLASS and val/CLASS.")
    usual = kind == "text" and options.calibration != SELF and options.nsamples == WINDOWS
    if options.draw is not None and (not usual or options.baseline or options.held_out or options.draw < 1):
        parser.error(
            f"--draw must be at least 1, and needs a language model, a calibration text and {WINDOWS} windows."
        )
    if not options.model and kind == "text":
        parser.error("--model must be given, except with --images and --photos.")
    run = {"digits": measure_images, "photos": measure_photos, "text": measure_text}[kind]
    run = measure_baseline if options.baseline else run
    run(options, Console(width=130))


if __name__ == "__main__":
    main()
