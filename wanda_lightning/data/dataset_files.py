"""Load data sets from the Hugging Face hub, and tables and texts from files, by `datasets`."""

import os
import re
from pathlib import Path
from typing import Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import reading

# The readers of `datasets` by extension.
_READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
EXTENSIONS = tuple(_READERS)
_JSON = (".json", ".jsonl", ".ndjson")  # of a folder, datasets reads all three


def load(source: str, *config: str, **options: Any) -> Any:
    """Load a data set from a file, from a folder, or by its name on the hub; a .txt file is one row with a `text`.

    Errors as for `reading`: an OSError for a data set that neither the cache nor the hub has, a ValueError for one that
    cannot be read.
    """
    import datasets

    path = Path(source).expanduser()
    name = str(path) if path.is_dir() else source
    if path.suffix in _READERS:
        name = _READERS[path.suffix]
        options |= {"data_files": str(path), "split": "train"}
    if path.suffix == ".txt":
        # utf-8-sig reads a file with or without a byte order mark.
        options |= {"sample_by": "document", "encoding": "utf-8-sig"}

    for file in (path, *path.rglob("*")):
        if file.suffix in _JSON and file.is_file() and not file.stat().st_size:
            raise UserError(f"The data of {str(file)!r} cannot be loaded: the file is empty.")
    with reading("data", source, on_hub=not path.exists()):
        try:
            return datasets.load_dataset(name, *config, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            # Its own message says only that an error occurred.
            raise error.__cause__ or error from None


def is_hub_id(source: str) -> bool:
    """Whether a name is OWNER/NAME, as data sets on the hub have, and not a path."""
    # `Path.exists` raises an error for a text that is too long for a path.
    is_path = source.endswith(EXTENSIONS) or os.path.exists(source)
    return not is_path and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None
