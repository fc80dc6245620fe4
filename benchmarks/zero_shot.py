"""Compare methods by zero-shot accuracy beside perplexity.

    python benchmarks/zero_shot.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --tasks_dir zero_shot --save benchmarks/results

`--tasks_dir` has a file TASK.jsonl for each task (docs/tasks.md). Windows, pruning and `--save` are those of
quality.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from measuring import LanguageModel, run_from_shell
from quality import TEXT, CellOptions, cells_of, prune_and_measure, prune_cells
from result import Runs

from wanda_lightning.evaluation import PAPER_TASKS, answer, load_tasks


@dataclass(frozen=True, kw_only=True)
class Options(CellOptions):
    """Options of this program."""

    tasks_dir: Path
    methods: Sequence[str] = ("magnitude", "wanda", "sparsegpt", "best", "thorough")
    goals: Sequence[str] = ("50", "2:4")


def accuracies(metrics):
    """Return acc and, if the task has it, acc_norm, each with its standard error."""
    measured = {}
    for metric in ("acc", "acc_norm"):
        if metric in metrics:
            measured[metric] = metrics[metric]
            measured[f"{metric}_error"] = metrics[f"{metric}_stderr"]
    return measured


def main(options: Options):
    """Measure the missing cells."""
    names = [name for name in PAPER_TASKS if (options.tasks_dir / f"{name}.jsonl").is_file()]
    assert names, "--tasks_dir must have a file TASK.jsonl."
    tasks = load_tasks(names, options.tasks_dir)
    runs = Runs(options.save, "tasks")
    cells = cells_of(options, TEXT, ())
    language = LanguageModel(options)

    def record(planned, measure):
        """Save a run for each task, measured together unless all are saved: perplexity, and accuracy."""
        rows = {name: replace(planned, case={"task": name}) for name in tasks}
        if all(runs.saved(row) for row in rows.values()):
            return
        measured = measure()
        metrics, _ = answer(language.model, language.tokenizer, tasks)
        for name, row in rows.items():
            runs.save(row, {**measured, **accuracies(metrics[name])})

    record(replace(language.planned, calibration=None), language.measure)
    measure = partial(prune_and_measure, language)
    prune_cells(language.model, cells, language.planned, record, measure)


if __name__ == "__main__":
    run_from_shell(main)
