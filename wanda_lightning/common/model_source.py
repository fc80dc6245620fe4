"""The source of a model: a hub id, a local folder, a GGUF file or a timm model; paths are checked at once."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.checks import check_flags, require_extra
from wanda_lightning.common.errors import MissingPackageError, UserError
from wanda_lightning.common.wording import one_line

_MODULES = "modules.json"


@dataclass(frozen=True)
class ModelSource:
    """The source of a model."""

    name: StrPath  # hub id, folder or `.gguf` file, or `timm:NAME`
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
    def hub(self) -> Kwargs:
        """The arguments of `from_pretrained` for a model on the hub, except its id."""
        arguments = dict(vars(self))
        del arguments["name"]
        return arguments

    def locate(self) -> Kwargs:
        """Return the arguments of `from_pretrained`; raise an OSError for a path that is not a model."""
        path = self.path
        exists = path.exists()
        # An id on the hub is NAME or OWNER/NAME.
        is_path = path.is_absolute() or str(self).startswith(".") or len(path.parts) > 2
        if not exists and (is_path or path.suffix in (".gguf", ".safetensors")):
            raise FileNotFoundError(f"The model {self} does not exist. Check the path.")
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            raise OSError(
                f"model must be a folder, a .gguf file or a hub id, but {self} has only weights. Give its folder."
            )

        arguments = self.hub
        name = str(path if exists else self)
        if path.suffix == ".gguf":
            require_extra("demo", "gguf", "accelerate", purpose="GGUF files")
            name = str(path.parent)
            arguments["gguf_file"] = path.name
        arguments["pretrained_model_name_or_path"] = name
        return arguments

    def loaded_folder(self) -> Path:
        """Return the folder of a model: its own, or after loading the one of a hub model in the cache."""
        if self.path.is_dir():
            return self.path
        from transformers.utils import cached_file

        options = {**self.hub, "local_files_only": True}
        return Path(cached_file(str(self), "config.json", **options)).parent


def load_config(source: ModelSource) -> Any:
    """Load the transformers configuration of a hub id, a local folder or a GGUF file; errors as for `reading`."""
    arguments = source.locate()
    folder = source.path
    inner = sorted(config.parent.as_posix() for config in folder.glob("*/config.json"))
    if inner and not (folder / "config.json").exists():
        raise UserError(
            f"model {source} must be a folder with config.json, but it has none. Perhaps you mean {inner[0]}."
        )
    from transformers import AutoConfig

    with reading("configuration", source, on_hub=not folder.exists()):
        config = AutoConfig.from_pretrained(**arguments)
        for index in folder.glob("*.index.json"):
            _check_index(index)
    if config.model_type == "timm_wrapper":
        name = f"local-dir:{folder}" if folder.exists() else f"hf-hub:{source}"
        raise UserError(f"model {source} is an image classifier of timm: its name is timm:{name}.")
    return config


def _check_index(index: Path) -> None:
    """Refuse an index of weights that names files outside of its folder: a private one would be saved as weights."""
    for file in json.loads(index.read_bytes())["weight_map"].values():
        path = PureWindowsPath(file)  # which knows both slashes
        if path.anchor or ".." in path.parts:
            raise UserError(
                f"{index} must name files in its folder, but it names {path.as_posix()}."
            )


def load_tokenizer(source: ModelSource) -> Any:
    """Load a transformers tokenizer; None for a folder without one; errors as for `reading`."""
    arguments = source.locate()
    path = source.path
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("vocab*")):
        return None
    from transformers import AutoTokenizer

    with reading("tokenizer", source, on_hub=not path.exists()):
        return AutoTokenizer.from_pretrained(**arguments)


def is_embedding_model(source: ModelSource) -> bool:
    """Whether a folder, or a model on the hub, has the list of modules that sentence-transformers writes."""
    if str(source).startswith("timm:"):
        return False
    source.locate()
    if source.path.exists():
        return (source.path / _MODULES).is_file()
    return _is_on_hub(source)


@cache
def _is_on_hub(source: ModelSource) -> bool:
    from huggingface_hub import hf_hub_download

    with _offline_if_unreachable(on_hub=True):
        try:
            hf_hub_download(
                str(source), _MODULES, revision=source.revision, cache_dir=source.cache_dir
            )
        except (OSError, ValueError):  # no such file, model or id, or no network
            return False
    return True


@contextmanager
def reading(part: str, name: object, on_hub: bool = False) -> Iterator[None]:
    """While a library loads the `part` of a model or data set, name both in its errors.

    A missing package stays an ImportError, an error of the file system or the hub an OSError; others are ValueErrors.
    If the hub does not answer, libraries read only their caches, since they would ask it again for half a minute. The
    error for a model then says first that no file or folder has this name, since a wrong path is the likelier reason.
    """
    from huggingface_hub import is_offline_mode

    with _offline_if_unreachable(on_hub) as reasons:
        try:
            yield
        except Exception as error:
            # The class of torch is asked by its name, since torch is not imported for this.
            out_of_memory = type(error).__name__ == "OutOfMemoryError"
            if out_of_memory or isinstance(error, UserError | MemoryError):
                raise
            if on_hub and is_offline_mode() and part != "data":
                reasons.insert(0, "no file or folder has this name")
            message = f"The {part} of {str(name)!r} cannot be loaded:"
            raise _explained(error, message, reasons) from error


def _explained(error: Exception, message: str, reasons: Sequence[str]) -> Exception:
    """Return an error that says what was read, followed by the error's own message.

    `reasons` say why the hub or the network, whose errors are OSErrors, may have failed.
    """
    # Libraries wrap these errors in their own; their classes need not be importable here.
    names = {type(error).__name__, type(error.__context__).__name__}
    kind: type[Exception] = UserError
    if isinstance(error, ImportError):
        kind = MissingPackageError
    elif names & {"JSONDecodeError", "SafetensorError"}:
        message += " a file is damaged; download or save it again:"
    elif not isinstance(error, OSError):
        # The message of a KeyError, for one, is only the key.
        message += f" {type(error).__name__}:"
    else:
        kind = OSError
        if reasons:
            message += f" {', '.join(reasons)}:"
    # transformers goes on with all classes that it knows.
    return kind(f"{message} {one_line(error).partition(' Model type should be one of ')[0]}")


@contextmanager
def _offline_if_unreachable(on_hub: bool) -> Iterator[list[str]]:
    """Set the offline mode of huggingface_hub while the hub does not answer; yield the reasons for later errors.

    It is set by an assignment to a constant, which `huggingface_hub.is_offline_mode` reads at each call. There is no
    public way: `local_files_only=True` is not an argument of timm, and of datasets only in a part of its functions.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    was_offline = is_offline_mode()
    reasons = []
    if on_hub and not was_offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:  # libraries of the network raise errors of many kinds
            constants.HF_HUB_OFFLINE = True
            reasons.append("it is not in the cache")
            reasons.append(f"and the Hugging Face hub cannot be reached ({one_line(error)})")
    try:
        yield reasons
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def timm_name(name: StrPath) -> str:
    """Return the name for `timm.create_model`: without the prefix `timm:`, and a path object as `local-dir:FOLDER`."""
    if not isinstance(name, str):
        name = f"local-dir:{os.fspath(name)}"
    text = name.removeprefix("timm:")
    folder = text.removeprefix("local-dir:")
    return text if folder == text else f"local-dir:{ModelSource(folder).path}"
