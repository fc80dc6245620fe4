"""The options of the commands with their help, and all checks of them that need no model."""

from __future__ import annotations

import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml

from wanda_lightning.cli.parser import UsageError, as_list, default_of, option
from wanda_lightning.common.checks import check_memory, check_report_path
from wanda_lightning.common.files import (
    PROGRESS_NAME,
    refuse_existing,
    refuse_nonempty,
    refuse_replacement,
    refuse_unresumable,
)
from wanda_lightning.common.model_source import why_missing, why_no_language_model
from wanda_lightning.config import NAMES, PruningConfig
from wanda_lightning.core.hyperparameters import Number, OneOf
from wanda_lightning.data import image_sources, text_sources
from wanda_lightning.hub.upload import refuse_upload
from wanda_lightning.methods import PARKING

FLAGS = {"sparsity": "sparsity_ratio", "pattern": "sparsity_type", "method": "prune_method"}
"""The names in the reference code of some arguments of `PruningConfig.from_names`."""

TIMM = "timm:"  # before the name of an image classifier
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAPER_SEQLEN = 2048
PAPER_IMAGES, PAPER_SEQUENCES = 4096, 128
IMAGES_AT_ONCE, SEQUENCES_AT_ONCE = 64, 4
LEARNING_RATES = {"full": 2e-5, "lora": 1e-4, "keep-zeros-lora": 1e-4}
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "paper", "all")
PRECISIONS = ("32-true", "32", "64-true", "64", "16-true", "16-mixed", "bf16-true", "bf16-mixed")

_TEXTS = "c4, wikitext2, python-docs, sklearn-docs (these two need no network) or a FILE (.txt, .jsonl, .parquet)"
_IMAGES = (
    "a folder laid out like ImageNet, cifar10, cifar100, a hub id, or digits (8x8 digits, needs no network). Required "
    "for image classifiers."
)
_CACHE_DIR = "Folder for downloads from the hub."
_TRUST = "Run the code that comes with a hub model."
_DTYPE = "Data type of the weights; by default auto, as they are stored."
_LIMIT = "Number of windows to measure on; by default all."
_REPORT = "Page (.html) or picture (.png) to write, with figures and tables (needs the extra report)."
_PUSH = "OWNER/NAME of a repository on the Hugging Face hub, to which the saved model is uploaded."
_PRIVATE = "Make the repository of --push_to_hub private if it is new, and refuse a public one."
_SEQLEN = "Number of tokens in a window; by default the model's context, at most"


_COUNT = Number(minimum=1, whole=True)
_WINDOW = Number(minimum=2, whole=True)
_SEED = Number(minimum=0, maximum=2**32 - 1, whole=True)


class _Pattern(OneOf):
    def accepts(self, value: object) -> bool:
        found = re.fullmatch(r"(\d+):(\d+)", str(value))
        return 1 <= int(found[1]) < int(found[2]) if found else super().accepts(value)


def _pruning_options() -> Iterator[tuple[str, str, Any]]:
    """Yield an option for each argument of `PruningConfig.from_names`, with the first sentence of its description."""
    text = inspect.getdoc(PruningConfig.from_names) or ""  # none under python -OO
    described = dict(re.findall(r"^ {4}(\w+): (.+?\.)(?=\s|\Z)", text, flags=re.DOTALL | re.MULTILINE))
    for name, parameter in inspect.signature(PruningConfig.from_names).parameters.items():
        help = " ".join(described.get(name, "").replace("`", "").split())
        rule = OneOf(tuple(NAMES[name])) if name in NAMES else None
        if name == "pattern":
            rule = _Pattern(("unstructured", *NAMES[name], "any other N:M with 1 <= N < M"))
        yield FLAGS.get(name, name), parameter.annotation, option(help, parameter.default, rule, keyword=name)


_MODEL = option(
    "Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.",
    MISSING,
)
_ModelAndPruning: Any = make_dataclass(
    "_ModelAndPruning", [("model", "str", _MODEL), *_pruning_options()], kw_only=True
)


@dataclass(kw_only=True)
class InspectOptions(_ModelAndPruning):  # type: ignore[misc]  # its base is made from PruningConfig
    """The options of `wanda-lightning inspect`: the model, all choices of pruning, and the reference's flags."""

    use_variant: bool = option(
        "Let rows differ in sparsity: each row loses the same share of its total score (the paper's variant).", False
    )
    prune_granularity: str | None = option(
        "Compare weights within rows or within layers; by default as in the method's paper: within layers for "
        "magnitude and sparsegpt, else within rows.",
        rule=OneOf(("row", "layer")),
    )
    stream: bool = option(
        "Also print the memory that prune --stream needs, and fail if this machine has less; no weight is read.", False
    )
    nsamples: int | None = option(
        "Number of calibration samples; by default 128 sequences or 4096 images, as in the paper.", rule=_COUNT
    )
    seqlen: int | None = option(f"{_SEQLEN} {PAPER_SEQLEN}.", rule=_WINDOW)
    batch_size: int | None = option(
        f"Number of samples in a batch; by default {SEQUENCES_AT_ONCE} sequences or {IMAGES_AT_ONCE} images.",
        rule=_COUNT,
    )
    dtype: str | None = option(_DTYPE, rule=OneOf(DTYPES))
    park: str = option(
        "Where the activations of batches are while they wait, with --stream: memory (of --device), cpu (its "
        "memory, if --device is another), or disk (files beside the pruned model).",
        "memory",
        rule=OneOf(PARKING),
    )
    cache_dir: str | None = option(_CACHE_DIR)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if self.stream and self.model.endswith(".gguf"):
            raise UsageError(
                f"--stream reads a folder or hub model in safetensors, but --model is {self.model}. Give such a "
                "model, or leave --stream out."
            )
        if self.sparsity_type != "unstructured":
            refuse_given(self, f"--sparsity_type {self.sparsity_type}", "use_variant prune_granularity")
        is_wanda = self.method == "wanda" and self.criterion in (None, "wanda") and self.solver in (None, "zero_out")
        if self.use_variant and (not is_wanda or self.prune_granularity == "layer"):
            raise UsageError(
                f"--use_variant compares Wanda's scores within rows, but --prune_method is {self.name} and "
                f"--prune_granularity is {self.prune_granularity or 'row'}. Use --prune_method wanda within rows, or "
                "leave --use_variant out."
            )

    def refuse_early(self) -> None:
        """Refuse a file that does not exist, and choices that contradict each other."""
        if self.is_image:
            refuse_given(self, "an image classifier", "stream")
        if not self.stream:
            refuse_given(self, "inspect without --stream", "nsamples seqlen batch_size dtype park")
        refuse_missing(self, "model")
        _ = self.config

    @property
    def is_image(self) -> bool:
        """Whether the model is an image classifier."""
        return self.model.startswith(TIMM)

    @property
    def method(self) -> str:
        """The method, Wanda by default."""
        return self.prune_method or "wanda"

    @property
    def name(self) -> str:
        """The label of the results: the method, and the choices that replace its own."""
        method = self.prune_method
        if method is None and self.criterion is None and self.solver is None:
            method = "wanda"
        names = (method, self.criterion, self.solver, self.allocation, self.recovery)
        return "_".join(name for name in names if name is not None)

    @property
    def choices(self) -> dict[str, Any]:
        """The arguments of `PruningConfig.from_names`."""
        names = inspect.signature(PruningConfig.from_names).parameters
        choices = {name: getattr(self, FLAGS.get(name, name)) for name in names} | {"method": self.method}
        if self.use_variant:
            choices["pattern"] = "equal_share"
        elif self.prune_granularity is not None:
            choices["pattern"] = f"unstructured_{self.prune_granularity}"
        return choices

    @property
    def config(self) -> PruningConfig:
        """The choices as objects. The sparsity of N:M need not be given, since `inspect` does not show it."""
        choices = self.choices
        if ":" in self.sparsity_type:
            n, m = map(int, self.sparsity_type.split(":"))
            choices["sparsity"] = 1 - n / m
        return PruningConfig.from_names(**choices)


@dataclass(kw_only=True)
class PruneOptions(InspectOptions):
    """The options of `wanda-lightning prune`: those of `inspect`, the data, and where the results go."""

    seed: int = option("Seed that draws the calibration samples.", 0, rule=_SEED)
    calibration: str | None = option(
        f"Text to calibrate on, by default c4 as in the paper: {_TEXTS}; or self, what the dense model writes."
    )
    eval: list[str] | None = option(
        f"Texts to measure perplexity on, by default wikitext2: {_TEXTS}. The first is the one that counts."
    )
    limit: int | None = option(_LIMIT, rule=_COUNT)
    data_path: str | None = option(f"Images to calibrate and measure on: {_IMAGES}")
    resume: str | None = option("Weights (.safetensors) of the image classifier.")
    save: str | None = option("Folder for log_METHOD.txt and pruning_report.json.")
    report: str | None = option(_REPORT)
    save_model: str | None = option("Folder for the pruned model.")
    push_to_hub: str | None = option(_PUSH)
    private: bool = option(_PRIVATE, False)
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
    eval_zero_shot: bool = option(
        "Also measure the pruned model on the paper's seven zero-shot tasks (needs lm-eval).", False
    )
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each of these tasks (see evaluate --help); by default they come from the hub."
    )

    def __post_init__(self) -> None:
        if self.is_image:
            language = "seqlen limit calibration eval dtype trust_remote_code stream eval_zero_shot tasks_dir"
            refuse_given(self, "an image classifier", language)
            _require_images(self.model, self.data_path)
        else:
            refuse_given(self, "a language model", "data_path resume")
        if not self.eval_zero_shot:
            refuse_given(self, "pruning without --eval_zero_shot", "tasks_dir")
        if self.stream:
            writes = self.save or self.report
            refuse_given(self, "--stream", "eval_zero_shot" if writes else "overwrite eval_zero_shot")
            if self.save_model is None:
                raise UsageError("--stream writes each pruned block to --save_model, which is missing. Add it.")
            if self.calibration == text_sources.SELF:
                raise UsageError(
                    f"--calibration {self.calibration} needs the whole model in memory to write a text, but --stream "
                    "reads it block by block. Give a text, or leave --stream out."
                )
        else:
            refuse_given(self, "pruning without --stream, which uses a GPU if there is one", "device park")
        _refuse_push(self, "pruning")
        super().__post_init__()

    def refuse_early(self) -> None:
        """Also refuse other files that do not exist, places that cannot be written, and too many samples."""
        refuse_missing(self, "model resume tasks_dir")
        _refuse_place(self, "save_model", refuse_unresumable if self.stream else refuse_replacement)
        if not (self.stream and (Path(self.save_model or "").expanduser() / PROGRESS_NAME).is_file()):
            _refuse_place(self, "save", refuse_nonempty)  # a run that continues may find its model there
        if self.report is not None:
            check_report_path(self.report)
        _refuse_place(self, "report", refuse_existing)
        if self.push_to_hub is not None:
            refuse_upload(self.push_to_hub, self.private)
        if self.is_image:
            image_sources.check_source(self.data_path or "", calibrates=True)
        else:
            if self.calibration != text_sources.SELF:
                text_sources.check_source(self.calibration or "c4", "--calibration")
            for text in self.eval or ():
                text_sources.check_source(text, "--eval")
            check_memory("--nsamples", self.nsamples or PAPER_SEQUENCES, self.seqlen or PAPER_SEQLEN)
        PruningConfig.from_names(**self.choices)  # last, since it imports torch


@dataclass(kw_only=True)
class FinetuneOptions:
    """The options of `wanda-lightning finetune`."""

    model: str = option("Hub id, folder or .gguf file of the pruned model.", MISSING)
    method: str = option(
        "full trains all weights; keep-zeros-lora trains adapters that merge without filling a zero; lora trains plain "
        "adapters and sets the pruned weights to zero again after the merge.",
        "keep-zeros-lora",
        rule=OneOf(tuple(LEARNING_RATES)),
    )
    dense: str | None = option("The model before pruning, to measure it for comparison.")
    distill: bool = option(
        "Also learn the predictions of --dense, which are half of the loss: it needs memory for a second model.", False
    )
    save_model: str | None = option("Folder for the fine-tuned model, with its adapters merged.")
    push_to_hub: str | None = option(_PUSH)
    private: bool = option(_PRIVATE, False)
    data: str = option(f"Text to train on: {_TEXTS}.", "c4")
    eval: str = option(f"Text to measure perplexity on: {_TEXTS}.", "wikitext2")
    limit: int | None = option(_LIMIT, rule=_COUNT)
    steps: int = option("Number of optimizer steps.", 300, rule=_COUNT)
    batch_size: int = option("Number of windows in a step, on each device.", 1, rule=_COUNT)
    devices: int = option("Number of devices to train on.", 1, rule=_COUNT)
    seqlen: int | None = option(f"{_SEQLEN} 1024 (as in the paper).", rule=_WINDOW)
    lr: float | None = option(
        "Learning rate of the first step, which falls linearly to 0; by default 1e-4 for adapters (as in the paper) "
        "and 2e-5 for all weights.",
        rule=Number(above=0),
    )
    lora_r: int = option("Rank of the adapters.", 8, rule=_COUNT)
    lora_alpha: int = option("Scale of the adapters times their rank.", 16, rule=_COUNT)
    lora_dropout: float = option("Dropout of the adapters' inputs.", 0.05, rule=Number(minimum=0, below=1))
    target_modules: list[str] = option(
        "Layers that get adapters, each given by the end of its name, or all-linear.", ["q_proj", "v_proj"]
    )
    precision: str | None = option("Precision of the Trainer; by default that of the weights.", rule=OneOf(PRECISIONS))
    dtype: str | None = option(
        "Data type of the weights; by default auto, as they are stored, and float32 for --method full, since its small "
        "updates would be lost in 16 bits.",
        rule=OneOf(DTYPES),
    )
    seed: int = option("Seed that draws the windows and initializes the adapters.", 0, rule=_SEED)
    cache_dir: str | None = option(_CACHE_DIR)
    overwrite: bool = option("Replace a --save_model folder with everything in it.", False)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if self.method == "full":
            adapters = "lora_r lora_alpha lora_dropout target_modules"
            refuse_given(self, "--method full, which trains no adapters", adapters)
        _refuse_push(self, "fine-tuning")
        if self.distill and self.dense is None:
            raise UsageError("--distill learns from the dense model, but none is given. Name it with --dense.")
        if self.distill and self.dense is not None and Path(self.dense).resolve() == Path(self.model).resolve():
            raise UsageError(f"--distill learns from the dense model, but --dense is the pruned one, {self.model}.")
        for name in (self.model, self.dense or ""):
            if name.startswith(TIMM):
                raise UsageError(f"--model and --dense must be language models, but one is {name}.")

    def refuse_early(self) -> None:
        """Refuse files that do not exist, places that cannot be written, and samples that do not fit in memory."""
        refuse_missing(self, "model dense")
        text_sources.check_source(self.data, "--data")
        text_sources.check_source(self.eval, "--eval")
        _refuse_place(self, "save_model", refuse_replacement)
        if self.push_to_hub is not None:
            refuse_upload(self.push_to_hub, self.private)
        windows = self.steps * self.batch_size * self.devices
        check_memory("--steps times --batch_size", windows, self.seqlen or PAPER_SEQLEN)


@dataclass(kw_only=True)
class EvaluateOptions:
    """The options of `wanda-lightning evaluate`."""

    model: list[str] = option(
        "Hub ids, folders or .gguf files of language models; or timm:NAME of image classifiers, a folder as "
        "timm:local-dir:FOLDER.",
        MISSING,
    )
    dense: str | None = option(
        "The dense model. It is measured first, and the table shows how the others differ from it."
    )
    pruned: str | None = option(
        "The pruned model from which --model was made, for example by quantizing it. It is measured, too, and the "
        "table shows which share of its zeros each of --model has lost."
    )
    eval: list[str] | None = option(
        f"Texts to measure perplexity on, by default wikitext2 as in the paper: {_TEXTS}. An empty string: none."
    )
    tasks: list[str] = option("Zero-shot tasks (need lm-eval); paper stands for all of them.", [], rule=OneOf(TASKS))
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each task, one document in a line, instead of the data sets on the hub. A "
        "document has these fields: boolq passage, question, label; rte sentence1, sentence2, label; hellaswag "
        "activity_label, ctx_a, ctx_b, endings, label; winogrande sentence, option1, option2, answer; arc_easy and "
        "arc_challenge question, choices, answerKey; openbookqa question_stem, choices, answerKey."
    )
    data_path: str | None = option(f"Images to measure on: {_IMAGES}")
    resume: list[str] | None = option("Weights (.safetensors) of image classifiers, one for each --model.")
    limit: int | None = option("Number of windows of each text; by default all.", rule=_COUNT)
    task_limit: int | None = option("Number of documents of each task; by default all.", rule=_COUNT)
    seqlen: int | None = option(f"{_SEQLEN} {PAPER_SEQLEN}.", rule=_WINDOW)
    batch_size: int | None = option(
        "Number of windows or of answers in a batch, by default 4; or of images, by default 64.", rule=_COUNT
    )
    dtype: str | None = option(_DTYPE, rule=OneOf(DTYPES))
    save: str | None = option("JSON file for all numbers.")
    cache_dir: str | None = option(_CACHE_DIR)
    overwrite: bool = option("Replace a --save file.", False)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if len({name.startswith(TIMM) for name in self.models}) != 1:
            found = "both were given" if self.models else "none was given"
            raise UsageError(f"--model must name language models or image classifiers, but {found}.")
        if self.is_image:
            language = "eval tasks tasks_dir limit task_limit seqlen dtype trust_remote_code"
            refuse_given(self, "an image classifier", language)
            _require_images(self.models[0], self.data_path)
        else:
            refuse_given(self, "a language model", "data_path resume")
            if not self.tasks:
                refuse_given(self, "an evaluation without --tasks", "tasks_dir task_limit")
        if self.resume is not None and len(self.resume) != len(self.model):
            raise UsageError(
                f"--resume must have one file for each --model, but it has {len(self.resume)} for {len(self.model)}."
            )

    def refuse_early(self) -> None:
        """Refuse files that do not exist, and a file that cannot be written."""
        refuse_missing(self, "model dense pruned resume tasks_dir")
        if self.is_image:
            image_sources.check_source(self.data_path or "")
        for text in self.eval or ():
            text_sources.check_source(text, "--eval")
        _refuse_place(self, "save", refuse_existing)

    @property
    def models(self) -> list[str]:
        """The names of all models, without repetitions, the dense one first, then the pruned one."""
        return list(dict.fromkeys([*filter(None, (self.dense, self.pruned)), *self.model]))

    @property
    def is_image(self) -> bool:
        """Whether the models are image classifiers."""
        return self.models[0].startswith(TIMM)


@dataclass(kw_only=True)
class SpeedOptions:
    """The options of `wanda-lightning speed`."""

    model: str = option("Hub id or folder of a language model that is pruned to 2:4.", MISSING)
    seqlen: int = option("Number of tokens in the prompt.", 128, rule=_WINDOW)
    tokens: int = option("Number of tokens to generate.", 64, rule=_COUNT)
    dtype: str | None = option(_DTYPE, rule=OneOf(DTYPES))
    cache_dir: str | None = option(_CACHE_DIR)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if self.model.startswith(TIMM):
            raise UsageError(f"--model must be a language model, but it is {self.model}.")

    def refuse_early(self) -> None:
        """Refuse a file that does not exist."""
        refuse_missing(self, "model")


OPTIONS: dict[str, type] = {
    "prune": PruneOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "inspect": InspectOptions,
    "speed": SpeedOptions,
}


def as_given(options: Any) -> dict[str, Any]:
    """Return the options that were given or have a default, for reports."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def as_command(command: str, options: Any, always: Collection[str] = ()) -> str:
    """Return a shell command with the options that differ from their defaults, and with those in `always`."""
    words = ["wanda-lightning", command]
    for each in fields(options):
        value = getattr(options, each.name)
        if value == default_of(each) and each.name not in always:
            continue
        if isinstance(value, list):
            listed, value = value, ",".join(value)
            if as_list(value) != listed:
                value = yaml.safe_dump(listed, default_flow_style=True, width=math.inf).strip()
        words += [f"--{each.name}"] if value is True else [f"--{each.name}", str(value)]
    return shlex.join(words)


def refuse_given(options: Any, purpose: str, names: str) -> None:
    """Raise a UsageError for options that do not have their defaults although they mean nothing for this purpose."""
    defaults = {each.name: default_of(each) for each in fields(options)}
    given = [f"--{name}" for name in names.split() if getattr(options, name) != defaults[name]]
    if given:
        verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise UsageError(f"{', '.join(given)} {verb} no meaning for {purpose}. Leave {them} out.")


def _refuse_push(options: Any, what: str) -> None:
    for needed, name in (("save_model", "push_to_hub"), ("push_to_hub", "private")):
        if getattr(options, needed) is None:
            refuse_given(options, f"{what} without --{needed}", name)


def _require_images(model: str, data_path: str | None) -> None:
    if data_path is None:
        raise UsageError(
            f"--data_path is required for the image classifier {model}: give a folder laid out like ImageNet, cifar10, "
            "cifar100 or a hub id with the classes that the model was trained on, or digits to try the command out."
        )


def refuse_missing(options: Any, names: str) -> None:
    """Raise a UsageError for a file or folder that does not exist, unless its name may be a hub id."""
    for name in names.split():
        given = getattr(options, name)
        for value in [given] if isinstance(given, str) else given or ():
            path = value.removeprefix("timm:local-dir:")
            if name in ("resume", "tasks_dir") or path != value:
                path = os.path.abspath(path)  # never a hub id
            if reason := why_missing(path):
                raise UsageError(f"--{name} {value} {reason}")
            if name in ("model", "dense", "pruned") and path == value and (reason := why_no_language_model(Path(path))):
                raise UsageError(f"--{name} {value} {reason}")


def _refuse_place(options: Any, name: str, refuse: Callable[[str, bool], None]) -> None:
    """Raise a UsageError that starts with the option if a path cannot be written."""
    if (path := getattr(options, name)) is not None:
        if not path.strip():
            raise UsageError(f"--{name} must be a path, but it is {path!r}.")
        try:
            refuse(path, options.overwrite)
        except OSError as error:
            raise UsageError(f"--{name} {error}") from error
