"""Errors and warnings of the pruning callback about its options, the schedule and the Trainer, as tables of rows."""

import math
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from wanda_lightning.callbacks.schedules import PruningState, Schedule
from wanda_lightning.callbacks.trainer import is_dry_run
from wanda_lightning.common.checks import check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig


def check_options(
    config: PruningConfig, schedule: Schedule, calibrate_on: str, dataloader: object
) -> None:
    """Raise a ValueError for options of the callback that contradict each other."""
    check_values(("calibration", "validation"), calibrate_on=calibrate_on)

    pattern = config.pattern
    recovery = config.recovery
    if pattern.fixed_sparsity and len(schedule.stages) > 1:
        raise UserError(
            f"schedule must have one stage for {pattern}, whose sparsity is fixed, but it is {schedule}. Prune with "
            "at_step=..., or use pattern='unstructured'."
        )
    if calibrate_on != "validation":
        return

    # Whether the row applies, the option, and what is wrong with it.
    rows = (
        (dataloader is not None, "dataloader", "has other batches"),
        (config.sequential != "none", "sequential", "runs pruned layers"),
        (config.allocation.reads_gradients, "allocation", "needs backward passes"),
        (config.reads_gradients, "pattern", "needs backward passes"),
        (recovery.reads_batches or recovery.trains_blocks, "recovery", "trains on the batches"),
    )
    for applies, option, why in rows:
        if applies:
            shown = option if option == "dataloader" else config.shown(option)
            raise UserError(
                "calibrate_on='validation' only collects statistics of the dense model while Lightning validates it, "
                f"but {shown} {why}. Use calibrate_on='calibration', or other choices."
            )


def refuse_training(
    config: PruningConfig,
    schedule: Schedule,
    state: PruningState,
    trainer: Trainer,
    calibrate_on: str,
    dataloader: object,
) -> None:
    """Raise an error for a fit in which pruning would be wrong, or would fail at a later stage."""
    last = schedule.stages[-1][0]
    end = _end_of_training(trainer)
    stages_left = sum(share > state.share for _, share in schedule.stages)

    rows = (
        (
            last > end,
            f"schedule must end while the model trains, but {schedule} ends at optimizer step {last} and training "
            f"ends at {end:.0f}. Prune earlier, or train longer; to train in parts, give each part the final "
            "max_epochs.",
        ),
        (
            calibrate_on == "validation" and not trainer.enable_validation,
            "calibrate_on='validation' prunes at the end of a validation loop, but this fit has none. Give fit a "
            "validation dataloader, or use calibrate_on='calibration'.",
        ),
        (
            stages_left > 1 and isinstance(dataloader, Iterator) and config.data_reader,
            f"dataloader must be read by {stages_left} stages of {schedule}, but it is a {type(dataloader).__name__}, "
            "which can be read only once. Give a list or a DataLoader.",
        ),
    )
    for applies, sentence in rows:
        if applies:
            raise MisconfigurationException(sentence)


def _end_of_training(trainer: Trainer) -> float:
    """Return the optimizer step at which training ends; infinity if no limit is known."""
    end: float = trainer.max_steps
    if trainer.lightning_module.automatic_optimization:
        end = trainer.estimated_stepping_batches  # at most max_steps
    # Lightning writes -1 for no limit.
    return math.inf if end == -1 else end


def warn_of_dense_best(schedule: Schedule, trainer: Trainer) -> None:
    """Warn if a `ModelCheckpoint(monitor=...)` compares checkpoints from before pruning with those from after it."""
    if is_dry_run(trainer):
        return
    for checkpoint in trainer.checkpoint_callbacks:
        if (
            isinstance(checkpoint, ModelCheckpoint)
            and checkpoint.monitor
            # A subclass that overrides this chooses what it compares, as BestAfterPruning does.
            and type(checkpoint).check_monitor_top_k is ModelCheckpoint.check_monitor_top_k
        ):
            rank_zero_warn(
                f"ModelCheckpoint(monitor={checkpoint.monitor!r}) also compares checkpoints from before step "
                f"{schedule.stages[-1][0]}, when pruning ends, so its best one is probably less sparse than requested. "
                f"Use BestAfterPruning(monitor={checkpoint.monitor!r}), which compares only those from after pruning."
            )


def warn_of_evaluation(name: str, share: float, state: PruningState, schedule: Schedule) -> None:
    """Warn of an evaluation that does not prune (`share` is 0) a dense model, or that prunes before training does."""
    if not share and state.share == 0:
        rank_zero_warn(
            f"{name} prunes during training, by {schedule}, so the model evaluated now is dense."
        )

    if share > (schedule.share(0) or 0):
        rank_zero_warn(
            f"{name} prunes this model right before it is evaluated, but the schedule {schedule} prunes it during "
            "training, so the result is that of a pruned model without training after pruning. Load a checkpoint from "
            "after pruning, such as ckpt_path='last', to evaluate the trained model."
        )


def warn_if_unfinished(name: str, state: PruningState, sparsity: float, step: int) -> None:
    """Warn that training ended before the model reached its final sparsity."""
    if state.awaits_validation:
        rank_zero_warn(f"{name} did not prune: no validation loop ended after pruning was due.")
    elif state.share < 1:
        rank_zero_warn(
            f"{name} pruned to sparsity {sparsity * state.share:g} instead of {sparsity:g}, because training ended at "
            f"optimizer step {step}."
        )
