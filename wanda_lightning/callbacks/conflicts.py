"""Errors and warnings of the pruning callback about its options, the schedule and the Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from wanda_lightning.callbacks.schedules import Schedule
from wanda_lightning.callbacks.state import PruningState
from wanda_lightning.callbacks.trainer import averaged_models, last_step
from wanda_lightning.callbacks.zeros import zeros_callbacks
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.permutation import NoPermutation


def check_stages(schedule: Schedule, pattern: Pattern) -> None:
    """Raise a ValueError for a schedule with several stages and a pattern whose sparsity is fixed, such as 2:4."""
    if pattern.fixed_sparsity is not None and len(schedule.stages) > 1:
        raise UserError(
            f"schedule must have one stage for {pattern}, whose sparsity is fixed, but it is {schedule}. Prune with "
            "at_step=..., or use pattern='unstructured'."
        )


def check_calibrate_on(calibrate_on: str, config: PruningConfig, dataloader: object) -> None:
    """Raise a ValueError for an unknown name, or options that calibration on a validation loop does not support."""
    if calibrate_on == "calibration":
        return
    if calibrate_on != "validation":
        raise UserError(f"calibrate_on must be one of calibration, validation, but it is {calibrate_on!r}.")
    if config.pattern.drops_experts:
        raise UserError(
            f"calibrate_on='validation' collects statistics of weights, but {config.shown('pattern')} needs a pass of "
            "its own. Use calibrate_on='calibration'."
        )
    if config.sequential != "none" or dataloader is not None:
        raise UserError(
            "calibrate_on='validation' runs the dense model on the validation batches, so it needs sequential='none' "
            f"and no dataloader, but sequential is {config.sequential!r}"
            + (" and a dataloader is given." if dataloader is not None else ".")
        )
    if config.pattern.prunes_units:
        raise UserError(
            f"calibrate_on='validation' runs no block by itself, but {config.shown('pattern')} runs each block with "
            "and without hidden units, to find those that it can remove. Use calibrate_on='calibration'."
        )
    if config.reads_gradients:
        reader = config.shown("allocation" if config.allocation.reads_gradients else "pattern")
        raise UserError(
            f"calibrate_on='validation' has no backward passes, but {reader} needs them. Use "
            "calibrate_on='calibration', or choices that read no gradients, such as allocation='owl'."
        )
    if config.recovery.reads_batches or config.recovery.recorded:
        raise UserError(
            f"calibrate_on='validation' keeps no batches, but {config.shown('recovery')} trains on them. "
            "Use calibrate_on='calibration'."
        )


def refuse_experts_in_training(config: PruningConfig, state: PruningState) -> None:
    """Raise an error if experts would be dropped while an optimizer holds the parameters."""
    if config.pattern.drops_experts and state.share < 1:
        raise MisconfigurationException(
            f"{config.shown('pattern')} replaces parameters by smaller ones, which the optimizer would not see. Drop "
            "experts before training, with prune(model, batches, ...) or trainer.validate."
        )


def refuse_late_stages(schedule: Schedule, trainer: L.Trainer) -> None:
    """Raise an error if training ends before the last stage of the schedule."""
    last, end = schedule.stages[-1][0], last_step(trainer)
    if last > end:
        raise MisconfigurationException(
            f"schedule must end while the model trains, but {schedule} ends at optimizer step {last} and training ends "
            f"at {end:.0f}. Prune earlier, or train longer."
        )


def refuse_one_shot(dataloader: object, config: PruningConfig, schedule: Schedule, state: PruningState) -> None:
    """Raise an error if several stages would read an iterator."""
    left = sum(share > state.share for _, share in schedule.stages)
    if left > 1 and isinstance(dataloader, Iterator) and config.data_reader:
        raise MisconfigurationException(
            f"dataloader must be read by {left} stages of {schedule}, but it is a {type(dataloader).__name__}, which "
            "can be read only once. Give a list or a DataLoader."
        )


def without_permutation_in_training(config: PruningConfig, trainer: L.Trainer) -> PruningConfig:
    """Leave permutations out, with a warning, if masks, moments or averages depend on the order of the weights."""
    holding = any(callback.holds_zeros for callback in zeros_callbacks(trainer))
    started = trainer.global_step > 0 or averaged_models(trainer) or holding
    if trainer.state.fn != TrainerFn.FITTING or not started or not config.permutation.reads_batches:
        return config
    rank_zero_warn(
        f"{config.permutation} permutes nothing during training: the optimizer's moments, averaged weights and the "
        "zeros that other callbacks keep are stored in the old order. Prune before training and without averaging, or "
        "give permutation='none'."
    )
    return replace(config, permutation=NoPermutation())


def refuse_fit_without_validation(trainer: L.Trainer) -> None:
    """Raise an error if `fit` runs no validation loop to calibrate on."""
    if not trainer.enable_validation:
        raise MisconfigurationException(
            "calibrate_on='validation' prunes at the end of a validation loop, but this fit has none. Give fit a "
            "validation dataloader, or use calibrate_on='calibration'."
        )


def warn_of_dense_best(schedule: Schedule, trainer: L.Trainer) -> None:
    """Warn if a `ModelCheckpoint(monitor=...)` compares checkpoints from before pruning with those from after it.

    A subclass that overrides `check_monitor_top_k` chooses which checkpoints it compares, as `BestAfterPruning` does.
    """
    last = schedule.stages[-1][0]
    for checkpoint in () if trainer.fast_dev_run else trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
        if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.monitor is None:
            continue
        if type(checkpoint).check_monitor_top_k is ModelCheckpoint.check_monitor_top_k:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={checkpoint.monitor!r}) also compares checkpoints from before step {last}, "
                "when pruning ends, so its best one is probably less sparse than requested. Use "
                f"BestAfterPruning(monitor={checkpoint.monitor!r}), which compares only checkpoints from after pruning."
            )


def warn_if_dense(name: str, state: PruningState, schedule: Schedule) -> None:
    """Warn that a model is evaluated before its first stage."""
    if state.share == 0:
        rank_zero_warn(f"{name} prunes during training, by {schedule}, so the model evaluated now is dense.")


def warn_if_late(name: str, share: float, schedule: Schedule) -> None:
    """Warn that a model is pruned right before it is evaluated, although the schedule prunes during training."""
    if share > (schedule.share(0) or 0):
        rank_zero_warn(
            f"{name} prunes this model right before it is evaluated, but the schedule {schedule} prunes it during "
            "training, so the result is that of a pruned model without training after pruning. To evaluate the trained "
            "model, load a checkpoint from after pruning, such as ckpt_path='last'."
        )


def warn_if_unfinished(name: str, state: PruningState, sparsity: float, step: int) -> None:
    """Warn that training ended before the model reached its final sparsity."""
    if state.due:
        rank_zero_warn(f"{name} did not prune: no validation loop ended after pruning was due.")
    elif state.share < 1:
        rank_zero_warn(
            f"{name} pruned to sparsity {sparsity * state.share:g} instead of {sparsity:g}, because training ended at "
            f"optimizer step {step}."
        )
