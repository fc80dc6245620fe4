"""Measure all methods with one model and its data: perplexity, seconds and memory at several sparsities.

    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --nsamples 16 --seqlen 512 --limit 40 --save benchmarks/results
    python benchmarks/quality.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt --draw 1
    python benchmarks/quality.py --images --save benchmarks/results
    python benchmarks/quality.py --photos .cache/efficientnet_lite0 --data imagenet_sample --nsamples 512

Windows are those of `wanda-lightning prune` with seed 0, in batches of 4, in float32. With `--save`, each cell is a
file (benchmarks/result.py), and the same command again measures only cells that are missing or used other choices.
`--draw` draws the calibration windows with another seed, measures on a second text as well, and has a table of its own.
`--images` trains and prunes the models of recipes/vision/demo.py, and `--photos` prunes a timm model with its weights.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cyclopts import Parameter
from measuring import (
    LanguageModel,
    Photos,
    Text,
    cost_of,
    fingerprint,
    outputs,
    run_from_shell,
    seconds,
)
from result import Result, Runs, Samples, sparsity_of

from wanda_lightning import OWL, Distill, Fisher, PruningConfig, prune
from wanda_lightning.core import EqualShare, Unstructured
from wanda_lightning.core.losses import divergence
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.methods import METHODS, PRESETS

TEXT = {
    **{name: {"method": name} for name in METHODS if not name.startswith("ablate_")},
    "sparsegpt at layer": {"method": "sparsegpt", "sequential": "layer"},
    "variant": {"method": "wanda", "pattern": EqualShare()},
    "owl": {"method": "wanda", "allocation": OWL()},
    "fisher": {"method": "wanda", "allocation": Fisher(num_samples=8)},
    **{name: {"method": name} for name in PRESETS},
    "thorough, 3 passes": {"method": "thorough", "recovery": Distill(passes=3)},
    "admm+reconstruct": {"method": "admm", "recovery": "reconstruct"},
    "best-row_weights": {"method": "best", "pattern": Unstructured("layer")},
}
UNSTRUCTURED = ("variant", "owl", "fisher", "best-row_weights", "best+row_weights")  # not for N:M


def _biases_kept(name):
    """Return a method whose solver would fit biases, without that."""
    method = METHODS[name] if name in METHODS else PRESETS[name]
    return {"method": name, "solver": replace(method.solver(), intercept=False)}


IMAGES = {
    "magnitude": TEXT["magnitude"],
    "wanda, row": TEXT["wanda"],
    "wanda, layer": {"method": "wanda", "pattern": Unstructured("layer")},
    **{name: TEXT[name] for name in ("sparsegpt", "refit", "balanced", "best", "thorough")},
    "refit, biases kept": _biases_kept("refit"),
    "balanced, biases kept": _biases_kept("balanced"),
    "best, biases kept": _biases_kept("best"),
    "best+row_weights": {"method": "best", "pattern": Unstructured("layer", weigh_rows=True)},
    "wanda at layer": {"method": "wanda", "sequential": "layer"},
    "balanced at layer": {"method": "balanced", "sequential": "layer"},
    "best at layer": {"method": "best", "sequential": "layer"},
    "best+distil at layer": {
        "method": "best",
        "recovery": Distill(blocks=False),
        "sequential": "layer",
    },
    "best+reconstruct": {"method": "best", "recovery": "reconstruct"},
}
GOALS = {
    "text": ("50", "60", "70", "4:8", "2:4"),
    "digits": ("50", "70", "80", "90", "2:4"),
    "photos": ("50", "60", "70", "2:4"),
}
PHOTOS = {
    name: IMAGES[name] for name in ("wanda, row", "sparsegpt", "balanced", "best", "thorough")
}
for name, choices in IMAGES.items():
    if name.startswith("best+") or " at " in name:
        PHOTOS[name] = choices
WINDOWS = 16  # for calibration, in the table of all methods
CALIBRATION_PHOTOS = 512  # likewise
EPOCHS = 30  # of training on digits
# By the first thing that is unusual about the calibration windows.
TABLES = {"": "methods", "windows": "windows", "draw": "draws"}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """Options of this program. Only a language model needs `--model`. Methods and goals are all by default."""

    model: str = ""
    methods: Sequence[str] = ()
    goals: Sequence[str] = ()
    save: str = ""
    nsamples: int = 0
    """By default 16 windows, or 512 photos."""
    draw: int = 0
    """Another seed of the calibration windows; also measures on a second text."""
    images: bool = False
    photos: str | None = None
    data: str = ""


def prune_cells(
    model,
    cells,
    planned,
    runs,
    measure,
):
    """Measure all cells, each from the dense weights, but those whose choices the model refuses."""
    dense = copy.deepcopy(model.state_dict())
    for name, goal, choices in cells:
        model.load_state_dict(dense)
        try:
            make_plan(PruningConfig(**choices), model)
        except ValueError as error:
            print(f"Not measured: {name}, {goal}: {error}")
            continue
        target = sparsity_of(goal)
        arguments = {key: str(value) for key, value in choices.items() if key not in target}
        row = replace(planned, method=name, **target, arguments=arguments)
        runs(row, partial(measure, choices))


def cells_of(options, known, goals):
    """Return each method and goal with the arguments of `prune`, without those that a method is not for."""
    return [
        (name, goal, {**known[name], **sparsity_of(goal)})
        for name in options.methods or known
        for goal in options.goals or goals
        if is_for(name, goal)
    ]


def is_for(method, goal):
    """Whether a method can prune to a goal."""
    return ":" not in goal or method not in UNSTRUCTURED


def prune_and_measure(language, choices):
    """Return one cell of the table of a language model."""
    cost = cost_of(lambda: prune(language.model, language.calibration, **choices, progress=False))
    return {
        **language.measure(),
        "seconds": cost.seconds,
        "peak_mib": cost.peak_mib,
        "sparsity": cost.result.sparsity,
    }


def measure_text(options):
    """Measure all methods with a language model."""
    options = replace(options, nsamples=options.nsamples or WINDOWS)
    case = {}
    if options.nsamples != WINDOWS:
        case["windows"] = options.nsamples
    if options.draw:
        case["draw"] = options.draw
    assert len(case) < 2, "--draw needs the usual windows."
    table = TABLES[next(iter(case), "")]

    cells = cells_of(options, TEXT, GOALS["text"])
    language = LanguageModel(options, options.draw)
    runs = Runs(options.save, table)
    runs(replace(language.planned, calibration=None), language.measure)
    planned = replace(language.planned, case=case)
    prune_cells(language.model, cells, planned, runs, partial(prune_and_measure, language))


def measure_images(options):
    """Measure all methods with a ViT and a ConvNeXt that are trained on digits."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from recipes.vision import demo

    cells = cells_of(options, IMAGES, GOALS["digits"])
    runs = Runs(options.save, "images")
    for name in demo.MODELS:
        module, data, _ = demo.train(name, EPOCHS)
        planned = Result(
            model=name,
            method="dense",
            case={"weights": fingerprint(module)},
            calibration=Samples("digits", data.num_samples),
            evaluation=Samples("digits", 360),
        )
        measure_classifier(module.model.eval(), data, planned, cells, runs)


def measure_classifier(model, data, dense, cells, runs, **case):
    """Measure all methods with a classifier and the data module of its images; `case` is that of pruned models."""
    calibration = [images for images, _ in data.calibration_dataloader()]
    evaluation = list(data.val_dataloader())
    labels = torch.cat([labels for _, labels in evaluation])
    expected = outputs(model, evaluation)

    def scored(logits):
        correct = (logits.argmax(dim=1) == labels).tolist()
        return {
            "top1": sum(correct) / len(correct),
            "correct": "".join("01"[bit] for bit in correct),
        }

    def measure(choices):
        duration = seconds(lambda: prune(model, calibration, **choices, progress=False))
        logits = outputs(model, evaluation)
        differs = float(divergence(logits, expected)[0]) / len(expected)
        return {**scored(logits), "divergence": differs, "seconds": duration}

    runs(replace(dense, calibration=None), lambda: scored(expected))
    planned = replace(dense, case=dense.case | case)
    prune_cells(model, cells, planned, runs, measure)


def measure_photos(options):
    """Measure presets with a classifier and its weights, on images in the layout of ImageNet."""
    count = options.nsamples or CALIBRATION_PHOTOS
    cells = cells_of(options, PHOTOS, GOALS["photos"])
    photos = Photos(options.photos, options.data, count)
    table = "photos"
    case = {}
    if count != CALIBRATION_PHOTOS:
        table = "more_photos"
        case = {"images": count}
    runs = Runs(options.save, table)
    measure_classifier(photos.model, photos.data, photos.planned, cells, runs, **case)


def main(options: Options = Options()):
    """Measure the missing cells."""
    if options.images:
        measure_images(options)
    elif options.photos:
        measure_photos(options)
    else:
        measure_text(options)


if __name__ == "__main__":
    run_from_shell(main)
