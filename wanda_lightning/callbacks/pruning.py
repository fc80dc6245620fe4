"""The callback that prunes a model inside Lightning's loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from wanda_lightning.callbacks import conflicts
from wanda_lightning.callbacks.calibration_data import CalibrationData, ValidationLoop
from wanda_lightning.callbacks.schedules import OneShot, PruningState, Schedule, schedule_of
from wanda_lightning.callbacks.trainer import processes_of, pruning_target
from wanda_lightning.callbacks.zeros import ZerosCallback
from wanda_lightning.common import checks
from wanda_lightning.common.atomic_write import require_writable
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, check_choices
from wanda_lightning.engine.prune import prune_as, prune_collected, rehearse
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.planning.plan import Plan, make_plan
from wanda_lightning.report import Circumstances, PruningReport
from wanda_lightning.training.held_zeros import sharded_layers, zeros_of


class PruningCallback(ZerosCallback):
    """Prune a model before it is trained or evaluated, at a step of training, or by a schedule.

    `trainer.fit` prunes at each stage of the schedule, counted in optimizer steps (`trainer.global_step`). The default
    schedule has one stage, before the first step and after the sanity check of the validation loop. Each stage scores
    all weights again, with new statistics. The zeros stay zero while the model trains (see `KeepZeros`).
    `trainer.validate`, `test` and `predict` prune when they start, and so evaluate the pruned model, unless the
    schedule starts after step 0. A model that this callback has pruned, also before a resume, is not pruned again while
    it has its zeros. With `fast_dev_run`, it prunes once, before the first step, and writes no report.

    The calibration data come from the first of these that exists: `dataloader`; `calibration_dataloader()` of the
    datamodule, then of the module; the train dataloader; the validation, test or predict dataloader of the loop that
    runs. The callback uses the first `num_samples` samples, and does not cut a batch whose tensors have different
    lengths. A batch runs through the module in the Trainer's precision. `PrunableModule` lists what a module may define
    for that. Layer names are relative to its `pruning_target` (our modules give the names of Hugging Face and timm).

    After pruning, `trainer.callback_metrics` and the loggers have `sparsity/model`, `sparsity/pruned_layers` and the
    sparsity of each layer. Use `BestAfterPruning` to keep the best checkpoint. To prune at another moment, override
    `should_prune`. Two pruning callbacks of one class in a Trainer must differ in `skip` or `only`.

    Args:
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1).
        num_samples: Number of calibration samples (sequences or images).
        dataloader: The calibration data.
        keep_zeros: Keep the zeros while the model trains.
        report_dir: Folder to which `pruning_report.json` is saved.
        report: Page (`.html`) or picture (`.png`) of the report to write. It needs the extra `report`.
        at_step: Number of optimizer steps before pruning.
        schedule: Instead of `at_step`: `CubicSchedule(...)`, `LinearSchedule(...)`, `OneShot(...)`, or your own.
        calibrate_on: `"validation"` collects statistics from Lightning's own validation loop, without an extra pass,
            and prunes at its end: of the next one after the step of the schedule, or of `trainer.validate`, which then
            evaluates the dense model. The default of `sequential` is then `"none"`, the only value that it supports. It
            uses whole batches until they have `num_samples` samples.
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `permutation`, `sequential`, `skip`, `only`, `keep_batch_norm`.

    Raises:
        ImportError: If a library that writes the `report` is missing.
        ValueError: If a value is out of range, or choices contradict each other. When a loop starts: if the model
            cannot be pruned as requested, now or at a later stage, for which one batch runs through the model, unless
            the data is an iterator or an `IterableDataset`.
        MisconfigurationException: When a loop starts: if the strategy distributes the model in a way that cannot be
            pruned, or training ends before the last stage.
    """

    _method: str | None = None  # by default

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
        report: str | Path | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
        calibrate_on: Literal["calibration", "validation"] = "calibration",
        **choices: Unpack[PruningChoices],
    ) -> None:
        super().__init__()
        choices.setdefault("method", self._method)
        check_choices(choices)
        self.config = PruningConfig.from_names(sparsity, **choices)
        if calibrate_on == "validation" and self.config.sequential in ("auto", "one_pass"):
            # A validation loop runs the dense model.
            self.config = replace(self.config, sequential="none")
        self.schedule = schedule_of(at_step, schedule)
        conflicts.check_options(self.config, self.schedule, calibrate_on, dataloader)
        checks.check_at_least(1, num_samples=num_samples)
        if report is not None:
            checks.check_report_path(report)
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.calibrate_on = calibrate_on
        self.keep_zeros = keep_zeros
        self.report_dir = report_dir
        self.report_path = report
        self._state = PruningState(self._fixed_choices)
        self._processes = SINGLE_PROCESS
        self._plan: Plan | None = None  # in a run of the Trainer, once it is needed
        self._modules: list[nn.Module] = []  # of the model that is planned
        self._validation: ValidationLoop | None = None  # while a validation loop is calibrated on
        self._resumed = False  # weights and state come from the same checkpoint

    @property
    def report(self) -> PruningReport | None:
        """The report of the latest pruning, also after a resume; None before the first."""
        return self._state.report

    @property
    def is_finished(self) -> bool:
        """Whether it has pruned the model to its final sparsity."""
        return self._state.share == 1

    @property
    def state_key(self) -> str:
        """A key with `skip` and `only`, since two callbacks may prune different layers."""
        only = {"only": list(self.config.only)} if self.config.only else {}
        return self._generate_state_key(skip=list(self.config.skip), **only)

    def should_prune(self, trainer: L.Trainer) -> bool:
        """Whether to prune now; called before training, after each optimizer step, and before an evaluation.

        If it is overridden, the schedule still gives the share of the sparsity, by default all of it.
        """
        share = self._schedule(trainer).share(trainer.global_step)
        return share is not None and share > self._state.share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an unsupported strategy, and a `report_dir` or `report` that cannot be written."""
        self._processes = processes_of(trainer)
        with self._processes.fail_together():
            for path, kind in ((self.report_dir, "folder"), (self.report_path, "file")):
                if path is not None and trainer.is_global_zero:
                    require_writable(path, overwrite=True, kind=kind)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before the first step if the schedule says so, and hold the zeros from then on."""
        self._forget_if_dense(trainer, pl_module)
        conflicts.refuse_training(
            self.config,
            self._schedule(trainer),
            self._state,
            trainer,
            self.calibrate_on,
            self.dataloader,
        )
        self._prune_if_asked(trainer, pl_module)
        if self._state.share < 1:
            with self._calibration(
                trainer, pl_module
            ) as data:  # raises the errors of a later stage now
                find = data.trial_batches if self.calibrate_on == "calibration" else lambda: None
                rehearse(self._plan_once(pl_module), find, data.forward, data.predict)
            conflicts.warn_of_dense_best(self.schedule, trainer)
        self._hold(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prune after an optimizer step if the schedule says so."""
        if self._prune_if_asked(trainer, pl_module):
            self._hold(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks, and warn if the final sparsity was not reached."""
        conflicts.warn_if_unfinished(
            type(self).__name__, self._state, self.config.sparsity, trainer.global_step
        )
        super().on_train_end(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks."""
        self.on_validation_batch_end()
        self._validation = None
        self.teardown()
        super().on_exception(trainer, pl_module, exception)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.validate`, or start to collect statistics."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prune_to_evaluate(trainer, pl_module)
        if self._state.due and not trainer.sanity_checking:
            self._validation = ValidationLoop(self._plan_due(trainer, pl_module), self.num_samples)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect statistics while the batch runs."""
        if self._validation is not None:
            self._validation.start_batch(batch)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Stop collecting."""
        if self._validation is not None:
            self._validation.batch.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune with the collected statistics."""
        if self._validation is not None:
            collected = self._validation
            self._validation = None
            self._record(prune_collected(collected.plan, collected.calibration), trainer)
            if trainer.state.fn == TrainerFn.FITTING:
                self._hold(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.test` or `trainer.predict`."""
        self._prune_to_evaluate(trainer, pl_module)

    on_predict_start = on_test_start

    def teardown(self, *_: Any, **__: Any) -> None:
        """Forget the plan, which refers to the model."""
        self._plan = None
        self._modules = []

    def state_dict(self) -> dict[str, Any]:
        """Return how far the model is pruned; see `PruningState`."""
        return replace(
            self._state, unheld_zeros=self._zeros.state_dict()["unheld_zeros"]
        ).to_checkpoint()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; refuse that of a run with another sparsity or pattern."""
        self._state = PruningState.from_checkpoint(
            state_dict, self._fixed_choices, type(self).__name__
        )
        self._zeros.load_state_dict({"layers": [], "unheld_zeros": self._state.unheld_zeros})
        self._resumed = True

    @property
    def _fixed_choices(self) -> dict[str, Any]:
        """The choices that a resumed run must not change."""
        choices = self.config.describe()
        return {name: choices[name] for name in ("sparsity", "pattern")}

    def _schedule(self, trainer: L.Trainer) -> Schedule:
        if trainer.fast_dev_run and trainer.state.fn == TrainerFn.FITTING:  # type: ignore[attr-defined]
            return OneShot()
        return self.schedule

    def _share_due(self, trainer: L.Trainer) -> float:
        """The share of the final sparsity to prune to now."""
        return self._schedule(trainer).share(trainer.global_step) or 1.0

    def _plan_once(self, pl_module: L.LightningModule) -> Plan:
        """Return the plan for the final sparsity; the layers are found once, unless the model has other modules now."""
        model = pruning_target(pl_module)
        modules = [*pruning_target(pl_module).modules()]
        if self._plan is None or self._modules != modules:
            self._plan = make_plan(self.config, model, self._processes)
            self._modules = modules
        return self._plan

    def _plan_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Plan:
        """Return the plan for the stage that is due."""
        config = self.config.scaled(self._share_due(trainer))
        if self.calibrate_on == "calibration":
            config = conflicts.without_permutation_in_training(config, trainer)
        return self._plan_once(pl_module).with_choices(config)

    def _forget_if_dense(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the state if the model is not the one that was pruned, or dense weights were loaded into it."""
        may_differ = bool(self._state.zeros) and not self._resumed
        self._resumed = False
        if may_differ and not self._state.describes(
            zeros_of(pruning_target(pl_module), self._processes)
        ):
            self._state = PruningState(self._fixed_choices)
        if self.report is not None:
            set_metrics(self.report, trainer)

    def _prune_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Return whether the model was pruned; ask once for each step."""
        if self._state.asked_at == trainer.global_step:
            return False
        asked = self.should_prune(trainer)
        later = self.calibrate_on == "validation"
        if asked and later:
            self._state.due = True
        elif asked:
            self._prune(trainer, pl_module)
        # At last, so that a resumed run repeats an interrupted pruning.
        self._state.asked_at = trainer.global_step
        return asked and not later

    def _prune_to_evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_if_dense(trainer, pl_module)
        share = self._share_due(trainer) if self.should_prune(trainer) else 0.0
        if share and self.calibrate_on == "validation" and trainer.state.fn == TrainerFn.VALIDATING:
            self._state.due = True
            return
        conflicts.warn_of_evaluation(type(self).__name__, share, self._state, self.schedule)
        if share:
            self._prune(trainer, pl_module)

    def _prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune to the share that is due, and publish the report."""
        with self._calibration(trainer, pl_module) as data:
            report = prune_as(
                self._plan_due(trainer, pl_module),
                data.batches(),
                forward=data.forward,
                predict=data.predict,
                progress=shows_progress(trainer),
            )
        self._record(report, trainer)

    def _record(self, report: PruningReport, trainer: L.Trainer) -> None:
        """Publish and save the report of a stage, with its run."""
        describe: Any = getattr(getattr(trainer, "datamodule", None), "describe_calibration", None)
        is_given = self.dataloader is not None or self.calibrate_on == "validation"
        calibration = (
            describe(self.num_samples)
            if describe and self.config.data_reader and not is_given
            else ""
        )
        report = replace(
            report,
            run=Circumstances(model=_name_of(trainer.lightning_module), calibration=calibration),
        )
        self._state.record(report, self._share_due(trainer))
        if shows_progress(trainer):
            rank_zero_info(f"{type(self).__name__}: {report.summary()}")
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=trainer.global_step)
        set_metrics(report, trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self.report_dir is not None:
                report.save(self.report_dir)
            if self.report_path is not None:
                report.save(self.report_path)

    @contextmanager
    def _calibration(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> Iterator[CalibrationData]:
        """Give the data to run in the Trainer's precision, without changing the random numbers that training draws."""
        with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
            yield CalibrationData(
                trainer, pl_module, self.dataloader, self.num_samples, self._processes
            )

    def _hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.keep_zeros and self._state.zeros:
            layers = self._plan_once(pl_module).layers if self._plan else ()
            found = {layer.name: layer for layer in layers} or sharded_layers(
                pruning_target(pl_module)
            )
            self._zeros.hold([found[name] for name in self._state.zeros])
            self._clear_copies(trainer, pl_module)


class WandaPrune(PruningCallback):
    """`PruningCallback(method="wanda")`: by weight magnitude times input norm, within each row (Sun et al. 2024)."""

    _method = "wanda"


def shows_progress(trainer: L.Trainer) -> bool:
    """Whether the Trainer shows a progress bar."""
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def set_metrics(report: PruningReport, trainer: L.Trainer) -> None:
    """Add the sparsities of a report to the metrics that callbacks such as `ModelCheckpoint` monitor."""
    device = trainer.strategy.root_device
    trainer.callback_metrics.update(
        {name: torch.tensor(x, device=device) for name, x in report.metrics().items()}
    )


def _name_of(pl_module: L.LightningModule) -> str:
    """Return the name from which the model was loaded; empty if it is not known."""
    choices = pl_module.hparams
    model = pruning_target(pl_module)
    name = choices.get("model")
    if not isinstance(name, str) or not (
        hasattr(model, "name_or_path") or hasattr(model, "pretrained_cfg")
    ):
        # Other models have neither, so `model` could mean anything.
        return str(getattr(model, "name_or_path", ""))
    if hasattr(model, "name_or_path"):
        return name
    source = choices.get("checkpoint") or (
        "" if choices.get("pretrained", True) else "not pretrained"
    )
    return f"timm:{name.removeprefix('timm:')}" + (f" ({source})" if source else "")
