"""Sentences for calibration and pairs of sentences for training and evaluation, as a LightningDataModule."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.checks import SEED, check_at_least, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.text_features import SENTENCES, reads_texts, text_features
from wanda_lightning.common.wording import quantity
from wanda_lightning.data.chats import Chats
from wanda_lightning.data.loaders import silence_worker_advice, training_loader
from wanda_lightning.data.sentence_pairs import (
    STSB,
    Pair,
    check_pairs,
    draw_pieces,
    draw_sentences,
    read_pairs,
)
from wanda_lightning.data.text_sources import SELF, Texts, calibration_source, check_source, named

Batches = DataLoader[Any]


class SentenceDataModule(L.LightningDataModule):
    """Sentences, tokenized by a model of sentence-transformers; see `EmbeddingModule` for the batches.

    Calibration uses different sentences of at least five words, which a seed draws from a text. Evaluation and training
    use pairs of sentences with a score of their similarity; scores above 1 are divided by the largest.

    Args:
        model: A SentenceTransformer, which tokenizes the texts; by default that of the module that the Trainer runs.
        calibration: Text to cut into sentences, with the choices of `TextDataModule` except self, chats and several
            texts.
        evaluation: stsb (the test split of STS-B, from the hub), or a .csv file with the columns sentence1, sentence2
            and score, or with three columns in this order.
        train: Pairs to train on: stsb (its training split), or such a file.
        train_samples: Without `train`, the number of pieces of the calibration text to train on, each of 4 to 14 words
            from anywhere in it; with `DistillFromDense`, since they have no scores.
        batch_size: Number of sentences or pairs in a batch.
        num_samples: Number of calibration sentences; all if the text has fewer.
        limit: Number of evaluation pairs, from the start; by default all.
        seed: Seed of the drawn sentences and of the shuffling for training.
        cache_dir: Folder for downloads from the hub.

    Raises:
        ValueError: For a number out of range, an unknown source, or a file that lacks a column or a score.
        OSError: If the hub cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        calibration: Any = "python-docs",  # Any: also lists and a datasets.Dataset
        evaluation: StrPath = STSB,
        train: StrPath | None = None,
        batch_size: int = SENTENCES,
        num_samples: int = 1024,
        limit: int | None = None,
        train_samples: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        optional = {"limit": limit, "train_samples": train_samples}
        given = {name: count for name, count in optional.items() if count is not None}
        check_at_least(1, batch_size=batch_size, num_samples=num_samples, **given)
        check_values(SEED, seed=seed)
        self.calibration, self._text = named(calibration, "calibration")
        if self.calibration == SELF:  # an embedding model writes no text
            check_source(SELF, "calibration")
        self.evaluation = os.fspath(evaluation)
        check_pairs(self.evaluation, "evaluation")
        self.train = train if train is None else os.fspath(train)
        if self.train is not None:
            check_pairs(self.train, "train")
            if train_samples is not None:
                raise UserError(
                    f"train_samples must not be given beside train, whose pairs are all trained on, but train is "
                    f"{self.train} and train_samples is {train_samples}."
                )
        self.model = model
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.limit = limit
        self.train_samples = train_samples
        self.seed = seed
        self.cache_dir = cache_dir

    @cached_property
    def calibration_sentences(self) -> list[str]:
        """The sentences to calibrate on, in the order in which they were drawn."""
        sentences = draw_sentences(self._read_text(), self.num_samples, self.seed)
        if not sentences:
            raise UserError(
                f"calibration must have a sentence of at least five words, but {self.calibration} has none."
            )
        return sentences

    @cached_property
    def train_pieces(self) -> list[str]:
        """The pieces of the calibration text to train on; in one process, those of a batch have equally many words."""
        assert self.train_samples is not None
        pieces = draw_pieces(self._read_text(), self.train_samples, self.seed, self.batch_size)
        if not pieces:
            raise UserError(
                f"calibration must have a text of at least 14 words to train on pieces of it, but {self.calibration} "
                "has none."
            )
        return pieces

    def _read_text(self) -> Texts:
        content = calibration_source(self._text, self.cache_dir)
        if isinstance(content, Chats):
            raise UserError(
                f"calibration must be a text to cut into sentences, but {self.calibration} has chats."
            )
        return content

    @cached_property
    def evaluation_pairs(self) -> list[Pair]:
        """The pairs to measure on, in their order."""
        return read_pairs(self.evaluation, "test", self.cache_dir)[: self.limit]

    @cached_property
    def train_pairs(self) -> list[Pair]:
        """The pairs to train on, in their order."""
        if self.train is None:
            raise UserError(
                "train must name pairs of sentences to train on. Give stsb or a file, or train_samples with "
                "DistillFromDense."
            )
        return read_pairs(self.train, "train", self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Read the pairs of the stage."""
        _ = self.evaluation_pairs
        if stage == "fit":
            _ = self.train_pieces if self.train_samples else self.train_pairs

    def describe_calibration(self, num_samples: int) -> str:
        """Return the source, the number of sentences, and the seed that drew them."""
        count = min(num_samples, len(self.calibration_sentences))
        return f"{self.calibration}, {quantity(count, 'sentence')}, seed {self.seed}"

    def describe_evaluation(self) -> str:
        """Return the source and its number of pairs."""
        return f"{self.evaluation}, {quantity(len(self.evaluation_pairs), 'pair')}"

    def calibration_dataloader(self) -> Batches:
        """Return the calibration sentences, in the order in which they were drawn."""
        return self._loader(self.calibration_sentences, collate_fn=self._features)

    def train_dataloader(self) -> Batches:
        """Return the training pairs, shuffled anew in each epoch, or the pieces, in the order of their batches."""
        if self.train_samples:
            return training_loader(
                self, self.train_pieces, shuffle=False, collate_fn=self._features_without_score
            )
        return training_loader(self, self.train_pairs, collate_fn=self._paired_features)

    def val_dataloader(self) -> Batches:
        """Return the evaluation pairs, in their order."""
        return self._loader(self.evaluation_pairs, collate_fn=self._paired_features)

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, dataset: Any, **options: Any) -> Batches:
        silence_worker_advice()
        return DataLoader(dataset, self.batch_size, **options)

    def _features(self, texts: Sequence[str]) -> Kwargs:
        model: Any = self.model
        if model is None:
            model = getattr(getattr(self.trainer, "lightning_module", None), "pruning_target", None)
        if not reads_texts(model):
            raise UserError(
                "model must be a SentenceTransformer, which tokenizes the texts, but neither model nor the module that "
                "a Trainer runs has one."
            )
        return dict(text_features(model, texts))

    def _features_without_score(self, texts: Sequence[str]) -> Kwargs:
        """Return the features of pieces, and None as their score: nobody has forgotten it."""
        return {**self._features(texts), "score": None}

    def _paired_features(self, pairs: Sequence[Pair]) -> Kwargs:
        """Return the features of all first sentences, then of all second ones, and the scores."""
        first, second, scores = zip(*pairs, strict=True)
        return {**self._features([*first, *second]), "score": torch.tensor(scores)}
