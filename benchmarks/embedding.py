"""Compare fewer hidden units, fewer bits, and both for a sentence encoder in ONNX Runtime and OpenVINO, in one thread.

    pip install onnx onnxscript onnxruntime openvino nncf
    python benchmarks/embedding.py --model .cache/all-MiniLM-L6-v2 --calibration c4_sample.txt --eval stsb \
        --runs 10 --save benchmarks/results

Scores are those of the files themselves: the Spearman correlation with the scores of the pairs, times 100. Speeds are
ratios to dense float32 in the same program, whose files take turns: medians of `--runs` rounds with 32 sentences of 64
tokens, and of five times as many with one sentence of 32 tokens. int8 is dynamic in ONNX Runtime (signed weights, each
column with its own scale), and static in OpenVINO (`nncf.quantize` for transformers, with the calibration sentences).
Files in out/runtimes are used again: after a change of `trained`, remove those with that word in their names.
"""

from functools import partial
from importlib import metadata
from pathlib import Path

import lightning as L
import numpy as np
import torch
import worth
from measuring import run_from_shell, seconds
from result import Result, Samples
from runtimes import measure
from scipy.stats import spearmanr
from worth import Kind, narrower, rows_of_units

from wanda_lightning import (
    DistillFromDense,
    EmbeddingModule,
    SentenceDataModule,
    ShrinkCallback,
)

NUMBERS = dict.fromkeys(("onnxruntime", "openvino"), ("float32", "int8"))
WIDTHS = ("50", "75")
PIECES = 25600  # of text, to train on
LENGTHS = {1: 32, 32: 64}  # tokens, by the number of sentences
PACKAGES = ("onnxruntime", "openvino", "nncf")


def trained(options, goal, model, seed):
    """Return the model without a percentage of its hidden units, trained as `smaller_encoder.yaml` in recipes does."""
    module = EmbeddingModule(model, lr=5e-4, lr_decay=True)
    data = SentenceDataModule(
        model,
        options.calibration,
        options.eval,
        batch_size=64,
        train_samples=PIECES,
        seed=seed,
    )
    shrinking = ShrinkCallback(units=int(goal) / 100, num_samples=1024)
    callbacks = [DistillFromDense(weight=1.0), shrinking]
    choices = {
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
    }
    L.Trainer(max_epochs=1, callbacks=callbacks, **choices).fit(module, data)
    return model.eval()


def arrays(features):
    """Return what the files take: tokens, and which of them are no padding."""
    return features["input_ids"].numpy(), features["attention_mask"].numpy()


def sentences(options, seed=0):
    """Prepare a sentence encoder; `seed` draws the calibration sentences and what is trained on."""
    model = EmbeddingModule(options.model).eval().model
    count = options.nsamples or 1024
    data = SentenceDataModule(
        model, options.calibration, options.eval, num_samples=count, seed=seed
    )
    texts = data.calibration_sentences
    pairs = list(data.val_dataloader())
    scores = np.concatenate([batch["score"] for batch in pairs])
    planned = Result(
        model=Path(options.model).name,
        method="dense",
        calibration=Samples(Path(options.calibration).name, count),
        evaluation=Samples("STS-B", len(scores)),
        versions={name: metadata.version(name) for name in PACKAGES},
    )
    rows = [(planned, lambda model: model)]
    rows += rows_of_units(planned, "structured", partial(narrower, texts), WIDTHS)
    rows += rows_of_units(
        planned, "structured, trained", partial(trained, options, seed=seed), WIDTHS
    )

    def quality(run):
        similarities = []
        for batch in pairs:
            ids, mask = arrays(batch)
            first, second = np.split(run(ids, None, mask)[0], 2)
            lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            similarities += list((first * second).sum(axis=1) / lengths)
        return {"spearman": 100 * float(spearmanr(similarities, scores).statistic)}

    def clock(size, run):
        ids = np.random.default_rng(0).integers(1000, 30000, size=(size, LENGTHS[size]))
        mask = np.ones_like(ids)
        return [seconds(lambda: run(ids, None, mask))]

    samples = [arrays(batch) for batch in data.calibration_dataloader()]
    return Kind(model, rows, quality, ["sentences"], clock, run_sentences, samples)


def run_sentences(model):
    """Return what runs a sentence encoder."""

    @torch.no_grad()
    def run(ids, _, mask):
        features = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return model(features)["sentence_embedding"].numpy(), None

    return run


def main(options: worth.Options = worth.Options()):
    """Measure the rows in each program."""
    measure(sentences(options), NUMBERS, options, "embedding", threads=1)


if __name__ == "__main__":
    run_from_shell(main)
