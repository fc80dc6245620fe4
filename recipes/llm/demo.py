"""Prune a language model with magnitude, Wanda and `best`, and show all of them in one table.

    make demo                          (runs this script with SmolLM2-135M-Instruct)
    python recipes/llm/demo.py --model FOLDER_OR_GGUF --sparsity 0.5 --pattern 2:4

Calibration reads Python's own documentation. Perplexity is measured on text of another kind, the descriptions of
scikit-learn's data sets, and beside it on other topics of Python's documentation, where pruning seems to cost less.
Nothing is downloaded for them. Magnitude and Wanda are pruned in Python, `best` in the shell, which also writes a page
about it. Result: a table with perplexities, size and seconds, and out/demo.html.
"""

import argparse
import copy
import logging
import os
import subprocess
import sys
import warnings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon leave the cores to others

import lightning as L
from rich.console import Console
from rich.table import Table

from wanda_lightning import (
    CausalLMModule,
    PruningCallback,
    PruningReport,
    TextDataModule,
    WandaPrune,
)

# To measure on. Calibration reads other topics of python-docs than those that are measured here.
TEXTS = ("sklearn-docs", "python-docs")
# The names under which the module logs the perplexities of the first text and of another one.
METRICS = ("val_perplexity", "val_ppl/python-docs")
PAGE = "out/demo.html"


def row_of(report: PruningReport | None, perplexities: list[float], mebibytes: float) -> list[str]:
    """Return the cells of a method; the dense model has no report."""
    numbers = [f"{perplexity:.2f}" for perplexity in perplexities]
    numbers.append(f"{mebibytes:,.1f}")
    if report is None:
        return ["", *numbers, ""]
    return [f"{report.sparsity:.2%}", *numbers, f"{report.total_seconds:.1f}"]


def measure(
    module: CausalLMModule, data: TextDataModule, callback: PruningCallback | None
) -> list[str]:
    """Prune with the callback, if there is one, and measure the model; return the cells of the table."""
    # The callback prunes before the validation begins, so the metrics are those of the pruned model.
    trainer = L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
    )
    trainer.validate(module, data, verbose=False)

    perplexities = [float(trainer.callback_metrics[metric]) for metric in METRICS]
    size = sum(parameter.nbytes for parameter in module.model.parameters()) / 2**20
    report = callback.report if callback else None
    return row_of(report, perplexities, size)


def prune_in_shell(options: argparse.Namespace) -> list[str]:
    """Prune with `best` by a command, which writes a page and a report; return the cells from the report."""
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
    # `python -m wanda_lightning` is the command wanda-lightning of this environment.
    command = [sys.executable, "-m", "wanda_lightning", "prune", "--overwrite"]
    command += [f"--{name}={value}" for name, value in values.items()]
    subprocess.run(command, check=True)

    report = PruningReport.load("out/demo")
    perplexities = [result.after for result in report.run.results]
    (size,) = report.run.costs
    return row_of(report, perplexities, size.after)


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

    # Lightning 2.6 calls torch 2.13 in a deprecated way.
    warnings.filterwarnings("ignore", message=".*LeafSpec")
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
    callbacks = {
        "dense": None,
        "magnitude": PruningCallback(options.sparsity, method="magnitude", pattern=options.pattern),
        "wanda": WandaPrune(
            options.sparsity, pattern=options.pattern, num_samples=options.num_samples
        ),
    }

    # Each method prunes the dense weights, not what the method before it has left.
    dense = copy.deepcopy(module.state_dict())
    rows = {}
    for method, callback in callbacks.items():
        module.load_state_dict(dense)
        rows[method] = measure(module, data, callback)
    del module, dense  # the command loads the model once more
    rows["best"] = prune_in_shell(options)

    table = Table(
        title=f"{options.model}, perplexity on at most {options.limit} windows of {options.seqlen} tokens"
    )
    table.add_column("method")
    numbers = ("zeros", *TEXTS, "MiB of weights", "seconds to prune")
    for heading in numbers:
        table.add_column(heading, justify="right")
    for method, cells in rows.items():
        table.add_row(method, *cells)
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(
        "Zeros change neither the size nor the speed: files store them, and dense kernels multiply by them."
    )
    console.print(f"The page about best is {PAGE}.")


if __name__ == "__main__":
    main()
