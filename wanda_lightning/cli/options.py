"""The options of all commands with their help, and the checks of them that need no model."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass
from functools import partial

from wanda_lightning.cli.common_options import (
    COUNT,
    DTYPES,
    IMAGES_HELP,
    LIMIT_HELP,
    PAPER_SEQLEN,
    SEQLEN_HELP,
    TEXTS_HELP,
    TIMM,
    WINDOW,
    ModelOptions,
    SaveOptions,
)
from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.parser import option
from wanda_lightning.cli.pruning_options import InspectOptions, PruneOptions
from wanda_lightning.common.atomic_write import require_writable
from wanda_lightning.common.checks import SEED, Number, OneOf
from wanda_lightning.common.memory import check_memory
from wanda_lightning.data import image_sources, text_sources

LEARNING_RATES = {"full": 2e-5, "lora": 1e-4, "keep-zeros-lora": 1e-4}
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "paper", "all")
PRECISIONS = ("32-true", "32", "64-true", "64", "16-true", "16-mixed", "bf16-true", "bf16-mixed")


@dataclass(kw_only=True)
class FinetuneOptions(SaveOptions):
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
    data: str = option(f"Text to train on: {TEXTS_HELP}.", "c4")
    evaluation: str = option(f"Text to measure perplexity on: {TEXTS_HELP}.", "wikitext2", alias="eval")
    limit: int | None = option(LIMIT_HELP, rule=COUNT)
    steps: int = option("Number of optimizer steps.", 300, rule=COUNT)
    batch_size: int = option("Number of windows in a step, on each device.", 1, rule=COUNT)
    devices: int = option("Number of devices to train on.", 1, rule=COUNT)
    seqlen: int | None = option(f"{SEQLEN_HELP} 1024 (as in the paper).", rule=WINDOW)
    lr: float | None = option(
        "Learning rate of the first step, which falls linearly to 0; by default 1e-4 for adapters (as in the paper) "
        "and 2e-5 for all weights.",
        rule=Number(above=0),
    )
    lora_r: int = option("Rank of the adapters.", 8, rule=COUNT)
    lora_alpha: int = option("Scale of the adapters times their rank.", 16, rule=COUNT)
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
    seed: int = option("Seed that draws the windows and initializes the adapters.", 0, rule=SEED)

    def __post_init__(self) -> None:
        if self.method == "full":
            adapters = "lora_r lora_alpha lora_dropout target_modules"
            self.refuse_given("--method full, which trains no adapters", adapters)
        if self.distill and self.dense is None:
            raise UsageError("--distill learns from the dense model, but none is given. Name it with --dense.")
        if self.distill and self.dense is not None and os.path.realpath(self.dense) == os.path.realpath(self.model):
            raise UsageError(f"--distill learns from the dense model, but --dense is the pruned one, {self.model}.")
        for name in (self.model, self.dense or ""):
            if name.startswith(TIMM):
                raise UsageError(f"--model and --dense must be language models, but one is {name}.")

    def refuse_early(self) -> None:
        """Refuse files that do not exist, places that cannot be written, and samples that do not fit in memory."""
        self.refuse_missing("model dense")
        text_sources.check_source(self.data, "--data")
        text_sources.check_source(self.evaluation, "--evaluation")
        self.refuse_place("save_model", require_writable)
        self.refuse_replaced("dense")
        self.refuse_push("fine-tuning")
        windows = self.steps * self.batch_size * self.devices
        check_memory("--steps times --batch_size", windows, self.seqlen or PAPER_SEQLEN)


@dataclass(kw_only=True)
class ShrinkOptions(SaveOptions):
    """The options of `wanda-lightning shrink`."""

    model: str = option(
        "Hub id, folder or .gguf file of a language model, or timm:NAME of an image classifier, a folder as "
        "timm:local-dir:FOLDER, that is pruned with --pattern structured.",
        MISSING,
    )
    stream: bool = option("Read a language model block by block from disk, and write each smaller block.", False)
    save_model: str | None = option("Folder for the smaller model. Without it, what could be taken out is only shown.")

    def __post_init__(self) -> None:
        if self.model.startswith(TIMM):
            self.refuse_given("an image classifier", "dtype revision trust_remote_code stream")
        if self.stream and self.save_model is None:
            raise UsageError("--stream writes each smaller block to --save_model, which is missing. Add it.")

    def refuse_early(self) -> None:
        """Refuse a model that does not exist, and a place that cannot be written."""
        self.refuse_missing("model")
        self.refuse_place("save_model", require_writable)
        self.refuse_replaced("model")
        self.refuse_push("shrinking")


@dataclass(kw_only=True)
class EvaluateOptions(ModelOptions):
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
    evaluation: list[str] | None = option(
        f"Texts to measure perplexity on, by default wikitext2 as in the paper: {TEXTS_HELP}. An empty string: none.",
        alias="eval",
    )
    tasks: list[str] = option("Zero-shot tasks (need lm-eval); paper stands for all of them.", [], rule=OneOf(TASKS))
    tasks_dir: str | None = option(
        "Folder with a TASK.jsonl for each task, one document in a line, instead of the data sets on the hub. A "
        "document has these fields: boolq passage, question, label; rte sentence1, sentence2, label; hellaswag "
        "activity_label, ctx_a, ctx_b, endings, label; winogrande sentence, option1, option2, answer; arc_easy and "
        "arc_challenge question, choices, answerKey; openbookqa question_stem, choices, answerKey."
    )
    data: str | None = option(f"Images to measure on: {IMAGES_HELP}", alias="data_path")
    checkpoint: list[str] | None = option(
        "Weights (.safetensors) of image classifiers, one for each --model.", alias="resume"
    )
    limit: int | None = option("Number of windows of each text; by default all.", rule=COUNT)
    task_limit: int | None = option("Number of documents of each task; by default all.", rule=COUNT)
    seqlen: int | None = option(f"{SEQLEN_HELP} {PAPER_SEQLEN}.", rule=WINDOW)
    batch_size: int | None = option(
        "Number of windows or of answers in a batch, by default 4; or of images, by default 64.", rule=COUNT
    )
    save: str | None = option("JSON file for all numbers.")
    overwrite: bool = option("Replace a --save file.", False)

    def __post_init__(self) -> None:
        if len({name.startswith(TIMM) for name in self.models}) != 1:
            found = "both were given" if self.models else "none was given"
            raise UsageError(f"--model must name language models or image classifiers, but {found}.")
        language = "evaluation tasks tasks_dir limit task_limit seqlen dtype revision trust_remote_code"
        self.refuse_other_kind(self.models[0], self.data, language)
        if not self.tasks:
            self.refuse_given("an evaluation without --tasks", "tasks_dir task_limit")
        if self.checkpoint is not None and len(self.checkpoint) != len(self.model):
            raise UsageError(
                f"--checkpoint must have one file for each --model, but it has {len(self.checkpoint)} for "
                f"{len(self.model)}."
            )

    def refuse_early(self) -> None:
        """Refuse files that do not exist, and a file that cannot be written."""
        self.refuse_missing("model dense pruned checkpoint tasks_dir")
        if self.is_image:
            image_sources.check_source(self.data or "")
        for text in self.evaluation or ():
            text_sources.check_source(text, "--evaluation")
        self.refuse_place("save", partial(require_writable, kind="file"))

    @property
    def models(self) -> list[str]:
        """The names of all models, without repetitions, the dense one first, then the pruned one."""
        return list(dict.fromkeys([*filter(None, (self.dense, self.pruned)), *self.model]))

    @property
    def is_image(self) -> bool:
        """Whether the models are image classifiers."""
        return self.models[0].startswith(TIMM)


OPTIONS: dict[str, type] = {
    "prune": PruneOptions,
    "shrink": ShrinkOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "inspect": InspectOptions,
}
