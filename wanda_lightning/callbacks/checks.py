"""What a pruning callback refuses, or warns of, before it prunes."""

from __future__ import annotations

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from wanda_lightning.callbacks.schedules import Schedule
from wanda_lightning.callbacks.state import PruningState
from wanda_lightning.callbacks.trainer import last_step
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Pattern


def check_stages(schedule: Schedule, pattern: Pattern) -> None:
    """Refuse several stages for a pattern with one sparsity.

    Raises:
        ValueError: Names both.
    """
    if pattern.fixed_sparsity is not None and len(schedule.stages) > 1:
        raise ValueError(
            f"schedule must have one stage for {pattern}, which has one sparsity, but it is {schedule}. Prune with "
            "at_step=..., or use pattern='unstructured'."
        )


def check_calibrate_on(calibrate_on: str, config: PruningConfig, dataloader: object) -> None:
    """Refuse what calibration on a validation loop cannot do.

    Raises:
        ValueError: If the name is unknown, or a choice needs more than the dense model's inputs.
    """
    if calibrate_on not in ("calibration", "validation"):
        raise ValueError(f"calibrate_on must be one of calibration, validation, but it is {calibrate_on!r}.")
    if calibrate_on == "validation" and (config.sequential != "none" or dataloader is not None):
        raise ValueError(
            "calibrate_on='validation' runs the dense model on the validation batches, so it needs sequential='none' "
            f"and no dataloader, but sequential is {config.sequential!r}"
            + (" and a dataloader is given." if dataloader is not None else ".")
        )
    if calibrate_on == "validation" and config.allocation.reads_gradients:
        raise ValueError(
            f"calibrate_on='validation' has no backward passes, but {config.allocation} needs them. Use "
            "calibrate_on='calibration', or another allocation such as 'owl'."
        )


def refuse_equal_keys(callback: Callback, trainer: L.Trainer) -> None:
    """Refuse two callbacks whose states a checkpoint cannot tell apart.

    Raises:
        MisconfigurationException: Says what has to differ.
    """
    keys = [other.state_key for other in trainer.callbacks if type(other) is type(callback)]  # type: ignore[attr-defined]
    if keys.count(callback.state_key) > 1:
        raise MisconfigurationException(
            f"skip or only must differ between two callbacks of the class {type(callback).__name__}, but both have the "
            f"state key {callback.state_key}. Let them prune different layers, or use one callback with a schedule."
        )


def refuse_late_stages(schedule: Schedule, trainer: L.Trainer) -> None:
    """Refuse a schedule that ends after training does.

    Raises:
        MisconfigurationException: Names the schedule and both steps.
    """
    last, end = schedule.stages[-1][0], last_step(trainer)
    if last > end:
        raise MisconfigurationException(
            f"schedule must end while the model trains, but {schedule} ends at optimizer step {last} and training ends "
            f"at {end:.0f}. Prune earlier, or train longer."
        )


def refuse_fit_without_validation(trainer: L.Trainer) -> None:
    """Refuse calibration on the validation loop of a fit that has none.

    Raises:
        MisconfigurationException: Says what to give.
    """
    if not trainer.enable_validation:
        raise MisconfigurationException(
            "calibrate_on='validation' prunes at the end of a validation loop, but this fit has none. Give fit a "
            "validation dataloader, or use calibrate_on='calibration'."
        )


def warn_of_dense_best(schedule: Schedule, trainer: L.Trainer) -> None:
    """Warn where `ModelCheckpoint(monitor=...)` compares checkpoints from before pruning with those from after.

    Not for a subclass that decides itself which checkpoints it compares, see `PruningCallback`.
    """
    last = schedule.stages[-1][0]
    for checkpoint in () if trainer.fast_dev_run else trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
        if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.monitor is None:
            continue
        if type(checkpoint).check_monitor_top_k is ModelCheckpoint.check_monitor_top_k:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={checkpoint.monitor!r}) also compares checkpoints from before step {last}, "
                "when pruning ends: its best one is likely to be less sparse than asked for, or dense. Let it compare "
                "only checkpoints from after pruning, as the docstring of PruningCallback shows."
            )


def warn_if_dense(name: str, state: PruningState, schedule: Schedule) -> None:
    """Warn that a model is measured before its first stage."""
    if state.share == 0:
        rank_zero_warn(f"{name} prunes while the model trains, by {schedule}, so the model measured now is dense.")


def warn_if_late(name: str, share: float, schedule: Schedule) -> None:
    """Warn that a model is pruned and measured at once which should have been pruned during training."""
    if share > (schedule.share(0) or 0):
        rank_zero_warn(
            f"{name} prunes a model now that it should have pruned while it trained, by {schedule}. What is measured "
            "is a pruned model without training after pruning. To measure the trained one, load a checkpoint from "
            "after pruning, such as ckpt_path='last'."
        )


def warn_if_unfinished(name: str, state: PruningState, sparsity: float, step: int) -> None:
    """Warn that training ended before the model had its final sparsity."""
    if state.due:
        rank_zero_warn(f"{name} did not prune: no validation loop ended after pruning was due.")
    elif state.share < 1:
        rank_zero_warn(
            f"{name} did not prune to sparsity {sparsity:g}, but to {sparsity * state.share:g}: training ended at "
            f"optimizer step {step}."
        )
