"""The source of a model: a hub id, a local folder, a GGUF file or a timm model.

All code that loads or describes a model by name uses this module. Libraries are imported inside functions, so that
checking a local path is fast.
"""

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
from wanda_lightning.common.words import did_you_mean, one_line

_LOCAL_FOLDER, _ON_HUB = "local-dir:", "hf-hub:"  # timm's prefixes of a folder and of a hub id


@dataclass(frozen=True)
class ModelSource:
    """The source of a model.

    Attributes:
        name: Hub id, folder or `.gguf` file of a language model; or `timm:NAME` of an image classifier.
        revision: Branch, tag or commit on the hub.
        cache_dir: Folder for downloads from the hub; None for the usual one.
        trust_remote_code: Run the code that comes with the model.
    """

    name: str | os.PathLike[str]
    revision: str = "main"
    cache_dir: str | None = None
    trust_remote_code: bool = False

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
        return {name: getattr(self, name) for name in ("revision", "cache_dir", "trust_remote_code")}

    def locate(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`, with a path if one exists, or else a hub id.

        Raises a FileNotFoundError for a path that does not exist.
        """
        if reason := why_missing(self.name):
            raise FileNotFoundError(f"The model {self} {reason}")
        if self.path.suffix == ".gguf":
            require_extra("demo", "gguf", "accelerate", purpose="GGUF files")
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name, **self.hub}
        return {"pretrained_model_name_or_path": str(self.path) if self.path.exists() else str(self), **self.hub}


def why_missing(name: str | os.PathLike[str]) -> str:
    """Return why a name is neither an existing path nor a hub id, as a predicate; empty if it may be one."""
    path = ModelSource(name).path
    is_path = path.is_absolute() or os.fspath(name).startswith(".") or len(path.parts) > 2
    if path.exists() or not (is_path or path.suffix in (".gguf", ".safetensors")):
        return ""
    download = " `python recipes/llm/get_smollm2.py .cache` downloads SmolLM2." if path.suffix == ".gguf" else ""
    return f"does not exist. Check the path.{download}"


def _config_in(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder; empty if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def load_config(source: ModelSource) -> Any:
    """Load the transformers configuration of a hub id, a local folder or a GGUF file.

    Raises an OSError for a model that neither a folder nor the hub has, and a ValueError for a file that is damaged or
    inconsistent.
    """
    arguments = source.locate()
    config = _config_in(source.path)
    if "architecture" in config and "model_type" not in config:
        raise UserError(
            f"model must be one that transformers can load, but {source} is an image classifier of timm: its name is "
            f"timm:{_LOCAL_FOLDER}{source.path}."
        )
    _refuse_files_outside(source.path)
    from transformers import AutoConfig

    with reading("configuration", source), asking_hub_once(not source.path.exists()):
        return AutoConfig.from_pretrained(**arguments)


def _refuse_files_outside(folder: Path) -> None:
    """Refuse an index that names files outside of its folder: they could be private, and would be saved as weights."""
    for index in sorted(folder.glob("*.index.json")):
        with reading("index of the weights", index):
            names = [PureWindowsPath(name) for name in json.loads(index.read_bytes())["weight_map"].values()]
        for name in names:  # it knows both kinds of slashes
            if name.anchor or ".." in name.parts:
                raise UserError(f"{index} must name files in its folder, but it names {name.as_posix()}. Correct it.")


def load_tokenizer(source: ModelSource) -> Any:
    """Load a transformers tokenizer; errors as for `load_config`."""
    arguments = source.locate()
    from transformers import AutoTokenizer

    with reading("tokenizer", source), asking_hub_once(not source.path.exists()):
        return AutoTokenizer.from_pretrained(**arguments)


@contextmanager
def asking_hub_once(is_needed: bool = True) -> Iterator[None]:
    """Let libraries read only their caches if the hub does not answer, since they would ask again for half a minute."""
    from huggingface_hub import constants, get_session

    was_offline, cause = constants.HF_HUB_OFFLINE, ""
    try:
        if is_needed and not was_offline:
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # libraries of the network raise errors of many kinds
        cause, constants.HF_HUB_OFFLINE = one_line(error), True
    try:
        yield
    except OSError as error:
        if not cause:
            raise
        raise ConnectionError(f"not in the cache, and the Hugging Face hub cannot be reached ({cause})") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@contextmanager
def reading(part: str, name: ModelSource | Path) -> Iterator[None]:
    """While a library loads the `part` of a model, turn its errors, of many classes, into errors for the user.

    A missing package stays an ImportError, an error of the file system or the hub an OSError, and exhausted memory the
    error that it is; anything else becomes a ValueError. Only a file that cannot be parsed is called damaged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        cause = f"{'' if isinstance(error, OSError | ImportError) else f'{type(error).__name__}: '}{one_line(error)}"
        names, advice = {type(error).__name__, type(error.__context__).__name__}, ""
        if not names.isdisjoint(("JSONDecodeError", "SafetensorError")):
            advice = ": a file is damaged. Download or save it again. The cause"
        elif str(name).endswith(".gguf") and not isinstance(error, OSError | ImportError):
            advice = ". Check that the file is complete. The cause"
        kinds: tuple[tuple[type, type[Exception]], ...] = ((ImportError, MissingPackageError), (OSError, OSError))
        kind = next((ours for theirs, ours in kinds if isinstance(error, theirs) and not advice), UserError)
        raise kind(f"The {part} of {str(name)!r} cannot be loaded{advice}: {cause}") from error


def timm_name(name: str | os.PathLike[str]) -> str:
    """Return the name of an image classifier for `timm.create_model`, or raise a ValueError for an unknown one.

    It may be a name that timm knows, with or without the prefix `timm:` and a tag of pretrained weights;
    `hf-hub:OWNER/NAME`; `local-dir:FOLDER`; or a path object of a folder.
    """
    text = name.removeprefix("timm:") if isinstance(name, str) else f"{_LOCAL_FOLDER}{os.fspath(name)}"
    if text.startswith(_LOCAL_FOLDER):
        folder = ModelSource(text.removeprefix(_LOCAL_FOLDER)).path
        if "model_type" in _config_in(folder):
            raise UserError(f"model {folder} is of transformers, not of timm. Leave out the prefix timm:.")
        return f"{_LOCAL_FOLDER}{folder}"
    if text.startswith(_ON_HUB):
        return text
    import timm

    if not timm.is_model(text.partition(".")[0]):
        near = did_you_mean(text.partition(".")[0], timm.list_models())
        raise UserError(
            f"model must be a name that timm {timm.__version__} knows, but it is {text!r}.{near} For a model on the "
            "hub, give hf-hub:OWNER/NAME; for a folder, local-dir:FOLDER."
        )
    return text
