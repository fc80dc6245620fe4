"""Keep the best checkpoint of a pruned model, and save the trained model as a folder that its own library loads."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Module

from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.callbacks.trainer import is_dry_run, processes_of, require_lightning
from wanda_lightning.callbacks.zeros import zeros_callbacks
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import atomic_write, require_writable, resolve_path
from wanda_lightning.common.checks import check_flags
from wanda_lightning.hub.card import write_card
from wanda_lightning.models import count_parameters
from wanda_lightning.report import PruningReport
from wanda_lightning.report.descriptions import fate
from wanda_lightning.training.held_zeros import zeros_of


class BestAfterPruning(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, but only checkpoints from after the last stage of pruning are compared.

    A dense model usually scores better than a pruned one. So this callback compares none before the last stage of every
    pruning callback of the Trainer, and then waits for the next validation loop, so that no score of an earlier model
    counts. `save_last=True` writes `last` whenever checkpoints are compared, by default after each epoch. It does so
    before the last stage, too, and for a model that is not the best, so that the run can be resumed.
    `save_last="link"` only links to checkpoints that were saved as the best.

    Args:
        monitor: Name of the metric to compare.
        mode: `"min"` or `"max"`.
        **options: The other arguments of `ModelCheckpoint`.
    """

    def __init__(self, monitor: str, mode: str = "min", **options: Any) -> None:
        super().__init__(monitor=monitor, mode=mode, **options)
        self._compares = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of `pytorch_lightning`, which would write a best checkpoint of its own, too."""
        require_lightning(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare from the start if the model is already pruned."""
        super().on_train_start(trainer, pl_module)
        self._compares = _is_pruned(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Compare from the first validation loop after pruning."""
        self._compares = _is_pruned(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Without validation loops, compare from the first batch after pruning."""
        if not trainer.enable_validation:
            self._compares = _is_pruned(trainer)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the checkpoint is among the best since the last stage of pruning."""
        return self._compares and super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: Trainer, *metrics: Any) -> None:
        super()._save_topk_checkpoint(trainer, *metrics)
        if self.save_last is True:
            # Lightning 2.6 writes `last` next, but at the end of an epoch only if it saved a checkpoint in this step.
            self._last_global_step_saved = trainer.global_step


def _is_pruned(trainer: Trainer) -> bool:
    return all(callback.is_finished for callback in zeros_callbacks(trainer))


class SavePretrained(Callback):
    """Save the model when training ends, with the module's own `save_pretrained` (see docs/lightning_module.md).

    If the folder was filled while the model trained, the model is saved next to it, such as in `out-2`, with a warning.
    If saving fails, the state dict of the module is written next to the folder, as `out-state.pt`, and the error says
    so. `fast_dev_run` saves nothing.

    If a pruning callback of the same Trainer has pruned the model, a model card (`README.md`) is written, too.

    Args:
        folder: Where to save.
        overwrite: Replace a model that is already in the folder.

    Raises:
        FileExistsError: When training starts, if the folder is not empty and `overwrite` is false.
        OSError: If saving fails.
        MisconfigurationException: When training starts, if the module has no `save_pretrained`, or if no process holds
            the whole model.
    """

    def __init__(self, folder: StrPath, overwrite: bool = False) -> None:
        check_flags(overwrite=overwrite)
        self.folder = folder
        self.overwrite = overwrite

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written, or a model that cannot be saved."""
        if stage != "fit" or is_dry_run(trainer):
            return

        processes = processes_of(trainer)
        self._refuse_without_method(pl_module)
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"SavePretrained needs a process with the whole model, but {type(trainer.strategy).__name__} "
                "distributes the model. With ModelParallelStrategy (FSDP2), call save_pretrained of CausalLMModule in "
                "every process after fit, or use ModelCheckpoint with save_distributed_checkpoint=False."
            )

        with processes.fail_together():
            if trainer.is_global_zero:
                check_saving = getattr(pl_module, "check_saving", None)
                if callable(check_saving):
                    check_saving()
                require_writable(self.folder, self.overwrite)

    def _refuse_without_method(self, pl_module: LightningModule) -> None:
        """Raise an error for a module without `save_pretrained`."""
        if not callable(getattr(pl_module, "save_pretrained", None)):
            raise MisconfigurationException(
                f"SavePretrained calls save_pretrained(folder, overwrite), but {type(pl_module).__name__} has no such "
                "method. Define it, or use Lightning's ModelCheckpoint."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the adapters in every process, and save in the first, while the others wait."""
        if is_dry_run(trainer):
            return
        try:
            folder = self._merge_and_save(trainer, pl_module)
            if folder is not None:
                _write_card(folder, trainer)
        finally:  # also if saving fails
            trainer.strategy.barrier("SavePretrained")

    def _merge_and_save(self, trainer: Trainer, pl_module: Any) -> Path | None:
        """Save the model in the first process, or else at least its state dict, with an error that says so.

        Return the folder.
        """
        try:
            if callable(getattr(pl_module, "merge", None)):
                pl_module.merge()
            return self._save(pl_module) if trainer.is_global_zero else None
        except Exception as error:
            if not trainer.is_global_zero:
                raise
            raise OSError(
                f"{self.folder} could not be written ({type(error).__name__}: {error}). The trained weights are in "
                f"{self._save_state(pl_module)}: load them with module.load_state_dict(torch.load(PATH))."
            ) from error

    def _save(self, pl_module: Any) -> Path:
        folder = Path(self.folder)
        try:
            require_writable(folder, self.overwrite)
        except FileExistsError:
            folder = _unused(resolve_path(folder))
            rank_zero_warn(
                f"{self.folder} was written to while the model trained, so the model is saved in {folder}."
            )

        pl_module.save_pretrained(folder, overwrite=self.overwrite)
        return folder

    def _save_state(self, pl_module: LightningModule) -> Path:
        """Write the state dict next to the folder, or else into the folder for temporary files; return where it is."""
        folder = resolve_path(self.folder)
        name = f"{folder.name}-state"
        path = _unused(folder.parent / name, ".pt")
        try:
            with atomic_write(path) as temporary:
                torch.save(pl_module.state_dict(), temporary)
        except Exception:  # the disk may be full
            path = _unused(Path(tempfile.gettempdir()) / name, ".pt")
            torch.save(pl_module.state_dict(), path)
        return path


def _write_card(folder: Path, trainer: Trainer) -> None:
    """Write the card of a model that the latest pruning callback of the Trainer has pruned."""
    reports = [callback.report for callback in zeros_callbacks(trainer) if callback.report]
    if not reports:
        return
    report = reports[-1]
    if fate(report) == "are zero":
        report = _after_training(report, pruning_target(trainer.lightning_module))
    write_card(folder, report, trained_steps=trainer.global_step)


def _after_training(report: PruningReport, model: Module) -> PruningReport:
    """Return the report with the zeros that the model has now."""
    # Training fills zeros that are not kept.
    zeros = zeros_of(model)
    layers = [
        replace(layer, sparsity=zeros.get(layer.name, layer.zeros) / layer.size)
        for layer in report.layers
    ]

    # Also in what was not pruned: biases are often initialized to zeros, and adapters are merged by now.
    size, all_zeros = count_parameters(model)
    return replace(report, layers=tuple(layers), parameters=size, zeros=all_zeros)


def _unused(path: Path, suffix: str = "") -> Path:
    """Return the path, with the suffix, or the first one next to it that does not exist, such as `out-2`."""
    candidate = path.with_name(path.name + suffix)
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}{suffix}")
    return candidate
