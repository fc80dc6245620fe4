"""Measure a model with one validation loop."""

import logging
from math import isfinite
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback

from wanda_lightning.cli.model_and_data import AnyData
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.evaluation.agreement import AfterBatch, Agreement
from wanda_lightning.evaluation.results import share_error
from wanda_lightning.lightning_modules import CausalLMModule
from wanda_lightning.report.descriptions import PERPLEXITY, SPEARMAN, TOP1, Metric


class _Comparison(L.Callback):
    """Calls a function after each batch, and reads the standard errors of perplexities before they are reset."""

    def __init__(self, after_batch: AfterBatch) -> None:
        self.errors: dict[str, float] = {}
        self._after_batch = after_batch

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        index: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store or compare the predictions."""
        self._after_batch(batch, index, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the standard errors."""
        if isinstance(pl_module, CausalLMModule):
            self.errors = pl_module.standard_errors()


def measure(module: Any, data: AnyData, agreement: Agreement, is_dense: bool) -> dict[str, float]:
    """Run one validation loop, and return its metrics.

    There are also the standard errors of perplexities and accuracies (`_stderr`). `agreement` stores the predictions of
    the dense model, or compares others with them.
    """
    # Lightning would describe the hardware.
    logging.getLogger("lightning.pytorch").setLevel("WARNING")
    watching = agreement.storing if is_dense else agreement.comparing
    with (
        ProgressBar("Measuring", None) as bar,
        watching(module.model) as after_batch,
    ):
        comparison = _Comparison(after_batch)
        progress = LambdaCallback(
            on_validation_start=lambda trainer, _: bar.expect(sum(trainer.num_val_batches)),
            on_validation_batch_end=lambda *_: bar.advance(),
        )
        trainer = L.Trainer(
            devices=1,
            callbacks=[comparison, progress],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.validate(module, data, verbose=False)

    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, error in comparison.errors.items():
        if isfinite(error):  # not for a single window
            metrics[f"{name}_stderr"] = error
    if isinstance(data, ImageDataModule):
        images: Any = data.val_dataloader().dataset
        for name in [*metrics]:
            if "accuracy" in name:
                metrics |= share_error(name, metrics[name], len(images))
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
            name = f"val_ppl/{text}"
        descriptions[name] = data.describe_evaluation(number)
    return descriptions
