"""Tasks of lm-eval, such as zero-shot accuracy, on documents from the hub or from files.

lm-eval defines prompts, answers and metrics; this module gives it the documents, after checking that the task can use
them.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.common.wording import did_you_mean, one_line
from wanda_lightning.data.dataset_files import load
from wanda_lightning.evaluation.results import Metrics, Results, share_error

# The seven tasks of Sun et al. 2024 (Table 2), with the fields of a document that lm-eval reads; see docs/tasks.md.
PAPER_TASKS = {
    "boolq": ("passage", "question", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
Answers = dict[str, list[bool]]
"""Whether the answer to each document was right, by task."""
_UNFIT = "The documents in {} do not fit lm-eval's definition of {}"
_NOT_ON_THE_HUB = (
    "The documents of {0} are not in the cache and cannot be downloaded from the Hugging Face hub. Put them into a "
    "file: --tasks_dir DIR, with DIR/{0}.jsonl. The cause"
)
_EXAMPLES_SEED = 1234  # lm-eval's own
_RUN_CODE = "HF_ALLOW_CODE_EVAL"  # as the library evaluate calls it
# The folders of the paper's tasks in lm_eval/tasks.
_FOLDERS = ("arc", "glue/rte", "hellaswag", "openbookqa", "super_glue/boolq", "winogrande")


def load_tasks(
    asked: Sequence[str],
    folder: StrPath | None = None,
    cache_dir: str | None = None,
    num_fewshot: int | None = None,
) -> Kwargs:
    """Load tasks of lm-eval by any name that it knows; `paper` or `all` stands for the seven of the Wanda paper.

    A folder must have a file TASK.jsonl for each task: one document in each line, with the fields in
    `PAPER_TASKS[TASK]`, or those that lm-eval reads for another task. Without a folder the documents come from the hub.
    Prompts have `num_fewshot` examples, by default as many as lm-eval says for the task: none for those of the paper.

    Raises:
        ValueError: If a name is unknown, a task would run code that the model writes without permission, or documents
            do not fit or are too few for the examples.
    """
    names: dict[str, None] = {}  # as a set in order
    for name in asked:
        names |= dict.fromkeys(PAPER_TASKS if name in ("paper", "all") else [name])
    if not names:
        return {}
    require_extra("eval", "lm_eval", purpose="Tasks")
    _refuse_unknown(names)
    tasks: Kwargs = {}
    if folder is None:
        with _cached_in(cache_dir):
            for name in names:
                loaded = _load(name, name, _NOT_ON_THE_HUB.format(name))
                tasks |= {**loaded["tasks"], **loaded["groups"]}
        _set_examples(tasks, num_fewshot)
        return tasks

    files = {name: Path(folder).expanduser() / f"{name}.jsonl" for name in names}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"tasks_dir must have a file TASK.jsonl for each of {', '.join(names)}, but {folder} does not have "
            f"{', '.join(missing)}. Write one document in each line."
        )
    # All files are read before lm-eval is imported, which takes seconds.
    documents = {name: _read(path, PAPER_TASKS.get(name, ())) for name, path in files.items()}
    for name, path in files.items():
        tasks |= _from_documents(name, documents[name], path)
    _set_examples(tasks, num_fewshot)
    for name, task in tasks.items():
        count = len(documents[name])
        examples = task.config.num_fewshot
        if count <= examples:
            raise UserError(
                f"{files[name]} must have more documents than the prompts of {name} have examples, which are other "
                f"documents of the file, but it has {count}, and the number of examples is {examples}. Add documents, "
                "or set --num_fewshot."
            )
    return tasks


def _from_documents(name: str, documents: Any, path: Path) -> Kwargs:
    """Load a task with these documents instead of its own."""
    if _index_for(name).task_index[name].kind.name in ("GROUP", "TAG"):
        raise UserError(
            f"tasks must be single tasks if their documents are in --tasks_dir, but {name} is a group of tasks. "
            "`lm-eval ls subtasks` lists single ones."
        )
    # Examples are other documents of the file.
    source: Kwargs = dict.fromkeys(("training_split", "test_split", "fewshot_split"))
    source |= {"task": name, "validation_split": "validation"}
    source["custom_dataset"] = lambda **_: {"validation": documents}
    # lm-eval merges changes into its own definition of a task only if the task is a member of a group.
    group = {"group": "wanda_lightning", "task": [source]}
    tasks = dict(_load(name, group, _UNFIT.format(path, name))["tasks"])
    if tasks[name].OUTPUT_TYPE == "multiple_choice":
        _check_answers(tasks[name], path)
    return tasks


def _set_examples(tasks: Kwargs, num_fewshot: int | None) -> None:
    """Set the number of examples in each prompt, as lm-eval's command does."""
    for task in _split(tasks)[0].values():
        own = task.config.num_fewshot
        if own == 0 and num_fewshot:
            name = task.config.task
            warnings.warn(
                f"{name} has prompts without examples by definition; --num_fewshot {num_fewshot} does not change them.",
                stacklevel=3,
            )
        elif num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _split(tasks: Mapping[str, Any]) -> tuple[Kwargs, Kwargs]:
    """Return single tasks, and groups of them such as mmlu, which have metrics of their own."""
    groups = {name: task for name, task in tasks.items() if hasattr(task, "child_names")}
    return {name: task for name, task in tasks.items() if name not in groups}, groups


def _refuse_unknown(names: Iterable[str]) -> None:
    others = [name for name in names if name not in PAPER_TASKS]
    if not others:
        return
    known = _all_tasks().all_tasks
    for name in others:
        if name not in known:
            similar = did_you_mean(name, [*PAPER_TASKS, *known])
            raise UserError(
                f"tasks must be names that lm-eval knows, or paper for the seven of the paper, but one is {name!r}."
                f"{similar} `lm-eval ls tasks` lists all."
            )


@cache
def _all_tasks() -> Any:
    """Return lm-eval's index of all tasks, which takes 10 s, since it reads 14 thousand files."""
    from lm_eval import tasks

    with _quiet():
        return tasks.TaskManager()


@cache
def _paper_tasks() -> Any:
    """Return lm-eval's index of the paper's tasks."""
    from lm_eval import tasks

    folders = [Path(tasks.__file__).parent / name for name in _FOLDERS]
    if not all(folder.is_dir() for folder in folders):  # another version of lm-eval has moved them
        return _all_tasks()
    with _quiet():
        return tasks.TaskManager(include_path=list(map(str, folders)), include_defaults=False)


def _index_for(name: str) -> Any:
    return _paper_tasks() if name in PAPER_TASKS else _all_tasks()


def _load(name: str, spec: str | Kwargs, failure: str) -> Any:
    """Return what lm-eval loads for a name: `tasks` and `groups` by their names."""
    index = _index_for(name)
    if (index.task_index[name].cfg or {}).get("unsafe_code") and not _may_run_code():
        raise UserError(
            f"The task {name} runs code that the model writes. Where that can do no harm, allow it with {_RUN_CODE}=1 "
            "in the environment."
        )
    with _quiet():
        try:
            return index.load([spec])
        except ImportError as error:  # of the module with functions for this task
            raise UserError(
                f"The task {name} needs another package: {one_line(error)}. Install it."
            ) from error
        except Exception as error:  # lm-eval runs code and templates on the documents
            raise UserError(f"{failure}: {one_line(error)}") from error


@contextmanager
def _cached_in(folder: str | None) -> Iterator[None]:
    """Let `datasets` keep in a folder what it downloads.

    A task of lm-eval would take the folder only in place of its own arguments for `datasets`.
    """
    from datasets import config

    usual = config.HF_DATASETS_CACHE
    config.HF_DATASETS_CACHE = folder or usual
    try:
        yield
    finally:
        config.HF_DATASETS_CACHE = usual


def _may_run_code() -> bool:
    return os.environ.get(_RUN_CODE) == "1"


def _read(path: Path, fields: Sequence[str]) -> Any:
    documents = load(str(path))
    if not fields:
        return documents
    for number, document in enumerate(documents, start=1):
        for name in fields:
            if document.get(name) is None:  # the prompt would have the word None
                raise UserError(
                    f"Each line of {path} must have {', '.join(fields)}, but document {number} has no {name}. Correct "
                    "the file."
                )
    return documents.select_columns(list(fields))


def _check_answers(task: Any, path: Path) -> None:
    """Refuse an answer that is not among the choices, since lm-eval would count every prediction as wrong."""
    unfit = _UNFIT.format(path, path.stem)
    for number, document in enumerate(task.eval_docs, start=1):
        try:
            choices = task.doc_to_choice(document)
            # In winogrande the choices are beginnings of a sentence, and the text is the number of the right one.
            answer_of = task.doc_to_text if task.multiple_input else task.doc_to_target
            answer = answer_of(document)
            fits = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        except Exception as error:
            raise UserError(f"{unfit}: document {number} raises {error!r}.") from error
        if not fits:
            raise UserError(
                f"{unfit}: the answer of document {number} is {answer!r}, but there are {len(choices)}."
            )


def answer(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    batch_size: int = 4,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> tuple[Results, Answers]:
    """Evaluate a language model on tasks from `load_tasks`.

    The model runs on the accelerator if there is one, on `batch_size` choices at a time, and is moved back to its
    device afterward. Only the first `limit` documents of each task are used. Return for each task the metrics of
    lm-eval, such as `acc` and `acc_norm` (log-likelihoods divided by the lengths of the choices), their standard
    errors, and the number of documents; with several tasks that all have `acc`, also `mean`: the mean of `acc` and its
    standard error, as in the paper. Also return whether the answer to each document was right.
    """
    if not tasks:
        return {}, {}
    single, groups = _split(tasks)
    for task in single.values():
        task.set_fewshot_seed(_EXAMPLES_SEED)  # the same examples for each model
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    home = model.device
    device = torch.accelerator.current_accelerator(check_available=True)
    # A copy: lm-eval adds a missing padding token to the tokenizer, and it would be saved with the model.
    tokenizer = copy.deepcopy(tokenizer)
    # The token before an empty prompt. These tasks have no empty prompts, but lm-eval always decodes the token.
    prefix = 0 if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None else None
    try:
        model.to(device or home)
        with evaluating(model):
            with _quiet():
                lm = HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    prefix_token_id=prefix,
                )
            measured = lm_eval.evaluate(
                lm,
                {"tasks": single, "groups": groups},
                limit=limit,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
                confirm_run_unsafe_code=_may_run_code(),
            )
    finally:
        model.to(home)

    # lm-eval counts only single tasks.
    counts = {name: measured["n-samples"][name]["effective"] for name in single}
    for name, group in groups.items():
        counts[name] = sum(counts[task.task_name] for task in group.get_all_tasks())
    results = {}
    for name in tasks:
        values = {}
        for key, value in {**measured["results"], **measured.get("groups", {})}.get(
            name, {}
        ).items():
            # METRIC,FILTER or METRIC_stderr,FILTER; where there is no standard error, lm-eval has the text N/A.
            metric, comma, filtered = key.partition(",")
            if not comma or isinstance(value, str):
                continue
            suffix = "" if filtered == "none" else f",{filtered}"
            if metric.endswith("_stderr"):
                suffix += "_stderr"
            values[metric.removesuffix("_stderr") + suffix] = float(value)
        if values:  # not for a group that only lists tasks
            results[name] = {**values, "documents": counts[name]}
    if len(single) > 1 and not groups and all("acc" in values for values in results.values()):
        results["mean"] = _mean(list(results.values()))
    return results, {name: _right_answers(measured["samples"][name]) for name in single}


def _right_answers(samples: Sequence[Kwargs]) -> list[bool]:
    """Return whether the answer to each document was right; empty for a task whose metrics do not say so.

    The first metric decides, such as `acc` or `exact_match`, after the first filter of the answers.
    """
    metric, *_ = samples[0]["metrics"]
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    first.sort(key=lambda sample: sample["doc_id"])
    values = [sample[metric] for sample in first]
    return [bool(value) for value in values] if all(value in (0, 1) for value in values) else []


def flips(dense: Answers, pruned: Answers) -> Results:
    """Return the shares of documents whose answer was right and is wrong, and the reverse, by task.

    Accuracy stays the same if as many answers become right as become wrong (Dutta et al., "Accuracy is Not All You
    Need", NeurIPS 2024).
    """
    results = {}
    for name, before in dense.items():
        after = pruned[name]
        if not before or not after:  # the metrics of the task do not say what is right
            continue
        pairs = list(zip(before, after, strict=True))
        values: Metrics = {}
        for flip, pair in (("right_to_wrong", (True, False)), ("wrong_to_right", (False, True))):
            share = pairs.count(pair) / len(pairs)
            values |= {flip: share, **share_error(flip, share, len(pairs))}
        results[name] = values
    return results


def _mean(results: Sequence[Metrics]) -> Metrics:
    """Average accuracies of independent tasks: the variances of the means add up.

    >>> _mean([{"acc": 0.25, "acc_stderr": 0.03}, {"acc": 0.75, "acc_stderr": 0.04}])
    {'acc': 0.5, 'acc_stderr': 0.025}
    """
    count = len(results)
    mean = {"acc": sum(task["acc"] for task in results) / count}
    if all("acc_stderr" in task for task in results):
        mean["acc_stderr"] = sum(task["acc_stderr"] ** 2 for task in results) ** 0.5 / count
    return mean


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only errors of lm-eval, which also warns of every loaded model and every default."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
