"""An image classifier as a LightningModule."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import lightning as L
import timm
import timm.optim
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from wanda_lightning.files import whole_folder
from wanda_lightning.modules.loading import create_classifier, load_checkpoint


class ImageClassifierModule(L.LightningModule):
    """An image classifier: trains on cross entropy, is measured by accuracy.

    A batch is `(images, labels)`, or a mapping with `image` or `pixel_values` and `label` or `labels`. Logged are
    `train_loss`, `val_loss`, `val_accuracy`, with more than 5 classes `val_accuracy_top5`, and the same for `test`;
    `predict` gives the logits.

    Args:
        model: A name that timm knows, with or without the prefix `timm:`; `hf-hub:OWNER/NAME`; `local-dir:FOLDER`; or
            a ready model.
        pretrained: Load the weights that timm has for the name. Not used where there is a `checkpoint` or the model is
            ready.
        num_classes: Another number of classes than the pretrained weights have. For a ready model that has no
            `num_classes`: how many logits it gives.
        checkpoint: A `.safetensors` file with all the weights of the model.
        model_kwargs: More arguments of `timm.create_model`, such as `img_size`.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and norms are spared.

    Raises:
        ValueError: For a name that timm does not know, a checkpoint that does not fit or is not in safetensors, or a
            model that is no classifier.
        OSError: If weights can neither be downloaded nor found in the cache.
    """

    _TOP: ClassVar = {"accuracy": 1, "accuracy_top5": 5}

    def __init__(
        self,
        model: str | nn.Module,
        pretrained: bool = True,
        num_classes: int | None = None,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self._model_kwargs = dict(model_kwargs or {})
        if isinstance(model, str):
            self.save_hyperparameters()
            if num_classes is not None:
                self._model_kwargs["num_classes"] = num_classes
            self.model = create_classifier(model, pretrained and checkpoint is None, self._model_kwargs)
        else:
            self.save_hyperparameters(ignore=["model"])
            if model_kwargs:
                raise ValueError(
                    f"model_kwargs are for a model given by name, but a ready {type(model).__name__} came."
                )
            self.model = model
        if checkpoint is not None:
            load_checkpoint(self.model, checkpoint)
        self.model.train()
        self._num_classes = getattr(self.model, "num_classes", num_classes) or 0
        if self._num_classes < 2:
            raise ValueError(
                f"A classifier with at least 2 classes is needed, but {type(self.model).__name__} has "
                f"{self._num_classes or 'no'} classes. Set num_classes."
            )
        self.lr = lr
        self.weight_decay = weight_decay
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": MulticlassAccuracy(self._num_classes, top_k=k, average="micro")
                for stage in ("val", "test")
                for name, k in self._TOP.items()
                if k < self._num_classes
            }
        )

    @property
    def pruning_target(self) -> nn.Module:
        """What the pruning callbacks prune: the model under its own names."""
        return self.model

    @property
    def num_classes(self) -> int:
        """How many logits the model gives for an image."""
        return self._num_classes

    def forward(self, images: Tensor) -> Any:
        """The logits, of shape (batch, num_classes)."""
        return self.model(images)

    def calibration_predictions(self, batch: Any) -> Any:
        """Run the images of the batch through the model, for its logits."""
        return self(_read_images(batch)[0])

    def calibration_step(self, batch: Any) -> None:
        """Run the images of the batch through the model."""
        self(_read_images(batch)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross entropy; of a distilled DeiT with two heads, the mean over the heads."""
        images, labels = _read_labelled(batch)
        outputs = self(images)
        heads = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads]).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the images to the accuracies and the loss of validation."""
        self._measure("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add the images to the accuracies and the loss of the test."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: Any) -> None:
        images, labels = _read_labelled(batch)
        logits = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(logits.float(), labels), batch_size=len(images))
        for name, metric in self.metrics.items():
            if name.startswith(f"{stage}_"):
                assert isinstance(metric, Metric)
                metric.update(logits, labels)
                self.log(name, metric, prog_bar=True, batch_size=len(images))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits of the batch; labels are not needed."""
        return self(_read_images(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that require a gradient; biases, norms and what the model exempts do not decay."""
        exempt: Collection[str] = getattr(self.model, "no_weight_decay", tuple)()
        groups = timm.optim.param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=exempt)
        return torch.optim.AdamW(groups, lr=self.lr)

    def save_pretrained(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a timm folder with weights and configuration, whole or not at all. Call it in one process only.

        Args:
            folder: Loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
            ValueError: If the model is not one of timm's, so that no name could rebuild it.
        """
        if not hasattr(self.model, "pretrained_cfg"):
            raise ValueError(
                f"A timm folder was to be written, but {type(self.model).__name__} does not come from "
                "timm.create_model. Save its weights with safetensors.torch.save_file(model.state_dict(), ...)."
            )
        with whole_folder(folder, overwrite) as new:
            save_for_hf(self.model, str(new), model_args=self._model_kwargs, safe_serialization=True)


def _read_images(batch: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(batch, Mapping):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        return batch[0], batch[1] if len(batch) > 1 else None
    images = next((batch[key] for key in ("image", "pixel_values") if key in batch), None)
    if images is None:
        raise ValueError(f"A batch should have 'image' or 'pixel_values', but it has {', '.join(map(repr, batch))}.")
    return images, next((batch[key] for key in ("label", "labels") if key in batch), None)


def _read_labelled(batch: Any) -> tuple[Tensor, Tensor]:
    images, labels = _read_images(batch)
    if labels is None:
        raise ValueError("A loss needs labels: a batch (images, labels), or a mapping with 'label' or 'labels'.")
    return images, labels
