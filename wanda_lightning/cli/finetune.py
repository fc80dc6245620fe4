"""`wanda-lightning finetune`: train a pruned language model and keep every zero."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.table import Table

from wanda_lightning.callbacks import DistillFromDense, KeepZeros
from wanda_lightning.cli.measure import (
    checked_seqlen,
    measure,
    plain_trainer,
    push,
    refuse_long_windows,
    refuse_no_space,
    save_model,
)
from wanda_lightning.cli.options import LEARNING_RATES, FinetuneOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parser import as_command
from wanda_lightning.common.errors import MissingPackageError, UserError
from wanda_lightning.common.words import counted, one_line
from wanda_lightning.data import TextDataModule
from wanda_lightning.hub.upload import list_files
from wanda_lightning.modules import CausalLMModule
from wanda_lightning.training.held_zeros import zeros_of

_PAPER_SEQLEN = 1024
_CHECKPOINTS = 20  # in a whole run


def run(options: FinetuneOptions) -> None:
    """Fine-tune a pruned language model, measure it before and after, and save it.

    While it trains into a folder, its progress is kept in a checkpoint next to the folder, from which the same command
    continues after an interruption.
    """
    checkpoint = None if options.save_model is None else _Progress(options)
    try:
        _finetune(options, checkpoint)
    except BaseException:
        if checkpoint is not None and checkpoint.path.exists():
            print_line(f"The same command continues from {checkpoint.path}.")
        raise


def _finetune(options: FinetuneOptions, checkpoint: _Progress | None) -> None:
    source = options.source(options.model)
    refuse_long_windows(options.seqlen, source)
    dtype = options.dtype or ("float32" if options.method == "full" else "auto")
    L.seed_everything(options.seed, verbose=False)
    lr = options.lr or LEARNING_RATES[options.method]
    module = CausalLMModule(options.model, dtype=dtype, lr=lr, lr_decay=True, **source.hub)
    windows = TextDataModule(
        module.tokenizer,
        options.data,
        options.evaluation,
        seqlen=checked_seqlen(options.seqlen, module.model.config, _PAPER_SEQLEN),
        num_samples=options.steps * options.batch_size * options.devices,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        cache_dir=options.cache_dir,
    )
    zeros = _count_zeros(module)
    if not zeros:
        raise UserError(
            f"{options.model} has no zeros to keep. Prune it first: wanda-lightning prune --save_model DIR."
        )
    windows.setup("fit")
    refuse_no_space(options.save_model, module)
    # Before anything is measured, since adapters and devices may be refused.
    if options.method != "full":
        _add_adapters(module, options)
    dense = None
    if options.dense is not None:
        dense = CausalLMModule(options.dense, dtype=dtype, **options.source(options.dense).hub)
    trainer = _trainer(options, dense, checkpoint)
    perplexity: dict[str, float] = {}
    if dense is not None:
        perplexity["dense"] = measure(dense, windows)["val_perplexity"]
        del dense  # unless it is still needed, free it before training
    perplexity["pruned"] = measure(module, windows)["val_perplexity"]  # new adapters add nothing
    started = time.perf_counter()
    resumed = checkpoint is not None and checkpoint.path.exists()
    trainer.fit(module, windows, ckpt_path=checkpoint.path if checkpoint is not None and resumed else None)
    seconds = time.perf_counter() - started
    if options.method == "lora":
        perplexity["fine-tuned, adapters apart"] = measure(module, windows)["val_perplexity"]
    module.merge(reprune=options.method == "lora")
    perplexity["fine-tuned"] = measure(module, windows)["val_perplexity"]
    folder = save_model(module, options.save_model, options.overwrite)
    if checkpoint is not None:
        checkpoint.path.unlink(missing_ok=True)
    files = list_files(folder) if folder else []
    table = Table("model")
    table.add_column("perplexity", justify="right")
    for name, value in perplexity.items():
        table.add_row(name, f"{value:.2f}")
    print_table(table)
    steps = counted(options.steps, "step")
    print_line(f"{steps} in {seconds:.0f} s. Zeros before: {zeros:,}, after: {_count_zeros(module):,}.")
    if folder is None:
        print_line("The model was not saved. To save it, add --save_model DIR.")
    push(folder, files, options)


def _add_adapters(module: CausalLMModule, options: FinetuneOptions) -> None:
    targets = options.target_modules
    try:
        module.add_adapters(
            r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            keep_zeros=options.method == "keep-zeros-lora",
        )
    except MissingPackageError:
        raise
    except ValueError as error:
        raise UserError(f"--target_modules {','.join(targets)} cannot get adapters: {one_line(error)}") from error


def _command_of(checkpoint: Path) -> str:
    """Return the command that wrote a checkpoint; empty if the file is damaged or of another program."""
    import torch

    try:
        return str(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["command"])
    except Exception:  # torch raises errors of many kinds
        return ""


class _Progress(Checkpoint):
    """The checkpoint of a run, and the command that it belongs to; refuses a checkpoint of another command."""

    def __init__(self, options: FinetuneOptions) -> None:
        folder = Path(options.save_model or "").absolute()
        self.path = folder.with_name(f"{folder.name}.ckpt")
        self._every = max(1, options.steps // _CHECKPOINTS)
        self._command = as_command("finetune", replace(options, push_to_hub=None, private=False, overwrite=False))
        if self.path.exists():
            found = _command_of(self.path)
            if found != self._command:
                raise UserError(
                    f"--save_model {options.save_model} has a checkpoint of another command, {self.path}. Remove the "
                    f"file, or continue that command{f': {found}' if found else '.'}"
                )
            print_line(f"Training continues from {self.path}.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Replace the checkpoint after some of the steps."""
        if trainer.global_step % self._every == 0:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the command."""
        checkpoint["command"] = self._command


def _trainer(options: FinetuneOptions, dense: CausalLMModule | None, checkpoint: _Progress | None) -> L.Trainer:
    """Return the Trainer for the fine-tuning; Lightning refuses devices that this machine does not have."""
    callbacks: list[Callback] = [KeepZeros()] if options.method == "full" else []
    callbacks += [DistillFromDense(dense)] if options.distill and dense is not None else []
    callbacks += [] if checkpoint is None else [checkpoint]
    return plain_trainer(
        *callbacks,
        devices=options.devices,
        strategy="auto" if options.devices == 1 else "ddp_spawn",  # the command itself runs only once
        precision=options.precision,
        max_epochs=-1,  # else configure_optimizers would load the data before Lightning restores its position
        max_steps=options.steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        enable_checkpointing=checkpoint is not None,
    )


def _count_zeros(module: CausalLMModule) -> int:
    return sum(zeros_of(module.pruning_target).values())
