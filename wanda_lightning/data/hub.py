"""What texts and images share: the way to the hub, and loaders over data in memory."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning


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
