"""The callback that makes a model smaller inside a Trainer."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Module

from wanda_lightning.callbacks.distillation import DistillFromDense
from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.save import SavePretrained
from wanda_lightning.callbacks.schedules import Schedule
from wanda_lightning.callbacks.trainer import set_metrics, shows_progress
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack
from wanda_lightning.shrink_config import ShrinkChoices, ShrinkConfig
from wanda_lightning.units.zero_units import take_out_zero_units
from wanda_lightning.verbs.remove_units import remove_units
from wanda_lightning.verbs.shrink import carry_out


class ShrinkCallback(PruningCallback):
    """Make a model smaller before it is trained or evaluated: hidden units or experts leave it.

    They leave in `setup`, before the optimizers are made, so training has no masks to hold. A run that resumes does it
    again, and so needs the same choices and data, before it loads the smaller weights. With a `schedule`, hidden units
    become zero in its stages, stay zero while the model trains, and leave when `fit` ends.

    The calibration data come from the same places as those of `PruningCallback`. `DistillFromDense` without a `dense`
    model copies the network in `setup`, so it must come before this callback; and with a `schedule`, `SavePretrained`
    must come after it.

    Args:
        units: Fraction of the hidden units that leave, above 0 and below 1.
        experts: Fraction of the experts that leave each mixture of experts.
        num_samples: Number of calibration samples (sequences or images).
        dataloader: The calibration data.
        report_dir: Folder to which `pruning_report.json` is saved.
        schedule: When hidden units become zero, and how many: `CubicSchedule(...)`, for example.
        **choices: The other arguments of `ShrinkConfig`: `by`, `refit`, `multiple_of`, `recovery`,
            `sequential`, `skip`, `only`, `keep_batch_norm`.

    Raises:
        ValueError: If a value is out of range or would be ignored. In `setup`: if the model cannot be shrunk as asked.
        MisconfigurationException: In `setup`: if the strategy distributes the model, or callbacks are in the wrong
            order. When training starts: if it ends before the last stage.
    """

    _remove = staticmethod(remove_units)

    def __init__(
        self,
        units: float | None = None,
        experts: float | None = None,
        *,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        report_dir: StrPath | None = None,
        schedule: Schedule | None = None,
        **choices: Unpack[ShrinkChoices],
    ) -> None:
        config = ShrinkConfig(units=units, experts=experts, **choices)
        self._parts = config.parts
        if not self._parts or config.max_size:
            raise UserError(
                "ShrinkCallback needs units= or experts=, such as units=0.5; it takes no max_size."
            )
        self._in_stages = schedule is not None
        if self._in_stages and experts is not None:
            raise UserError(
                "schedule sets hidden units to zero, and experts leave at once. Leave one of them out."
            )
        super().__init__(
            self._parts[0],
            num_samples=num_samples,
            dataloader=dataloader,
            keep_zeros=self._in_stages,
            report_dir=report_dir,
            schedule=schedule,
        )
        self._small_model: weakref.ref[Module] | None = None

    def _config_of(
        self, sparsity: float | PruningConfig, **choices: Unpack[PruningChoices]
    ) -> PruningConfig:
        assert isinstance(sparsity, PruningConfig)
        return sparsity

    def should_prune(self, trainer: Trainer) -> bool:
        """Whether to set units to zero now, by the schedule."""
        is_due = self._in_stages and not self._has_shrunk(trainer)
        return is_due and super().should_prune(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shrink the model, unless this callback has done so or has a schedule."""
        super().setup(trainer, pl_module, stage)
        self._refuse_order(trainer)
        if self._in_stages or self._has_shrunk(trainer):
            return

        # As Lightning does after this hook.
        pl_module.to(trainer.strategy.root_device)
        trainer.precision_plugin.convert_module(pl_module)
        model = pruning_target(pl_module)
        with self._calibration(trainer) as data:
            report = carry_out(
                self._parts,
                model,
                data.batches(),
                data.forward,
                data.predict,
                shows_progress(trainer),
                self._processes,
            )
        self._small_model = weakref.ref(model)
        self._publish(report, trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take out the units that the stages of a schedule have set to zero."""
        if not (self._in_stages and self.report) or self._has_shrunk(trainer):
            return
        pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        with self._calibration(trainer) as data:
            forward = None
            for batch in islice(data.batches(), 1):
                forward = partial(data.forward, batch)
            model = pruning_target(pl_module)
            try:
                taken = take_out_zero_units(model, forward, shows_progress(trainer))
            except UserError as error:  # a trained model is not lost
                rank_zero_warn(f"The model keeps its zero units. {error}")
                return
        pl_module.cpu()
        self._small_model = weakref.ref(model)
        report = self.report.marked_as_shrunk() if taken.layers else self.report
        self._publish(replace(report, notes=(*report.notes, *taken.notes())), trainer)

    def _has_shrunk(self, trainer: Trainer) -> bool:
        """Whether the model of the Trainer is the one that this callback has made smaller."""
        model = pruning_target(trainer.lightning_module)
        return self._small_model is not None and self._small_model() is model

    def _refuse_order(self, trainer: Trainer) -> None:
        """Refuse callbacks that would see the model too late or too early."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        place = callbacks.index(self)
        for index, callback in enumerate(callbacks):
            if isinstance(callback, DistillFromDense) and not callback.dense and index > place:
                raise MisconfigurationException(
                    "DistillFromDense copies the dense model in setup, so it must come before ShrinkCallback in the "
                    "callbacks of the Trainer."
                )
            if isinstance(callback, SavePretrained) and self._in_stages and index < place:
                raise MisconfigurationException(
                    "ShrinkCallback takes units out when fit ends, so SavePretrained must come after it in the "
                    "callbacks of the Trainer."
                )

    def _reset_for_dense_model(self, trainer: Trainer) -> None:
        if self._in_stages and not self._has_shrunk(trainer):
            super()._reset_for_dense_model(trainer)
        elif self.report:
            set_metrics(self.report, trainer)
