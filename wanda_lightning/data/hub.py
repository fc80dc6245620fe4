"""Data sets from the Hugging Face hub, and loaders over data in memory."""

from __future__ import annotations

import warnings
from typing import Any

from wanda_lightning.checks import one_line


def load_from_hub(name: str, *config: str, instead: str, **options: Any) -> Any:
    """Load a data set with `datasets.load_dataset`; all ranks may call it together, since `datasets` locks its cache.

    Args:
        name: Id of the data set.
        *config: Name of its configuration.
        instead: What an error message recommends where the hub cannot be reached.
        **options: More arguments of `load_dataset`.

    Raises:
        OSError: If neither the cache nor the hub has it.
        ValueError: If it is there but cannot be read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(name, *config, **options)
    except ConnectionError as error:  # datasets raises it for every failed look-up, and with HF_HUB_OFFLINE
        found = "is not in the cache, and the Hugging Face hub cannot be reached"
        cause: Exception = error
    except (FileNotFoundError, HfHubHTTPError) as error:
        found, cause = "was not found on the Hugging Face hub", error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"The data set {name} cannot be read: a file is damaged, or in another format than its name says. "
            f"Download it again, or use {instead}. The cause: {one_line(error.__cause__ or error)}"
        ) from error
    raise OSError(
        f"The data set {name} was asked for, but it {found}. Use {instead}. The cause: {one_line(cause)}"
    ) from cause


def silence_worker_advice() -> None:
    """Stop Lightning from recommending worker processes: a loader over data in memory is slower with them.

    Lightning has no other switch for it. The filter matches this one message; calling this twice adds it once.
    """
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers", category=PossibleUserWarning)
