"""The source of a model: a hub id, a local folder, a GGUF file or a timm model.

All code that loads or describes a model by name uses this module, so that a wrong name or a broken file always raises
the same error. Libraries are imported inside functions, so that checking a local path is fast.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from wanda_lightning.common.checks import check_flags, require_extra
from wanda_lightning.common.errors import MissingPackageError, UserError
from wanda_lightning.common.words import did_you_mean, one_line

_KINDS = {  # in a configuration of timm
    "architecture": str,
    "pretrained_cfg": dict,
    "model_args": dict | None,
    **dict.fromkeys(("input_size", "mean", "std"), list | None),
}
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
        names = ("revision", "cache_dir", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    def locate(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`, with a path if one exists, or else a hub id.

        Raises a FileNotFoundError for a GGUF file or a folder that does not exist.
        """
        if self.path.suffix == ".gguf":
            if not self.path.is_file():
                raise FileNotFoundError(f"The GGUF file {self} does not exist. Download it and give its local path.")
            require_extra("demo", "gguf", "accelerate", purpose="GGUF files")
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name, **self.hub}
        if reason := why_missing(self.name):
            raise FileNotFoundError(f"The model {self} {reason}")
        return {"pretrained_model_name_or_path": str(self.path) if self.path.exists() else str(self), **self.hub}


def why_missing(name: str | os.PathLike[str]) -> str:
    """Return why a name is neither an existing path nor a hub id, as a predicate; empty if it may be one."""
    path = ModelSource(name).path
    is_file = path.suffix in (".gguf", ".safetensors")
    is_path = is_file or path.is_absolute() or os.fspath(name).startswith(".") or len(path.parts) > 2
    return "does not exist. Check the path." if is_path and not path.exists() else ""


def load_config(source: ModelSource) -> Any:
    """Load the transformers configuration of a hub id, a local folder or a GGUF file.

    Raises an OSError for a model that neither a folder nor the hub has, and a ValueError for a file that is damaged or
    inconsistent.
    """
    arguments, path = source.locate(), source.path
    if reason := why_no_language_model(path):
        raise OSError(f"model must be a folder that Hugging Face transformers can load, but {path} {reason}")
    _refuse_files_outside(path)
    from transformers import AutoConfig

    with reading("configuration", source):
        refuse_unreachable(source)
        return AutoConfig.from_pretrained(**arguments)


def why_no_language_model(path: Path) -> str:
    """Return why a folder or file is no language model, as a predicate; empty if it may be one or does not exist."""
    if path.is_file() and path.suffix != ".gguf":
        return "is neither a folder nor a .gguf file. Give the folder with config.json and the safetensors weights."
    if not path.is_dir():
        return ""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        return "has no config.json."
    except (OSError, ValueError, RecursionError):
        return ""  # `reading` explains it
    if isinstance(config, dict) and "architecture" in config and "model_type" not in config:
        return f"is an image classifier of timm: its name is timm:{_LOCAL_FOLDER}{path}."
    return ""


def why_no_checkpoint(path: Path) -> str:
    """Return why a file is no checkpoint of an image classifier, as a predicate; empty if it may be one."""
    if path.suffix == ".safetensors":
        return ""
    return (
        "must be a .safetensors file. Convert one that you trust: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )


def _refuse_files_outside(folder: Path) -> None:
    """Refuse an index that names files outside of its folder, which would be read as weights."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            found = {*json.loads(index.read_bytes())["weight_map"].values()}
            names = sorted(name for name in found if isinstance(name, str))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # `reading` explains it
        for name in map(PureWindowsPath, names):  # it knows both kinds of slashes
            if name.anchor or ".." in name.parts:
                raise UserError(f"{index} must name files in its folder, but it names {name.as_posix()}. Correct it.")


def load_tokenizer(source: ModelSource) -> Any:
    """Load a transformers tokenizer; errors as for `load_config`."""
    arguments = source.locate()
    from transformers import AutoTokenizer

    with reading("tokenizer", source):
        refuse_unreachable(source)
        return AutoTokenizer.from_pretrained(**arguments)


def refuse_unreachable(source: ModelSource) -> None:
    """Raise an OSError if a hub model is not in the cache and the hub cannot be reached.

    The libraries would try again for half a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    if source.path.exists():
        return
    hub_id = str(source)
    try:
        folder = Path(source.cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")
        if not (folder / "snapshots").is_dir():
            get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=source.revision))
    except (HfHubHTTPError, HFValidationError):  # the hub has answered, or it is no hub id: the libraries explain it
        return
    except Exception as error:  # libraries of the network raise errors of many kinds
        raise OSError(f"{hub_id} is not in the cache, and the hub cannot be reached ({one_line(error)}).") from error


@contextmanager
def reading(part: str, name: ModelSource | Path) -> Iterator[None]:
    """While a library reads the `part` of a model, turn its errors, of many classes, into errors for the user.

    A missing file becomes an OSError, and a file that cannot be used a ValueError. A missing package stays an
    ImportError, and exhausted memory the error that it is.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"The {part} of {str(name)!r} cannot be read without a package: {one_line(error)}"
        ) from error
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise _explain(error, part, str(name)) from error


def _explain(error: Exception, part: str, name: str) -> Exception:
    path = ModelSource(name).path
    if broken := _broken_json(path):
        return UserError(f"The {part} of {name!r} cannot be read: {broken}. Download or save the file again.")
    cause = one_line(error)
    if "trust_remote_code=True" in cause:
        return UserError(
            f"The {part} of {name!r} needs code that comes with the model. If you trust it, allow it with "
            "trust_remote_code=True (--trust_remote_code)."
        )
    if unknown := re.search("model type `(.+?)` but Transformers does not recognize", cause):
        return UserError(
            f"The {part} of {name!r} names the model type {unknown[1]}, which transformers "
            f"{version('transformers')} does not know. Install a newer one (pip install --upgrade transformers), or "
            "correct config.json."
        )
    found = path.exists() or isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError))  # of the hub
    if isinstance(error, OSError) and not found:
        return OSError(
            f"The {part} of {name!r} cannot be found: neither a local folder nor the Hugging Face hub (or its cache) "
            f"has the {part}. Check the name and the connection, or give a local folder or a .gguf file. "
            f"The cause: {cause}"
        )
    return UserError(
        f"The {part} of {name!r} cannot be used: a file is incomplete or damaged, or the files contradict each other. "
        f"Download or save them again. The cause: {type(error).__name__}: {cause}"
    )


def _broken_json(folder: Path) -> str | None:
    """Return the name of the first JSON file of a folder that cannot be parsed, with the reason."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{file} is not valid JSON ({error})"
    return None


def timm_name(name: str | os.PathLike[str]) -> str:
    """Check the name of an image classifier, and return the name for `timm.create_model`.

    It may be a name that timm knows, with or without the prefix `timm:` and a tag of pretrained weights;
    `hf-hub:OWNER/NAME`; `local-dir:FOLDER`; or a path object of a folder. An OSError names what a folder lacks or that
    the hub cannot be reached; a ValueError, an unknown model or tag.
    """
    text = name.removeprefix("timm:") if isinstance(name, str) else f"{_LOCAL_FOLDER}{os.fspath(name)}"
    if text.startswith(_LOCAL_FOLDER):
        return f"{_LOCAL_FOLDER}{_timm_folder(ModelSource(text.removeprefix(_LOCAL_FOLDER)).path)}"
    if text.startswith(_ON_HUB):
        try:
            refuse_unreachable(ModelSource(text.removeprefix(_ON_HUB)))
        except OSError as error:
            raise OSError(f"{error} Check the connection, or give a folder: {_LOCAL_FOLDER}FOLDER.") from error
        return text
    import timm

    architecture, _, tag = text.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"model must be a name that timm {timm.__version__} knows, but it is {text!r}."
            f"{did_you_mean(architecture, timm.list_models())} For a model on the hub, give hf-hub:OWNER/NAME; for "
            "a folder, local-dir:FOLDER."
        )
    try:
        timm.models.get_pretrained_cfg(text)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise UserError(
            f"model must name pretrained weights that timm {timm.__version__} has for {architecture} "
            f"({', '.join(tags) or 'none'}), but it names {tag!r}."
        ) from error
    return text


def _timm_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise OSError(f"model must be a folder that timm can load, but {folder} has no config.json.")
    if broken := _broken_json(folder):
        raise UserError(f"The configuration of {str(folder)!r} cannot be read: {broken}. Save the file again.")
    config = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict) or "architecture" not in config:
        raise UserError(
            f"model must be a folder that timm can load, but {folder}/config.json has no 'architecture'. For a "
            "language model, leave out the prefix timm:."
        )
    known = config.get("pretrained_cfg", {})
    fields = {**known} if isinstance(known, dict) else {}
    fields |= {"architecture": config["architecture"], "model_args": config.get("model_args"), "pretrained_cfg": known}
    wrong = [name for name, kind in _KINDS.items() if not isinstance(fields.get(name), kind)]
    if wrong or len(fields.get("input_size") or "any") != 3:
        raise UserError(
            f"The configuration of {str(folder)!r} cannot be used: {folder}/config.json has a wrong "
            f"{(wrong or ['input_size'])[0]}. Correct it, or save the folder again."
        )
    return folder
