"""Measure all methods with one model and its data: perplexity, seconds and memory at several sparsities.

    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 512 --limit 40 --save benchmarks/results
    python benchmarks/quality.py --model M.gguf --calibration self --eval wikitext2_test.raw.txt --goals 60
    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --draw 1
    python benchmarks/quality.py --images --save benchmarks/results
    python benchmarks/quality.py --photos .cache/efficientnet_lite0 --data imagenet_sample --nsamples 512

Windows are those of `wanda-lightning prune` with seed 0, in batches of 4, in float32. With `--save`, each cell is a
file (benchmarks/result.py), and the same command again measures only cells that are missing or used other choices.
With `--calibration self`, the dense model writes the windows, and the files are in a table of their own. `--draw` draws
the calibration windows with another seed, measures on a second text as well, and also has a table of its own.
`--images` trains and prunes the models of recipes/vision/demo.py, and `--photos` prunes a timm model with its weights.
"""

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, PeakMemory, fingerprint, perplexity, seconds
from result import Result, Runs, Samples, sparsity_of, to_hexadecimal
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
from wanda_lightning.data.text_sources import OWN_TEXT, SELF
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.methods import METHODS, PRESETS

Choices = dict[str, Any]  # arguments of `prune`, without the sparsity
Measured = dict[str, float]

TEXT: dict[str, Choices] = {
    **{name: {"method": name} for name in METHODS if not name.startswith("ablate_")},
    "sparsegpt at layer": {"method": "sparsegpt", "sequential": "layer"},
    "variant": {"method": "wanda", "pattern": EqualShare()},
    "owl": {"method": "wanda", "allocation": OWL()},
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
UNSTRUCTURED = ("variant", "owl", "fisher", "best-row_weights", "best+row_weights")  # not for N:M
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


def in_batches(windows: Tensor) -> list[dict[str, Tensor]]:
    """Return windows in batches of 4."""
    return [{"input_ids": part} for part in windows.split(4)]


class LanguageModel:
    """A model and its windows. Each measurement starts from the dense weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        module = CausalLMModule(options.model, dtype="float32")
        sources = (options.calibration, options.eval)
        windows = {"seqlen": options.seqlen, "num_samples": options.nsamples, "limit": options.limit}
        texts = tuple(dict.fromkeys((sources[1], SECOND_TEXT)))  # the second is only read with `draw`
        data = TextDataModule(module.tokenizer, sources[0], texts, **windows, seed=options.draw or 0)
        self.tokenizer, self.model = module.tokenizer, module.model.eval()
        if options.calibration == SELF:  # no Trainer runs the model
            self.samples = sample_windows(self.model, self.tokenizer, options.nsamples, options.seqlen)
        else:
            self.samples = data.calibration_windows
        self.calibration, self.evaluation = in_batches(self.samples), in_batches(data.evaluation_windows)
        self.texts = {"perplexity": self.evaluation}
        if options.draw is not None:
            self.texts["perplexity_second"] = in_batches(data.windows_of(SECOND_TEXT))
        self.dense = copy.deepcopy(self.model.state_dict())
        named = {SELF: OWN_TEXT, "python-docs": "python-docs"}
        names = [named.get(source, Path(source).name) for source in sources]
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
            evaluation=Samples(names[1], options.limit, options.seqlen),
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


def cells(options: argparse.Namespace, known: Mapping[str, Choices]) -> Iterator[tuple[str, str, Choices]]:
    """Yield each method and goal with the arguments of `prune`, without those that a method is not for."""
    for name in options.methods:
        for goal in options.goals:
            if name not in (UNSTRUCTURED if ":" in goal else PERMUTED):
                yield name, goal, choices(known[name], goal)


def measure_text(options: argparse.Namespace) -> None:
    """Measure all methods with a language model."""
    table = "methods" if options.nsamples == WINDOWS else "windows"
    table = "draws" if options.draw is not None else table
    table = "own_text" if options.calibration == SELF else table
    language, runs = LanguageModel(options), Runs(options.save, table)
    runs(replace(language.planned, case={}, calibration=None), language.measure_perplexity)
    for name, goal, chosen in cells(options, TEXT):
        if reason := language.refusal(chosen):
            print(f"{name}, {goal}: {reason}")
        else:
            runs(language.plan(name, goal, chosen), partial(language.measure, chosen))


def measure_images(options: argparse.Namespace) -> None:
    """Measure all methods with a ViT and a ConvNeXt that are trained on digits."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    for name in demo.MODELS:
        _measure_digits(name, *demo.train(name, options.epochs), demo.run, options)


def _measure_digits(
    name: str, module: Any, data: Any, accuracy: float, run: Callable[..., float], options: argparse.Namespace
) -> None:
    runs, dense = Runs(options.save, "images"), copy.deepcopy(module.state_dict())
    trained = Result(
        model=name, method="dense", case={"weights": fingerprint(module)}, evaluation=Samples("digits", 360)
    )
    runs(trained, lambda: {"top1": accuracy})
    expected = _outputs(module.eval(), data.val_dataloader())

    def measure(chosen: Mapping[str, Any]) -> Measured:
        module.load_state_dict(dense)
        top1 = run(module, data, PruningCallback(**chosen, num_samples=data.num_samples))
        found = _outputs(module.eval(), data.val_dataloader())
        return {"top1": top1, "divergence": float(divergence(found, expected)[0]) / len(expected)}

    for method, goal, chosen in cells(options, IMAGES):
        module.load_state_dict(dense)
        if reason := refusal(module.model, chosen):
            print(f"{method}, {goal}: {reason}")
            continue
        planned = replace(trained, method=method, **sparsity_of(goal), arguments=arguments(chosen))
        runs(replace(planned, calibration=Samples("digits", data.num_samples)), partial(measure, chosen))


def measure_photos(options: argparse.Namespace) -> None:
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
    runs(planned, lambda: scored(expected))
    for method, goal, chosen in cells(options, PHOTOS):
        case = {} if usual else {"images": options.nsamples}
        run = replace(planned, method=method, case=case, **sparsity_of(goal), arguments=arguments(chosen))
        runs(replace(run, calibration=Samples(name, options.nsamples)), partial(measure, chosen))


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
    """Measure the missing cells."""
    parser = argparse.ArgumentParser(description="Measure the quality of all methods.")
    add_options(parser)
    parser.set_defaults(nsamples=None)
    parser.add_argument(
        "--draw", type=int, help="another seed of the calibration windows; also measures on a second text"
    )
    parser.add_argument("--methods", nargs="+", help=f"of: {shlex.join(TEXT)}; with --images of: {shlex.join(IMAGES)}")
    parser.add_argument("--images", action="store_true", help="image classifiers instead of a language model")
    parser.add_argument("--photos", help="folder of a timm model with its weights")
    parser.add_argument("--data", help="images for --photos: a folder with train/CLASS and val/CLASS")
    parser.add_argument("--epochs", type=int, default=30, help="training epochs of --images")
    options = parser.parse_args()
    if options.nsamples is None:
        options.nsamples = CALIBRATION_PHOTOS if options.photos else WINDOWS
    kind = "digits" if options.images else "photos" if options.photos else "text"
    known = {"digits": IMAGES, "photos": PHOTOS, "text": TEXT}[kind]
    options.methods, options.goals = options.methods or list(known), options.goals or GOALS[kind]
    check_options(parser, options, known)
    if kind == "photos" and not options.data:
        parser.error("--photos needs --data, a folder with train/CLASS and val/CLASS.")
    usual = kind == "text" and options.calibration != SELF and options.nsamples == WINDOWS
    if options.draw is not None and (not usual or options.draw < 1):
        parser.error(
            f"--draw must be at least 1, and needs a language model, a calibration text and {WINDOWS} windows."
        )
    if not options.model and kind == "text":
        parser.error("--model must be given, except with --images and --photos.")
    {"digits": measure_images, "photos": measure_photos, "text": measure_text}[kind](options)


if __name__ == "__main__":
    main()
