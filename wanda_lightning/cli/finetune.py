"""`wanda-lightning finetune`: train a pruned language model and keep every zero."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from wanda_lightning.common.refuse_path import files_in
from wanda_lightning.common.words import counted, one_line
from wanda_lightning.data import TextDataModule
from wanda_lightning.hub.card import OwnCard, continue_card, read_card
from wanda_lightning.modules import CausalLMModule
from wanda_lightning.report import Run
from wanda_lightning.report.metrics import PERPLEXITY
from wanda_lightning.training.held_zeros import zeros_of

_PAPER_SEQLEN = 1024
_CHECKPOINTS = 20  # in a whole run


def run(options: FinetuneOptions) -> None:
    """Fine-tune a pruned language model, measure it before and after, and save it.

    While it trains into a folder, its progress is kept in a checkpoint next to the folder, from which the same command
    continues after an interruption.
    """
    checkpoint = None if options.save_model is None else _Progress(options)
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
    if options.method != "full":  # before anything is measured, since it may be refused
        _add_adapters(module, options)
    perplexity: dict[str, float] = {}
    callbacks: list[Callback] = [KeepZeros()] if options.method == "full" else []
    if options.dense is not None:
        dense = CausalLMModule(options.dense, dtype=dtype, **options.source(options.dense).hub)
        perplexity["dense"] = measure(dense, windows)["val_perplexity"]
        callbacks += [DistillFromDense(dense)] if options.distill else []
        del dense  # unless it is still needed, free it before training
    perplexity["pruned"] = measure(module, windows)["val_perplexity"]  # new adapters add nothing
    seconds = _train(module, windows, options, callbacks, checkpoint)
    if options.method == "lora":
        perplexity["fine-tuned, adapters apart"] = measure(module, windows)["val_perplexity"]
    module.merge(reprune=options.method == "lora")
    perplexity["fine-tuned"] = measure(module, windows)["val_perplexity"]
    card = OwnCard() if options.save_model is None else read_card(source)  # may be replaced
    folder = save_model(module, options.save_model, options.overwrite)
    _write_card(card, folder, options, perplexity, windows)
    if checkpoint is not None:
        checkpoint.path.unlink(missing_ok=True)
    files = files_in(folder) if folder else []
    table = Table("model")
    table.add_column("perplexity", justify="right")
    for name, value in perplexity.items():
        table.add_row(name, f"{value:.2f}")
    print_table(table)
    steps = counted(options.steps, "step")
    print_line(f"{steps} in {seconds:.0f} s. Zeros before: {zeros:,}, after: {_count_zeros(module):,}.")
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


class _Progress(Checkpoint):
    """The checkpoint of a run, and the command that it belongs to; refuses a checkpoint of another command."""

    def __init__(self, options: FinetuneOptions) -> None:
        folder = Path(options.save_model or "").absolute()
        self.path = folder.with_name(f"{folder.name}.ckpt")
        self._every = max(1, options.steps // _CHECKPOINTS)
        self._command = as_command("finetune", replace(options, push_to_hub=None, private=False, overwrite=False))
        if self.path.exists():
            import torch

            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)["command"]
            if found != self._command:
                raise UserError(
                    f"--save_model {options.save_model} has a checkpoint of another command, {self.path}. Remove the "
                    f"file, or continue that command: {found}"
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


def _train(
    module: CausalLMModule,
    windows: TextDataModule,
    options: FinetuneOptions,
    callbacks: Sequence[Callback],
    checkpoint: _Progress | None,
) -> float:
    """Train, and return the number of seconds."""
    trainer = plain_trainer(
        *callbacks,
        *([] if checkpoint is None else [checkpoint]),
        devices=options.devices,
        strategy="auto" if options.devices == 1 else "ddp_spawn",  # the command itself runs only once
        precision=options.precision,
        max_epochs=-1,  # else configure_optimizers would load the data before Lightning restores its position
        max_steps=options.steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        enable_checkpointing=checkpoint is not None,
    )
    started = time.perf_counter()
    resumed = checkpoint is not None and checkpoint.path.exists()
    trainer.fit(module, windows, ckpt_path=checkpoint.path if checkpoint is not None and resumed else None)
    return time.perf_counter() - started


def _write_card(
    card: OwnCard,
    folder: Path | None,
    options: FinetuneOptions,
    perplexity: Mapping[str, float],
    windows: TextDataModule,
) -> None:
    if folder is None:
        return
    run = Run(
        command=as_command("finetune", options),
        metric=PERPLEXITY.name,
        before=perplexity["pruned"],
        after=perplexity["fine-tuned"],
        data=windows.describe_evaluation(),
    )
    name, on_hub = options.push_to_hub or folder, options.push_to_hub is not None
    continue_card(card, folder, run, name=name, on_hub=on_hub)


def _count_zeros(module: CausalLMModule) -> int:
    return sum(zeros_of(module.pruning_target).values())
