"""Windows of tokens, drawn for calibration and cut for perplexity as in Sun et al. 2024 (Wanda)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wanda_lightning.checks import check_at_least, check_positive
from wanda_lightning.data.hub import silence_worker_advice
from wanda_lightning.data.text_sources import calibration_source, check_source, evaluation_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_C4_EVALUATION_WINDOWS = 256


# ------------------------------------------------------------------------------------------------------ protocols


def draw_from_text(ids: Sequence[int], seqlen: int, num_samples: int, seed: int, source: str = "the text") -> Tensor:
    """Windows that start anywhere in one text: `start = randint(0, len(ids) - seqlen - 1)`.

    The draws are the reference's for WikiText-2, with a `random.Random(seed)` of their own.

    Returns:
        Token ids of shape (num_samples, seqlen).

    Raises:
        ValueError: If the text does not have more than `seqlen` tokens.
    """
    if len(ids) <= seqlen:
        raise ValueError(
            f"Windows of seqlen={seqlen} tokens need a text of at least {seqlen + 1}, but {source} has {len(ids)}. "
            "Choose a smaller seqlen or a longer text."
        )
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(num_samples)]
    tokens = torch.tensor(ids, dtype=torch.long)
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def draw_from_documents(
    documents: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
    seqlen: int,
    num_samples: int,
    seed: int,
    source: str = "the source",
) -> Tensor:
    """Windows that lie in one document each: draw documents until one is longer than `seqlen`, then where it starts.

    The draws are the reference's for C4, with a `random.Random(seed)` of their own. Only documents that are drawn are
    tokenized, unless as many draws as there are documents found none that is long enough: then all are.

    Returns:
        Token ids of shape (num_samples, seqlen).

    Raises:
        ValueError: If no document has more than `seqlen` tokens.
    """
    rng = random.Random(seed)
    too_short: dict[int, int] = {}  # tokens by document
    windows: list[Tensor] = []
    while len(windows) < num_samples:
        for _ in range(len(documents)):
            i = rng.randint(0, len(documents) - 1)
            ids = [] if i in too_short else tokenize(documents[i])
            if len(ids) > seqlen:
                start = rng.randint(0, len(ids) - seqlen - 1)
                windows.append(torch.tensor(ids[start : start + seqlen], dtype=torch.long))
                break
            too_short.setdefault(i, len(ids))
        else:
            _require_long_document(documents, tokenize, seqlen, too_short, source)
    return torch.stack(windows)


def _require_long_document(
    documents: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
    seqlen: int,
    too_short: dict[int, int],
    source: str,
) -> None:
    for i, document in enumerate(documents):
        if i in too_short:
            continue
        if (count := len(tokenize(document))) > seqlen:
            return
        too_short[i] = count
    raise ValueError(
        f"Windows of seqlen={seqlen} tokens need a document of at least {seqlen + 1}, but the longest of the "
        f"{len(documents)} documents of {source} has {max(too_short.values())}. Choose a smaller seqlen, or give "
        "a .txt file, which is read as one text."
    )


def cut(ids: Sequence[int], seqlen: int, limit: int | None = None, source: str = "the text") -> Tensor:
    """Windows side by side, as perplexity is measured on; what is left at the end is dropped.

    >>> cut([1, 2, 3, 4, 5, 6, 7], seqlen=3)
    tensor([[1, 2, 3],
            [4, 5, 6]])

    Returns:
        Token ids of shape (windows, seqlen), at most `limit` windows.

    Raises:
        ValueError: If there are not enough tokens for one window.
    """
    count = len(ids) // seqlen
    if count == 0:
        raise ValueError(
            f"A window of seqlen={seqlen} tokens was asked for, but {source} has only {len(ids)}. "
            "Choose a smaller seqlen or a longer text."
        )
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)[:limit]


# ------------------------------------------------------------------------------------------------- the data module


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


class TextDataModule(L.LightningDataModule):
    """Windows of `seqlen` tokens: drawn at random to calibrate and train, cut side by side to measure perplexity.

    A batch is `{"input_ids": (batch, seqlen)}`, int64; all windows are full, so there is no attention mask. The
    protocol is the one of Sun et al. 2024 and their code, so that a seed draws the windows that it draws there:

    - calibration on documents (c4, .jsonl, .parquet): draw documents until one is longer than `seqlen`, then the start;
    - calibration on one text (wikitext2, python-docs, .txt): draw the start;
    - evaluation: everything joined to one text, cut into windows, the rest dropped. Of c4 the first 1100 documents of
      the validation file, at most 256 windows.

    Calibration and evaluation are each read and tokenized once, when first needed. A file given for both is measured on
    what it was calibrated on; python-docs has two parts without a common paragraph.

    Args:
        tokenizer: A ready one; or a hub id, a folder or a `.gguf` file; by default that of the module which the trainer
            runs.
        calibration: c4, wikitext2, python-docs (needs no network) or a FILE: .txt is one text; .jsonl and .parquet hold
            documents in the field `text`.
        evaluation: The same choice, for perplexity.
        seqlen: Tokens in a window, special tokens of the tokenizer included.
        num_samples: Windows to draw for calibration.
        train_samples: Windows to draw for training, those of calibration among them; by default the same.
        batch_size: Windows in a batch.
        limit: Windows to measure on, from the start; by default all.
        seed: Draws the windows and shuffles for training.
        cache_dir: Where downloads from the hub are kept.

    Raises:
        ValueError: For a number out of range, an unknown source, or (once it is read) a source that is not as it should
            be or too short for one window.
        FileNotFoundError: For a file that does not exist.
        OSError: If the hub is needed and cannot be reached.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        calibration: str = "python-docs",
        evaluation: str = "python-docs",
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
        check_positive(num_samples=num_samples, batch_size=batch_size, limit=limit, train_samples=train_samples)
        check_source(calibration)
        check_source(evaluation)
        self._check_tokenizer(tokenizer)
        self._given_tokenizer = tokenizer
        self.calibration = calibration
        self.evaluation = evaluation
        self.seqlen = seqlen
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.limit = limit
        self.seed = seed
        self.cache_dir = cache_dir
        self.train_samples = num_samples if train_samples is None else train_samples

    @staticmethod
    def _check_tokenizer(tokenizer: Any) -> None:
        if isinstance(tokenizer, (str, Path)):
            path = Path(tokenizer).expanduser()
            if path.suffix == ".gguf" and not path.is_file():
                raise FileNotFoundError(f"The GGUF file {tokenizer} does not exist. Check the path.")
        elif tokenizer is not None and not callable(tokenizer):
            raise ValueError(
                f"A tokenizer is needed to read text, but {type(tokenizer).__name__} was given. "
                "Name one: a hub id, a folder or a .gguf file."
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use."""
        given = self._given_tokenizer
        if given is None:
            given = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
            if given is None:
                raise ValueError(
                    "A tokenizer is needed to read text, but none was given, and no Trainer runs a module that has "
                    "one. Name one: a hub id, a folder or a .gguf file; or save it into the model's folder."
                )
        if not isinstance(given, (str, Path)):
            return given
        from transformers import AutoTokenizer

        path = Path(given).expanduser()
        name, options = str(path) if path.exists() else str(given), {}
        if path.suffix == ".gguf":
            name, options = str(path.parent), {"gguf_file": path.name}
        try:
            return AutoTokenizer.from_pretrained(name, cache_dir=self.cache_dir, **options)
        except (OSError, ValueError) as error:
            raise OSError(
                f"The tokenizer {str(given)!r} was asked for, but neither a local folder nor the Hugging Face hub (or "
                f"its cache) has it. Check the name and the connection. The cause: {error}"
            ) from error

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False: the warning that a text is longer than the context; windows never are.
        return self.tokenizer(text, verbose=False).input_ids

    @cached_property
    def calibration_windows(self) -> Tensor:
        """Token ids of shape (num_samples, seqlen), in the order in which they were drawn."""
        return self._draw(self.num_samples)

    @cached_property
    def train_windows(self) -> Tensor:
        """Token ids of shape (train_samples, seqlen), in the order in which they were drawn."""
        return self.calibration_windows if self.train_samples == self.num_samples else self._draw(self.train_samples)

    def _draw(self, count: int) -> Tensor:
        content = calibration_source(self.calibration, self.cache_dir)
        draw = (self.seqlen, count, self.seed, self.calibration)
        if isinstance(content, str):
            return draw_from_text(self._tokenize(content), *draw)
        return draw_from_documents(content, self._tokenize, *draw)

    @cached_property
    def evaluation_windows(self) -> Tensor:
        """Token ids of shape (windows, seqlen), in the order of the text."""
        ids = self._tokenize(evaluation_text(self.evaluation, self.cache_dir))
        if self.evaluation == "c4":
            ids = ids[: _C4_EVALUATION_WINDOWS * self.seqlen]
        return cut(ids, self.seqlen, self.limit, self.evaluation)

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs, so that a bad source is refused before anything is trained or pruned.

        Only `fit` reads what is trained on; elsewhere it is read when `calibration_dataloader()` is called.
        """
        _ = self.evaluation_windows
        if stage in (None, "fit"):
            _ = self.train_windows

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The drawn windows, in the order in which they were drawn."""
        return self._loader(self.calibration_windows)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The drawn windows, in an order that the seed gives, another one each epoch."""
        return self._loader(self.train_windows, torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The windows of the evaluation text, in its order."""
        return self._loader(self.evaluation_windows)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The same as for validation."""
        return self.val_dataloader()

    def _loader(self, windows: Tensor, shuffle: torch.Generator | None = None) -> DataLoader[dict[str, Tensor]]:
        silence_worker_advice()
        return DataLoader(_Windows(windows), batch_size=self.batch_size, shuffle=shuffle is not None, generator=shuffle)
