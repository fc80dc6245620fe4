"""The options of the commands, with their help: everything that can be refused before a library is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from wanda_lightning.checks import check_memory
from wanda_lightning.cli.parser import Rule, option
from wanda_lightning.data import image_sources, text_sources
from wanda_lightning.files import refuse_existing, refuse_nonempty, refuse_replacement
from wanda_lightning.methods import ALLOCATIONS, METHODS, PRESETS, SEQUENTIAL_CHOICES

TIMM = "timm:"  # before the name of an image classifier
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAPER_SEQLEN = 2048
PAPER_IMAGES, PAPER_SEQUENCES = 4096, 128
LEARNING_RATES = {"full": 2e-5, "lora": 1e-4, "keep-zeros-lora": 1e-4}
ADAPTERS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
PRECISIONS = ("32-true", "32", "64-true", "64", "16-true", "16-mixed", "bf16-true", "bf16-mixed")

_SUFFIXES = (".gguf", ".safetensors")
_TEXTS = "c4, wikitext2, python-docs (needs no network) or a FILE (.txt, .jsonl, .parquet)"
_LAYERS = "names, globs or re: expressions, separated by commas"


def _at_least(minimum: int) -> Rule:
    return Rule(f"be at least {minimum}", lambda value: value >= minimum)


def _is_pattern(value: str) -> bool:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error:
            return False
    return True


def _is_sparsity_type(value: str) -> bool:
    found = re.fullmatch(r"(\d+):(\d+)", value)
    return value == "unstructured" or (found is not None and 1 <= int(found[1]) < int(found[2]))


_SEED = Rule("be in [0, 4294967295]", lambda value: 0 <= value < 2**32)
_SPARSITY = Rule("be in [0, 1)", lambda value: 0 <= value < 1)
_SPARSITY_TYPE = Rule("be unstructured, or N:M with 1 <= N < M such as 2:4", _is_sparsity_type)
_PATTERNS = Rule("hold names, globs or re: with a regular expression", _is_pattern)
_POSITIVE = Rule("be above 0", lambda value: 0 < value < math.inf)
_DROPOUT = Rule("be in [0, 1)", lambda value: 0 <= value < 1)
_CACHE_DIR = "Folder that keeps downloads from the hub."
_TRUST = "Run the code that comes with a hub model."
_DTYPE = "Data type of the weights, by default auto, as they are stored."
_INCLUDE_GROUPED = "Prune grouped convolutions, too, each group as a matrix of its own."
_SKIP = f"Layers to leave dense: {_LAYERS}."
_ONLY = f"Layers to prune, by default all: {_LAYERS}."


@dataclass(kw_only=True)
class PruneOptions:
    """The options of `wanda-lightning prune`: the reference's flags and ours."""

    model: str = option(
        "Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.", MISSING
    )
    seed: int = option("Seed that draws the calibration samples.", 0, rule=_SEED)
    nsamples: int | None = option(
        "Number of calibration samples; by default 128 sequences or 4096 images, as in the paper.", rule=_at_least(1)
    )
    sparsity_ratio: float = option("Fraction of each pruned layer's weights that become zero.", 0.5, rule=_SPARSITY)
    sparsity_type: str = option("unstructured, or any N:M such as 2:4 and 4:8.", "unstructured", rule=_SPARSITY_TYPE)
    prune_method: str | None = option("Pruning method, by default wanda.", choices=tuple(METHODS))
    preset: str | None = option(
        "Instead of a method: fast (Wanda, one pass), balanced (better at every sparsity) or best.",
        choices=tuple(PRESETS),
    )
    cache_dir: str | None = option(_CACHE_DIR)
    use_variant: bool = option(
        "Let rows differ in sparsity: each loses the same share of its score (the paper's variant).", False
    )
    save: str | None = option("Folder for log_METHOD.txt and pruning_report.json.")
    save_model: str | None = option("Folder for the pruned model.")
    seqlen: int | None = option("Tokens in a window; by default the model's context, at most 2048.", rule=_at_least(2))
    calibration: str | None = option(f"Text to calibrate on, by default c4 as in the paper: {_TEXTS}.")
    eval: str | None = option(f"Text to measure perplexity on, by default wikitext2: {_TEXTS}.")
    limit: int | None = option("Number of windows to measure on; by default all.", rule=_at_least(1))
    sequential: str | None = option(
        "Whose pruning the statistics see: that of earlier blocks (block, the default for language models), of all "
        "earlier layers (layer), or of none (none, the default for image classifiers).",
        choices=SEQUENTIAL_CHOICES,
    )
    allocation: str | None = option(
        "How layers share the sparsity: all alike (uniform, the default); less where more scores are outliers (owl) or "
        "where the weights' spectrum has a heavier tail (alpha), per block or per layer; less where the predictions "
        "depend on more (fisher).",
        choices=tuple(ALLOCATIONS),
    )
    dtype: str | None = option(_DTYPE, choices=DTYPES)
    batch_size: int | None = option("Samples in a batch; by default 4 sequences or 64 images.", rule=_at_least(1))
    skip: list[str] = option(_SKIP, [], rule=_PATTERNS)
    only: list[str] = option(_ONLY, [], rule=_PATTERNS)
    include_grouped: bool = option(_INCLUDE_GROUPED, False)
    data_path: str | None = option(
        "Images to calibrate and measure on: a folder laid out like ImageNet, cifar10, cifar100, a hub id, or digits "
        "(8x8 digits, needs no network). An image classifier needs it."
    )
    prune_granularity: str | None = option(
        "What weights are compared within; by default the method's own, a layer for magnitude and sparsegpt, else a "
        "row.",
        choices=("row", "layer"),
    )
    min_expert_tokens: int = option(
        "An expert that receives fewer calibration tokens is pruned with the statistics of all experts of its module.",
        32,
        rule=_at_least(0),
    )
    resume: str | None = option("Weights (.safetensors) of the image classifier.")
    eval_zero_shot: bool = option(
        "Measure the pruned model on the paper's seven zero-shot tasks, too (needs lm-eval).", False
    )
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each of these tasks (see evaluate --help); by default they come from the hub."
    )
    overwrite: bool = option(
        "Add to a --save folder that is not empty, and replace a --save_model folder with everything in it.", False
    )
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if self.is_image:
            refuse_given(self, "an image classifier", "seqlen limit calibration eval dtype trust_remote_code")
            refuse_given(self, "an image classifier", "eval_zero_shot tasks_dir")
            _require_images(self.model, self.data_path)
        else:
            refuse_given(self, "a language model", "data_path resume")
        if not self.eval_zero_shot:
            refuse_given(self, "pruning without --eval_zero_shot", "tasks_dir")
        if self.preset is not None:
            refuse_given(self, "a preset, which chooses the method", "prune_method use_variant")
        if self.sparsity_type != "unstructured":
            refuse_given(self, f"--sparsity_type {self.sparsity_type}", "use_variant prune_granularity")
        if self.use_variant and (self.name != "wanda" or self.prune_granularity == "layer"):
            raise ValueError(
                f"--use_variant compares Wanda's scores within rows, but --prune_method is {self.name} and "
                f"--prune_granularity is {self.prune_granularity or 'row'}. Use --prune_method wanda within rows, or "
                "leave --use_variant out."
            )

    def refuse_early(self) -> None:
        """Refuse files that do not exist, places that cannot be written, and samples that do not fit in memory."""
        refuse_missing(self, "model resume tasks_dir")
        if self.is_image:
            image_sources.check_source(self.data_path or "", calibrates=True)
        else:
            text_sources.check_source(self.calibration or "c4", "--calibration")
            text_sources.check_source(self.eval or "wikitext2", "--eval")
        if self.save is not None:
            refuse_nonempty(self.save, self.overwrite)
        if self.save_model is not None:
            refuse_replacement(self.save_model, self.overwrite)
        if not self.is_image:
            check_memory("--nsamples", self.nsamples or PAPER_SEQUENCES, self.seqlen or PAPER_SEQLEN)

    @property
    def is_image(self) -> bool:
        """Whether the model is an image classifier."""
        return self.model.startswith(TIMM)

    @property
    def name(self) -> str:
        """The name of the method or the preset."""
        return self.preset or self.prune_method or "wanda"


@dataclass(kw_only=True)
class FinetuneOptions:
    """The options of `wanda-lightning finetune`."""

    model: str = option("Hub id, folder or .gguf file of the pruned model.", MISSING)
    method: str = option(
        "full trains all weights; keep-zeros-lora trains adapters that merge without filling a zero; lora trains plain "
        "adapters and puts the zeros back after the merge.",
        "keep-zeros-lora",
        choices=tuple(LEARNING_RATES),
    )
    dense: str | None = option("The model before it was pruned, to measure it, too.")
    save_model: str | None = option("Folder for the fine-tuned model, its adapters merged.")
    data: str = option(f"Text to train on: {_TEXTS}.", "c4")
    eval: str = option(f"Text to measure perplexity on: {_TEXTS}.", "wikitext2")
    limit: int | None = option("Number of windows to measure on; by default all.", rule=_at_least(1))
    steps: int = option("Optimizer steps.", 300, rule=_at_least(1))
    batch_size: int = option("Windows in a step.", 1, rule=_at_least(1))
    seqlen: int | None = option(
        "Tokens in a window; by default the model's context, at most 1024 (as in the paper).", rule=_at_least(2)
    )
    lr: float | None = option(
        "Learning rate of the first step, which falls linearly to 0; by default 1e-4 for adapters (as in the paper) "
        "and 2e-5 for all weights.",
        rule=_POSITIVE,
    )
    lora_r: int | None = option("Rank of the adapters, by default 8.", rule=_at_least(1))
    lora_alpha: int | None = option("Scale of the adapters times their rank, by default 16.", rule=_at_least(1))
    lora_dropout: float | None = option("Dropout of the adapters' inputs, by default 0.05.", rule=_DROPOUT)
    target_modules: list[str] | None = option(
        "Layers that get adapters, by the ends of their names, separated by commas, or all-linear; by default "
        "q_proj,v_proj."
    )
    precision: str | None = option("Precision of the Trainer; by default that of the weights.", choices=PRECISIONS)
    dtype: str | None = option(
        "Data type of the weights, by default auto, as they are stored; for --method full float32, since 16 bits would "
        "lose its small updates.",
        choices=DTYPES,
    )
    seed: int = option("Seed that draws the windows and initializes the adapters.", 0, rule=_SEED)
    cache_dir: str | None = option(_CACHE_DIR)
    overwrite: bool = option("Replace a --save_model folder with everything in it.", False)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if self.method == "full":
            refuse_given(self, "--method full, which trains no adapters", " ".join(ADAPTERS))
        for name in (self.model, self.dense or ""):
            if name.startswith(TIMM):
                raise ValueError(f"--model and --dense must be language models, but one is {name}.")

    def refuse_early(self) -> None:
        """Refuse files that do not exist, places that cannot be written, and samples that do not fit in memory."""
        refuse_missing(self, "model dense")
        text_sources.check_source(self.data, "--data")
        text_sources.check_source(self.eval, "--eval")
        if self.save_model is not None:
            refuse_replacement(self.save_model, self.overwrite)
        check_memory("--steps times --batch_size", self.steps * self.batch_size, self.seqlen or PAPER_SEQLEN)

    @property
    def adapters(self) -> dict[str, Any]:
        """The options of the adapters, those not given by their defaults."""
        given = {name: getattr(self, name) for name in ADAPTERS}
        return {name: ADAPTERS[name] if value is None else value for name, value in given.items()}


@dataclass(kw_only=True)
class EvaluateOptions:
    """The options of `wanda-lightning evaluate`."""

    model: list[str] = option(
        "Hub ids, folders or .gguf files of language models; or timm:NAME of image classifiers, a folder as "
        "timm:local-dir:FOLDER. Commas separate several.",
        MISSING,
    )
    dense: str | None = option("One more model, the first: the table shows the differences of the others to it.")
    eval: list[str] | None = option(
        f"Texts to measure perplexity on, by default wikitext2 as in the paper: {_TEXTS}. Commas separate several; an "
        "empty string is none."
    )
    tasks: list[str] = option(
        "Zero-shot tasks, separated by commas: boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa; "
        "or paper for all of them (needs lm-eval).",
        [],
    )
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each task, one document in a line, instead of the data sets on the hub. A "
        "document has these fields: boolq passage, question, label; rte sentence1, sentence2, label; hellaswag "
        "activity_label, ctx_a, ctx_b, endings, label; winogrande sentence, option1, option2, answer; arc_easy and "
        "arc_challenge question, choices, answerKey; openbookqa question_stem, choices, answerKey."
    )
    data_path: str | None = option(
        "Images to measure on: a folder laid out like ImageNet, cifar10, cifar100, a hub id, or digits (8x8 digits, "
        "needs no network). Image classifiers need it."
    )
    resume: list[str] | None = option(
        "Weights (.safetensors) of image classifiers, one for each --model, separated by commas."
    )
    limit: int | None = option("Number of windows of each text; by default all.", rule=_at_least(1))
    task_limit: int | None = option("Number of documents of each task; by default all.", rule=_at_least(1))
    seqlen: int | None = option("Tokens in a window; by default the model's context, at most 2048.", rule=_at_least(2))
    batch_size: int | None = option(
        "Windows or choices in a batch, by default 4; or images, by default 64.", rule=_at_least(1)
    )
    dtype: str | None = option(_DTYPE, choices=DTYPES)
    save: str | None = option("JSON file for all numbers.")
    cache_dir: str | None = option(_CACHE_DIR)
    overwrite: bool = option("Replace a --save file.", False)
    trust_remote_code: bool = option(_TRUST, False)

    def __post_init__(self) -> None:
        if len({name.startswith(TIMM) for name in self.models}) != 1:
            found = "both were given" if self.models else "none was given"
            raise ValueError(f"--model must name language models or image classifiers, but {found}.")
        if self.is_image:
            refuse_given(self, "an image classifier", "eval tasks tasks_dir limit task_limit seqlen dtype")
            refuse_given(self, "an image classifier", "trust_remote_code")
            _require_images(self.models[0], self.data_path)
        else:
            refuse_given(self, "a language model", "data_path resume")
            if not self.tasks:
                refuse_given(self, "an evaluation without --tasks", "tasks_dir task_limit")
        if self.resume is not None and len(self.resume) != len(self.model):
            raise ValueError(
                f"--resume must have one file for each --model, but it has {len(self.resume)} for {len(self.model)}."
            )

    def refuse_early(self) -> None:
        """Refuse files that do not exist, and a file that cannot be written."""
        refuse_missing(self, "model dense resume tasks_dir")
        if self.is_image:
            image_sources.check_source(self.data_path or "")
        for text in self.eval or ():
            text_sources.check_source(text, "--eval")
        if self.save is not None:
            refuse_existing(self.save, self.overwrite)

    @property
    def models(self) -> list[str]:
        """The names of all models, without repetitions, the dense one first."""
        return list(dict.fromkeys([*([self.dense] if self.dense else []), *self.model]))

    @property
    def is_image(self) -> bool:
        """Whether the models are image classifiers."""
        return self.models[0].startswith(TIMM)


@dataclass(kw_only=True)
class InspectOptions:
    """The options of `wanda-lightning inspect`."""

    model: str = option(
        "Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.", MISSING
    )
    sequential: str = option(
        "Where calibration batches stop: at blocks, at layers, or nowhere (none).", "block", choices=SEQUENTIAL_CHOICES
    )
    skip: list[str] = option(_SKIP, [], rule=_PATTERNS)
    only: list[str] = option(_ONLY, [], rule=_PATTERNS)
    include_grouped: bool = option(_INCLUDE_GROUPED, False)
    sparsity_type: str = option(
        "unstructured, or any N:M: layers whose input width is not a multiple of M stay dense.",
        "unstructured",
        rule=_SPARSITY_TYPE,
    )
    cache_dir: str | None = option(_CACHE_DIR)
    trust_remote_code: bool = option(_TRUST, False)

    def refuse_early(self) -> None:
        """Refuse a file that does not exist."""
        refuse_missing(self, "model")


def refuse_given(options: Any, purpose: str, names: str) -> None:
    """Refuse options that were given although they mean nothing for this purpose.

    Raises:
        ValueError: Names all of them.
    """
    given = [f"--{name}" for name in names.split() if getattr(options, name) not in (None, False, [])]
    if given:
        verb = "has" if len(given) == 1 else "have"
        raise ValueError(
            f"{', '.join(given)} {verb} no meaning for {purpose}. Leave {'it' if verb == 'has' else 'them'} out."
        )


def _require_images(model: str, data_path: str | None) -> None:
    if data_path is None:
        raise ValueError(
            f"--data_path is required for the image classifier {model}: give a folder laid out like ImageNet, cifar10, "
            "cifar100 or a hub id with the classes that the model was trained on, or digits to try the command out."
        )


def refuse_missing(options: Any, names: str) -> None:
    """Refuse local files and folders that do not exist; a name that may be a hub id is left to the hub.

    Raises:
        FileNotFoundError: Names the option and the path.
    """
    for name in names.split():
        given = getattr(options, name)
        for value in [given] if isinstance(given, str) else given or ():
            path = Path(value.removeprefix("timm:local-dir:"))
            is_local = name in ("resume", "tasks_dir") or path.is_absolute() or path.suffix in _SUFFIXES
            if is_local and not path.exists():
                raise FileNotFoundError(f"--{name} {value} does not exist. Check the path.")
