"""Upload the folder of a model to the Hugging Face hub."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from glob import escape
from pathlib import Path

from wanda_lightning.common.checks import check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.refuse_path import files_in
from wanda_lightning.common.words import one_line

_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json"]

_EXPECTED = "push_to_hub must be OWNER/NAME of a model repository"


def refuse_upload(repo_id: str, private: bool = False) -> None:
    """Refuse an upload that cannot succeed; `private` connects to the hub to refuse a public repository."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    check_flags(private=private)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{_EXPECTED}, but it is {repo_id!r}: {one_line(error)}") from error
    if "/" not in repo_id:  # the card names the repository, and whose it would be is not known
        raise UserError(f"{_EXPECTED}, but it is {repo_id!r}. Add the user or the organization.")
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"push_to_hub must be left out while HF_HUB_OFFLINE is set, but it is {repo_id!r}. Unset HF_HUB_OFFLINE, "
            "or upload the saved model later: hf upload."
        )
    if get_token() is None:
        raise UserError(
            f"push_to_hub must be left out without a token that may write to {repo_id!r}, but no token was found. Run "
            "hf auth login, or set HF_TOKEN."
        )
    if private:
        _refuse_public(repo_id)


def _refuse_public(repo_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with suppress(OSError, HfHubHTTPError):  # there is no such repository yet, or the upload will explain it
        if not HfApi().repo_info(repo_id).private:
            raise UserError(
                f"push_to_hub={repo_id!r} must be a private repository with private=True, but it exists and is public. "
                "Make it private on the hub, or choose another name."
            )


def upload(folder: str | os.PathLike[str], repo_id: str, files: Collection[str], private: bool = False) -> str:
    """Upload files of a folder to a model repository, in one commit, and return its address.

    A repository that does not exist is created. Weights of another model in the repository are deleted, because they
    might be loaded instead. Any failure is an OSError that names the command that uploads the files later.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="wanda_lightning")
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private:
            _refuse_public(address.repo_id)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=Path(folder),
            allow_patterns=list(map(escape, files)),
            commit_message="Upload pruned model with wanda_lightning",
            delete_patterns=_WEIGHTS,
        )
    except ValueError as error:
        raise OSError(f"The model is saved in {folder}, but it was not uploaded: {error}") from error
    except Exception as error:  # of the connection, of the server, of the disk
        included = (word for file in sorted(files) for word in ("--include", escape(file)))
        later = ["hf", "upload", repo_id, os.fspath(folder), *(["--private"] if private else []), *included]
        raise OSError(
            f"push_to_hub={repo_id!r} failed: the model is saved in {folder}, but it was not uploaded "
            f"({type(error).__name__}: {one_line(error)}). To upload it later, run: {shlex.join(later)}"
        ) from error
    return str(address)


class Uploadable:
    """An object that saves its model with `save_pretrained(folder, overwrite)`, as an upload needs it."""

    save_pretrained: Callable[..., object]

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Save the model as `save_pretrained` does, upload it, and return the address. Call it in one process only.

        Args:
            repo_id: OWNER/NAME of a model repository on the Hugging Face hub; it is created if it does not exist.
            private: Make the repository private if it is new, and refuse a public one.

        Raises:
            ValueError: If the upload cannot succeed, for example without a token.
            OSError: If it fails. The message names the folder of the model, which stays, and the command that uploads
                it later.
        """
        refuse_upload(repo_id, private)
        folder = tempfile.mkdtemp()
        try:
            self.save_pretrained(folder, overwrite=True)
        except BaseException:
            shutil.rmtree(folder)
            raise
        address = upload(folder, repo_id, files_in(folder), private)
        shutil.rmtree(folder)
        return address
