"""Data sets from the Hugging Face hub, and tables and texts from files, by `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import asking_hub_once
from wanda_lightning.common.words import one_line

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),  # with or without a byte order mark
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
EXTENSIONS = tuple(_BUILDERS)


def load_file(path: Path, cache_dir: str | None = None) -> Any:
    """Return a file as a `datasets.Dataset`; a .txt file is one row with the column `text`."""
    name, options = _BUILDERS[path.suffix]
    return _load(str(path), name, "another file", data_files=str(path), split="train", cache_dir=cache_dir, **options)


def load_from_hub(name: str, *config: str, instead: str, **options: Any) -> Any:
    """Load a data set by its name on the hub, or from a folder; errors recommend `instead`.

    Raises an OSError for a data set that neither the cache nor the hub has, and a ValueError for one that cannot be
    read.
    """
    return _load(name, name, instead, *config, **options)


def _load(source: str, name: str, instead: str, *config: str, **options: Any) -> Any:
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    was_offline = datasets.config.HF_HUB_OFFLINE  # its own copy of the constant
    try:
        with asking_hub_once(not was_offline and not Path(source).exists()):
            datasets.config.HF_HUB_OFFLINE |= constants.HF_HUB_OFFLINE
            return datasets.load_dataset(name, *config, **options)
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        # `datasets` raises a ConnectionError for every failed look-up, and with HF_HUB_OFFLINE.
        found = "is not in the cache, and the Hugging Face hub cannot be reached"
        if not isinstance(error, ConnectionError):
            found = "was not found on the Hugging Face hub"
        raise OSError(f"The data set {source} {found}. Use {instead}. The cause: {one_line(error)}") from error
    except (datasets.exceptions.DatasetGenerationError, ArrowException, ValueError, StopIteration) as error:
        cause = one_line(error.__cause__ or error) or "it is empty"
        raise UserError(
            f"The data set {source} cannot be loaded. Correct it, load it with datasets.load_dataset and give the "
            f"result, or use {instead}. The cause: {cause}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
