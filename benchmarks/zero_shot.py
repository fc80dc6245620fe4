"""Compare methods by zero-shot accuracy beside perplexity, on real documents or on documents made from a text.

    python benchmarks/zero_shot.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --text wikitext2_test.raw.txt --tasks_dir out/zero_shot --save benchmarks/results

With `--text`, documents in the format of OpenBookQA are written to `--tasks_dir`. Each asks which of four words ends a
sentence, after the sentence before it. The wrong words end other sentences of the same article and are about as long as
the right one. Without `--text`, the files TASK.jsonl in `--tasks_dir` are used. Windows,
pruning and `--save` are those of quality.py.
"""

import argparse
import json
import random
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import columns
from quality import TEXT, LanguageModel, Measured, add_options, check_options, choices
from result import Result, Runs
from rich.console import Console

from wanda_lightning.data.text_sources import check_source, evaluation_text
from wanda_lightning.evaluation import PAPER_TASKS, load_tasks, zero_shot

METHODS = ("magnitude", "wanda", "sparsegpt", "best", "thorough")
Step = Callable[[], Measured]
LABELS = ["A", "B", "C", "D"]
ARTICLE = re.compile(r"^ ?= [^=\n]+ = *$", re.MULTILINE)  # title in WikiText
END_OF_SENTENCE = re.compile(r"(?<=[a-z\d)\" ]{2}[.!?])\s+(?=[A-Z\"])")  # not after "Mr." or "U.S."
LAST_WORD = re.compile(r"(.+) ([a-zA-Z]{4,}) ?[.!?]")


def last_words(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Return two adjacent sentences without the last word, that word, and the last words in the same article."""
    for article in ARTICLE.split(text):
        paragraphs = (END_OF_SENTENCE.split(line.strip()) for line in article.splitlines())
        pairs = (pair for paragraph in paragraphs for pair in pairwise(paragraph))
        usual = (pair for pair in pairs if all(40 <= len(sentence) <= 250 for sentence in pair))
        ends = [(before, found) for before, after in usual if (found := LAST_WORD.fullmatch(after))]
        words = [found[2] for _, found in ends]
        for before, found in ends:
            yield f"{before} {found[1]}", found[2], words


def write_documents(text: str, folder: Path, count: int) -> None:
    """Write documents of OpenBookQA, drawn with seed 0, with the three other words that are nearest in length."""
    draw = random.Random(0)
    questions = [(stem, word, sorted({*words} - {word})) for stem, word, words in last_words(text)]
    questions = [question for question in questions if len(question[2]) >= 3]
    if len(questions) < count:
        raise ValueError(f"--documents must be at most {len(questions)} for this text, but it is {count}.")
    lines = []
    for stem, word, others in draw.sample(questions, count):
        draw.shuffle(others)  # at random among those of the same length
        wrong = sorted(others, key=lambda other: abs(len(other) - len(word)))[:3]
        answers = draw.sample([word, *wrong], 4)
        document = {"question_stem": stem, "choices": {"text": answers, "label": LABELS}}
        document["answerKey"] = LABELS[answers.index(word)]
        lines.append(json.dumps(document) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openbookqa.jsonl").write_text("".join(lines), encoding="utf-8")


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


def row(results: list[Result]) -> list[str]:
    """Return perplexity, and for each task acc and, if the task has it, acc_norm."""
    shown = [(run.measured, metric) for run in results for metric in ("acc", "acc_norm")]
    cells = [f"{m[metric]:.1%} ± {100 * m[f'{metric}_error']:.1f}" if metric in m else "" for m, metric in shown]
    return [f"{results[0].measured['perplexity']:.2f}", *cells]


def main() -> None:
    """Write the documents, measure the missing cells and print the table."""
    parser = argparse.ArgumentParser(description="Compare methods by zero-shot accuracy and perplexity.")
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"of: {shlex.join(TEXT)}")
    parser.add_argument("--text", help="FILE or name from which documents are made; by default tasks_dir has them")
    parser.add_argument("--documents", type=int, default=600, help="documents that --text gives")
    parser.add_argument("--tasks_dir", required=True, help="folder with TASK.jsonl")
    parser.set_defaults(goals=("50", "2:4"), held_out=False)
    options = parser.parse_args()
    check_options(parser, options, TEXT)
    if not options.model:
        parser.error("--model must be given.")
    folder = Path(options.tasks_dir)
    try:
        if options.text:
            check_source(options.text, "--text")
            write_documents(evaluation_text(options.text), folder, options.documents)
        names = [name for name in PAPER_TASKS if (folder / f"{name}.jsonl").is_file()]
        tasks = load_tasks(names, folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not tasks:
        parser.error(
            f"--tasks_dir must have a file TASK.jsonl, but {folder} has none. Add --text, or name another folder."
        )
    runs, language = Runs(options.save, "tasks"), LanguageModel(options)
    metrics = [f"{name} {metric}" for name in names for metric in ("acc", "acc_norm")]
    table = columns(f"{options.model}: zero-shot accuracy ± standard error", "", "goal", "perplexity", *metrics)
    dense = replace(language.planned, calibration=None)
    table.add_row("dense", "", *row(measure(language, tasks, runs, dense, language.measure_dense)))
    for name in options.methods:
        for goal in options.goals:
            chosen = choices(TEXT[name], goal)
            if reason := language.refusal(chosen):
                table.add_row(name, goal, reason)
                continue
            step = partial(language.measure, chosen)
            table.add_row(name, goal, *row(measure(language, tasks, runs, language.plan(name, goal, chosen), step)))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
