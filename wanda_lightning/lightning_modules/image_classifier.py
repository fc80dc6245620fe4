"""An image classifier as a LightningModule."""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
import timm
import timm.optim
import torch
from timm.models import get_model_args
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.checks import check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.lightning_modules.model_loading import create_classifier, load_checkpoint
from wanda_lightning.parallel import is_sharded
from wanda_lightning.units.timm_arguments import fit_arguments, save_for_timm

_ACCURACIES = {"accuracy": 1, "accuracy_top5": 5}  # by name: how many classes a model may guess


class ImageClassifierModule(L.LightningModule):
    """An image classifier, trained on cross entropy and evaluated by accuracy.

    A batch is `(images, labels)`, or a mapping with `image` or `pixel_values` and `label` or `labels`: images of shape
    (batch, channels, height, width), labels of shape (batch,). The module logs `train_loss`, `val_loss`,
    `val_accuracy`, with more than 5 classes `val_accuracy_top5`, and the same for `test`; `predict` returns the logits.

    Args:
        model: A name that timm knows, with or without the prefix `timm:`; `hf-hub:OWNER/NAME`; `local-dir:FOLDER`, or
            the folder as a `Path`; or a built model.
        pretrained: Load the weights that timm has for the name. Ignored with a `checkpoint` and for a built model.
        num_classes: Number of classes, if the pretrained weights have another number, or if a built model has no
            attribute `num_classes`.
        checkpoint: A `.safetensors` file with all weights of the model.
        model_kwargs: More arguments of `timm.create_model`, such as `img_size`.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and norms do not decay.

    Raises:
        ValueError: For a wrong option, weights that cannot be used, or a model that is not a classifier.
        OSError: If weights can neither be downloaded nor found in the cache.
    """

    def __init__(
        self,
        model: StrPath | nn.Module,
        pretrained: bool = True,
        num_classes: int | None = None,
        checkpoint: StrPath | None = None,
        model_kwargs: Kwargs | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        check_flags(pretrained=pretrained)
        self._model_kwargs = dict(model_kwargs or {})
        # Paths become text before the hyperparameters are saved.
        if checkpoint is not None:
            checkpoint = os.fspath(checkpoint)
        if isinstance(model, os.PathLike):
            model = f"local-dir:{os.fspath(model)}"

        if isinstance(model, str):
            self.save_hyperparameters()
            if num_classes is not None:
                self._model_kwargs["num_classes"] = num_classes
            self.model = create_classifier(
                model, pretrained and checkpoint is None, self._model_kwargs
            )
        else:
            self.save_hyperparameters(ignore=["model"])
            self.model = model
        if checkpoint is not None:
            load_checkpoint(self.model, checkpoint)
        self.model.train()
        self.num_classes: int = getattr(self.model, "num_classes", num_classes) or 0
        self.lr = lr
        self.weight_decay = weight_decay

        accuracies: Kwargs = {}
        for name, top_k in _ACCURACIES.items():
            if top_k == 1 or top_k < self.num_classes:
                accuracies[name] = MulticlassAccuracy(
                    self.num_classes, top_k=top_k, average="micro"
                )
        self.val_metrics = MetricCollection(accuracies, prefix="val_", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    @property
    def pruning_target(self) -> nn.Module:
        """The module that the pruning callbacks prune: the model itself."""
        return self.model

    def forward(self, images: Tensor) -> Any:
        """Return the logits, of shape (batch, num_classes)."""
        return self.model(images)

    def calibration_predictions(self, batch: Any) -> Any:
        """Run the images of the batch through the model and return the logits."""
        return self(_read_images(batch)[0])

    # The head is small, unlike the one of a language model, so nothing is gained by leaving it out.
    calibration_step = calibration_predictions

    def load_dense_model(self, name: StrPath) -> nn.Module:
        """Load another pretrained classifier, by any name, with the same arguments of `timm.create_model`."""
        # timm would replace a head with another number of classes by a random one.
        kwargs = self._model_kwargs.copy()
        kwargs.pop("num_classes", None)
        return create_classifier(name, True, kwargs)

    def on_fit_start(self) -> None:
        """Store the class names of the data in the model, so that they are saved with it."""
        model: Any = self.model
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", ())
        if hasattr(model, "pretrained_cfg") and len(names) == self.num_classes:
            model.pretrained_cfg["label_names"] = list(names)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross entropy."""
        images, labels = _read_images(batch)
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add the images to the loss and the accuracies of the validation, and return the predicted labels."""
        return self._measure("val_loss", self.val_metrics, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add the images to the loss and the accuracies of the test, and return the predicted labels."""
        return self._measure("test_loss", self.test_metrics, batch, batch_idx)

    def _measure(self, loss: str, metrics: MetricCollection, batch: Any, batch_idx: int) -> Tensor:
        images, labels = _read_images(batch)
        size = len(images)
        logits = self(images)
        self.log(loss, F.cross_entropy(logits.float(), labels), batch_size=size)
        if batch_idx == 0:  # an earlier loop may have been interrupted
            metrics.reset()
        metrics.update(logits, labels)
        self.log_dict(metrics, prog_bar=True, batch_size=size)
        return logits.argmax(dim=-1)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of the batch; it needs no labels."""
        return self.calibration_predictions(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters that require a gradient, without decay of biases and norms.

        `no_weight_decay` of the model names more parameters that do not decay.
        """
        exempt: Collection[str] = getattr(self.model, "no_weight_decay", tuple)()
        groups = timm.optim.param_groups_weight_decay(
            self.model, self.weight_decay, no_weight_decay_list=exempt
        )
        return torch.optim.AdamW(groups, lr=self.lr)

    def check_saving(self) -> None:
        """Raise an error for a model that `save_pretrained` cannot write or timm could not rebuild."""
        self._timm_arguments()

    def _timm_arguments(self) -> tuple[str, Kwargs]:
        """Return the name and the arguments with which timm builds the model; refuse one that it cannot rebuild."""
        if is_sharded(self.model):
            raise UserError(
                "save_pretrained needs the whole model in one process, but it is sharded."
            )
        if not hasattr(self.model, "pretrained_cfg"):
            raise UserError(
                f"model must be a timm model for save_pretrained, but it is a {type(self.model).__name__}. "
                "Save its weights with safetensors.torch.save_file(model.state_dict(), ...)."
            )
        name, arguments = fit_arguments(self.model, self._model_kwargs)
        json.dumps(get_model_args(self.model, arguments))  # a TypeError names what JSON cannot hold
        return name, arguments

    def save_pretrained(self, folder: StrPath, overwrite: bool = False) -> None:
        """Write a timm folder with weights and configuration atomically. Call it in one process only.

        Args:
            folder: Path to write; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, for some after
                `shrink` once the file `modeling_shrunk.py` in it is imported.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
            ValueError: If timm did not build the model, and so cannot rebuild it from the configuration; if FSDP2
                shards it.
        """
        name, arguments = self._timm_arguments()
        model: Any = self.model
        names = model.pretrained_cfg.get("label_names") or ()
        labels = {"label_names": names} if len(names) == self.num_classes else {}

        with atomic_folder(folder, overwrite) as new:
            save_for_timm(model, name, arguments, labels, new)


def _read_images(batch: Any) -> tuple[Tensor, Any]:
    """Return the images of a batch and their labels, or None without labels."""
    if isinstance(batch, Mapping):
        images = batch["image"] if "image" in batch else batch["pixel_values"]
        return images, batch.get("label", batch.get("labels"))
    if not isinstance(batch, (tuple, list)):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 else None
