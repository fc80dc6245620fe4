"""Take hidden units out of a sentence encoder, and show what is left of its quality, its size and its time.

    make demo-embedding                                       (all-MiniLM-L6-v2 from PyPI)
    python recipes/embedding/demo.py --model FOLDER --calibration sentences.txt --pairs pairs.csv

Nothing is trained, and no scores are read before the measurement. Without `--pairs`, the score is how well the
similarities of sentences that were not used for calibration keep the order that the dense model gives them: their
Spearman correlation, times 100, so the dense model has 100. With `--pairs`, a file with the columns sentence1,
sentence2 and score, such as STS-B's test set, or `stsb` for that of the hub, it is the correlation with the scores:
README has 82.0 for the dense model and 80.8 for the half. Result: a table, the page
out/embedding.html, and the model without half of its units in out/embedding, which `SentenceTransformer` loads.
Calibrated on 1,024 sentences of Python's documentation, half of the units keep 93.48 and run 1.23 times as fast (one
sentence) and 1.39 times (512), three quarters 84.08, 1.37 and 1.66; once, beside other programs. Cost: 7 min there.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import median, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave the cores to others

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from wanda_lightning import EmbeddingModule, SentenceDataModule, shrink
from wanda_lightning.report import Circumstances, Measured
from wanda_lightning.report.descriptions import SPEARMAN

SPARSITIES = (0.5, 0.75)  # shares of the hidden units
HELD_OUT = 3  # every third sentence is only compared with the dense model
FOLDER = Path("out/embedding")
PAGE = Path("out/embedding.html")

Score = Callable[[SentenceTransformer], float]


def embeddings(model: SentenceTransformer, sentences: list[str]) -> Tensor:
    """Return normalized embeddings, of shape (sentences, width)."""
    return model.encode(sentences, convert_to_tensor=True, normalize_embeddings=True).cpu()


def score_of_pairs(data: SentenceDataModule) -> Score:
    """Return the score on pairs: the correlation of similarities with the scores in the file."""
    first, second, scores = zip(*data.evaluation_pairs, strict=True)

    def score(model: SentenceTransformer) -> float:
        similarities = (embeddings(model, [*first]) * embeddings(model, [*second])).sum(dim=1)
        return 100 * float(spearman_corrcoef(similarities, torch.tensor(scores)))

    return score


def score_beside(dense: SentenceTransformer, sentences: list[str]) -> Score:
    """Return the score without pairs: the correlation of all similarities with those of the dense model."""
    rows, columns = torch.triu_indices(len(sentences), len(sentences), offset=1)

    def similarities(model: SentenceTransformer) -> Tensor:
        vectors = embeddings(model, sentences)
        return (vectors @ vectors.T)[rows, columns]

    expected = similarities(dense)
    return lambda model: 100 * float(spearman_corrcoef(similarities(model), expected))


def size_of(model: SentenceTransformer) -> float:
    """Return the MiB of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def speeds(
    models: list[SentenceTransformer], sentences: list[str], rounds: int, what: str
) -> list[Measured]:
    """Return how many times as fast as the first model each is: medians of rounds in which they take turns.

    The standard error of a median is 1.25 times that of the mean.
    """
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, own_times in zip(models, times, strict=True):
            start = time.perf_counter()
            model.encode(sentences)
            if number:  # the first round warms up
                own_times.append(time.perf_counter() - start)

    results = []
    for own_times in times:
        ratios = [dense / own for dense, own in zip(times[0], own_times, strict=True)]
        error = 1.25 * stdev(ratios) / sqrt(len(ratios))
        results.append(Measured(what, 1.0, median(ratios), after_error=error))
    return results


def main() -> None:
    """Shrink copies of the model, measure all of them, and save the one without half of its units."""
    parser = argparse.ArgumentParser(description="Take hidden units out of a sentence encoder.")
    parser.add_argument("--model", required=True, help="folder or hub id of sentence-transformers")
    parser.add_argument("--calibration", default="python-docs", help="text to cut into sentences")
    parser.add_argument("--num_samples", type=int, default=1024, help="calibration sentences")
    parser.add_argument("--pairs", help="stsb, or a .csv file with two sentences and a score")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the clock, from 2 on")
    options = parser.parse_args()

    dense = EmbeddingModule(options.model).eval().model
    data = SentenceDataModule(
        dense,
        options.calibration,
        options.pairs or "stsb",
        num_samples=options.num_samples * HELD_OUT // (HELD_OUT - 1),
    )
    sentences = data.calibration_sentences
    held_out = sentences[::HELD_OUT]
    calibration = [text for index, text in enumerate(sentences) if index % HELD_OUT]
    if options.pairs:
        score = score_of_pairs(data)
        heading = f"Spearman x 100, {options.pairs}"
        measured_on = f"{options.pairs}, {len(data.evaluation_pairs)} pairs"
    else:
        score = score_beside(dense, held_out)
        heading = "Spearman x 100, beside dense"
        measured_on = f"the dense model's similarities, {len(held_out)} sentences"

    models = {"dense": dense}
    reports = []
    for sparsity in SPARSITIES:
        name = f"without {sparsity:.0%} of the units"
        model = copy.deepcopy(dense)
        report = shrink(model, calibration, units=sparsity)
        print(f"{name}: {sum(map(torch.numel, model.parameters())):,} parameters")
        models[name] = model
        reports.append(report)

    all_models = [*models.values()]
    one = speeds(all_models, held_out[:1], 20 * options.rounds, "times as fast, one sentence")
    many = speeds(all_models, held_out, options.rounds, f"times as fast, {len(held_out)} sentences")
    scores = [score(model) for model in all_models]
    sizes = [size_of(model) for model in all_models]

    EmbeddingModule(all_models[1]).eval().save_pretrained(FOLDER, overwrite=True)
    run = Circumstances(
        model=options.model,
        metric=SPEARMAN.name,
        before=scores[0],
        after=scores[1],
        data=measured_on,
        costs=(Measured("MiB of weights", sizes[0], sizes[1]), one[1], many[1]),
        calibration=f"{options.calibration}, {len(calibration)} sentences",
    )
    replace(reports[0], run=run).save(PAGE)

    table = Table(
        title=f"{options.model}, calibrated on {len(calibration)} sentences of {options.calibration}"
    )
    table.add_column("model")
    for title in (heading, "MiB", one[0].data, many[0].data):
        table.add_column(title, justify="right")
    for index, name in enumerate(models):
        numbers = (
            f"{scores[index]:.2f}",
            f"{sizes[index]:.1f}",
            f"{one[index].after:.2f} ± {one[index].after_error:.2f}",
            f"{many[index].after:.2f} ± {many[index].after_error:.2f}",
        )
        table.add_row(name, *numbers)
    Console(width=max(110, Console().width)).print(table)
    if not options.pairs:
        print(
            "The score says how well the similarities of sentences keep the order that the dense model gives them. "
            "README has correlations with the scores of STS-B (82.0 dense, 80.8 for the half): add --pairs stsb."
        )
    print(f"The smaller model is in {FOLDER}, and the page about it is {PAGE}.")


if __name__ == "__main__":
    main()
