"""The callback that prunes a model inside Lightning's loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from wanda_lightning.callbacks.checks import (
    check_calibrate_on,
    check_stages,
    refuse_equal_keys,
    refuse_fit_without_validation,
    refuse_late_stages,
    warn_if_dense,
    warn_if_late,
    warn_if_unfinished,
    warn_of_dense_best,
)
from wanda_lightning.callbacks.held_zeros import HeldZeros, zeros_of
from wanda_lightning.callbacks.run import prune_module, publish
from wanda_lightning.callbacks.schedules import EndingBy, Schedule, schedule_of
from wanda_lightning.callbacks.state import PruningState
from wanda_lightning.callbacks.trainer import last_step, processes_of, pruning_target
from wanda_lightning.callbacks.validation_loop import ValidationLoop
from wanda_lightning.checks import check_at_least, refuse_pytorch_lightning
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.files import refuse_nonempty
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.plan import make_plan
from wanda_lightning.report import PruningReport


class PruningCallback(Callback):
    """Prune a model before it is trained or evaluated, at a step of training, or by a schedule.

    `trainer.fit` prunes at each stage of the schedule, counted in optimizer steps (`trainer.global_step`). The default
    schedule has one stage, before the first step and after the sanity check of the validation loop. Each stage scores
    all weights again, with new statistics, and zeros stay zero. `trainer.validate`, `test` and `predict` prune when
    they start, and so evaluate the pruned model, unless the schedule starts after step 0. A model that this callback
    has pruned, also before a resume, is not pruned again while it has its zeros. The zeros stay zero while the model
    trains (see `KeepZeros`). With `fast_dev_run`, stages after the end of training are moved to its last step.

    The calibration data come from the first of these that exists: `dataloader`; `calibration_dataloader()` of the
    datamodule, then of the module; the train dataloader; the validation, test or predict dataloader of the loop that
    runs. The callback uses the first `num_samples` samples, and does not cut a batch whose tensors have different
    lengths. A batch runs through the module's `calibration_step(batch)` if it has one, else as in `prune`. Layer names
    are relative to the module's `pruning_target` if it has one (our modules give the names of Hugging Face and timm),
    else to the LightningModule.

    `ModelCheckpoint(monitor=...)` also compares checkpoints from before pruning, and prefers them since dense models
    score better. Let it compare only checkpoints from after the last stage, here at step 1000::

        class BestAfterPruning(ModelCheckpoint):
            def check_monitor_top_k(self, trainer, current=None):
                return trainer.global_step > 1000 and super().check_monitor_top_k(trainer, current)

    To prune at another moment, override `should_prune`.

    Args:
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1).
        num_samples: Number of calibration samples (sequences or images).
        dataloader: The calibration data.
        keep_zeros: Keep the zeros while the model trains.
        report_dir: Folder to which `pruning_report.json` is saved.
        at_step: Number of optimizer steps before pruning.
        schedule: Instead of `at_step`: `CubicSchedule(...)`, `LinearSchedule(...)`, `OneShot(...)`, or your own.
        calibrate_on: `"validation"` collects statistics from Lightning's own validation loop, without an extra pass,
            and prunes at the end of the loop: of the next validation loop after the step of the schedule, or of
            `trainer.validate`, which then evaluates the dense model. It needs `sequential="none"`, and uses whole
            batches until they have `num_samples` samples.
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `sequential`, `skip`, `only`, `include_grouped`, `min_expert_tokens`.

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
        self.schedule = schedule_of(at_step, schedule)
        check_at_least(1, num_samples=num_samples)
        check_stages(self.schedule, self.config.pattern)
        check_calibrate_on(calibrate_on, self.config, dataloader)
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.keep_zeros = keep_zeros
        self.report_dir = report_dir
        self.calibrate_on = calibrate_on
        self._zeros = HeldZeros()
        self._state = PruningState(self._fixed_choices)
        self._validation: ValidationLoop | None = None  # while a validation loop is calibrated on
        self._processes = SINGLE_PROCESS
        self._is_set_up = False
        self._resumed = False  # weights and state come from the same checkpoint

    @classmethod
    def preset(
        cls, name: str, sparsity: float = 0.5, pattern: Pattern | str = "unstructured", **options: Any
    ) -> PruningCallback:
        """Construct the callback with a preset: `"fast"`, `"balanced"` or `"best"` (the README gives their costs).

        Args:
            name: The preset, the same as `method=name`.
            sparsity: Fraction of the weights that become zero, of each layer or (`"best"`) of all layers.
            pattern: Constraint on the positions of the zeros.
            **options: The other arguments of `PruningCallback`; they replace choices of the preset.

        Raises:
            ValueError: If there is no such preset, or a value is out of range.
            TypeError: If it is called on a subclass that chooses a method.
        """
        if cls.__init__ is not PruningCallback.__init__:
            raise TypeError(
                f"preset {name!r} chooses a method, but so does {cls.__name__}. Use PruningCallback.preset({name!r})."
            )
        return cls(sparsity, pattern=pattern, **{"method": name, **options})

    @property
    def report(self) -> PruningReport | None:
        """The report of the latest pruning, also after a resume; None before the first."""
        return self._state.report

    @property
    def state_key(self) -> str:
        """A key with `skip` and `only`, since two callbacks may prune different layers."""
        only = {"only": list(self.config.only)} if self.config.only else {}
        key = self._generate_state_key(skip=list(self.config.skip), **only)
        # Equal keys would make the constructor of the Trainer raise an error that does not explain them; `setup` does.
        return key if self._is_set_up else f"{key} {id(self)}"

    def should_prune(self, trainer: L.Trainer) -> bool:
        """Whether to prune now; called before training, after each optimizer step, and before an evaluation.

        Override it to prune at other moments. The callback then prunes to the share of the sparsity that the schedule
        has at `trainer.global_step`, by default all of it.
        """
        share = self._schedule(trainer).share(trainer.global_step)
        return share is not None and share > self._state.share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an unsupported Trainer, and a folder to which the report cannot be written.

        Raises:
            OSError: If `report_dir` cannot be written.
            MisconfigurationException: If the strategy distributes the model in a way that cannot be pruned, the Trainer
                is one of `pytorch_lightning`, or another callback prunes the same part of the model.
        """
        refuse_pytorch_lightning(trainer)
        self._is_set_up = True
        refuse_equal_keys(self, trainer)
        self._processes = processes_of(trainer)
        with self._processes.fail_together():
            if self.report_dir is not None and trainer.is_global_zero:
                refuse_nonempty(self.report_dir, overwrite=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before the first step if the schedule says so, and hold the zeros from then on.

        Raises:
            MisconfigurationException: If training ends before the last stage of the schedule.
            ValueError: If a layer cannot be pruned as requested, now or at a later stage.
        """
        refuse_late_stages(self._schedule(trainer), trainer)
        if self.calibrate_on == "validation":
            refuse_fit_without_validation(trainer)
        self._forget_if_dense(pl_module)
        if self._state.asked_at != trainer.global_step:
            self._prune_if_asked(trainer, pl_module)
        if self._state.share < 1:
            with self._processes.fail_together():  # raise now the errors of a later stage
                make_plan(self.config, pruning_target(pl_module), self._processes)
            warn_of_dense_best(self.schedule, trainer)
        self._hold(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune after an optimizer step if the schedule says so."""
        if self._state.asked_at != trainer.global_step and self._prune_if_asked(trainer, pl_module):
            self._hold(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks, and warn if the final sparsity was not reached."""
        warn_if_unfinished(self._name, self._state, self.config.sparsity, trainer.global_step)
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        if self._validation is not None:
            self._validation.end_batch()
        self._validation = None
        self._zeros.release()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.validate`, or start to collect statistics."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prune_to_evaluate(trainer, pl_module)
        if self._state.due and not trainer.sanity_checking:
            config = self._config_at(self._shares_due(trainer)[-1])
            self._validation = ValidationLoop(config, pruning_target(pl_module), self._processes, self.num_samples)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect statistics while the batch runs."""
        if self._validation is not None:
            self._validation.start_batch(batch)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Stop collecting."""
        if self._validation is not None:
            self._validation.end_batch()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune with the collected statistics."""
        if self._validation is not None:
            report, self._validation = self._validation.prune(), None
            self._record(report, self._shares_due(trainer)[-1], trainer)
            if trainer.state.fn == TrainerFn.FITTING:
                self._hold(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.test` or `trainer.predict`."""
        self._prune_to_evaluate(trainer, pl_module)

    on_predict_start = on_test_start

    def state_dict(self) -> dict[str, Any]:
        """Return how far the model is pruned; see `PruningState`."""
        return replace(self._state, unheld_zeros=self._zeros.unheld_zeros()).to_checkpoint()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state.

        Raises:
            ValueError: If the checkpoint's run pruned to another sparsity or with another pattern.
        """
        self._state = PruningState.from_checkpoint(state_dict, self._fixed_choices, self._name)
        self._zeros.load(self._state.unheld_zeros)
        self._resumed = True

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _fixed_choices(self) -> dict[str, Any]:
        """The choices that a resumed run must not change."""
        choices = self.config.describe()
        return {name: choices[name] for name in ("sparsity", "pattern")}

    def _schedule(self, trainer: L.Trainer) -> Schedule:
        """The schedule; with `fast_dev_run`, its late stages are moved to the last step."""
        if trainer.fast_dev_run and trainer.state.fn == TrainerFn.FITTING:  # type: ignore[attr-defined]
            return EndingBy(self.schedule, int(last_step(trainer)))
        return self.schedule

    def _shares_due(self, trainer: L.Trainer) -> list[float]:
        """The shares of the final sparsity to prune to now, one after the other.

        Usually there is one, of the latest stage; with `fast_dev_run`, all stages at the same step are run.
        """
        schedule, step = self._schedule(trainer), trainer.global_step
        if schedule is self.schedule:
            return [schedule.share(step) or 1.0]
        return [share for stage, share in schedule.stages if stage <= step and share > self._state.share] or [1.0]

    def _forget_if_dense(self, pl_module: L.LightningModule) -> None:
        """Reset the state if the model is not the one that was pruned, or dense weights were loaded into it."""
        resumed, self._resumed = self._resumed, False
        if resumed or not self._state.zeros:
            return
        if not self._state.describes(zeros_of(pruning_target(pl_module), self._processes)):
            self._state = PruningState(self._fixed_choices)

    def _prune_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Prune if `should_prune` returns True, and return whether the model was pruned."""
        self._state.asked_at = trainer.global_step
        if not self.should_prune(trainer):
            return False
        if self.calibrate_on == "validation":
            self._state.due = True
            return False
        for share in self._shares_due(trainer):
            self._prune(share, trainer, pl_module)
        return True

    def _prune_to_evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_if_dense(pl_module)
        if not self.should_prune(trainer):
            warn_if_dense(self._name, self._state, self.schedule)
            return
        if self.calibrate_on == "validation" and trainer.state.fn == TrainerFn.VALIDATING:
            self._state.due = True
            return
        (share,) = self._shares_due(trainer)
        warn_if_late(self._name, share, self.schedule)
        self._prune(share, trainer, pl_module)

    def _prune(self, share: float, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = prune_module(self._config_at(share), trainer, pl_module, self.dataloader, self.num_samples)
        self._record(report, share, trainer)

    def _record(self, report: PruningReport, share: float, trainer: L.Trainer) -> None:
        self._state.record(report, share)
        publish(report, trainer, self._name, self.report_dir)

    def _config_at(self, share: float) -> PruningConfig:
        """Return the configuration that prunes to a share of the final sparsity."""
        allocation = self.config.allocation.scaled(share)
        return replace(self.config, sparsity=self.config.sparsity * share, allocation=allocation)

    def _hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.keep_zeros and self._state.zeros:
            self._zeros.hold(pruning_target(pl_module), self._state.zeros)
            self._zeros.clear(trainer, pl_module)
