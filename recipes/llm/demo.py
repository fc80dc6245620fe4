"""Prune a language model with magnitude, Wanda and `best`, and show all of them in one table.

    make demo                          (runs this script with SmolLM2-135M-Instruct)
    python recipes/llm/demo.py --model FOLDER_OR_GGUF --sparsity 0.5 --pattern 2:4

Calibration reads Python's own documentation. Perplexity is measured on text of another kind, the descriptions of
scikit-learn's data sets, and beside it on other topics of Python's documentation, where pruning seems to cost less.
Nothing is downloaded for them. Magnitude and Wanda are pruned in Python, `best` in the shell, which also writes a page
about it. Result: a table with perplexities, size, speed and seconds, and out/demo.html.
"""

import argparse
import copy
import logging
import os
import subprocess
import sys
import time
import warnings
from itertools import pairwise

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon leave the cores to others

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from rich.table import Table

from wanda_lightning import (
    CausalLMModule,
    PruningCallback,
    PruningReport,
    TextDataModule,
    WandaPrune,
)

# To measure on; the model is calibrated on other topics of python-docs.
TEXTS = (
    "sklearn-docs",
    "python-docs",
)
METRICS = ("val_perplexity", f"val_perplexity/{TEXTS[1]}")
PAGE = "out/demo.html"


def measure(
    module: CausalLMModule, data: TextDataModule, callback: PruningCallback | None
) -> list[str]:
    """Prune with the callback, if there is one; return perplexities, size, speed and seconds to prune for the table."""
    starts: list[tuple[float, int]] = []  # of each batch: when, and how many tokens it has

    def start(
        _: L.Trainer, __: L.LightningModule, batch: dict[str, torch.Tensor], *___: object
    ) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        starts.append((time.perf_counter(), batch["input_ids"].numel()))

    clock = LambdaCallback(on_validation_batch_start=start)
    trainer = L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback, clock] if callback else [clock],
    )
    trainer.validate(module, data, verbose=False)

    size = sum(parameter.nbytes for parameter in module.model.parameters()) / 2**20
    # Other work of the machine has disturbed the fastest batch least.
    speed = max(tokens / (end - begin) for (begin, tokens), (end, _) in pairwise(starts))
    report = callback.report if callback else None
    return [
        f"{report.sparsity:.2%}" if report else "",
        *(f"{trainer.callback_metrics[metric]:.2f}" for metric in METRICS),
        f"{size:,.1f}",
        f"{speed:,.0f}",
        f"{report.total_seconds:.1f}" if report else "",
    ]


def prune_in_shell(options: argparse.Namespace) -> list[str]:
    """Prune with `best` by a command, which writes a page and a report; return the same from the report."""
    values = {
        "model": options.model,
        "method": "best",
        "sparsity": options.sparsity,
        "pattern": options.pattern,
        "calibration": "python-docs",
        "evaluation": ",".join(TEXTS),
        "num_samples": options.num_samples,
        "seqlen": options.seqlen,
        "limit": options.limit,
        "save": "out/demo",
        "report": PAGE,
    }
    given = [f"--{name}={value}" for name, value in values.items()]
    subprocess.run(
        [sys.executable, "-m", "wanda_lightning", "prune", *given, "--overwrite"], check=True
    )

    report = PruningReport.load("out/demo")
    size, speed = report.run.costs
    return [
        f"{report.sparsity:.2%}",
        *(f"{result.after:.2f}" for result in report.run.results),
        f"{size.after:,.1f}",
        f"{speed.after:,.0f}",
        f"{report.total_seconds:.1f}",
    ]


def main() -> None:
    """Load the model once, measure it, then prune and measure a fresh copy with each method."""
    parser = argparse.ArgumentParser(
        description="Prune a language model with magnitude, Wanda and `best`."
    )
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--pattern", default="unstructured", help="unstructured, or N:M such as 2:4"
    )
    parser.add_argument("--num_samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
    parser.add_argument("--limit", type=int, default=32, help="windows to measure on")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning 2.6 on torch 2.13
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)
    module = CausalLMModule(options.model)
    data = TextDataModule(
        module.tokenizer,
        evaluation=TEXTS,
        seqlen=options.seqlen,
        num_samples=options.num_samples,
        limit=options.limit,
        batch_size=4,
    )
    methods: dict[str, PruningCallback | None] = {
        "dense": None,
        "magnitude": PruningCallback(options.sparsity, method="magnitude", pattern=options.pattern),
        "wanda": WandaPrune(
            options.sparsity, pattern=options.pattern, num_samples=options.num_samples
        ),
    }
    dense = copy.deepcopy(module.state_dict())
    rows = {}
    for name, callback in methods.items():
        module.load_state_dict(dense)
        rows[name] = measure(module, data, callback)
    del module, dense
    rows["best"] = prune_in_shell(options)

    table = Table(
        title=f"{options.model}, perplexity on at most {options.limit} windows of {options.seqlen} tokens"
    )
    for heading in (
        "method",
        "zeros",
        *TEXTS,
        "MiB of weights",
        "tokens per second",
        "seconds to prune",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(
        "Zeros change neither the size nor the speed: files store them, and dense kernels multiply by them."
    )
    console.print(f"The page about best is {PAGE}.")


if __name__ == "__main__":
    main()
