"""Compare methods by zero-shot accuracy beside perplexity.

    python benchmarks/zero_shot.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --tasks_dir zero_shot --save benchmarks/results

`--tasks_dir` has a file TASK.jsonl for each task (docs/tasks.md). Windows, pruning and `--save` are those of
quality.py.
"""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quality import TEXT, LanguageModel, Measured, add_options, cells, check_options
from result import Result, Runs

from wanda_lightning.evaluation import PAPER_TASKS, load_tasks, zero_shot

METHODS = ("magnitude", "wanda", "sparsegpt", "best", "thorough")
Step = Callable[[], Measured]


def measure(language: LanguageModel, tasks: dict[str, Any], runs: Runs, planned: Result, prune: Step) -> list[Result]:
    """Return one run for each task, measured together unless all are saved: perplexity, and accuracy with its error."""
    each = {name: replace(planned, case={"task": name}) for name in tasks}
    saved = [runs.saved(run) for run in each.values()]
    if None not in saved:
        return saved
    measured = prune()
    found = zero_shot(language.model, language.tokenizer, tasks)
    return [runs.save(run, {**measured, **accuracies(found[name])}) for name, run in each.items()]


def accuracies(found: dict[str, float]) -> Measured:
    """Return acc and, if the task has it, acc_norm, each with its standard error."""
    metrics = [metric for metric in ("acc", "acc_norm") if metric in found]
    return {metric: found[metric] for metric in metrics} | {f"{m}_error": found[f"{m}_stderr"] for m in metrics}


def main() -> None:
    """Measure the missing cells."""
    parser = argparse.ArgumentParser(description="Compare methods by zero-shot accuracy and perplexity.")
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"of: {shlex.join(TEXT)}")
    parser.add_argument("--tasks_dir", required=True, help="folder with TASK.jsonl")
    parser.set_defaults(goals=("50", "2:4"), draw=None)
    options = parser.parse_args()
    check_options(parser, options, TEXT)
    if not options.model:
        parser.error("--model must be given.")
    folder = Path(options.tasks_dir)
    try:
        names = [name for name in PAPER_TASKS if (folder / f"{name}.jsonl").is_file()]
        tasks = load_tasks(names, folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not tasks:
        parser.error(f"--tasks_dir must have a file TASK.jsonl, but {folder} has none. Name another folder.")
    runs, language = Runs(options.save, "tasks"), LanguageModel(options)
    dense = replace(language.planned, calibration=None)
    measure(language, tasks, runs, dense, language.measure_perplexity)
    for name, goal, chosen in cells(options, TEXT):
        if reason := language.refusal(chosen):
            print(f"{name}, {goal}: {reason}")
        else:
            measure(language, tasks, runs, language.plan(name, goal, chosen), partial(language.measure, chosen))


if __name__ == "__main__":
    main()
