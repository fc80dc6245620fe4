"""Prune a language model with magnitude and with Wanda, and measure its perplexity.

    make demo                          (runs this script with SmolLM2-135M-Instruct, then writes a page about `best`)
    python recipes/llm/demo.py --model FOLDER_OR_GGUF --sparsity 0.5 --pattern 2:4

Calibration reads Python's own documentation. Perplexity is measured on text of another kind, the descriptions of
scikit-learn's data sets, and beside it on other topics of Python's documentation, where pruning seems to cost less.
Nothing is downloaded for them. Result: a table with perplexities and seconds.
"""

import argparse
import copy
import logging
import os
import time
import warnings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads soon leave the cores to others

import lightning as L
from rich.console import Console
from rich.table import Table

from wanda_lightning import CausalLMModule, PruningCallback, TextDataModule, WandaPrune

TEXTS = ("sklearn-docs", "python-docs")  # to measure on; the model is calibrated on other topics of python-docs
METRICS = ("val_perplexity", f"val_perplexity/{TEXTS[1]}")


def main() -> None:
    """Load the model once, measure it, then prune and measure a fresh copy with each method."""
    parser = argparse.ArgumentParser(description="Prune a language model with magnitude and with Wanda.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or N:M such as 2:4")
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
        "wanda": WandaPrune(options.sparsity, pattern=options.pattern, num_samples=options.num_samples),
    }
    dense = copy.deepcopy(module.state_dict())
    table = Table(title=f"{options.model}, perplexity on at most {options.limit} windows of {options.seqlen} tokens")
    for heading in ("method", "sparsity", *TEXTS, "seconds to prune", "seconds in total"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, callback in methods.items():
        module.load_state_dict(dense)
        started = time.perf_counter()
        trainer = L.Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[callback] if callback else [],
        )
        trainer.validate(module, data, verbose=False)
        report = callback.report if callback else None
        table.add_row(
            name,
            f"{report.sparsity:.2%}" if report else "",
            *(f"{trainer.callback_metrics[metric]:.2f}" for metric in METRICS),
            f"{report.total_seconds:.1f}" if report else "",
            f"{time.perf_counter() - started:.1f}",
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
