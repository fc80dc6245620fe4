"""Shared steps of the commands: choose the length of windows, measure a model, save it, and upload it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from wanda_lightning.callbacks.save import find_free_folder
from wanda_lightning.cli.common_options import SaveOptions
from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.output import print_line
from wanda_lightning.common.memory import require_space
from wanda_lightning.common.model_source import ModelSource, load_config
from wanda_lightning.common.words import one_line
from wanda_lightning.hub.upload import upload


def measure(module: L.LightningModule, data: L.LightningDataModule, *callbacks: Callback) -> dict[str, float]:
    """Run one validation loop, before which a callback may prune, and return its metrics."""
    trainer = plain_trainer(*callbacks)
    trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def plain_trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    """Return a Trainer that, unless the options say otherwise, has one device and writes nothing."""
    plain: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="auto", callbacks=list(callbacks), **{**plain, **options})


def refuse_long_windows(seqlen: int | None, model: ModelSource, option: str = "--seqlen") -> None:
    """Refuse windows that are longer than the context of a model, before its weights are loaded."""
    if seqlen is not None:
        checked_seqlen(seqlen, load_config(model), seqlen, option)


def checked_seqlen(seqlen: int | None, config: Any, default: int, option: str = "--seqlen") -> int:
    """Return the number of tokens in a window: the given one if it fits, else the context, but at most `default`."""
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or default)
    if seqlen is not None and seqlen > context:
        raise UsageError(f"{option} must be at most {context}, the model's context, but it is {seqlen}.")
    return min(default, context) if seqlen is None else seqlen


def refuse_no_space(folder: str | None, module: L.LightningModule) -> None:
    """Refuse a folder on a disk that cannot hold the module's weights."""
    if folder is not None:
        tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
        require_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def save_model(module: Any, folder: str | None, overwrite: bool, **options: Any) -> Path | None:
    """Save a model, next to the folder if another run has saved one in it meanwhile, and return where it is.

    The module's `save_pretrained` gets the options; what it returns is printed.
    """
    if folder is None:
        return None
    refuse_no_space(folder, module)
    place = find_free_folder(folder, overwrite)
    if (result := module.save_pretrained(place, overwrite=overwrite, **options)) is not None:
        print_line(str(result))
    if place != Path(folder):
        print_line(f"Note: {folder} was written to meanwhile, so the model is in {place}.")
    return place


@contextmanager
def tolerating_no_card(folder: Path) -> Iterator[None]:
    """Print a note if the model card cannot be written, since the saved model and the results matter more."""
    try:
        yield
    except Exception as error:
        print_line(f"Note: no model card could be written into {folder}: {one_line(error)}")


def push(folder: Path | None, files: Collection[str], options: SaveOptions) -> None:
    """Upload files of a saved model if a repository is given. Call it last, since it may fail."""
    if folder is not None and options.push_to_hub is not None:
        print_line(f"Uploaded {folder} to {upload(folder, options.push_to_hub, files, options.private)}.")
