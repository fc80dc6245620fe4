"""The source of a model: a hub id, a local folder, a GGUF file or a timm model; paths are checked at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from wanda_lightning.common.checks import check_flags, require_extra
from wanda_lightning.common.errors import MissingPackageError, UserError
from wanda_lightning.common.wording import one_line


@dataclass(frozen=True)
class ModelSource:
    """The source of a model."""

    # Hub id, folder or `.gguf` file of a language model, or `timm:NAME`.
    name: str | os.PathLike[str]
    revision: str = "main"  # branch, tag or commit on the hub
    cache_dir: str | None = None  # for downloads from the hub; None for the usual one
    trust_remote_code: bool = False  # whether to run the code that comes with the model

    def __post_init__(self) -> None:
        check_flags(trust_remote_code=self.trust_remote_code)

    def __str__(self) -> str:
        return str(self.name)

    @property
    def path(self) -> Path:
        """The name as a path, which may not exist."""
        return Path(os.path.expanduser(self.name))  # Path.expanduser refuses ~ of an unknown user

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for a model on the hub, except its id."""
        return {
            name: getattr(self, name) for name in ("revision", "cache_dir", "trust_remote_code")
        }

    def locate(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`; raise an OSError for a path that is not a model."""
        path = self.path
        is_path = path.is_absolute() or str(self).startswith(".") or len(path.parts) > 2
        if not path.exists() and (is_path or path.suffix in (".gguf", ".safetensors")):
            raise FileNotFoundError(f"The model {self} does not exist. Check the path.")
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            raise OSError(
                f"model must be a folder, a .gguf file or a hub id, but {self} has only weights. Give its folder."
            )
        if path.suffix == ".gguf":
            require_extra("demo", "gguf", "accelerate", purpose="GGUF files")
            return {
                "pretrained_model_name_or_path": str(path.parent),
                "gguf_file": path.name,
                **self.hub,
            }
        return {
            "pretrained_model_name_or_path": str(path) if path.exists() else str(self),
            **self.hub,
        }


def load_config(source: ModelSource) -> Any:
    """Load the transformers configuration of a hub id, a local folder or a GGUF file; errors as for `reading`."""
    arguments = source.locate()
    folder = source.path
    from transformers import AutoConfig

    with reading("configuration", source, on_hub=not folder.exists()):
        config = AutoConfig.from_pretrained(**arguments)
        for index in folder.glob("*.index.json"):
            # For both slashes.
            for name in map(PureWindowsPath, json.loads(index.read_bytes())["weight_map"].values()):
                # The file could be private, and would be saved as weights.
                if name.anchor or ".." in name.parts:
                    raise UserError(
                        f"{index} must name files in its folder, but it names {name.as_posix()}."
                    )
    if config.model_type == "timm_wrapper":
        named = f"local-dir:{folder}" if folder.exists() else f"hf-hub:{source}"
        raise UserError(f"model {source} is an image classifier of timm: its name is timm:{named}.")
    return config


def load_tokenizer(source: ModelSource) -> Any:
    """Load a transformers tokenizer; None for a folder without one; errors as for `reading`."""
    arguments = source.locate()
    path = source.path
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("vocab*")):
        return None
    from transformers import AutoTokenizer

    with reading("tokenizer", source, on_hub=not path.exists()):
        return AutoTokenizer.from_pretrained(**arguments)


@contextmanager
def reading(part: str, name: object, on_hub: bool = False) -> Iterator[None]:
    """While a library loads the `part` of a model or data set, name both in its errors.

    A missing package stays an ImportError, an error of the file system or the hub an OSError; others are ValueErrors.
    If the hub does not answer, libraries read only their caches, since they would ask it again for half a minute. The
    error for a model then says first that no file or folder has this name, since a wrong path is the likelier reason.
    """
    from huggingface_hub import constants, get_session

    was_offline = constants.HF_HUB_OFFLINE
    reasons = [] if part == "data" else ["no file or folder has this name"]
    try:
        if on_hub and not was_offline:
            try:
                get_session().head(constants.ENDPOINT, timeout=10)
            except Exception as error:  # libraries of the network raise errors of many kinds
                constants.HF_HUB_OFFLINE = True
                reasons += [
                    "it is not in the cache",
                    f"and the Hugging Face hub cannot be reached ({one_line(error)})",
                ]
        yield
    except Exception as error:
        # torch's.
        if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise

        kind: type[Exception] = OSError
        found = ""
        if isinstance(error, ImportError):
            kind = MissingPackageError
        elif {type(error).__name__, type(error.__context__).__name__} & {
            "JSONDecodeError",
            "SafetensorError",
        }:
            kind = UserError
            found = " a file is damaged; download or save it again:"
        elif not isinstance(error, OSError):
            kind = UserError
            found = f" {type(error).__name__}:"
        elif on_hub and constants.HF_HUB_OFFLINE and reasons:
            found = f" {', '.join(reasons)}:"
        raise kind(
            f"The {part} of {str(name)!r} cannot be loaded:{found} {one_line(error)}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def timm_name(name: str | os.PathLike[str]) -> str:
    """Return the name for `timm.create_model`: without the prefix `timm:`, and a path object as `local-dir:FOLDER`."""
    text = name.removeprefix("timm:") if isinstance(name, str) else f"local-dir:{os.fspath(name)}"
    folder = text.removeprefix("local-dir:")
    return text if folder == text else f"local-dir:{ModelSource(folder).path}"
