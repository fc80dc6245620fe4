"""The options of the commands: how they are typed, read from files, shown in help, and turned back into a command.

cyclopts makes names, types, defaults, help and refusals from these classes.
"""

import inspect
import re
import shlex
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter
from cyclopts.config import Yaml
from cyclopts.validators import Number

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.checks import SEED
from wanda_lightning.common.model_source import ModelSource, is_embedding_model
from wanda_lightning.common.wording import one_line
from wanda_lightning.config import NAMES, PruningConfig, check_pattern


def split_names(type_: Any, tokens: Iterable[Any]) -> tuple[str, ...]:
    """Split texts at commas; a regular expression (re:...) is an argument of its own.

    Example:
        >>> from cyclopts import Token
        >>> split_names(None, [Token(value="lm_head, *.down_proj"), Token(value="re:x{1,3}")])
        ('lm_head', '*.down_proj', 're:x{1,3}')
    """
    names = []
    for token in tokens:
        if token.value.startswith("re:"):
            names.append(token.value)
        else:
            names += map(str.strip, token.value.split(","))
    return tuple(filter(None, names))


def _whole_number(type_: Any, tokens: Iterable[Any]) -> int:
    """Read a whole number; by itself, cyclopts rounds 1.5."""
    (token,) = tokens
    if not re.fullmatch(r"[+-]?[0-9]+", token.value):  # int() also reads 1_0
        raise ValueError(f"must be a whole number, but it is {token.value}.")
    return int(token.value)


def _known_texts(type_: Any, texts: Any) -> None:
    """Refuse an unknown text or file of pairs. The data modules refuse those that are not for their models."""
    from wanda_lightning.data.sentence_pairs import STSB
    from wanda_lightning.data.text_sources import SELF, check_source

    if isinstance(texts, str):
        texts = [texts]
    for text in texts:
        if text not in (SELF, STSB) and not text.endswith(".csv"):
            check_source(text)


def _known_calibration(type_: Any, texts: Any) -> None:
    """Refuse an unknown text, and none at all."""
    _known_texts(type_, texts or [""])


class _File(Yaml):
    """A YAML file with options, which are read as text, since YAML reads 2:4 as 124; null stands for the default."""

    def _load_config(self, path: Path) -> Any:
        import yaml

        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise CycloptsError(
                msg=f"--config must name YAML files with options, but {path} cannot be read: {one_line(error)}"
            ) from error

        if not isinstance(content, dict):
            return content  # which cyclopts refuses

        for name, value in content.items():
            if isinstance(value, dict):  # cyclopts ignores what is below the name of a command
                raise CycloptsError(
                    msg=f"--config must name YAML files with options at their top level, but in {path}, {name} holds "
                    "others. Move them up."
                )
        return {name: value for name, value in content.items() if value != "null"}


def read_files(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Read the options that were not given as arguments from the files of `Session.config`, the last file first."""
    tokens = arguments["--config"].tokens if arguments.get("--config", None) else []
    for path in reversed(split_names(None, tokens)):
        _File(path, must_exist=True, use_commands_as_keys=False)(app, commands, arguments)


def values_of(*groups: object) -> Kwargs:
    """Return all options by name."""
    values: Kwargs = {}
    for group in groups:
        values |= vars(group)
    return values


def given_in(*groups: Any) -> set[str]:
    """Return the names of the options that differ from their defaults."""
    return {
        option.name
        for group in groups
        for option in fields(group)
        if getattr(group, option.name) != option.default
    }


def as_command(command: str, *groups: Any, always: Collection[str] = ()) -> str:
    """Return a shell command with the options that differ from their defaults, and with those in `always`."""
    words = ["wanda-lightning", command]
    shown = given_in(*groups).union(always)
    for name, value in values_of(*groups).items():
        option = f"--{name}"
        if name not in shown:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no_{name}")
        elif isinstance(value, tuple):
            # The option is repeated, since a regular expression may contain commas. An empty text stands for no names.
            for part in value or ("",):
                words += [option, part]
        else:
            words += [option, str(value)]
    return shlex.join(words)


_Names = Annotated[tuple[str, ...], Parameter(converter=split_names)]
_WHOLE = Parameter(converter=_whole_number)
_Count = Annotated[int, _WHOLE, Parameter(validator=Number(gte=1, lte=2**31 - 1))]


def _group(title: str, place: int) -> Parameter:
    """Return the decorator of a class of options, which help shows under this title."""
    return Parameter(name="*", group=Group(title, sort_key=place))


_MODEL = _group("Model", 0)
_PRUNING = _group("Pruning", 1)
_SHRINKING = _group("Shrinking", 1)
_DATA = _group("Data", 2)
_RESULTS = _group("Results", 3)
_SESSION = _group("Session", 4)

# Options that only `--help_all` shows.
_RARE = Parameter(show="--help_all" in sys.argv)
_RARE_CHOICES = ("criterion", "solver", "allocation", "recovery", "sequential", "keep_batch_norm")


@_MODEL
@dataclass(frozen=True, kw_only=True)
class Model:
    """The model of a command."""

    model: str = field(kw_only=False)
    """Hub id, folder or .gguf file of a language model; hub id or folder of an embedding model, which has a
modules.json; timm:NAME of an image classifier, or timm:local-dir:FOLDER."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], _RARE] = "auto"
    """Data type of the weights; auto: as they are stored."""
    revision: Annotated[str, _RARE] = "main"
    """Branch, tag or commit of --model on the hub."""
    cache_dir: str | None = None
    """Folder for downloads from the hub."""
    trust_remote_code: bool = False
    """Run the code that comes with a hub model."""

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all models."""
        return (self.model,)

    @property
    def is_image(self) -> bool:
        """Whether they are image classifiers."""
        return any(name.startswith("timm:") for name in self.all)

    @property
    def is_embedding(self) -> bool:
        """Whether one of them is an embedding model."""
        return any(is_embedding_model(self.source(name)) for name in self.all)

    @property
    def is_language(self) -> bool:
        """Whether they are language models."""
        return not (self.is_image or self.is_embedding)

    def source(self, name: str) -> ModelSource:
        """Return the source of a model; `revision` is that of `model`, not of `dense`."""
        revision = self.revision if name in self.model else "main"
        return ModelSource(name, revision, self.cache_dir, self.trust_remote_code)


@_MODEL
@dataclass(frozen=True, kw_only=True)
class Models(Model):
    """The models of `evaluate`."""

    model: _Names = field(kw_only=False)  # type: ignore[assignment]
    """The models as for prune, with commas, all of one kind."""
    dense: str | None = None
    """The dense model. It is measured first, and the table shows how the others differ from it."""
    checkpoint: Annotated[_Names, Parameter(alias="--resume")] = ()
    """Weights (.safetensors) of image classifiers, one for each --model."""

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all models, without repetitions, the dense one first."""
        return tuple(dict.fromkeys([*filter(None, [self.dense]), *self.model]))


# The names of the reference code.
_ALIASES = {
    "sparsity": "--sparsity_ratio",
    "pattern": "--sparsity_type",
    "method": "--prune_method",
}


def _choices() -> Any:
    """Return a dataclass with an option for each argument of `PruningConfig`.

    The help is the first sentence of the argument's description.
    """
    text = inspect.getdoc(PruningConfig) or ""  # none under python -OO
    described = dict(re.findall(r"(?ms)^ {4}(\w+): (.+?\.)(?=\s|\Z)", text))

    options = []
    for name, argument in inspect.signature(PruningConfig).parameters.items():
        hint: Any = type(argument.default)
        check = None
        help = " ".join(described.get(name, "").replace("`", "").split())
        if name == "pattern":
            help += f" One of {', '.join(NAMES[name])}, or another N:M."
            check = _known_pattern
        elif name in NAMES:
            hint = Optional[Literal[tuple(NAMES[name])]]  # noqa: UP045  # `|` does not take a Literal of a tuple
        elif isinstance(argument.default, tuple):
            hint = _Names
        is_shown = _RARE.show if name in _RARE_CHOICES else None
        parameter = Parameter(help=help, alias=_ALIASES.get(name), validator=check, show=is_shown)
        options.append((name, Annotated[hint, parameter], argument.default))
    return make_dataclass("_Choices", options, kw_only=True, frozen=True)


def _known_pattern(type_: Any, pattern: str) -> None:
    check_pattern(pattern)


_Choices: Any = _choices()


@_PRUNING
@dataclass(frozen=True, kw_only=True)
class Pruning(_Choices):  # type: ignore[misc]  # a base made from PruningConfig
    """Choices of pruning."""

    use_variant: bool = False
    """The reference's name of --pattern equal_share: each row loses the same share of its total score."""
    prune_granularity: Annotated[Literal["row", "layer"] | None, _RARE] = None
    """The reference's name of --pattern unstructured_row and unstructured_layer."""

    @property
    def choices(self) -> Kwargs:
        """The arguments of `PruningConfig`, with the pattern that the reference's flags stand for."""
        choices = {option.name: getattr(self, option.name) for option in fields(_Choices)}
        if self.use_variant:
            choices["pattern"] = "equal_share"
        elif self.prune_granularity is not None:
            choices["pattern"] = f"unstructured_{self.prune_granularity}"
        return choices

    @property
    def name(self) -> str:
        """The label of the results: the method, and the choices that replace its own."""
        names = [self.method, self.criterion, self.solver]
        if not any(names):
            names = ["wanda"]
        names += [self.allocation, self.recovery]
        return "_".join(filter(None, names))


@_SHRINKING
@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """Choices of shrinking."""

    units: float | None = None
    """Fraction of the hidden units that leave, above 0 and below 1; without this and --experts, those that are zero."""
    experts: float | None = None
    """Fraction of the experts that leave each mixture of experts."""
    max_size: str | None = None
    """Size of the new model, such as 60GB, in place of --experts: as many experts stay as fit."""
    by: Literal["equal", "loss", "seconds"] = "equal"
    """Which layers lose units: all the same fraction (equal), or those on whose units the predictions depend least
(loss), relative to the time that a unit takes (seconds)."""
    refit: Annotated[bool, Parameter(negative="--no_refit")] = True
    """Compute the remaining weights of layers that read units anew; --no_refit leaves them as they are."""
    multiple_of: Annotated[_Count, _RARE] = 8
    """The number of units that a layer keeps is rounded to a multiple of this."""
    recovery: Optional[Literal[tuple(NAMES["recovery"])]] = None  # type: ignore[valid-type] # noqa: UP045
    """How the model is trained after its units have left: by block (reconstruct), or as a whole (distill)."""
    skip: _Names = ()
    """Layers to leave as they are: names, globs, or re: and a regular expression."""
    only: Annotated[_Names, _RARE] = ()
    """Layers that may change, by default all."""

    @property
    def name(self) -> str:
        """The label of the results."""
        return "_".join(name for name in ("units", "experts") if getattr(self, name)) or "experts"


@dataclass(frozen=True, kw_only=True)
class _Measured:
    evaluation: Annotated[_Names, Parameter(alias="--eval", validator=_known_texts)] = (
        "wikitext2",
    )
    """Texts to measure perplexity on, with commas; the first is the one that counts. For embedding models: stsb (their
default), or a FILE.csv with sentence1, sentence2 and score. An empty text: measure nothing."""
    data: Annotated[str | None, Parameter(alias="--data_path")] = None
    """Images: a folder laid out like ImageNet, or digits."""
    limit: _Count | None = None
    """Number of windows of each text, or of pairs, to measure on; by default all."""
    seqlen: Annotated[int | None, _WHOLE, Parameter(validator=Number(gte=2))] = None
    """Number of tokens in a window; by default the model's context, at most 2048."""
    batch_size: Annotated[_Count | None, _RARE] = None
    """Number of windows (or answers) in a batch, by default 4; of pairs, by default 32; or of images, by default 64."""
    tasks_dir: Annotated[str | None, _RARE] = None
    """Folder with a TASK.jsonl for each task, instead of the hub; docs/tasks.md describes the documents."""


@_DATA
@dataclass(frozen=True, kw_only=True)
class Data(_Measured):
    """Data that `prune` calibrates and measures on."""

    calibration: Annotated[_Names, Parameter(validator=_known_calibration)] = ("c4",)
    """Texts or chats to calibrate on, with commas for equal shares: c4, wikitext2, python-docs, sklearn-docs (these two
need no network), the id of a data set on the hub (OWNER/NAME), a FILE (.txt, .jsonl, .parquet) with text or
messages; or self, what the dense model writes."""
    packing: Annotated[Literal["windows", "none"], _RARE] = "windows"
    """Chats to calibrate on: windows joins them and cuts windows, as for text; none: each is a row, cut at --seqlen."""
    num_samples: Annotated[_Count | None, Parameter(alias="--nsamples")] = None
    """Number of calibration samples; by default 128 sequences or 4096 images, as in the paper, or 1024 sentences."""
    seed: Annotated[
        int, _WHOLE, Parameter(validator=Number(gte=SEED.minimum, lte=SEED.maximum))
    ] = 0
    """Seed that draws the calibration samples."""
    checkpoint: Annotated[str | None, _RARE, Parameter(alias="--resume")] = None
    """Weights (.safetensors) of the image classifier."""
    eval_zero_shot: bool = False
    """Also measure both models on the paper's seven zero-shot tasks (needs lm-eval)."""


@_DATA
@dataclass(frozen=True, kw_only=True)
class Measurements(_Measured):
    """Measurements of `evaluate`."""

    tasks: _Names = ()
    """Names of lm-eval tasks, separated by commas; paper (or all) means the paper's seven. Needs lm-eval."""
    task_limit: _Count | None = None
    """Number of documents of each task; by default all."""
    num_fewshot: Annotated[int | None, _WHOLE, Parameter(validator=Number(gte=0))] = None
    """Number of examples in the prompts of tasks; by default the task's own, 0 for the paper's tasks."""
    apply_chat_template: bool = False
    """Put the prompts of tasks into the tokenizer's chat template."""


@_RESULTS
@dataclass(frozen=True, kw_only=True)
class File:
    """Files that `evaluate` writes."""

    save: str | None = None
    """JSON file for all numbers."""
    overwrite: bool = False
    """Replace a --save file."""


@_RESULTS
@dataclass(frozen=True, kw_only=True)
class Results:
    """Files that `prune` and `shrink` write."""

    save_model: str | None = None
    """Folder for the new model."""
    stream: bool = False
    """Read a language model block by block from disk, and write each block; an interrupted run continues."""
    overwrite: bool = False
    """Replace a --save_model folder with everything in it, and a --report; add to a --save folder."""
    save: str | None = None
    """Folder for log_METHOD.txt and pruning_report.json."""
    report: str | None = None
    """Page (.html) or picture (.png) to write, with figures and tables (needs the extra report)."""
    device: Annotated[str, _RARE] = "cpu"
    """Device to compute on with --stream, such as cuda."""


@_SESSION
@dataclass(frozen=True, kw_only=True)
class Session:
    """Sources of the options of a command, and details of its errors."""

    config: _Names = ()
    """YAML files with options. Arguments take precedence, and later files over earlier ones."""
    print_config: Annotated[bool, _RARE] = False
    """Print all options as such a file."""
    debug: Annotated[bool, _RARE] = False
    """Show the traceback of every error."""


class JobOptions(NamedTuple):
    """All options of `prune` or `shrink`."""

    model: Model
    pruning: Pruning | Shrinking
    data: Data
    results: Results

    @property
    def max_size(self) -> str | None:
        """The size into which experts must fit."""
        return getattr(self.pruning, "max_size", None)
