"""Repeat the runs that the documentation leads with, with two further draws of the calibration data.

    pip install onnx onnxscript onnxruntime openvino nncf  (for the encoder)
    python benchmarks/draws.py --model M.gguf --images .cache/efficientnet_lite0 --data imagenet_sample \
        --encoder .cache/all-MiniLM-L6-v2 --pairs test.csv --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --save benchmarks/results

The first draw, with seed 0, is in the other tables, which show the mean and the standard deviation of all three. The
same command again measures only what is missing. `--parts text` repeats only one part.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import quality
import worth
from measuring import LanguageModel, Photos, Text, perplexity, run_from_shell
from result import Runs

SEEDS = (1, 2)
TABLE = "draws"
METHODS = ("wanda", "fast", "sparsegpt", "balanced", "best", "thorough")
PHOTO_METHODS = ("wanda, row", *METHODS[2:])
GOALS = ("50", "60", "2:4")


@dataclass(frozen=True, kw_only=True)
class Options(Text):
    """Models and data, the same as in the other tables."""

    model: str
    images: str = ""
    data: str = ""
    encoder: str = ""
    pairs: str = ""
    save: str = ""
    parts: Sequence[str] = ("text", "units", "photos", "encoder")


def text(options, seed):
    """Prune a language model with the methods that the documentation leads with."""
    shared = {name: getattr(options, name) for name in ("model", "calibration", "eval", "save")}
    cells = {"methods": METHODS, "goals": GOALS}
    quality.measure_text(quality.Options(**shared, **cells, draw=seed))


def units(options, seed):
    """Take hidden units out of a language model, by the loss."""
    language = LanguageModel(options, seed)
    change = partial(worth.narrower, language.calibration, allocation=worth.BY_LOSS)
    rows = worth.rows_of_units(language.planned, "structured, fisher", change, ("12.5", "25"))

    def quality_of(model):
        return {"perplexity": perplexity(model, language.evaluation)}

    repeat(rows, language.model, quality_of, options, seed)


def photos(options, seed):
    """Prune a classifier with its weights."""
    images = Photos(options.images, options.data, quality.CALIBRATION_PHOTOS, seed)
    chosen = quality.Options(methods=PHOTO_METHODS, goals=GOALS)
    cells = quality.cells_of(chosen, quality.PHOTOS, GOALS)
    runs = Runs(options.save, TABLE)
    quality.measure_classifier(images.model, images.data, images.planned, cells, runs, draw=seed)


def encoder(options, seed):
    """Take hidden units out of a sentence encoder, also with training afterward."""
    import embedding

    source = worth.Options(
        model=options.encoder, calibration=options.calibration, eval=options.pairs
    )
    kind = embedding.sentences(source, seed)
    _, *rows = kind.rows
    repeat(rows, kind.dense, lambda model: kind.quality(kind.run(model)), options, seed)


def repeat(rows, dense, quality_of, options, seed):
    """Measure the quality of each row, which is a run and what changes a copy of the dense model."""
    runs = Runs(options.save, TABLE)
    for planned, change in rows:

        def measure(change=change):
            return quality_of(change(copy.deepcopy(dense)))

        runs(replace(planned, case={"draw": seed}), measure)


PARTS = {function.__name__: function for function in (text, units, photos, encoder)}


def main(options: Options):
    """Measure what is missing."""
    for part in options.parts:
        for seed in SEEDS:
            PARTS[part](options, seed)


if __name__ == "__main__":
    run_from_shell(main)
