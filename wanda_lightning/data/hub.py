"""Data sets from the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import one_line


def load_from_hub(name: str, *config: str, instead: str, **options: Any) -> Any:
    """Load a data set with `datasets.load_dataset`.

    Raises an OSError, whose message recommends `instead`, for a data set that neither the cache nor the hub has, and a
    ValueError for one that cannot be read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    try:
        return datasets.load_dataset(name, *config, **options)
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        # `datasets` raises a ConnectionError for every failed look-up, and with HF_HUB_OFFLINE.
        found = "is not in the cache, and the Hugging Face hub cannot be reached"
        if not isinstance(error, ConnectionError):
            found = "was not found on the Hugging Face hub"
        raise OSError(f"The data set {name} {found}. Use {instead}. The cause: {one_line(error)}") from error
    except (datasets.exceptions.DatasetGenerationError, ArrowException) as error:
        raise UserError(
            f"The data set {name} cannot be read: a file is damaged, or its format does not match its extension. "
            f"Download it again, or use {instead}. The cause: {one_line(error.__cause__ or error)}"
        ) from error
    except ValueError as error:  # for example, it has several configurations
        raise UserError(
            f"The data set {name} cannot be loaded by its name alone. Load it with datasets.load_dataset and give the "
            f"result, or use {instead}. The cause: {one_line(error)}"
        ) from error
