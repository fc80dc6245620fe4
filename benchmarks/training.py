"""Train a pruned model to predict like the dense one.

    python benchmarks/training.py --dense M.gguf --start out/thorough --goal 2:4 --train c4_sample.txt \
        --eval wikitext2_test.raw.txt --save benchmarks/results

All rows start from the same pruned folder and, for one `--text`, train on the same windows in the same order: adjacent
windows of the training text (`web`), windows that the dense model writes (`own`), or `both`, shuffled. Perplexity is
measured in float32.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from cyclopts import Parameter
from lightning.pytorch.callbacks import Timer
from measuring import in_batches, perplexity, run_from_shell
from result import Result, Runs, Samples, sparsity_of
from torch.utils.data import DataLoader

from wanda_lightning import (
    CausalLMModule,
    DistillFromDense,
    KeepZeros,
    TextDataModule,
    sample_windows,
)
from wanda_lightning.data.text_sources import OWN_TEXT
from wanda_lightning.models import find_layers

SEQLEN = 512
LIMIT = 40
LR = 1e-4
TEXTS = {"web": "{}", "own": OWN_TEXT, "both": f"{{}} and {OWN_TEXT}"}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this program."""

    dense: str
    start: str
    """Folder of the pruned model."""
    goal: str
    """Sparsity of the pruned model: a percentage such as 50, or N:M."""
    train: Path
    eval: Path
    windows: int = 256
    """Number of windows to train on."""
    text: str = "both"
    """One of `TEXTS`."""
    own: int = 256
    """Number of windows that the dense model writes."""
    accumulate: int = 2
    """Windows in an optimizer step."""
    save: str = ""


def windows_of(text, dense, limit=None):
    """Return the adjacent windows of a text."""
    data = TextDataModule(dense.tokenizer, evaluation=str(text), seqlen=SEQLEN, limit=limit)
    return data.evaluation_windows


def training_windows(options, dense):
    """Return the windows to train on, shuffled."""
    windows = windows_of(options.train, dense)
    if options.text != "web":
        own = sample_windows(dense.model, dense.tokenizer, options.own, SEQLEN, seed=100)
        windows = own if options.text == "own" else torch.cat([windows, own])

    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    repeated = order.repeat(-(-options.windows // len(order)))[: options.windows]
    return windows[repeated]


def train(options, dense, windows):
    """Train one row, and return the model with its numbers."""
    L.seed_everything(0, verbose=False)
    module = CausalLMModule(options.start, dtype="float32", lr=LR, lr_decay=True)
    timer = Timer()
    trainer = L.Trainer(
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        callbacks=[KeepZeros(), timer, DistillFromDense(dense.model)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([{"input_ids": window} for window in windows]))

    zeros = 0
    sizes = 0
    for layer in find_layers(module.model).layers:
        count = int((layer.weight == 0).sum())
        if 0 < count < layer.size:  # it was pruned
            zeros += count
            sizes += layer.size
    numbers = {
        "seconds": timer.time_elapsed("train"),
        "trained_tokens": windows.numel(),
        "sparsity": zeros / sizes,
    }
    return module.model, numbers


def main(options: Options):
    """Train and measure the rows."""
    dense = CausalLMModule(options.dense, dtype="float32")
    windows = training_windows(options, dense)
    evaluated = windows_of(options.eval, dense, LIMIT)
    planned = Result(
        model=Path(options.dense).name,
        method="thorough",
        **sparsity_of(options.goal),
        evaluation=Samples(options.eval.name, len(evaluated), SEQLEN),
    )

    def measured(model):
        return {"perplexity": perplexity(model.eval(), in_batches(evaluated))}

    def trained():
        model, numbers = train(options, dense, windows)
        return {**measured(model), **numbers}

    runs = Runs(options.save, "training")
    runs(planned, lambda: measured(CausalLMModule(options.start, dtype="float32").model))

    arguments = {"lr": str(LR), "accumulate": str(options.accumulate)}
    if options.text != "web":
        arguments["own"] = str(options.own)
    steps = math.ceil(len(windows) / options.accumulate)
    planned = replace(
        planned,
        method="fixed",
        case={"windows": len(windows), "steps": steps, "text": options.text},
        arguments=arguments,
        calibration=Samples(TEXTS[options.text].format(options.train.name), len(windows), SEQLEN),
    )
    runs(planned, trained)


if __name__ == "__main__":
    run_from_shell(main)
