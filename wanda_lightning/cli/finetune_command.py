"""`wanda-lightning finetune`: train a pruned language model and keep every zero."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from wanda_lightning.callbacks import KeepZeros
from wanda_lightning.callbacks.held_zeros import zeros_of
from wanda_lightning.cli.measure import measure
from wanda_lightning.cli.options import as_patterns, checked_seqlen
from wanda_lightning.data import TextDataModule
from wanda_lightning.files import refuse_replacement
from wanda_lightning.modules import CausalLMModule

_PAPER_SEQLEN = 1024
_LR = {"full": 2e-5, "lora": 1e-4, "keep-zeros-lora": 1e-4}


def finetune_model(
    model: str,
    method: Literal["lora", "keep-zeros-lora", "full"] = "keep-zeros-lora",
    dense: str | None = None,
    save_model: str | None = None,
    data: str = "c4",
    eval: str = "wikitext2",
    limit: int | None = None,
    steps: int = 300,
    batch_size: int = 1,
    seqlen: int | None = None,
    lr: float | None = None,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    target_modules: str | list[str] = "q_proj,v_proj",
    precision: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Fine-tune a pruned language model without losing a zero, and measure it before and after.

    Args:
        model: Hub id, folder or .gguf file of the pruned model.
        method: full trains all weights; keep-zeros-lora trains adapters that merge sparse; lora plain adapters, after
            whose merge the zeros are put back.
        dense: The model before it was pruned, to measure it too.
        save_model: Folder for the fine-tuned model, its adapters merged.
        data: Text to train on: c4, wikitext2, python-docs (needs no network) or a FILE (.txt, .jsonl, .parquet).
        eval: Text to measure perplexity on, likewise.
        limit: Windows of it; by default all.
        steps: Optimizer steps.
        batch_size: Windows in a step.
        seqlen: Tokens in a window; by default the model's context, 1024 (as in the paper) at the most.
        lr: Learning rate at the start, from which it falls linearly to 0; by default 1e-4 for adapters (as in the
            paper) and 2e-5 for all weights.
        lora_r: Rank of the adapters.
        lora_alpha: Their scale, times r.
        lora_dropout: Dropout of their inputs.
        target_modules: Layers that have them, by the ends of their names, separated by commas; or all-linear.
        precision: Of the Trainer, such as bf16-mixed; by default that of the weights.
        dtype: Of the weights: auto (as stored), float32, bfloat16 or float16; by default auto, but float32 for full,
            whose small updates 16 bits would lose.
        seed: Draws the windows and initialises the adapters.
        cache_dir: Where downloads from the hub are kept.
        overwrite: Replace a --save_model folder with all that is in it.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        ValueError: If the options do not fit together or the model; before anything is written.
    """
    for name, count in {"steps": steps, "batch_size": batch_size}.items():
        if count < 1:
            raise ValueError(f"--{name} is at least 1, but {count} was given")
    if save_model is not None:
        refuse_replacement(save_model, overwrite)
    L.seed_everything(seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    dtype = dtype or ("float32" if method == "full" else "auto")
    hub: dict[str, Any] = {"dtype": dtype, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    module = CausalLMModule(model, lr=_LR[method] if lr is None else lr, lr_decay=True, **hub)
    windows = TextDataModule(
        module.tokenizer,
        data,
        eval,
        seqlen=checked_seqlen(seqlen, module, _PAPER_SEQLEN),
        num_samples=steps * batch_size,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        cache_dir=cache_dir,
    )
    zeros = _count_zeros(module)
    if not zeros:
        raise ValueError(f"{model} has no zeros to keep: prune it first (wanda-lightning prune --save_model DIR)")
    windows.setup("fit")
    callbacks: list[Callback] = []
    if method == "full":
        callbacks.append(KeepZeros())
    else:  # before anything is measured: it may refuse
        targets: Any = target_modules if target_modules == "all-linear" else as_patterns(target_modules)
        module.add_adapters(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=targets,
            keep_zeros=method == "keep-zeros-lora",
        )
    perplexity: dict[str, float] = {}
    if dense is not None:
        perplexity["dense"] = measure(CausalLMModule(dense, **hub), windows, "val_perplexity")
    perplexity["pruned"] = measure(module, windows, "val_perplexity")  # new adapters add nothing
    seconds = _train(module, windows, precision, callbacks)
    if method == "lora":
        perplexity["fine-tuned, adapters apart"] = measure(module, windows, "val_perplexity")
    module.merge(reprune=method == "lora")
    perplexity["fine-tuned"] = measure(module, windows, "val_perplexity")
    kept = _count_zeros(module)
    if save_model is not None:
        module.save_pretrained(save_model, overwrite=overwrite)
    _print_results(perplexity, zeros, kept, seconds, steps)


def _train(module: CausalLMModule, windows: TextDataModule, precision: str | None, callbacks: list[Callback]) -> float:
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    started = time.perf_counter()
    trainer.fit(module, windows)
    return time.perf_counter() - started


def _count_zeros(module: CausalLMModule) -> int:
    return sum(zeros_of(module.pruning_target).values())


def _print_results(perplexity: dict[str, float], zeros: int, kept: int, seconds: float, steps: int) -> None:
    table = Table()
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    for name, value in perplexity.items():
        table.add_row(name, f"{value:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{steps} steps in {seconds:.0f} s. Zeros before: {zeros:,}, after: {kept:,}.", highlight=False)
