"""Keep the best checkpoint of a pruned model, and save the trained model as a folder that its own library loads."""

from __future__ import annotations

import inspect
import os
import tempfile
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from wanda_lightning.callbacks.trainer import processes_of, pruning_target
from wanda_lightning.callbacks.zeros import zeros_callbacks
from wanda_lightning.common.atomic_write import atomic_write, require_writable, resolve_path
from wanda_lightning.common.checks import check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.hub.card import write_card
from wanda_lightning.hub.upload import list_files, refuse_upload, upload
from wanda_lightning.models import is_wrapper
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare from the start if the model is already pruned."""
        super().on_train_start(trainer, pl_module)
        self._compares = _is_pruned(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare from the first validation loop after pruning."""
        self._compares = _is_pruned(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Without validation loops, compare from the first batch after pruning."""
        if not trainer.enable_validation:
            self._compares = _is_pruned(trainer)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether the checkpoint is among the best since the last stage of pruning."""
        return self._compares and super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(
        self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last is True:
            # Lightning 2.6 writes `last` next, but at the end of an epoch only if it saved a checkpoint in this step.
            self._last_global_step_saved = trainer.global_step


def _is_pruned(trainer: L.Trainer) -> bool:
    return all(callback.is_finished for callback in zeros_callbacks(trainer))


class SavePretrained(Callback):
    """Save the model when training ends, with the module's own `save_pretrained` (see `PrunableModule`).

    If the folder was filled while the model trained, the model is saved next to it, such as in `out-2`, with a warning.
    If saving fails, the state dict of the module is written next to the folder, as `out-state.pt`, and the error says
    so. `fast_dev_run` saves nothing.

    If a pruning callback of the same Trainer has pruned the model, a model card (`README.md`) is written, too.

    Args:
        folder: Where to save.
        overwrite: Replace a model that is already in the folder.
        push_to_hub: OWNER/NAME of a repository on the Hugging Face hub, to which the saved files are uploaded.
        private: Make the repository private if it is new, and refuse a public one.
        shrink: Leave out hidden units that are zero on both sides, as after `pattern="structured"`; with a warning if
            the module cannot.

    Raises:
        FileExistsError: When training starts, if the folder is not empty and `overwrite` is false.
        ValueError: When training starts, if nothing can be uploaded to `push_to_hub`, for example without a token.
        OSError: If saving or the upload fails. After the latter, the message names the command that uploads the folder.
        MisconfigurationException: When training starts, if the module has no `save_pretrained`, or if no process holds
            the whole model.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        overwrite: bool = False,
        push_to_hub: str | None = None,
        private: bool = False,
        shrink: bool = False,
    ) -> None:
        check_flags(overwrite=overwrite, private=private, shrink=shrink)
        self.folder = folder
        self.overwrite = overwrite
        self.shrink = shrink
        self.push_to_hub = push_to_hub
        self.private = private

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written, or a model that cannot be saved."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        processes = processes_of(trainer)
        save = getattr(pl_module, "save_pretrained", None)
        if not callable(save) or (
            self.shrink and "shrink" not in inspect.signature(save).parameters
        ):
            raise MisconfigurationException(
                f"SavePretrained calls save_pretrained(folder, overwrite{', shrink=True' * self.shrink}), but "
                f"{type(pl_module).__name__} has no such method. Define it, or use Lightning's ModelCheckpoint."
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"SavePretrained needs a process with the whole model, but {type(trainer.strategy).__name__} "
                "distributes the model. With ModelParallelStrategy (FSDP2), call save_pretrained of CausalLMModule in "
                "every process after fit, or use ModelCheckpoint with save_distributed_checkpoint=False."
            )
        with processes.fail_together():
            if trainer.is_global_zero:
                if callable(check := getattr(pl_module, "check_saving", None)):
                    check()
                if self.push_to_hub is not None:
                    refuse_upload(self.push_to_hub, self.private)
                require_writable(self.folder, self.overwrite)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the adapters in every process, and save and upload in the first, while the others wait."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            try:
                if callable(merge := getattr(pl_module, "merge", None)):
                    merge()
                saved = self._save(pl_module) if trainer.is_global_zero else None
            except Exception as error:
                if not trainer.is_global_zero:
                    raise
                raise OSError(
                    f"{self.folder} could not be written ({type(error).__name__}: {error}). The trained weights are in "
                    f"{self._save_state(pl_module)}: load them with module.load_state_dict(torch.load(PATH))."
                ) from error
            if saved is not None:
                self._write_card(*saved, trainer, pl_module)
                if self.push_to_hub is not None:
                    address = upload(saved[0], self.push_to_hub, list_files(saved[0]), self.private)
                    rank_zero_info(f"SavePretrained: uploaded to {address}")
        finally:  # also if the upload fails
            trainer.strategy.barrier("SavePretrained")

    def _save(self, pl_module: Any) -> tuple[Path, bool]:
        """Save the model; return where, and whether hidden units were left out."""
        folder = Path(self.folder)
        try:
            require_writable(folder, self.overwrite)
        except FileExistsError:
            folder = _unused(resolve_path(folder))
            rank_zero_warn(
                f"{self.folder} was written to while the model trained, so the model is saved in {folder}."
            )
        if self.shrink:
            try:
                result = pl_module.save_pretrained(folder, overwrite=self.overwrite, shrink=True)
                rank_zero_info(f"SavePretrained: {result}")
                return folder, True
            except UserError as error:
                rank_zero_warn(f"The model is saved with its zeros. {error}")
        pl_module.save_pretrained(folder, overwrite=self.overwrite)
        return folder, False

    def _save_state(self, pl_module: L.LightningModule) -> Path:
        """Write the state dict next to the folder, or else into the folder for temporary files; return where it is."""
        path = resolve_path(self.folder)
        homes = path.parent, Path(tempfile.gettempdir())
        target, spare = (_unused(home / f"{path.name}-state", ".pt") for home in homes)
        try:
            with atomic_write(target) as new:
                torch.save(pl_module.state_dict(), new)
        except Exception:  # the disk may be full
            torch.save(pl_module.state_dict(), spare)
            return spare
        return target

    def _write_card(
        self, folder: Path, is_smaller: bool, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Write the card of a pruned model, with the zeros that it has after training."""
        if reports := [
            callback.report for callback in zeros_callbacks(trainer) if callback.report is not None
        ]:
            report = reports[-1]
            model = pruning_target(pl_module)
            zeros = zeros_of(model)  # training may have filled some
            # Also in what was not pruned: biases are often initialized to zeros, and adapters are merged by now.
            parameters = [*model.parameters()]
            report = replace(
                report,
                layers=tuple(
                    replace(x, sparsity=zeros.get(x.name, x.zeros) / x.size) for x in report.layers
                ),
                parameters=sum(parameter.numel() for parameter in parameters),
                zeros=sum(
                    int((weights == 0).count_nonzero())
                    for weights in parameters
                    if not is_wrapper(weights)
                ),
            )
            if is_smaller:
                report = report.marked_as_shrunk()
            name = self.push_to_hub or folder
            on_hub = self.push_to_hub is not None
            write_card(folder, report, name=name, on_hub=on_hub, trained_steps=trainer.global_step)


def _unused(path: Path, suffix: str = "") -> Path:
    """Return the path, with the suffix, or the first one next to it that does not exist, such as `out-2`."""
    names = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    return next(
        place for name in names if not os.path.lexists(place := path.with_name(name + suffix))
    )
