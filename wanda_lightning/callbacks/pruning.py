"""The callback that prunes a model inside Lightning's loops."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn import Module

from wanda_lightning.callbacks import conflicts
from wanda_lightning.callbacks.calibration_data import CalibrationData, ValidationStatistics
from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.callbacks.run_description import describe_run
from wanda_lightning.callbacks.schedules import OneShot, PruningState, Schedule, schedule_of
from wanda_lightning.callbacks.trainer import is_dry_run, processes_of, set_metrics, shows_progress
from wanda_lightning.callbacks.zeros import ZerosCallback
from wanda_lightning.common import checks
from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import require_writable
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, config_of
from wanda_lightning.core import Wanda, ZeroOut
from wanda_lightning.loop.plan import Plan, make_plan
from wanda_lightning.loop.steps import begin
from wanda_lightning.parallel import SINGLE_PROCESS
from wanda_lightning.report import PruningReport
from wanda_lightning.training.held_zeros import sharded_layers, zeros_of
from wanda_lightning.verbs.prune import prune_collected, rehearse
from wanda_lightning.verbs.prune_weights import prune_weights


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
    lengths. A batch runs through the module in the Trainer's precision. docs/lightning_module.md lists what a module
    may define for that. Layer names are relative to its `pruning_target` (our modules give the names of Hugging Face
    and timm).

    After pruning, `trainer.callback_metrics` and the loggers have `sparsity/model`, `sparsity/pruned_layers` and the
    sparsity of each layer. Use `BestAfterPruning` to keep the best checkpoint. To prune at another moment, override
    `should_prune`. Two pruning callbacks of one class in a Trainer must differ in `skip` or `only`.

    Args:
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1); or a `PruningConfig`.
        num_samples: Number of calibration samples (sequences or images).
        dataloader: The calibration data.
        keep_zeros: Keep the zeros while the model trains.
        report_dir: Folder to which `pruning_report.json` is saved.
        at_step: Number of optimizer steps before pruning.
        schedule: Instead of `at_step`: `CubicSchedule(...)`, `LinearSchedule(...)`, `OneShot(...)`, or your own.
        calibrate_on: `"validation"` collects statistics from Lightning's own validation loop, without an extra pass,
            and prunes when the loop ends. In `fit`, this is the first loop after the step of the schedule;
            `trainer.validate` evaluates the dense model first. `sequential` is then `"none"` by default, the only value
            that this supports. Whole batches are used until they have `num_samples` samples.
        **choices: The other arguments of `PruningConfig`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `sequential`, `skip`, `only`, `keep_batch_norm`.

    Raises:
        ValueError: If a value is out of range, or choices contradict each other. When a loop starts: if the model
            cannot be pruned as requested, now or at a later stage, for which one batch runs through the model, unless
            the data is an iterator or an `IterableDataset`.
        MisconfigurationException: When a loop starts: if the strategy distributes the model in a way that cannot be
            pruned, or training ends before the last stage.
    """

    _remove: ClassVar = staticmethod(prune_weights)

    def __init__(
        self,
        sparsity: float | PruningConfig = 0.5,
        *,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: StrPath | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
        calibrate_on: Literal["calibration", "validation"] = "calibration",
        **choices: Unpack[PruningChoices],
    ) -> None:
        super().__init__()
        self.config = self._config_of(sparsity, **choices)
        if calibrate_on == "validation" and self.config.sequential in ("auto", "one_pass"):
            # The statistics of a validation loop are those of the dense model.
            self.config = replace(self.config, sequential="none")
        self.schedule = schedule_of(at_step, schedule)
        conflicts.check_options(self.config, self.schedule, calibrate_on, dataloader)
        checks.check_at_least(1, num_samples=num_samples)

        self.num_samples = num_samples
        self.dataloader = dataloader
        self.calibrate_on = calibrate_on
        self.keep_zeros = keep_zeros
        self.report_dir = report_dir

        described = self.config.describe()
        # A resumed run must not change these.
        self._fixed_choices = {name: described[name] for name in ("sparsity", "pattern")}
        self._state = PruningState(self._fixed_choices)
        self._state_is_of_checkpoint = False  # until the run begins
        self._processes = SINGLE_PROCESS  # until `setup`
        self._final_plan: Plan | None = None
        self._planned_modules: list[Module] = []
        self._validation: ValidationStatistics | None = None  # while a loop is calibrated on

    def _config_of(
        self, sparsity: float | PruningConfig, **choices: Unpack[PruningChoices]
    ) -> PruningConfig:
        return config_of(sparsity, PruningCallback, **choices)

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
        layers = {"skip": list(self.config.skip)}
        if self.config.only:
            layers["only"] = list(self.config.only)
        return f"{type(self).__qualname__}{layers}"

    def should_prune(self, trainer: Trainer) -> bool:
        """Whether to prune now; called before training, after each optimizer step, and before an evaluation.

        If it is overridden, the schedule still gives the share of the sparsity, by default all of it.
        """
        share = self._schedule_of(trainer).share(trainer.global_step) or 0.0
        return share > self._state.share

    # What Lightning calls, in the order of a run.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported strategy, and a `report_dir` that cannot be written."""
        # One object for all that communicates: it knows whether another process has failed already.
        self._processes = processes_of(trainer)
        with self._processes.fail_together():
            if self.report_dir is not None and trainer.is_global_zero:
                require_writable(self.report_dir, overwrite=True, kind="folder")

    def load_state_dict(self, state_dict: Kwargs) -> None:
        """Restore the state; refuse that of a run with another sparsity or pattern."""
        name = type(self).__name__
        self._state = PruningState.from_checkpoint(state_dict, self._fixed_choices, name)
        self._state_is_of_checkpoint = True
        self._zeros.load_state_dict({"layers": [], "unheld_zeros": self._state.unheld_zeros})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the first step if the schedule says so, and hold the zeros from then on."""
        self._reset_for_dense_model(trainer)
        schedule = self._schedule_of(trainer)
        conflicts.refuse_training(
            self.config, schedule, self._state, trainer, self.calibrate_on, self.dataloader
        )
        self._prune_if_due(trainer)
        if not self.is_finished:
            self._raise_later_errors(trainer)
            conflicts.warn_of_dense_best(self.schedule, trainer)
        self._hold_zeros(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Prune after an optimizer step if the schedule says so."""
        if self._prune_if_due(trainer):
            self._hold_zeros(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Prune before `trainer.validate`, or start to collect statistics."""
        if trainer.state.fn == "validate":
            self._prune_to_evaluate(trainer)
        if self._state.awaits_validation and not trainer.sanity_checking:
            self._validation = ValidationStatistics(self._current_plan(trainer), self.num_samples)

    def on_validation_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        """Collect statistics while the batch runs."""
        if self._validation:
            self._validation.start_batch(batch)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Stop collecting."""
        if self._validation:
            self._validation.end_batch()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Prune with the collected statistics."""
        if self._validation:
            report = prune_collected(self._validation.plan, self._validation.calibration)
            self._validation = None
            self._publish(report, trainer)
            if trainer.state.fn == "fit":
                self._hold_zeros(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before `trainer.test` or `trainer.predict`."""
        self._prune_to_evaluate(trainer)

    on_predict_start = on_test_start

    def state_dict(self) -> Kwargs:
        """Return how far the model is pruned; see `PruningState`."""
        self._state.unheld_zeros = self._zeros.state_dict()["unheld_zeros"]
        return self._state.to_checkpoint()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and warn if the final sparsity was not reached."""
        conflicts.warn_if_unfinished(
            type(self).__name__, self._state, self.config.sparsity, trainer.global_step
        )
        super().on_train_end(trainer, pl_module)

    def on_exception(self, *arguments: Any) -> None:
        """Remove the hooks."""
        self.on_validation_batch_end()
        self._validation = None
        self.teardown()
        super().on_exception(*arguments)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Forget the plan, which refers to the model."""
        self._final_plan = None
        self._planned_modules = []

    # When to prune.

    def _schedule_of(self, trainer: Trainer) -> Schedule:
        """The schedule of this run: a dry run is over before most stages."""
        if is_dry_run(trainer) and trainer.state.fn == "fit":
            return OneShot()
        return self.schedule

    def _current_share(self, trainer: Trainer) -> float:
        """The share of the final sparsity to which a pruning at this step prunes."""
        # `should_prune` may be overridden to prune before the first stage.
        return self._schedule_of(trainer).share(trainer.global_step) or 1.0

    def _prune_if_due(self, trainer: Trainer) -> bool:
        """Ask `should_prune`, once for each optimizer step, and return whether the model was pruned."""
        # Several batches belong to one step if gradients accumulate.
        if self._state.last_asked_step == trainer.global_step:
            return False

        is_due = self.should_prune(trainer)
        waits = self.calibrate_on == "validation"
        if is_due and waits:
            self._state.awaits_validation = True
        elif is_due:
            self._prune(trainer)

        # After pruning, so that a run that resumes from an interrupted pruning repeats it.
        self._state.last_asked_step = trainer.global_step
        return is_due and not waits

    def _prune_to_evaluate(self, trainer: Trainer) -> None:
        """Prune before an evaluation if it is due, or warn that the evaluated model is dense."""
        self._reset_for_dense_model(trainer)
        share = self._current_share(trainer) if self.should_prune(trainer) else 0.0
        if share and self.calibrate_on == "validation" and trainer.state.fn == "validate":
            self._state.awaits_validation = True
            return

        conflicts.warn_of_evaluation(type(self).__name__, share, self._state, self.schedule)
        if share:
            self._prune(trainer)

    def _reset_for_dense_model(self, trainer: Trainer) -> None:
        """Reset the state if the model is not the one that was pruned, or dense weights were loaded into it."""
        # A checkpoint has the state of its own weights.
        if not self._state_is_of_checkpoint:
            model = pruning_target(trainer.lightning_module)
            # An earlier run may have been interrupted before it pruned.
            if self._state.share == 0 or not self._state.describes(
                zeros_of(model, self._processes)
            ):
                self._state = PruningState(self._fixed_choices)
        self._state_is_of_checkpoint = False

        if self.report:
            set_metrics(self.report, trainer)

    # What to prune, and with which data.

    def _plan(self, trainer: Trainer) -> Plan:
        """Return the plan for the final sparsity; the layers are found once, unless the model has other modules now."""
        model = pruning_target(trainer.lightning_module)
        modules = [*model.modules()]
        if self._final_plan is None or self._planned_modules != modules:
            self._final_plan = make_plan(self.config, model, self._processes)
            self._planned_modules = modules
        return self._final_plan

    def _current_plan(self, trainer: Trainer) -> Plan:
        """Return the plan for the sparsity of the current stage."""
        config = self.config.scaled(self._current_share(trainer))
        return self._plan(trainer).with_choices(config)

    @contextmanager
    def _calibration(self, trainer: Trainer) -> Iterator[CalibrationData]:
        """Give the data to run in the Trainer's precision, without changing the random numbers that training draws."""
        with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
            yield CalibrationData(
                trainer,
                trainer.lightning_module,
                self.dataloader,
                self.num_samples,
                self._processes,
            )

    def _raise_later_errors(self, trainer: Trainer) -> None:
        """Raise the errors of a later stage before training starts, by a trial with one batch."""
        with self._calibration(trainer) as data:
            # A validation loop brings its own batches later.
            waits = self.calibrate_on == "validation"
            rehearse(
                self._plan(trainer),
                lambda: None if waits else data.trial_batches(),
                data.forward,
                data.predict,
            )

    # Prune, publish the result, and hold the zeros.

    def _prune(self, trainer: Trainer) -> None:
        """Prune to the share of the current stage, and publish the report."""
        with self._calibration(trainer) as data:
            run = begin(
                self._current_plan(trainer),
                data.batches(),
                data.forward,
                data.predict,
                shows_progress(trainer),
            )
            report = self._remove(run)
        self._publish(report, trainer)

    def _publish(self, report: PruningReport, trainer: Trainer) -> None:
        """Add the run to the report of a stage, record and log it, and write its files."""
        # The datamodule can only describe its own samples, if any were read.
        has_own_data = self.dataloader is not None or self.calibrate_on == "validation"
        num_samples = self.num_samples if self.config.data_reader and not has_own_data else 0
        report = replace(report, run=describe_run(trainer, num_samples))

        self._state.record(report, self._current_share(trainer))
        if shows_progress(trainer):
            rank_zero_info(f"{type(self).__name__}: {report.summary()}")
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=trainer.global_step)
        set_metrics(report, trainer)

        if self.report_dir is not None and trainer.is_global_zero and not is_dry_run(trainer):
            report.save(self.report_dir)

    def _hold_zeros(self, trainer: Trainer) -> None:
        """Keep the zeros of all stages so far, in the weights and in copies of them."""
        if not self.keep_zeros or not self._state.zeros:
            return
        if self._final_plan is None:
            # A resumed run may have nothing left to prune, and makes no plan then.
            layers = sharded_layers(pruning_target(trainer.lightning_module))
        else:
            layers = {layer.name: layer for layer in self._plan(trainer).layers}
        self._zeros.hold([layers[name] for name in self._state.zeros])
        self._clear_copies(trainer)


class WandaPrune(PruningCallback):
    """`PruningCallback` that prunes by Wanda: by weight magnitude times input norm (Sun et al. 2024)."""

    def _config_of(
        self, sparsity: float | PruningConfig, **choices: Unpack[PruningChoices]
    ) -> PruningConfig:
        config = super()._config_of(sparsity, **choices)
        if not (isinstance(config.criterion, Wanda) and isinstance(config.solver, ZeroOut)):
            raise UserError(
                "WandaPrune prunes by Wanda, but another method was chosen. Use PruningCallback."
            )
        return config
