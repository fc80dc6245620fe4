"""What texts and images share: the way to the hub, and loaders over data in memory."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning


def check_positive(**values: int | None) -> None:
    """Refuse numbers below 1; None means that there is no number to check."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} should be at least 1, but it is {value}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` where a known name is near, else an empty string.

    >>> nearest("wikitxt2", ["c4", "wikitext2"])
    ' Did you mean wikitext2?'
    """
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def load_from_hub(name: str, *config: str, instead: str, **options: Any) -> Any:
    """Load a data set with `datasets.load_dataset`; `instead` says what to use where the hub cannot be reached.

    `datasets` locks its cache, so all ranks of a run may ask together.

    Raises:
        OSError: If neither the cache nor the hub has it.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(name, *config, **options)
    except ConnectionError as error:  # what datasets makes of every failed look-up, and of HF_HUB_OFFLINE
        found = "is not in the cache, and the Hugging Face hub cannot be reached"
        cause: Exception = error
    except (FileNotFoundError, HfHubHTTPError) as error:
        found, cause = "cannot be had from the Hugging Face hub", error
    raise OSError(f"The data set {name} was asked for, but it {found}. Use {instead}. The cause: {cause}") from cause


def silence_worker_advice() -> None:
    """Stop Lightning from asking for worker processes: a loader over memory is slower with them.

    Lightning has no other switch for it; the filter names this one message and is added once, however often called.
    """
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers", category=PossibleUserWarning)
