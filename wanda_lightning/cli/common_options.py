"""Help, rules for values and checks without a model, for the options of several commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.parser import default_of, option
from wanda_lightning.common.atomic_write import resolve_path
from wanda_lightning.common.checks import Number, OneOf
from wanda_lightning.common.model_source import ModelSource, why_missing, why_no_checkpoint, why_no_language_model
from wanda_lightning.hub.upload import refuse_upload

TIMM = "timm:"  # before the name of an image classifier
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAPER_SEQLEN = 2048
PAPER_IMAGES, PAPER_SEQUENCES = 4096, 128
IMAGES_AT_ONCE, SEQUENCES_AT_ONCE = 64, 4

TEXTS_HELP = (
    "c4, wikitext2, python-docs, sklearn-docs (these two need no network), the id of a data set on the hub "
    "(OWNER/NAME) or a FILE (.txt, .jsonl, .parquet)"
)
IMAGES_HELP = (
    "a folder laid out like ImageNet, cifar10, cifar100, a hub id, or digits (8x8 digits, needs no network). Required "
    "for image classifiers."
)
LIMIT_HELP = "Number of windows to measure on; by default all."
SEQLEN_HELP = "Number of tokens in a window; by default the model's context, at most"

COUNT = Number(minimum=1, whole=True)
WINDOW = Number(minimum=2, whole=True)


@dataclass(kw_only=True)
class ModelOptions:
    """The model that a command loads, and checks of options that need no model."""

    model: Any = option("Hub id, folder or .gguf file of a language model.", MISSING)
    dtype: str | None = option("Data type of the weights; by default auto, as they are stored.", rule=OneOf(DTYPES))
    revision: str = option("Branch, tag or commit of --model on the hub.", "main")
    cache_dir: str | None = option("Folder for downloads from the hub.")
    trust_remote_code: bool = option("Run the code that comes with a hub model.", False)

    def source(self, name: str) -> ModelSource:
        """Return the source of a model; `revision` is that of `model`, not of `dense` or `pruned`."""
        named = self.model if isinstance(self.model, list) else [self.model]
        return ModelSource(name, self.revision if name in named else "main", self.cache_dir, self.trust_remote_code)

    def refuse_given(self, purpose: str, names: str) -> None:
        """Refuse options that do not have their defaults although they mean nothing for this purpose."""
        defaults = {each.name: default_of(each) for each in fields(self)}
        given = [f"--{name}" for name in names.split() if getattr(self, name) != defaults[name]]
        if given:
            verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
            raise UsageError(f"{', '.join(given)} {verb} no meaning for {purpose}. Leave {them} out.")

    def refuse_missing(self, names: str) -> None:
        """Refuse a file or folder that does not exist, unless its name may be a hub id."""
        for name in names.split():
            given = getattr(self, name)
            for value in [given] if isinstance(given, str) else given or ():
                path = value.removeprefix("timm:local-dir:")
                if name in ("checkpoint", "tasks_dir") or path != value:
                    path = os.path.abspath(path)  # never a hub id
                reason = why_missing(path)
                if not reason and name == "checkpoint":
                    reason = why_no_checkpoint(Path(path))
                if not reason and name in ("model", "dense", "pruned") and path == value:
                    reason = why_no_language_model(Path(path))
                if reason:
                    raise UsageError(f"--{name} {value} {reason}")

    def refuse_place(self, name: str, refuse: Callable[[str, bool], None]) -> None:
        """Refuse a path that cannot be written, in a message that starts with the option."""
        values = vars(self)
        if (path := values[name]) is not None:
            if not path.strip() or "\0" in path:
                raise UsageError(f"--{name} must be a path, but it is {path!r}.")
            try:
                refuse(path, values["overwrite"])  # every command that writes has this option
            except OSError as error:
                raise UsageError(f"--{name} {error}") from error

    def refuse_other_kind(self, model: str, data: str | None, of_language_models: str) -> None:
        """Refuse options for the other kind of model, and an image classifier without images to measure it on."""
        if not model.startswith(TIMM):
            self.refuse_given("a language model", "data checkpoint")
            return
        self.refuse_given("an image classifier", of_language_models)
        if data is None:
            raise UsageError(
                f"--data is required for the image classifier {model}: give a folder laid out like ImageNet, cifar10, "
                "cifar100 or a hub id with the classes that the model was trained on, or digits to try the command out."
            )


@dataclass(kw_only=True)
class SaveOptions(ModelOptions):
    """The model that a command loads, and where it saves the new one."""

    save_model: str | None = option("Folder for the pruned model.")
    push_to_hub: str | None = option(
        "OWNER/NAME of a repository on the Hugging Face hub, to which the saved model is uploaded."
    )
    private: bool = option("Make the repository of --push_to_hub private if it is new, and refuse a public one.", False)
    overwrite: bool = option("Replace a --save_model folder with everything in it.", False)

    def refuse_replaced(self, names: str) -> None:
        """Refuse to replace a model that the command reads, or a folder with it; the place has been checked."""
        for name in names.split():
            path = (getattr(self, name) or "").removeprefix("timm:local-dir:")
            if (
                self.save_model
                and os.path.exists(path)
                and resolve_path(path).is_relative_to(resolve_path(self.save_model))
            ):
                raise UsageError(
                    f"--save_model {self.save_model} would replace --{name} {path}. Choose another folder."
                )

    def refuse_push(self, purpose: str) -> None:
        """Refuse an upload without a saved model, a private one without a repository, and one that cannot succeed."""
        for needed, name in (("save_model", "push_to_hub"), ("push_to_hub", "private")):
            if getattr(self, needed) is None:
                self.refuse_given(f"{purpose} without --{needed}", name)
        if self.push_to_hub is not None:
            refuse_upload(self.push_to_hub, self.private)
