"""Text for calibration, training and perplexity, as a LightningDataModule."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from wanda_lightning.common.checks import check_at_least, check_positive, check_seed
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource, load_tokenizer
from wanda_lightning.data.module import DataModule, ResumableLoader, silence_worker_advice
from wanda_lightning.data.own_text import sample_windows
from wanda_lightning.data.text_sources import (
    OWN_TEXT,
    SELF,
    calibration_source,
    check_source,
    documents_in,
    evaluation_text,
    name_of,
)
from wanda_lightning.data.windows import cut, draw_from_documents, draw_from_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_C4_EVALUATION_WINDOWS = 256
_SAMPLE = 2000  # number of characters on which two tokenizers are compared


class TextDataModule(DataModule):
    """Windows of `seqlen` tokens, drawn at random for calibration and training, adjacent for perplexity.

    A batch is `{"input_ids": (batch, seqlen)}`, int64; all windows are full, so there is no attention mask. A seed
    draws the same windows as the code of Sun et al. 2024:

    - calibration on documents (c4, .jsonl, .parquet, a hub data set, a list): draw documents until one is longer than
      `seqlen`, then draw the start of the window in it;
    - calibration on one text (wikitext2, python-docs, .txt): draw the start of the window;
    - evaluation: join the documents to one text, cut it into windows and drop the rest. c4 stands for the first 1100
      documents of the validation file, and at most 256 windows.

    Each text is read and tokenized once: in a Trainer, by one of its processes, which gives the windows to the others.
    If calibration and evaluation data are the same, the model is evaluated on the text that it was calibrated on; the
    two parts of python-docs have no paragraph in common. Text like that of the calibration flatters a pruned model, so
    evaluate on text of another kind, too.

    Args:
        tokenizer: A tokenizer, or the hub id, folder or `.gguf` file to load it from; by default the tokenizer of the
            module that the Trainer runs.
        calibration: c4, wikitext2, python-docs, sklearn-docs (the descriptions of scikit-learn's data sets; these two
            need no network) or a FILE: a .txt file is one text; .jsonl and .parquet files have documents in the field
            `text`. Or the id of a hub data set (OWNER/NAME), or a `datasets.Dataset`, such as a part of a large one,
            with documents in the column `text`; or a list of documents. Or self: what the model that the Trainer runs
            writes (see `sample_windows`) when the windows are first used, which must be before it is pruned.
        evaluation: Text for perplexity, with the same choices except self; of a hub data set, the split `validation` or
            else `test`. It may be a list of several, so a list of documents is in a list: `[documents]`. Each has a
            dataloader of its own, and the first is the one that counts: `val_perplexity` is its perplexity.
        seqlen: Number of tokens in a window, including the special tokens of the tokenizer.
        num_samples: Number of calibration windows.
        batch_size: Number of windows in a batch.
        limit: Number of evaluation windows, from the start of the text; by default all.
        seed: Seed of the drawn windows and of the shuffling for training.
        cache_dir: Folder for downloads from the hub.
        train_samples: Number of training windows, of which the calibration windows are the first; by default the same.

    Raises:
        ValueError: For a number out of range, an unknown source, or (when it is read) a source that is damaged or too
            short for one window.
        FileNotFoundError: For a file that does not exist.
        OSError: If the hub cannot be reached.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        # Any, for lists and datasets.Dataset: of a list of strings, jsonargparse would read the file that a name names.
        calibration: str | Any = "python-docs",
        evaluation: str | Any = "python-docs",
        seqlen: int = 2048,
        num_samples: int = 128,
        batch_size: int = 4,
        limit: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        train_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least(2, seqlen=seqlen)  # one token to read and one to predict
        check_at_least(1, num_samples=num_samples, batch_size=batch_size)
        check_positive(limit=limit, train_samples=train_samples)
        check_seed(seed)
        self.prepare_data_per_node = False
        self.calibration, self._calibration_source = _named(calibration, "calibration")
        named: list[tuple[str, Any]] = []
        for text in evaluation if isinstance(evaluation, list | tuple) else [evaluation]:
            name, source = _named(text, "evaluation")
            same = sum(each.startswith(name) for each, other in named if other is not each)
            named.append((f"{name} ({same + 1})" if same and name != source else name, source))
        self.evaluations = tuple(name for name, _ in named)
        self._evaluation_sources = dict(named)
        if not named or len(self._evaluation_sources) < len(named):
            raise UserError(
                f"evaluation must name at least one text, and each only once, but it names {list(self.evaluations)}."
            )
        if isinstance(tokenizer, (str, os.PathLike)):
            ModelSource(tokenizer).locate()
        self._given_tokenizer = tokenizer
        self.evaluation = self.evaluations[0]
        self.seqlen = seqlen
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.limit = limit
        self.seed = seed
        self.cache_dir = cache_dir
        self.train_samples = num_samples if train_samples is None else train_samples
        self._sample = ""
        self._drawn = torch.empty(0, seqlen, dtype=torch.long)  # windows for calibration and training
        self._cut: dict[str, Tensor] = {}  # by the name of the text

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use."""
        given = self._given_tokenizer
        if given is None:
            given = getattr(self._module, "tokenizer", None)
        if given is None:
            raise UserError(
                "tokenizer must be given, since no Trainer runs a module that has one. Give a hub id, a folder or "
                "a .gguf file, or save the tokenizer in the model's folder."
            )
        if isinstance(given, (str, os.PathLike)):
            given = load_tokenizer(ModelSource(given, cache_dir=self.cache_dir))
        return given

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False: the tokenizer would warn that the text is longer than the context, which the windows are not.
        return self.tokenizer(text, verbose=False).input_ids

    @property
    def calibration_windows(self) -> Tensor:
        """Token ids of shape (num_samples, seqlen), in the order in which they were drawn."""
        return self._windows(self.num_samples)

    @property
    def train_windows(self) -> Tensor:
        """Token ids of shape (train_samples, seqlen), in the order in which they were drawn."""
        return self._windows(self.train_samples)

    def _windows(self, count: int) -> Tensor:
        if len(self._drawn) < count:
            self._drawn = self._draw(count)  # begins with the windows that were drawn before
        return self._drawn[:count]

    def _draw(self, count: int) -> Tensor:
        if self.calibration == SELF:
            model = getattr(self._module, "model", None)
            if model is None:
                raise UserError(
                    f"calibration={self.calibration!r} needs a Trainer that runs a module with a model, which writes "
                    "the text, but there is none. Pass the data to its validate, test or fit, or call "
                    "wanda_lightning.sample_windows."
                )
            return sample_windows(model, self.tokenizer, count, self.seqlen, seed=self.seed)
        content = calibration_source(self._calibration_source, self.cache_dir)
        draw = (self.seqlen, count, self.seed, self.calibration)
        if isinstance(content, str):
            return draw_from_text(self._tokenize(content), *draw)
        return draw_from_documents(content, self._tokenize, *draw)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the windows that the model has written so far: a resumed run cannot have them written again."""
        return {"train_windows": self._drawn} if self.calibration == SELF and len(self._drawn) else {}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Use the windows of the run that is resumed."""
        if self.calibration == SELF:
            self._drawn = max(state_dict.values(), key=len, default=self._drawn)

    @property
    def evaluation_windows(self) -> Tensor:
        """Token ids of the first text for evaluation, of shape (windows, seqlen), in the order of the text."""
        return self.windows_of(self.evaluation)

    def windows_of(self, source: str) -> Tensor:
        """Return the token ids of a text for evaluation, of shape (windows, seqlen), in the order of the text."""
        if source not in self._cut:
            text = evaluation_text(self._evaluation_sources[source], self.cache_dir)
            self._sample = self._sample or text[:_SAMPLE]
            ids = self._tokenize(text)
            if source == "c4":
                ids = ids[: _C4_EVALUATION_WINDOWS * self.seqlen]
            self._cut[source] = cut(ids, self.seqlen, self.limit, source)
        return self._cut[source]

    def prepare_data(self) -> None:
        """Read and tokenize, in one process, what the Trainer will use; `setup` gives the windows to the others."""
        for source in self.evaluations:
            self.windows_of(source)
        if self.trainer is None or self.calibration == SELF:
            return
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        calibrates = any(getattr(callback, "reads_calibration_data", False) for callback in callbacks)
        trains = self.trainer.state.fn == TrainerFn.FITTING
        self._windows(max(calibrates * self.num_samples, trains * self.train_samples))

    def setup(self, stage: str | None = None) -> None:
        """Check the data of the stage: the evaluation windows, and for `fit` the training windows.

        Windows that `prepare_data` has not read are read now, those for calibration when `calibration_dataloader()` is
        called. Refuse a tokenizer that differs from that of the module that the Trainer runs, and a token for which the
        module has no embedding.
        """
        if self.trainer is not None:
            prepared = self._drawn, self._cut, self._sample
            self._drawn, self._cut, self._sample = self.trainer.strategy.broadcast(prepared)
        for source in self.evaluations:
            self._check_tokens(self.windows_of(source))
        if stage in (None, "fit") and self.calibration != SELF:  # the model writes on its device, and once if resumed
            self._check_tokens(self.train_windows)
        theirs = getattr(self._module, "tokenizer", None)
        if theirs is None or theirs is self.tokenizer:
            return
        if theirs(self._sample, verbose=False).input_ids != self._tokenize(self._sample):
            raise UserError(
                "tokenizer must be the tokenizer of the model, but that one splits the text differently, so the "
                "perplexity would be meaningless. Leave tokenizer out to use the tokenizer of the model."
            )

    def _check_tokens(self, windows: Tensor) -> Tensor:
        if hasattr(self._module, "check_tokens"):
            self._module.check_tokens(windows)
        return windows

    def describe_calibration(self, num_samples: int) -> str:
        """Return the source, the number and length of the windows, and the seed that drew them."""
        count = min(num_samples, self.num_samples)
        source = OWN_TEXT if self.calibration == SELF else self.calibration
        return f"{source}, {_count_of(count, self.seqlen)}, seed {self.seed}"

    def describe_evaluation(self, number: int = 0) -> str:
        """Return the source of the text with this number, and the number and length of its windows."""
        windows = self.windows_of(self.evaluations[number])
        return f"{self.evaluations[number]}, {_count_of(len(windows), self.seqlen)}"

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the calibration windows, in the order in which they were drawn."""
        return self._loader(self._check_tokens(self.calibration_windows))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the training windows, shuffled anew in each epoch."""
        return ResumableLoader(
            _rows(self.train_windows),
            self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            trainer=self.trainer,
            seed=self.seed,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Return the evaluation windows, in the order of the text; a list of dataloaders for several texts."""
        first = self._loader(self.evaluation_windows)
        others = [self._loader(self.windows_of(source)) for source in self.evaluations[1:]]
        return [first, *others] if others else first

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, windows: Tensor) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(_rows(windows), batch_size=self.batch_size)


def _rows(windows: Tensor) -> Any:
    silence_worker_advice()
    return [{"input_ids": window} for window in windows]


def _named(texts: Any, option: str) -> tuple[str, Any]:
    """Return the name of a text and its source; raise an error for anything else."""
    if not isinstance(texts, str | os.PathLike):
        documents_in(texts, option)
        return name_of(texts), texts
    name = os.fspath(texts)
    if name != SELF or option == "evaluation":
        check_source(name, option)
    return name, name


def _count_of(count: int, seqlen: int) -> str:
    return f"{count:,} window{'s' * (count != 1)} of {seqlen:,} tokens"
