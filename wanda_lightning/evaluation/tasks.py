"""What is left of a model: zero-shot accuracy by lm-eval, sparsity, and several models side by side.

Prompts, answers and metrics are lm-eval's own; here is only where the documents come from, and what fits together.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from wanda_lightning.core.name_patterns import did_you_mean
from wanda_lightning.data.text_sources import json_rows
from wanda_lightning.files import whole_file
from wanda_lightning.models import find_layers
from wanda_lightning.parallel import zero_counts
from wanda_lightning.report import versions

Results = dict[str, dict[str, float]]
"""What was measured on (a text, a task, a data set) -> metric -> value; fractions are in [0, 1]."""

# The seven tasks of Sun et al. 2024 (Table 2), with the fields that lm-eval's definitions read of a document.
PAPER_TASKS: dict[str, tuple[str, ...]] = {
    "boolq": ("passage", "question", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
_ALL = ("paper", "all")
_COUNTS = ("windows", "documents", "images")  # how much was measured: in the JSON, not in the table
_SPARSITY = {"layers": "of prunable layers", "model": "of the model"}


# --------------------------------------------------------------------------------------------------------- sparsity


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """Fractions of zeros: `layers`, over the weights that can be pruned; `model`, over all parameters."""
    layers = {
        id(layer.parameter): layer.parameter for layer in find_layers(model).layers
    }  # many experts are one parameter
    return {"layers": _zeros(layers.values()), "model": _zeros(model.parameters())}


def _zeros(parameters: Iterable[torch.Tensor]) -> float:
    parameters = list(parameters)
    return sum(zero_counts(parameters)) / max(1, sum(parameter.numel() for parameter in parameters))


# --------------------------------------------------------------------------------------------------- zero-shot tasks


def task_names(asked: Sequence[str]) -> list[str]:
    """The tasks asked for; `paper` or `all` is the seven.

    >>> task_names(["rte", "rte"])
    ['rte']

    Raises:
        ValueError: For a task that is none of them.
    """
    for name in asked:
        if name not in PAPER_TASKS and name not in _ALL:
            raise ValueError(
                f"A task is one of {', '.join(PAPER_TASKS)}, or paper for all of them, but {name!r} was asked for."
                f"{did_you_mean(name, PAPER_TASKS)} For other tasks run lm-eval itself on the model's folder."
            )
    return list(dict.fromkeys(one for name in asked for one in (PAPER_TASKS if name in _ALL else [name])))


def load_tasks(names: Sequence[str], folder: str | Path | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The tasks as lm-eval defines them, with their documents read and checked.

    Args:
        names: As `task_names` gives them.
        folder: Where TASK.jsonl is for each task: one document in a line, with the fields that the data set on the hub
            has (`PAPER_TASKS`); all of them are measured on. By default the hub's.
        cache_dir: Where downloads from the hub are kept.

    Returns:
        Tasks of lm-eval, by name.

    Raises:
        ImportError: Without lm-eval.
        FileNotFoundError: If a file is missing.
        ValueError: If a document is not as the task needs it.
        OSError: If the hub is needed and cannot be reached.
    """
    if not names:
        return {}
    _require_lm_eval()
    if folder is None:
        return _load({name: {"dataset_kwargs": {"cache_dir": cache_dir}} for name in names}, _not_on_the_hub)
    files = _task_files(names, Path(folder).expanduser())
    documents = {name: _read(path, PAPER_TASKS[name]) for name, path in files.items()}
    tasks: dict[str, Any] = {}
    for name, path in files.items():
        tasks |= _load({name: _local(documents[name])}, partial(_unfit, path))
        _check_answers(tasks[name], path)
    return tasks


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("Zero-shot tasks need lm-eval: pip install 'wanda_lightning[eval]'") from error


@cache  # it reads 14 thousand YAML files
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(overrides: Mapping[str, Mapping[str, Any]], explained: Callable[[Exception], Exception]) -> dict[str, Any]:
    # lm-eval merges overrides into its own definition of a task only where the task is the member of a group.
    members = [{"task": name, **changes} for name, changes in overrides.items()]
    with _quiet():
        manager = _task_manager()
        try:
            return dict(manager.load([{"group": "wanda_lightning", "task": members}])["tasks"])
        except Exception as error:  # of any kind: process_docs and the templates run on what is in the documents
            raise explained(error) from error


def _not_on_the_hub(error: Exception) -> Exception:
    return OSError(
        "The documents of the tasks were asked for, but they are not in the cache and cannot be had from the Hugging "
        f"Face hub. Put them into files: --tasks_dir DIR, with DIR/TASK.jsonl. The cause: {error}"
    )


def _local(documents: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(documents)},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
    }


def _task_files(names: Sequence[str], folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.jsonl" for name in names}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"The documents of {', '.join(names)} were looked for in {folder}, but there is no {', '.join(missing)}. "
            "A task is read from TASK.jsonl, one document in a line."
        )
    return files


def _read(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    documents = []
    for where, row in json_rows(path, fields):
        if nulls := [name for name in fields if row[name] is None]:
            raise ValueError(f"{where} has no value for {', '.join(nulls)}. Correct the line.")
        documents.append({name: row[name] for name in fields})
    if not documents:
        raise ValueError(f"The documents of a task were to be read from {path}, but it is empty. Give another file.")
    return documents


def _unfit(path: Path, error: object) -> ValueError:
    return ValueError(f"The documents in {path} do not fit lm-eval's definition of {path.stem}: {error}")


def _check_answers(task: Any, path: Path) -> None:
    """Refuse an answer that is none of the choices: lm-eval would count it as wrong, whatever the model says."""
    for number, document in enumerate(task.eval_docs, start=1):
        try:
            choices = task.doc_to_choice(document)
            answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
            fits = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        except Exception as error:
            raise _unfit(path, f"of document {number}, {error!r}") from error
        if not fits:
            raise _unfit(path, f"the answer of document {number} is {answer!r}, but there are {len(choices)} choices")


def zero_shot(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], batch_size: int = 4, limit: int | None = None
) -> Results:
    """Measure a language model on tasks without examples in the prompt.

    The model runs on the accelerator if there is one, and is put back where it was.

    Args:
        model: Of transformers, decoder-only.
        tokenizer: Its tokenizer.
        tasks: As `load_tasks` gives them.
        batch_size: Choices that are scored together.
        limit: Documents of each task, from the start; by default all.

    Returns:
        For each task `acc`, where the task has it `acc_norm` (log-likelihoods divided by the lengths of the choices),
        their standard errors, and how many documents. With several tasks also `mean`, of `acc`, as in the paper.
    """
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    home, training = model.device, model.training
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # A copy: lm-eval gives a tokenizer without padding one, and it would be saved with the model.
    tokenizer = copy.deepcopy(tokenizer)
    # What an empty prompt would begin with. No task here has one, but lm-eval decodes it for each prompt.
    prefix = 0 if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None else None
    try:
        model.to(device or home)
        with _quiet():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=prefix)
        found = lm_eval.evaluate(lm, {"tasks": dict(tasks)}, limit=limit, log_samples=False)
    finally:
        model.to(home)
        model.train(training)
    results: Results = {}
    for name in tasks:
        values = {key.removesuffix(",none"): value for key, value in found["results"][name].items() if "," in key}
        numbers = {key: float(value) for key, value in values.items() if not isinstance(value, str)}
        results[name] = {**numbers, "documents": found["n-samples"][name]["effective"]}
    if len(tasks) > 1:
        results["mean"] = {"acc": sum(results[name]["acc"] for name in tasks) / len(tasks)}
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of lm-eval: it warns of every model that is handed over ready, and of every default."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------ side by side


@dataclass
class Evaluation:
    """Several models, measured alike. `table()` shows them side by side; `save()` writes JSON.

    Attributes:
        models: What was found for each, in order.
        dense: The one that the others are compared with.
        config: The options.
        versions: Versions of Python and the libraries.
    """

    models: dict[str, Results]
    dense: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> str:
        """All numbers, unrounded."""
        return json.dumps(asdict(self), indent=1, default=str)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def table(self) -> Table:
        """A column for each model; behind a number, in brackets, its difference to the dense model."""
        table = Table()
        table.add_column("")
        for name in self.models:
            table.add_column(escape(name), justify="right", overflow="fold")
        rows = dict.fromkeys(
            (what, metric) for found in self.models.values() for what in found for metric in found[what]
        )
        for what, metric in rows:
            if metric in _COUNTS or metric.endswith("_stderr"):
                continue
            values = {name: found.get(what, {}).get(metric) for name, found in self.models.items()}
            base = values.get(self.dense or "")
            cells = [_cell(metric, value, None if name == self.dense else base) for name, value in values.items()]
            table.add_row(escape(f"{what} {_SPARSITY.get(metric, metric)}"), *cells)
        return table


def _cell(metric: str, value: float | None, base: float | None) -> str:
    """A number as people read it.

    >>> _cell("acc", 0.5, 0.625), _cell("perplexity", 65.291, None)
    ('50.00% (-12.50)', '65.29')
    """
    if value is None:
        return ""
    scale, unit = (1, "") if metric == "perplexity" else (100, "%")
    difference = "" if base is None else f" ({scale * (value - base):+.2f})"
    return f"{scale * value:.2f}{unit}{difference}"
