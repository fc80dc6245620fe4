"""The options of `prune` and `inspect`. Those of a pruning are the arguments of `PruningConfig.from_names`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from dataclasses import MISSING, dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wanda_lightning.cli.common_options import (
    COUNT,
    IMAGES_AT_ONCE,
    IMAGES_HELP,
    LIMIT_HELP,
    PAPER_SEQLEN,
    PAPER_SEQUENCES,
    SEQLEN_HELP,
    SEQUENCES_AT_ONCE,
    TEXTS_HELP,
    TIMM,
    WINDOW,
    ModelOptions,
    SaveOptions,
)
from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.parser import option
from wanda_lightning.common.atomic_write import require_writable, resolve_path
from wanda_lightning.common.checks import SEED, OneOf, check_report_path
from wanda_lightning.common.memory import check_memory
from wanda_lightning.config import NAMES, PruningConfig
from wanda_lightning.data import image_sources, text_sources

_REFERENCE_FLAGS = {"sparsity": "sparsity_ratio", "pattern": "sparsity_type", "method": "prune_method"}
_ARGUMENTS = inspect.signature(PruningConfig.from_names).parameters


class _Pattern(OneOf):
    def accepts(self, value: object) -> bool:
        found = re.fullmatch(r"(\d+):(\d+)", str(value))
        return 1 <= int(found[1]) < int(found[2]) if found else super().accepts(value)


def _choices(without: Collection[str] = ()) -> Any:
    """Return a dataclass with an option for each argument of `PruningConfig.from_names`.

    The help is the first sentence of the argument's description.
    """
    text = inspect.getdoc(PruningConfig.from_names) or ""  # none under python -OO
    described = dict(re.findall(r"^ {4}(\w+): (.+?\.)(?=\s|\Z)", text, flags=re.DOTALL | re.MULTILINE))
    options = []
    for name in (each for each in _ARGUMENTS if each not in without):
        default = _ARGUMENTS[name].default
        help = " ".join(described.get(name, "").replace("`", "").split())
        rule = OneOf(tuple(NAMES[name])) if name in NAMES else None
        if name == "pattern":
            rule = _Pattern(("unstructured", *NAMES[name], "any other N:M with 1 <= N < M"))
        kind = {tuple: list[str], type(None): str | None}.get(type(default), type(default))
        options.append((name, kind, option(help, default, rule, _REFERENCE_FLAGS.get(name))))
    return make_dataclass("_Choices", options, bases=(ModelOptions,), kw_only=True)


_PruneChoices: Any = _choices()
_InspectChoices: Any = _choices(without=("sparsity", "keep_batch_norm"))


@dataclass(kw_only=True)
class _PruningOptions(ModelOptions):
    """What `prune` and `inspect` share."""

    model: str = option(
        "Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.", MISSING
    )

    @property
    def is_image(self) -> bool:
        """Whether the model is an image classifier."""
        return self.model.startswith(TIMM)

    @property
    def choices(self) -> dict[str, Any]:
        """The arguments of `PruningConfig.from_names` that are options."""
        return {name: value for name, value in vars(self).items() if name in _ARGUMENTS}

    def refuse_streamed_gguf(self) -> None:
        """Refuse a file that cannot be read block by block."""
        if self.model.endswith(".gguf"):
            raise UsageError(
                f"--stream reads a folder or hub model in safetensors, but --model is {self.model}. Give such a "
                "model, or leave --stream out."
            )


@dataclass(kw_only=True)
class InspectOptions(_PruningOptions, _InspectChoices):  # type: ignore[misc]  # a base made from PruningConfig
    """The options of `inspect`: those of `prune` that determine which layers are pruned."""

    def __post_init__(self) -> None:
        if self.is_image:
            self.refuse_given("an image classifier", "revision trust_remote_code")
        self.refuse_given("inspect, which reads no weight and no data", "dtype")

    def refuse_early(self) -> None:
        """Refuse a file that does not exist, and choices that contradict each other."""
        self.refuse_missing("model")
        _ = self.config

    @property
    def config(self) -> PruningConfig:
        """The choices as objects, with the sparsity that fits the pattern."""
        n, _, m = self.choices["pattern"].partition(":")
        return PruningConfig.from_names(1 - int(n) / int(m) if m else 0.5, **self.choices)


@dataclass(kw_only=True)
class PruneOptions(_PruningOptions, SaveOptions, _PruneChoices):  # type: ignore[misc]  # a base made from PruningConfig
    """The options of `wanda-lightning prune`: also the data, and where the results go."""

    use_variant: bool = option(
        "The reference's name of --pattern equal_share: each row loses the same share of its total score.", False
    )
    prune_granularity: str | None = option(
        "The reference's name of --pattern unstructured_row and unstructured_layer.", rule=OneOf(("row", "layer"))
    )
    num_samples: int | None = option(
        "Number of calibration samples; by default 128 sequences or 4096 images, as in the paper.",
        rule=COUNT,
        alias="nsamples",
    )
    seqlen: int | None = option(f"{SEQLEN_HELP} {PAPER_SEQLEN}.", rule=WINDOW)
    batch_size: int | None = option(
        f"Number of samples in a batch; by default {SEQUENCES_AT_ONCE} sequences or {IMAGES_AT_ONCE} images.",
        rule=COUNT,
    )
    seed: int = option("Seed that draws the calibration samples.", 0, rule=SEED)
    calibration: str | None = option(
        f"Text to calibrate on, by default c4 as in the paper: {TEXTS_HELP}; or self, what the dense model writes."
    )
    evaluation: list[str] | None = option(
        f"Texts to measure perplexity on, by default wikitext2: {TEXTS_HELP}. The first is the one that counts.",
        alias="eval",
    )
    limit: int | None = option(LIMIT_HELP, rule=COUNT)
    data: str | None = option(f"Images to calibrate and measure on: {IMAGES_HELP}", alias="data_path")
    checkpoint: str | None = option("Weights (.safetensors) of the image classifier.", alias="resume")
    save: str | None = option("Folder for log_METHOD.txt and pruning_report.json.")
    report: str | None = option(
        "Page (.html) or picture (.png) to write, with figures and tables (needs the extra report)."
    )
    device: str = option("Device to compute on with --stream, such as cuda.", "cpu")
    stream: bool = option(
        "Read a language model block by block from disk, and write each pruned block to --save_model. If pruning is "
        "interrupted, the same command continues it.",
        False,
    )
    overwrite: bool = option(
        "Add to a --save folder that is not empty, replace a --report, and replace a --save_model folder with "
        "everything in it.",
        False,
    )
    shrink: bool = option(
        "Leave the hidden units that --pattern structured has set to zero out of --save_model: it becomes an ordinary, "
        "smaller model.",
        False,
    )
    eval_zero_shot: bool = option(
        "Also measure the pruned model on the paper's seven zero-shot tasks (needs lm-eval).", False
    )
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each of these tasks (see evaluate --help); by default they come from the hub."
    )

    def __post_init__(self) -> None:
        language = (
            "seqlen limit calibration evaluation dtype revision trust_remote_code stream eval_zero_shot tasks_dir"
        )
        self.refuse_other_kind(self.model, self.data, language)
        if self.evaluation is not None and len(set(self.evaluation)) != max(1, len(self.evaluation)):
            found = ", ".join(self.evaluation) or "none"
            raise UsageError(f"--evaluation must name at least one text, and each only once, but it names {found}.")
        if not self.eval_zero_shot:
            self.refuse_given("pruning without --eval_zero_shot", "tasks_dir")
        if self.stream:
            self.refuse_streamed_gguf()
            writes = self.save or self.report
            self.refuse_given("--stream", f"{'' if writes else 'overwrite '}eval_zero_shot")
            if self.save_model is None:
                raise UsageError("--stream writes each pruned block to --save_model, which is missing. Add it.")
            if self.calibration == text_sources.SELF:
                raise UsageError(
                    f"--calibration {self.calibration} needs the whole model in memory to write a text, but --stream "
                    "reads it block by block. Give a text, or leave --stream out."
                )
        else:
            self.refuse_given("pruning without --stream, which uses a GPU if there is one", "device")
        if self.save_model is None:
            self.refuse_given("pruning without --save_model", "shrink")
        if self.choices["pattern"] != "structured":
            self.refuse_given(f"--pattern {self.choices['pattern']}, whose zeros do not fill hidden units", "shrink")
        if self.use_variant or self.prune_granularity is not None:
            self._apply_reference_flags()

    def _apply_reference_flags(self) -> None:
        """Replace the reference's flags by the pattern that they stand for."""
        given, meant = self.choices["pattern"], f"unstructured_{self.prune_granularity}"
        if self.use_variant:
            meant = "equal_share"
        if given not in ("unstructured", meant):
            self.refuse_given(f"--pattern {given}", "use_variant prune_granularity")
        scores = self.method or "wanda", self.criterion or "wanda", self.solver or "zero_out"
        if self.use_variant and (scores != ("wanda", "wanda", "zero_out") or self.prune_granularity == "layer"):
            raise UsageError(
                f"--use_variant compares Wanda's scores within rows, but --method is {self.name} and "
                f"--prune_granularity is {self.prune_granularity or 'row'}. Use --method wanda within rows, or leave "
                "--use_variant out."
            )
        self.pattern, self.use_variant, self.prune_granularity = meant, False, None

    @property
    def name(self) -> str:
        """The label of the results: the method, and the choices that replace its own."""
        if self.pattern == "experts":
            return "reap"
        method = self.method or ("refit" if self.pattern == "structured" else "wanda")
        if self.method in (None, "wanda") and (self.criterion or self.solver):
            method = None
        names = (method, self.criterion, self.solver, self.allocation, self.recovery)
        return "_".join(name for name in names if name is not None)

    def refuse_early(self) -> None:
        """Refuse files that do not exist, places that cannot be written, and too many samples."""
        self.refuse_missing("model checkpoint tasks_dir")
        is_continued = False
        if self.stream:
            from wanda_lightning.streaming.output_folder import PROGRESS_NAME, require_resumable

            self.refuse_place("save_model", require_resumable)
            is_continued = (resolve_path(self.save_model or "") / PROGRESS_NAME).is_file()
        else:
            self.refuse_place("save_model", require_writable)
        self.refuse_replaced("model checkpoint")
        if self.stream and self.shrink and Path.cwd().is_relative_to(resolve_path(self.save_model or "")):
            raise UsageError(
                f"--save_model {self.save_model} is the working directory or contains it, but --shrink replaces the "
                "folder at the end. Choose a folder inside it."
            )
        if not is_continued:
            self.refuse_place("save", partial(require_writable, kind="folder"))  # the model may be there
        if self.report is not None:
            check_report_path(self.report)
            if Path(self.report) in (Path(self.save or ""), Path(self.save_model or "")):
                raise UsageError(f"--report must differ from the folders to write, but it is {self.report} too.")
        self.refuse_place("report", partial(require_writable, kind="file"))
        self.refuse_push("pruning")
        if self.is_image:
            image_sources.check_source(self.data or "")
        else:
            if self.calibration != text_sources.SELF:
                text_sources.check_source(self.calibration or "c4", "--calibration")
            for text in self.evaluation or ():
                text_sources.check_source(text, "--evaluation")
            check_memory("--num_samples", self.num_samples or PAPER_SEQUENCES, self.seqlen or PAPER_SEQLEN)
        PruningConfig.from_names(**self.choices)  # last, since it imports torch
