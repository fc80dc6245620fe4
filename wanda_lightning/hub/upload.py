"""Upload the folder of a model to the Hugging Face hub."""

import os
import re
import shlex
from collections.abc import Collection
from glob import escape

from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import list_entries, resolve_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import one_line

# Files for the hub's pages and leaderboards, one for each data set; * stands for its name.
RESULT_FILES = ".eval_results/wanda_lightning_*.yaml"


def refuse_upload(repo_id: str, private: bool = False) -> None:
    """Refuse an upload that cannot succeed; `private` connects to the hub to refuse a public repository."""
    from huggingface_hub import HfApi, constants, get_token

    expected = ""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        expected = "OWNER/NAME of a model repository"
    elif constants.HF_HUB_OFFLINE:
        expected = "left out while HF_HUB_OFFLINE is set"
    elif get_token() is None:  # of the environment or of an earlier login
        expected = "left out without a token (run hf auth login, or set HF_TOKEN)"
    if expected:
        raise UserError(f"push_to_hub must be {expected}, but it is {repo_id!r}.")

    api = HfApi()
    if private and api.repo_exists(repo_id) and not api.repo_info(repo_id).private:
        raise UserError(
            f"push_to_hub={repo_id!r} must be a private repository with private=True, but it exists and is public. "
            "Make it private on the hub, or choose another name."
        )


def upload(folder: StrPath, repo_id: str, files: Collection[str], private: bool = False) -> str:
    """Upload files of a folder to a model repository, in one commit, and return its address.

    A repository that does not exist is created. Weights of another model in the repository are deleted, because they
    might be loaded instead, and so are its results. Any failure is an OSError that names the command that uploads the
    files later.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="wanda_lightning")
    try:
        # `None` makes the repository as the organization's settings say.
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        refuse_upload(address.repo_id, private)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=os.fspath(folder),
            allow_patterns=list(map(escape, files)),
            commit_message="Upload pruned model with wanda_lightning",
            delete_patterns=[
                "model*.safetensors",
                "model*.safetensors.index.json",
                RESULT_FILES,
            ],
        )
    except UserError as error:
        raise OSError(
            f"The model is saved in {folder}, but it was not uploaded: {error}"
        ) from error
    except Exception as error:  # of the connection, of the server, of the disk
        command = ["hf", "upload", repo_id, os.fspath(folder)]
        if private:
            command.append("--private")
        for file in sorted(files):
            command += ["--include", escape(file)]
        raise OSError(
            f"push_to_hub={repo_id!r} failed: the model is saved in {folder}, but it was not uploaded "
            f"({type(error).__name__}: {one_line(error)}). To upload it later, run: {shlex.join(command)}"
        ) from error
    return str(address)


def list_files(folder: StrPath) -> list[str]:
    """Return the names of the files of a model in a folder, relative to it and with slashes, except hidden files.

    Those in a hidden folder such as `.eval_results` belong to the model.
    """
    root = resolve_path(folder)
    names = []
    for entry in list_entries(root):
        for path in (entry, *entry.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                names.append(path.relative_to(root).as_posix())
    return sorted(names)
