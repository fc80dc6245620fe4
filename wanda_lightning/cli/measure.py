"""Measure a model with the Trainer, as the commands do before and after they change it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from wanda_lightning.cli.tables import print_note
from wanda_lightning.files import refuse_full, unclaimed


def measure(
    module: L.LightningModule, data: L.LightningDataModule, metric: str, callback: Callback | None = None
) -> float:
    """Run one validation loop, before which the callback may prune, and return one of its numbers."""
    return measure_all(module, data, callback)[metric]


def measure_all(
    module: L.LightningModule, data: L.LightningDataModule, callback: Callback | None = None
) -> dict[str, float]:
    """Run one validation loop and return all numbers."""
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
    )
    (metrics,) = trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in metrics.items()}


def refuse_no_space(folder: str | None, module: L.LightningModule) -> None:
    """Refuse a folder on a disk that cannot hold the module's weights."""
    if folder is not None:
        tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
        refuse_full(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def save_model(module: Any, folder: str | None, overwrite: bool) -> None:
    """Save a model, beside the folder if another run has saved one there meanwhile."""
    if folder is None:
        return
    refuse_no_space(folder, module)
    place = unclaimed(folder, "config.json", overwrite)
    module.save_pretrained(place, overwrite=overwrite)
    if place != Path(folder):
        print_note(f"another run has written to {folder} meanwhile. The model is in {place}.")


@contextmanager
def readable_messages() -> Iterator[None]:
    """Print warnings as one line without a path of the source, and none that the user cannot act on."""
    form = warnings.formatwarning
    warnings.formatwarning = _one_line
    # Lightning 2.6 asks torch 2.13 in an old way, at every dataloader.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    # peft 0.21 asks transformers 5.24 in an old way, at every model that gets adapters.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        yield
    finally:
        warnings.formatwarning = form


def quiet_trainer() -> None:
    """Silence what the Trainer says about itself at every start."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _one_line(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"wanda-lightning: warning: {message}\n"
