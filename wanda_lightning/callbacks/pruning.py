"""Prune inside Lightning's loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from wanda_lightning.callbacks.calibration import calibration_batches, calibration_forward, pruning_target
from wanda_lightning.callbacks.keep_zeros import KeepZeros, is_pruned
from wanda_lightning.core.allocation import Allocation, Uniform
from wanda_lightning.core.criteria import Criterion, Magnitude, Wanda
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.core.solvers import Solver, ZeroOut
from wanda_lightning.pruner import PruningConfig, prune_as
from wanda_lightning.report import PruningReport


class PruningCallback(Callback):
    """Prune the model once, before it is trained or measured.

    In `trainer.fit` before the first optimizer step, after the sanity check of the validation loop; in
    `trainer.validate`, `test` and `predict` on start, so that the loop that follows measures the pruned model. A model
    that this callback has pruned, also before a resume, is not pruned again while its zeros are there. While training,
    the zeros stay zero (see `KeepZeros`).

    The calibration batches are the first `num_samples` samples of, in this order: `dataloader`; the datamodule's, then
    the module's `calibration_dataloader()`; the train dataloader; the validation, test or predict dataloader at hand.
    A batch goes through the model by `pl_module.calibration_step(batch)` where there is one, else as in `prune`.
    Layers are named as in the module's `pruning_target` where it has one (our modules name their model: the report
    then has Hugging Face's or timm's names), else as in the LightningModule.

    Args:
        sparsity: Fraction of each pruned layer's weights that become zero, in [0, 1).
        criterion: Gives scores; an object or its name. This and the following as in `prune`.
        pattern: Where zeros may fall, for example `"unstructured"` or `"2:4"`.
        allocation: Spreads the sparsity over the layers.
        solver: Gives the final weights.
        granularity: What the statistics see: `"block"`, `"layer"` or `"model"`.
        skip: Layers to leave dense: names, globs, or `re:` expressions.
        num_samples: Calibration samples (sequences or images).
        dataloader: Where to take them from.
        keep_zeros: Keep the zeros while training.
        report_dir: Write `pruning_report.json` there.

    Attributes:
        report: What happened, once it has.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        criterion: Criterion | str = Wanda(),
        pattern: Pattern | str = Unstructured(),
        allocation: Allocation | str = Uniform(),
        solver: Solver | str = ZeroOut(),
        granularity: str = "block",
        skip: Sequence[str] = (),
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        self.config = PruningConfig(sparsity, criterion, pattern, allocation, solver, granularity, skip)
        if num_samples < 1:
            raise ValueError(f"num_samples is at least 1, but {num_samples} was given")
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.keep_zeros = keep_zeros
        self.report_dir = report_dir
        self.report: PruningReport | None = None
        self._pruned_layers: list[str] | None = None
        self._zeros = KeepZeros()

    @property
    def state_key(self) -> str:
        """One state for each configuration: two callbacks may prune different parts of a model."""
        return self._generate_state_key(**self.config.describe())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned right.

        Raises:
            MisconfigurationException: If the model is spread over several processes.
        """
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} prunes in one process, but {type(trainer.strategy).__name__} runs "
                f"{trainer.world_size}. Prune with Trainer(devices=1), save, and train the pruned model with KeepZeros."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before the first step, and hold the zeros from then on."""
        self._prune_once(trainer, pl_module)
        if self.keep_zeros and self._pruned_layers is not None:
            self._zeros.hold(pruning_target(pl_module), self._pruned_layers, trainer.optimizers)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the zeros."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._zeros.release()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.validate` measures."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prune_once(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.test` measures."""
        self._prune_once(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before `trainer.predict` predicts."""
        self._prune_once(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Which layers are pruned; their zeros are in the weights."""
        return {"pruned_layers": self._pruned_layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run whose weights are pruned already."""
        self._pruned_layers = state_dict["pruned_layers"]

    def _prune_once(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target = pruning_target(pl_module)
        if self._pruned_layers is not None and is_pruned(target, self._pruned_layers):
            return
        bar = trainer.progress_bar_callback
        progress = bar is not None and bool(getattr(bar, "is_enabled", True))
        with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
            self.report = prune_as(
                self.config,
                target,
                calibration_batches(trainer, pl_module, self.dataloader, self.num_samples),
                forward=partial(calibration_forward, trainer, pl_module),
                progress=progress,
            )
        if progress:
            rank_zero_info(f"{type(self).__name__}: {self.report.summary()}")
        self._pruned_layers = [layer.name for layer in self.report.layers if layer.sparsity]
        for logger in trainer.loggers:
            logger.log_metrics(self.report.metrics(), step=trainer.global_step)
        if self.report_dir is not None:
            self.report.save(self.report_dir)


class WandaPrune(PruningCallback):
    """Prune by weight magnitude times input norm, within each output row (Sun et al. 2024).

    Takes what `PruningCallback` takes; the criterion is `Wanda`.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: Pattern | str = Unstructured(),
        allocation: Allocation | str = Uniform(),
        granularity: str = "block",
        skip: Sequence[str] = (),
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            Wanda(),
            pattern,
            allocation,
            granularity=granularity,
            skip=skip,
            num_samples=num_samples,
            dataloader=dataloader,
            keep_zeros=keep_zeros,
            report_dir=report_dir,
        )


class MagnitudePrune(PruningCallback):
    """Prune the smallest weights of each layer, without calibration data.

    Takes what `PruningCallback` takes; the criterion is `Magnitude`, compared over the whole layer by default.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: Pattern | str = Unstructured(group="layer"),
        allocation: Allocation | str = Uniform(),
        skip: Sequence[str] = (),
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            sparsity, Magnitude(), pattern, allocation, skip=skip, keep_zeros=keep_zeros, report_dir=report_dir
        )
