"""Measure a model with one validation loop: its metrics, and its speed."""

import logging
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback

from wanda_lightning.cli.model_and_data import AnyData
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.report.descriptions import PERPLEXITY, SPEARMAN, TOP1, Metric


class BatchClock(L.Callback):
    """Time the batches of a validation loop.

    `speed` is the number of tokens or images per second of the fastest batch, which other work of the machine has
    disturbed least. It is 0 until a second batch starts, since a batch is timed until the next one starts.
    """

    speed = 0.0
    _started = 0.0
    _size = 0

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, *indices: int
    ) -> None:
        """Time the previous batch."""
        # The CPU only queues what an accelerator computes.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = perf_counter()
        if self._size:
            self.speed = max(self.speed, self._size / (now - self._started))
        self._started = now
        self._size = batch["input_ids"].numel() if isinstance(batch, dict) else len(batch[0])


def measure(module: L.LightningModule, data: AnyData) -> dict[str, float]:
    """Run one validation loop, and return its metrics, with the `speed` if there are two batches or more."""
    # Lightning would describe the hardware.
    logging.getLogger("lightning.pytorch").setLevel("WARNING")
    clock = BatchClock()
    with ProgressBar("Measuring", None) as bar:
        progress = LambdaCallback(
            on_validation_start=lambda trainer, _: bar.expect(sum(trainer.num_val_batches)),
            on_validation_batch_end=lambda *_: bar.advance(),
        )
        trainer = L.Trainer(
            devices=1,
            callbacks=[clock, progress],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.validate(module, data, verbose=False)

    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if clock.speed:
        metrics["speed"] = clock.speed
    return metrics


def metric_of(data: AnyData) -> Metric:
    """Return what is measured on data of this kind."""
    if isinstance(data, TextDataModule):
        return PERPLEXITY
    return TOP1 if isinstance(data, ImageDataModule) else SPEARMAN


def logged_results(data: AnyData) -> dict[str, str]:
    """Describe each data set, by the name under which a Trainer logs the result on it."""
    name = metric_of(data).logged[0]
    if not isinstance(data, TextDataModule):
        return {name: data.describe_evaluation()}
    descriptions = {}
    for number, text in enumerate(data.evaluations):
        if number:
            name = f"{PERPLEXITY.logged[0]}/{text}"
        descriptions[name] = data.describe_evaluation(number)
    return descriptions
