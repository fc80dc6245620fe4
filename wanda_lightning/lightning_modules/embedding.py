"""A sentence embedding model as a LightningModule."""

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SpearmanCorrCoef

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.checks import check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.common.text_features import as_encoded, reads_texts
from wanda_lightning.lightning_modules.model_loading import load_embedding_model
from wanda_lightning.lightning_modules.optimizers import adamw
from wanda_lightning.units.fit_configuration import refuse_unloadable

Features = Mapping[str, Any]


class EmbeddingModule(L.LightningModule):
    """A model of sentence-transformers, trained and evaluated on pairs of sentences with a score of their similarity.

    A batch is a mapping with the features of sentences, as the model's `preprocess` or `tokenize` returns them, such as
    `input_ids` and `attention_mask`. Embeddings are those of `encode`: `SentenceDataModule` puts the model's default
    prompt before each text, and this module cuts them at the model's `truncate_dim`. For pairs, the first half of its
    rows are the first sentences, the second half the second ones, and `score` has the shape (pairs,);
    `SentenceDataModule` makes such batches. The loss is the squared difference between the cosine similarity and the
    score, from 0 to 1. With None as `score`, the loss is 0, so that `DistillFromDense` alone says what is learned; the
    model then trains as in evaluation, without dropout and without checkpoints of its blocks. The module logs
    `train_loss` (with scores), `val_spearman` and `test_spearman`, the Spearman correlation of the similarities with
    the scores, times 100; `predict` returns the embeddings.

    Args:
        model: Hub id or folder of a model of sentence-transformers, or a loaded model.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        lr_decay: Decay the learning rate linearly to 0 during training.
        revision: Branch, tag or commit on the hub.
        cache_dir: Folder for downloads.
        trust_remote_code: Run the model code that comes with the checkpoint.

    Raises:
        ValueError: For a model that tokenizes no texts, a folder without pooling, or weights that cannot be used.
        OSError: If neither a local folder nor the hub has the model in safetensors.
        ImportError: If sentence-transformers is missing.
    """

    def __init__(
        self,
        model: StrPath | nn.Module,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        lr_decay: bool = False,
        revision: str = "main",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_flags(lr_decay=lr_decay)
        self._hub: Kwargs = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        if isinstance(model, (str, os.PathLike)):
            model = os.fspath(model)
            self.save_hyperparameters()
            self.model = load_embedding_model(ModelSource(model, revision, **self._hub))
        elif reads_texts(model):
            self.save_hyperparameters(ignore=["model"])
            self.model = model
        else:
            raise UserError(
                f"model must be a SentenceTransformer, which tokenizes texts itself, but it is a "
                f"{type(model).__name__}. Give one, or its name."
            )
        self.model.train()
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_decay = lr_decay
        with warnings.catch_warnings():
            # It keeps all similarities, which are one number for each pair.
            warnings.filterwarnings("ignore", "Metric .* will save all targets")
            self._spearman = SpearmanCorrCoef()

    @property
    def pruning_target(self) -> nn.Module:
        """The module that the pruning callbacks prune: the model itself."""
        return self.model

    def forward(self, features: Features) -> Tensor:
        """Return the embeddings of sentences, of shape (sentences, width), cut at the model's `truncate_dim`."""
        output = as_encoded(self.model, self.model(dict(features)))
        return output["sentence_embedding"]

    def calibration_predictions(self, batch: Features) -> Tensor:
        """Run the sentences of the batch through the model and return their embeddings."""
        return self(batch)

    calibration_step = calibration_predictions

    def _similarities(self, batch: Features) -> Tensor:
        """Return the cosine similarity of each pair."""
        first, second = self(batch).float().chunk(2)
        return F.cosine_similarity(first, second)

    def training_step(self, batch: Features, batch_idx: int) -> Tensor:
        """Return the mean squared difference between the similarities and the scores; 0 if `score` is None."""
        scores = batch["score"]
        if scores is None:
            # For `DistillFromDense`, which compares what this call embeds. Dropout would only blur it.
            with evaluating(self.model):
                return self(batch).new_zeros(())
        loss = F.mse_loss(self._similarities(batch), scores)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(scores))
        return loss

    def validation_step(self, batch: Features, batch_idx: int) -> None:
        """Add the pairs to the correlation."""
        if batch_idx == 0:  # an earlier loop may have been interrupted
            self._spearman.reset()
        self._spearman.update(self._similarities(batch), batch["score"])

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log `val_spearman`."""
        self.log("val_spearman", 100 * self._spearman.compute(), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        """Log `test_spearman`."""
        self.log("test_spearman", 100 * self._spearman.compute())

    def configure_optimizers(self) -> Any:
        """Return AdamW over the parameters that require a gradient."""
        return adamw(self, self.lr, self.weight_decay, self.lr_decay)

    def load_dense_model(self, name: StrPath) -> nn.Module:
        """Load another model of sentence-transformers by its hub id or folder, from the same cache."""
        return load_embedding_model(ModelSource(os.fspath(name), **self._hub))

    def save_pretrained(self, folder: StrPath, overwrite: bool = False) -> None:
        """Write a folder of sentence-transformers atomically. Call it in one process only.

        Args:
            folder: Path to write; `SentenceTransformer(folder)` of versions 5.4 to 6 loads it, after
                `shrink` perhaps with `trust_remote_code=True` only, which the result then says.
            overwrite: Replace a folder that is not empty, with everything in it.

        Raises:
            FileExistsError: If the folder is not empty and `overwrite` is false.
        """
        model: Any = self.model
        with atomic_folder(folder, overwrite) as new:
            refuse_unloadable(model[0].auto_model)
            model.save(str(new), create_model_card=False)
            _write_old_class_names(model, new / "modules.json")


def _write_old_class_names(model: Any, path: Path) -> None:
    """Name classes as in version 5 of sentence-transformers, whose names version 6 loads, too."""
    from sentence_transformers.util import import_from_string

    entries = json.loads(path.read_text())
    for entry, module in zip(entries, model, strict=True):
        name = f"sentence_transformers.models.{type(module).__name__}"
        with suppress(ImportError):  # version 5 has no such class
            if import_from_string(name) is type(module):
                entry["type"] = name
    path.write_text(json.dumps(entries, indent=2))
