"""Prune inside Lightning's loops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from wanda_lightning.calibration.passive import PassiveCalibration
from wanda_lightning.callbacks.batches import (
    batch_size,
    calibration_batches,
    calibration_forward,
    processes_of,
    pruning_target,
)
from wanda_lightning.callbacks.held_zeros import HeldZeros, zeros_of
from wanda_lightning.callbacks.schedules import OneShot, Schedule
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.plan import Plan, make_plan
from wanda_lightning.pruning import prune_as, prune_collected
from wanda_lightning.report import PruningReport


class PruningCallback(Callback):
    """Prune the model: before it is trained or measured, at a step of training, or by a schedule.

    In `trainer.fit` at the stages of the schedule, counted in optimizer steps (`trainer.global_step`): by default
    before the first one, after the sanity check of the validation loop. A stage scores all weights anew, with fresh
    statistics; zeros stay zero. In `trainer.validate`, `test` and `predict` on start, so that the loop that follows
    measures the pruned model; but not if the schedule begins later than at step 0. A model that this callback has
    pruned, also before a resume, is not pruned again while its zeros are there. While training, the zeros stay zero
    (see `KeepZeros`).

    The calibration batches are the first `num_samples` samples of, in this order: `dataloader`; the datamodule's, then
    the module's `calibration_dataloader()`; the train dataloader; the validation, test or predict dataloader at hand.
    A batch goes through the model by `pl_module.calibration_step(batch)` where there is one, else as in `prune`.
    Layers are named as in the module's `pruning_target` where it has one (our modules name their model: the report
    then has Hugging Face's or timm's names), else as in the LightningModule.

    To prune at another moment, override `should_prune`.

    Args:
        sparsity: Fraction of each pruned layer's weights that become zero, in [0, 1).
        num_samples: Calibration samples (sequences or images).
        dataloader: Where to take them from.
        keep_zeros: Keep the zeros while training.
        report_dir: Write `pruning_report.json` there.
        at_step: Optimizer steps of training before pruning.
        schedule: Instead of `at_step`: `CubicSchedule(...)`, `LinearSchedule(...)`, `OneShot(...)`, or your own.
        calibrate_on: `"validation"` takes the statistics from Lightning's own validation loop while it runs, without an
            extra pass, and prunes when it ends: the next one after the step that is due, or that of `trainer.validate`,
            which then measures the dense model. Needs `sequential="none"`; of `num_samples`, whole batches.
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `sequential`, `skip`, `only`, `include_grouped`, `min_expert_tokens`.

    Attributes:
        report: What happened last, once it has.

    Raises:
        ValueError: If a value is out of range, or choices contradict each other.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
        calibrate_on: Literal["calibration", "validation"] = "calibration",
        **choices: Any,
    ) -> None:
        self.config = PruningConfig.from_names(sparsity, **choices)
        if num_samples < 1:
            raise ValueError(f"num_samples is at least 1, but {num_samples} was given")
        if at_step and schedule is not None:
            raise ValueError(f"at_step={at_step} and schedule={schedule} are two answers to one question: give one")
        self.schedule = schedule or OneShot(at_step)
        self.schedule.check()
        if self.config.pattern.fixed_sparsity is not None and len(self.schedule.stages) > 1:
            raise ValueError(
                f"{self.config.pattern} has one sparsity, so it cannot rise by "
                f"{self.schedule}: prune at_step=..., or use pattern='unstructured'"
            )
        if calibrate_on not in ("calibration", "validation"):
            raise ValueError(f"calibrate_on is 'calibration' or 'validation', but {calibrate_on!r} was given")
        if calibrate_on == "validation" and (self.config.sequential != "none" or dataloader is not None):
            raise ValueError(
                "calibrate_on='validation' sees the dense model on the validation batches: it needs "
                f"sequential='none' and no dataloader, but sequential={self.config.sequential!r} was given"
                + (" and a dataloader" if dataloader is not None else "")
            )
        if calibrate_on == "validation" and self.config.allocation.reads_gradients:
            raise ValueError(
                f"{self.config.allocation} passes batches backward, which a validation loop does not: leave out "
                "calibrate_on='validation', or use another allocation such as 'owl'"
            )
        self.calibrate_on = calibrate_on
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.keep_zeros = keep_zeros
        self.report_dir = report_dir
        self.report: PruningReport | None = None
        self._zeros = HeldZeros()
        self._pruned: dict[str, int] = {}  # zeros of each pruned layer
        self._share = 0.0  # of the sparsity that is reached
        self._resumed = False  # weights and state are of one checkpoint
        self._asked_at: int | None = None  # the step at which `should_prune` was asked last
        self._due = False  # at the end of the next validation loop
        self._processes = SINGLE_PROCESS
        self._watched: PassiveCalibration | None = None
        self._plan: Plan
        self._watching = ExitStack()
        self._seen = 0  # samples of the validation loop

    @classmethod
    def preset(
        cls, name: str, sparsity: float = 0.5, pattern: Pattern | str = "unstructured", **others: Any
    ) -> PruningCallback:
        """Construct the callback with a preset: `"fast"`, `"balanced"` or `"best"` (the README says what each costs).

        Args:
            name: The preset, the same as `method=name`.
            sparsity: Fraction of the weights that become zero, of each layer or (`"best"`) of all of them.
            pattern: Where zeros may fall.
            others: The other arguments of `PruningCallback`, also to replace a choice.

        Raises:
            ValueError: If there is no such preset, or a value is out of range.
            TypeError: For a subclass that chooses a method itself.
        """
        if cls.__init__ is not PruningCallback.__init__:
            raise TypeError(
                f"a preset chooses the method, as {cls.__name__} does: use PruningCallback.preset({name!r})"
            )
        return cls(sparsity, pattern=pattern, **{"method": name, **others})

    @property
    def state_key(self) -> str:
        """One state for each part of the model: two callbacks may prune different ones."""
        only = {"only": list(self.config.only)} if self.config.only else {}
        return self._generate_state_key(skip=list(self.config.skip), **only)

    def should_prune(self, trainer: L.Trainer) -> bool:
        """Whether to prune now; asked before training, after every batch with an optimizer step, and before measuring.

        Override it to choose the moment yourself. The model is pruned to the share of the sparsity that the schedule
        has for `trainer.global_step`, by default all of it.
        """
        share = self.schedule.share(trainer.global_step)
        return share is not None and share > self._share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned right.

        Raises:
            MisconfigurationException: If the strategy spreads the model in a way that cannot be pruned.
        """
        self._processes = processes_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before the first step if it is time, and hold the zeros from then on.

        Raises:
            MisconfigurationException: If training ends before the last stage of the schedule.
            ValueError: If something cannot be pruned as asked, also at a later stage.
        """
        _refuse_late_stages(self.schedule, trainer)
        if self.calibrate_on == "validation" and not trainer.enable_validation:
            raise MisconfigurationException(
                "calibrate_on='validation' prunes when a validation loop ends, but this fit has none: give it a "
                "validation dataloader, or calibrate_on='calibration'"
            )
        self._forget_if_dense(pl_module)
        if self._asked_at != trainer.global_step:
            self._ask(trainer, pl_module)
        if self._share < 1:
            self._refuse_what_later_stages_would(pruning_target(pl_module))
        self._hold(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune after an optimizer step if it is time."""
        if self._asked_at != trainer.global_step and self._ask(trainer, pl_module):
            self._hold(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the zeros."""
        if self._due:
            rank_zero_warn(f"{type(self).__name__} did not prune: no validation loop ended after it was due")
        elif self._share < 1:
            rank_zero_warn(
                f"training ended at optimizer step {trainer.global_step}, before {type(self).__name__} had pruned to "
                f"{self.config.sparsity:g}: it reached {self.config.sparsity * self._share:g}"
            )
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._watching.close()
        self._watched = None
        self._zeros.release()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.validate` measures, or begin to watch."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prune_to_measure(trainer, pl_module)
        if self._due and not trainer.sanity_checking:
            config, target = self._now(trainer), pruning_target(pl_module)
            with self._processes.fail_together():
                self._plan = make_plan(config, target, self._processes)
            self._watched = PassiveCalibration(
                target, self._plan.whole_model, self._plan.observed, config.min_expert_tokens, self._processes
            )
            self._seen = 0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first `num_samples` samples."""
        if self._watched is not None and self._seen < self.num_samples:
            self._seen += batch_size(batch) * self._processes.world_size
            self._watching.enter_context(self._watched.collect(batch))

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count what the batch brought."""
        self._watching.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune by what was watched."""
        if self._watched is not None:
            report, self._watched = prune_collected(self._plan, self._watched), None
            self._take(report, trainer)
            if trainer.state.fn == TrainerFn.FITTING:
                self._hold(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.test` measures."""
        self._prune_to_measure(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.predict` predicts."""
        self._prune_to_measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How far pruning is, and which zeros are not its own; the others are in the weights."""
        return {
            "choices": self._choices,
            "zeros": self._pruned,
            "share": self._share,
            "asked_at": self._asked_at,
            "due": self._due,
            "unheld_zeros": self._zeros.unheld_zeros(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where it was.

        Raises:
            ValueError: If it prunes to another sparsity or by another pattern.
        """
        if state_dict["choices"] != self._choices:
            raise ValueError(
                f"the checkpoint was written by {type(self).__name__} with {state_dict['choices']}, but this one has "
                f"{self._choices}. Give the same, or load the weights alone and start anew."
            )
        self._pruned, self._share = state_dict["zeros"], state_dict["share"]
        self._asked_at, self._due, self._resumed = state_dict["asked_at"], state_dict["due"], True
        self._zeros.load(state_dict["unheld_zeros"])

    @property
    def _choices(self) -> dict[str, Any]:
        """What a resumed run cannot change."""
        choices = self.config.describe()
        return {name: choices[name] for name in ("sparsity", "pattern")}

    def _forget(self) -> None:
        self._pruned, self._share, self._asked_at, self._due = {}, 0.0, None, False

    def _forget_if_dense(self, pl_module: L.LightningModule) -> None:
        """Start anew where the model is another, or has been given dense weights."""
        resumed, self._resumed = self._resumed, False
        if resumed or not self._pruned:
            return
        zeros = zeros_of(pruning_target(pl_module), self._processes)
        if any(2 * zeros.get(name, 0) < count for name, count in self._pruned.items()):
            self._forget()

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Prune if it is time, and say whether that was done."""
        self._asked_at = trainer.global_step
        if not self.should_prune(trainer):
            return False
        if self.calibrate_on == "validation":
            self._due = True
            return False
        self._prune(trainer, pl_module)
        return True

    def _refuse_what_later_stages_would(self, target: nn.Module) -> None:
        with self._processes.fail_together():
            make_plan(self.config, target, self._processes)

    def _hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.keep_zeros and self._pruned:
            self._zeros.hold(pruning_target(pl_module), self._pruned)
            self._zeros.clear(trainer, pl_module)

    def _prune_to_measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_if_dense(pl_module)
        if self.should_prune(trainer):
            if self.calibrate_on == "validation" and trainer.state.fn == TrainerFn.VALIDATING:
                self._due = True
            else:
                self._prune(trainer, pl_module)
        elif self._share == 0:
            rank_zero_warn(f"{type(self).__name__} prunes while training, by {self.schedule}: measuring a dense model")

    def _now(self, trainer: L.Trainer) -> PruningConfig:
        """The choices, at the sparsity that is due."""
        share = self._share_now(trainer)
        allocation = self.config.allocation.scaled(share)
        return replace(self.config, sparsity=self.config.sparsity * share, allocation=allocation)

    def _share_now(self, trainer: L.Trainer) -> float:
        return self.schedule.share(trainer.global_step) or 1.0

    def _prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
            report = prune_as(
                self._now(trainer),
                pruning_target(pl_module),
                calibration_batches(trainer, pl_module, self.dataloader, self.num_samples, self._processes),
                forward=partial(calibration_forward, trainer, pl_module),
                predict=partial(calibration_forward, trainer, pl_module, for_predictions=True),
                progress=_shows_progress(trainer),
                processes=self._processes,
            )
        self._take(report, trainer)

    def _take(self, report: PruningReport, trainer: L.Trainer) -> None:
        """Remember, show, log and save what was done."""
        self.report, self._share, self._due = report, self._share_now(trainer), False
        # A layer that is zero altogether was not pruned but made so, and may learn.
        self._pruned = {layer.name: layer.zeros for layer in report.layers if 0 < layer.sparsity < 1}
        if _shows_progress(trainer):
            rank_zero_info(f"{type(self).__name__}: {report.summary()}")
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=trainer.global_step)
        if self.report_dir is not None and trainer.is_global_zero:
            report.save(self.report_dir)


def _shows_progress(trainer: L.Trainer) -> bool:
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def _refuse_late_stages(schedule: Schedule, trainer: L.Trainer) -> None:
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few steps of a longer training
        return
    last = schedule.stages[-1][0]
    known: list[float] = [trainer.max_steps]
    if trainer.lightning_module.automatic_optimization:
        known.append(trainer.estimated_stepping_batches)
    steps = min((count for count in known if count != -1), default=math.inf)
    if last > steps:
        raise MisconfigurationException(
            f"{schedule} ends at optimizer step {last}, but training ends at {steps:.0f}: the model would never have "
            "the sparsity asked for. Prune earlier, or train longer."
        )
