"""Text for calibration, training and perplexity, as a LightningDataModule, in windows as in Sun et al. 2024 (Wanda)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.checks import SEED, check_at_least, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource, load_tokenizer
from wanda_lightning.common.wording import quantity
from wanda_lightning.data.chats import PADDING, Chats
from wanda_lightning.data.loaders import silence_worker_advice, training_loader
from wanda_lightning.data.own_text import sample_windows
from wanda_lightning.data.text_sources import (
    OWN_TEXT,
    SELF,
    Texts,
    calibration_source,
    evaluation_text,
    named,
    split_sources,
)
from wanda_lightning.data.windows import (
    cut,
    draw_from_chats,
    draw_from_documents,
    draw_from_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batches = DataLoader[dict[str, Tensor]]

_C4_EVALUATION_WINDOWS = 256
_PACKINGS = {"windows": "joined chats", "none": "chats, one in each window"}
_SAMPLE = (
    "Tokenizers of one kind split this in the same way: "
    "1,234\n\tdef \u00e9t\u00e9(x): return x**2  # \u65e5\u672c"
)


class TextDataModule(L.LightningDataModule):
    """Windows of `seqlen` tokens, drawn at random for calibration and training, adjacent for perplexity.

    A batch is `{"input_ids": (batch, seqlen)}`, int64. All windows are full, so there is no attention mask, except for
    chats with `packing="none"`. A seed draws the same windows of text as the code of Sun et al. 2024:

    - calibration on documents (c4, .jsonl, .parquet, a hub data set, a list): draw documents until one is longer than
      `seqlen`, then draw the start of the window in it;
    - calibration on one text (wikitext2, python-docs, .txt): draw the start of the window;
    - evaluation: join the documents to one text, cut it into windows and drop the rest. c4 stands for the first 1100
      documents of the validation file, and at most 256 windows.

    Chats are rows with `messages` and perhaps `tools`, but no `text`. The chat template of the tokenizer writes them,
    with all special tokens. For calibration, the seed draws their order; for evaluation, they are joined in their own
    order and cut into windows.

    Each process of a Trainer reads and tokenizes each text once. The parts of python-docs for calibration and
    evaluation have no paragraph in common; a file is read whole for both. Text like that of the calibration flatters a
    pruned model, so evaluate on text of another kind, too.

    Args:
        tokenizer: A tokenizer, or the hub id, folder or `.gguf` file to load it from; by default the tokenizer of the
            module that the Trainer runs.
        calibration: c4, wikitext2, python-docs, sklearn-docs (the descriptions of scikit-learn's data sets; these two
            need no network); a .txt file, which is one text; a .jsonl or .parquet file, the id of a hub data set
            (OWNER/NAME) or a `datasets.Dataset` with documents in the column `text`, or with chats; or a list of
            documents or of chats. Several of them, as a list or as names with commas, have equal shares of the
            windows and take turns; the first ones have one window more if the number is odd. Or self: what the dense
            model writes (see `sample_windows`) when the windows are first used.
        evaluation: Text for perplexity, with the same choices except self; of a hub data set, the split `validation` or
            else `test`. It may be a list of several, so a list of documents is in a list: `[documents]`. Each has a
            dataloader of its own; `val_perplexity` is the perplexity of the first, `val_ppl/TEXT` that of another.
        seqlen: Number of tokens in a window, including the special tokens of the tokenizer.
        num_samples: Number of calibration windows.
        batch_size: Number of windows in a batch.
        limit: Number of evaluation windows, from the start of the text; by default all.
        seed: Seed of the drawn windows and of the shuffling for training.
        cache_dir: Folder for downloads from the hub.
        train_samples: Number of training windows, of which the calibration windows are the first; by default the same.
        packing: What happens to chats for calibration and training. `"windows"` joins them and cuts windows, as for
            text. With `"none"`, each begins a row of its own, is cut at `seqlen`, and padded if it is shorter.

    Raises:
        ValueError: For a number out of range, an unknown source, a source that is damaged or too short, or a chat that
            the tokenizer's template cannot write.
        OSError: For a tokenizer that does not exist, or if the hub cannot be reached.
    """

    def __init__(
        self,
        tokenizer: StrPath | PreTrainedTokenizerBase | None = None,
        # Any: also lists and a datasets.Dataset. In a list of strings, jsonargparse would replace names of files by
        # their contents.
        calibration: Any = "python-docs",
        evaluation: Any = "python-docs",
        seqlen: int = 2048,
        num_samples: int = 128,
        batch_size: int = 4,
        limit: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        train_samples: int | None = None,
        packing: Literal["windows", "none"] = "windows",
    ) -> None:
        super().__init__()
        if train_samples is None:
            train_samples = num_samples
        check_at_least(2, seqlen=seqlen)  # one token to read and one to predict
        check_at_least(
            1, num_samples=num_samples, batch_size=batch_size, train_samples=train_samples
        )
        if limit is not None:
            check_at_least(1, limit=limit)
        check_values(SEED, seed=seed)
        check_values((*_PACKINGS,), packing=packing)
        if isinstance(tokenizer, str | os.PathLike):
            ModelSource(tokenizer).locate()
        self._given_tokenizer = tokenizer

        sources = [named(source, "calibration") for source in split_sources(calibration)]
        self.calibrations = tuple(name for name, _ in sources)
        self._calibration_sources = [source for _, source in sources]
        self.calibration = ",".join(self.calibrations)
        if SELF in self.calibrations and (len(sources) > 1 or packing == "none"):
            raise UserError(
                f"calibration='self' takes no other texts and no packing, but calibration is {self.calibration} and "
                f"packing is {packing}."
            )
        if num_samples < len(sources):
            raise UserError(
                f"num_samples must be at least the number of texts in calibration, {len(sources)}, but it is "
                f"{num_samples}."
            )
        self._evaluation_sources: Kwargs = {}
        if not isinstance(evaluation, list | tuple):
            evaluation = split_sources(evaluation)
        for text in evaluation:
            name, source = named(text, "evaluation")
            if name in self._evaluation_sources and name != source:  # another list of documents
                name = f"{name} ({len(self._evaluation_sources) + 1})"
            self._evaluation_sources[name] = source
        self.evaluations = tuple(self._evaluation_sources)
        self.evaluation = self.evaluations[0]

        self.seqlen = seqlen
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.limit = limit
        self.seed = seed
        self.cache_dir = cache_dir
        self.train_samples = train_samples
        self.packing = packing
        # Windows for training, which begin with those for calibration.
        self._drawn = torch.empty(0, seqlen, dtype=torch.long)
        self._cut: dict[str, Tensor] = {}  # by the name of the text

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use."""
        tokenizer = self._given_tokenizer or getattr(self._module, "tokenizer", None)
        reason = "no Trainer runs a module that has one"
        if isinstance(tokenizer, str | os.PathLike):
            reason = f"{tokenizer} has none"
            tokenizer = load_tokenizer(ModelSource(tokenizer, cache_dir=self.cache_dir))
        if tokenizer is None:
            raise UserError(f"tokenizer must be given, since {reason}.")
        return tokenizer

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False: the tokenizer would warn that the text is longer than the context, which the windows are not.
        return self.tokenizer(text, verbose=False).input_ids

    @property
    def calibration_windows(self) -> Tensor:
        """Token ids of shape (num_samples, seqlen), in the order in which they were drawn; -1 is padding."""
        return self._windows(self.num_samples)

    @property
    def train_windows(self) -> Tensor:
        """Token ids of shape (train_samples, seqlen), in the order in which they were drawn; -1 is padding."""
        return self._windows(self.train_samples)

    def _windows(self, count: int) -> Tensor:
        if len(self._drawn) < count:
            self._drawn = self._draw(count)  # begins with the windows that were drawn before
        return self._drawn[:count]

    def _draw(self, count: int) -> Tensor:
        if self.calibration == SELF:
            model = getattr(self._module, "pruning_target", None)
            if model is None:
                raise UserError(
                    "calibration='self' needs a Trainer that runs a module with a model, but there is none. Pass the "
                    "data to its validate, test or fit, or call wanda_lightning.sample_windows."
                )
            return sample_windows(model, self.tokenizer, count, self.seqlen, seed=self.seed)

        contents = self._calibration_contents
        if self.packing == "none" and not self._has_rows:
            raise UserError(
                f"packing='none' needs chats, but {self.calibration} is text, of which all windows are full. Leave it "
                "out."
            )
        windows = torch.empty(count, self.seqlen, dtype=torch.long)
        for number, (name, content) in enumerate(zip(self.calibrations, contents, strict=True)):
            places = windows[number :: len(contents)]  # sources take turns
            places.copy_(self._draw_from(content, len(places), name))
        return windows

    def _draw_from(self, content: Texts | Chats, count: int, name: str) -> Tensor:
        if isinstance(content, Chats):
            return draw_from_chats(
                content, self.tokenizer, self.seqlen, count, self.seed, self.packing
            )
        drawing = (self.seqlen, count, self.seed, name)
        if isinstance(content, str):
            return draw_from_text(self._tokenize(content), *drawing)
        return draw_from_documents(content, self._tokenize, *drawing)

    @cached_property
    def _calibration_contents(self) -> list[Texts | Chats]:
        return [calibration_source(each, self.cache_dir) for each in self._calibration_sources]

    @property
    def _has_rows(self) -> bool:
        """Whether calibration windows may be shorter than `seqlen`."""
        has_chats = any(isinstance(content, Chats) for content in self._calibration_contents)
        return self.packing == "none" and has_chats

    def state_dict(self) -> dict[str, Tensor]:
        """Return the windows that the model has written so far: a resumed run cannot have them written again."""
        if self.calibration == SELF and len(self._drawn):
            return {"train_windows": self._drawn}
        return {}

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
            if isinstance(text, Chats):
                ids = text.joined(self.tokenizer, self.limit and self.limit * self.seqlen)
            else:
                ids = self._tokenize(text)
            windows = cut(ids, self.seqlen, self.limit, source)
            self._cut[source] = windows[:_C4_EVALUATION_WINDOWS] if source == "c4" else windows
        return self._cut[source]

    def setup(self, stage: str | None = None) -> None:
        """Read and check the windows: refuse tokens without an embedding, and another tokenizer than the model's.

        Those for calibration are read when `calibration_dataloader()` is called.
        """
        for source in self.evaluations:
            self._check_tokens(self.windows_of(source))
        # A model that writes its text has no device yet, and a resumed run has not restored its text yet.
        if stage in (None, "fit") and self.calibration != SELF:
            self._check_tokens(self.train_windows)

        tokenizer = getattr(self._module, "tokenizer", None)
        if tokenizer is not None:
            ids = tokenizer(_SAMPLE, verbose=False).input_ids
            if ids != self._tokenize(_SAMPLE):
                raise UserError(
                    "tokenizer must be the tokenizer of the model, but that one splits the text differently, so the "
                    "perplexity would be meaningless. Leave tokenizer out to use the tokenizer of the model."
                )

    def _check_tokens(self, windows: Tensor) -> Tensor:
        if hasattr(self._module, "check_tokens"):
            self._module.check_tokens(windows.clamp(min=0))
        return windows

    def describe_calibration(self, num_samples: int) -> str:
        """Return the source, the number and length of the windows, and the seed that drew them."""
        names = [OWN_TEXT]
        at_most = ""
        if self.calibration != SELF:
            names = list(map(self._described, self.calibrations, self._calibration_contents))
            at_most = "at most " if self._has_rows else ""
        count = quantity(min(num_samples, self.num_samples), "window")
        equally = " in equal shares" if len(names) > 1 else ""
        size = f"{at_most}{self.seqlen:,} tokens"
        return f"{' and '.join(names)}, {count}{equally} of {size}, seed {self.seed}"

    def _described(self, name: str, content: Texts | Chats) -> str:
        return f"{name} ({_PACKINGS[self.packing]})" if isinstance(content, Chats) else name

    def describe_evaluation(self, number: int = 0) -> str:
        """Return the source of the text with this number, and the number and length of its windows."""
        name = self.evaluations[number]
        return f"{name}, {quantity(len(self.windows_of(name)), 'window')} of {self.seqlen:,} tokens"

    def calibration_dataloader(self) -> Batches:
        """Return the calibration windows, in the order in which they were drawn."""
        return self._loader(self._check_tokens(self.calibration_windows))

    def train_dataloader(self) -> Batches:
        """Return the training windows, shuffled anew in each epoch."""
        return training_loader(self, _rows(self.train_windows), collate_fn=_batch)

    def val_dataloader(self) -> Batches | list[Batches]:
        """Return the evaluation windows, in the order of the text; a list of dataloaders for several texts."""
        loaders = [self._loader(self.windows_of(source)) for source in self.evaluations]
        return loaders if len(loaders) > 1 else loaders[0]

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, windows: Tensor) -> Batches:
        return DataLoader(_rows(windows), self.batch_size, collate_fn=_batch)


def _rows(windows: Tensor) -> Any:
    """Return a data set with a dictionary for each window."""
    silence_worker_advice()
    return [{"input_ids": window} for window in windows]


def _batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the windows of a batch, with an attention mask if one is shorter than another."""
    windows = torch.stack([row["input_ids"] for row in rows])
    is_token = windows != PADDING
    longest = is_token.sum(dim=1).amax()
    batch = {"input_ids": windows.clamp(min=0)[:, :longest]}
    if not is_token[:, :longest].all():
        batch["attention_mask"] = is_token[:, :longest].long()
    return batch
