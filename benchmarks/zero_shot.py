"""Compare methods by zero-shot accuracy beside perplexity, on real documents or on documents made from a text.

    python benchmarks/zero_shot.py --model M.gguf --calibration c4_sample.txt --eval wikitext2_test.raw.txt \
        --text wikitext2_test.raw.txt --tasks_dir out/zero_shot --save zero_shot.json

With `--text`, documents in the format of two tasks are written to `--tasks_dir`: `hellaswag` asks which of four
sentences of an article follows a sentence, and `openbookqa` which of four words ends a sentence. The wrong answers come
from the same article and are about as long as the right one. Without `--text`, the files TASK.jsonl in `--tasks_dir`
are used. Windows, pruning and `--save` are those of quality.py.
"""

import argparse
import json
import random
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from quality import TEXT, WINDOWS, Cell, LanguageModel, add_options, check_options, choices, columns, open_results
from rich.console import Console

from wanda_lightning.data.text_sources import check_source, evaluation_text
from wanda_lightning.evaluation import PAPER_TASKS, load_tasks, zero_shot

METHODS = ("magnitude", "wanda", "sparsegpt", "best", "thorough")
HEADING = re.compile(r"^ ?= ([^=\n]+) = *$", re.MULTILINE)  # of an article in WikiText
END_OF_SENTENCE = re.compile(r"(?<=[a-z\d)\" ]{2}[.!?])\s+(?=[A-Z\"])")  # not after "Mr." or "U.S."
LAST_WORD = re.compile(r"(.+) ([a-zA-Z]{4,}) ?[.!?]")

Question = tuple[str, str, str, list[str]]  # title, context, right answer, other texts of the same kind


def articles(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Return for each article its title and the pairs of adjacent sentences of a paragraph, without extreme lengths."""
    first, *others = HEADING.split(text)
    for title, body in (("Text", first), *zip(others[::2], others[1::2], strict=True)):
        paragraphs = (END_OF_SENTENCE.split(line.strip()) for line in body.splitlines())
        pairs = (pair for paragraph in paragraphs for pair in pairwise(paragraph))
        yield title, [pair for pair in pairs if all(40 <= len(sentence) <= 250 for sentence in pair)]


def next_sentences(text: str) -> Iterator[Question]:
    """Ask for the sentence that follows another; the other sentences are not next to it."""
    for title, pairs in articles(text):
        following = [after for _, after in pairs]
        for index, (context, ending) in enumerate(pairs):
            yield title, context, ending, following[: max(index - 1, 0)] + following[index + 2 :]


def last_words(text: str) -> Iterator[Question]:
    """Ask for the last word of a sentence, after the sentence before it; the other words end sentences too."""
    for title, pairs in articles(text):
        ends = [(before, found) for before, after in pairs if (found := LAST_WORD.fullmatch(after))]
        words = [found[2] for _, found in ends]
        for before, found in ends:
            yield title, f"{before} {found[1]}", found[2], words


def hellaswag(title: str, context: str, answers: list[str], right: int) -> dict[str, Any]:
    """Return a document with the fields of HellaSwag."""
    return {"activity_label": title, "ctx_a": context, "ctx_b": "", "endings": answers, "label": str(right)}


def openbookqa(title: str, context: str, answers: list[str], right: int) -> dict[str, Any]:
    """Return a document with the fields of OpenBookQA, which has no title."""
    labels = ["A", "B", "C", "D"]
    return {"question_stem": context, "choices": {"text": answers, "label": labels}, "answerKey": labels[right]}


MADE = {"hellaswag": (next_sentences, hellaswag), "openbookqa": (last_words, openbookqa)}


def write_documents(text: str, folder: Path, counts: Sequence[int]) -> None:
    """Write documents of each task, drawn with seed 0; the wrong answers are the three nearest in length."""
    folder.mkdir(parents=True, exist_ok=True)
    for (task, (ask, document)), count in zip(MADE.items(), counts, strict=True):
        draw = random.Random(0)
        questions = [(*question, sorted(set(others) - {question[2]})) for *question, others in ask(text)]
        questions = [question for question in questions if len(question[3]) >= 3]
        if len(questions) < count:
            raise ValueError(f"The text gives only {len(questions)} documents of {task}: set --documents lower.")
        lines = []
        for title, context, answer, others in draw.sample(questions, count):
            draw.shuffle(others)  # at random among those of the same length
            wrong = sorted(others, key=lambda other: abs(len(other) - len(answer)))[:3]
            answers = draw.sample([answer, *wrong], 4)
            lines.append(json.dumps(document(title, context, answers, answers.index(answer))) + "\n")
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def measure(language: LanguageModel, tasks: dict[str, Any], perplexity: Callable[[], Cell]) -> Cell:
    """Prune and measure perplexity, then the accuracy of each task with its standard error."""
    cell = perplexity()
    return cell if "refused" in cell else {**cell, **zero_shot(language.model, language.tokenizer, tasks)}


def accuracies(cell: Cell, tasks: Sequence[str]) -> list[str]:
    """Return a row of the table: perplexity, and for each task acc and, if the task has it, acc_norm."""
    if "refused" in cell:
        return [cell["refused"]]
    found = [(cell[task], metric) for task in tasks for metric in ("acc", "acc_norm")]
    shown = [f"{r[m]:.1%} ± {100 * r[f'{m}_stderr']:.1f}" if m in r else "" for r, m in found]
    return [f"{cell['perplexity']:.2f}", *shown]


def main() -> None:
    """Write the documents, measure the missing cells and print the table."""
    parser = argparse.ArgumentParser(description="Compare methods by zero-shot accuracy and perplexity.")
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"of: {shlex.join(TEXT)}")
    parser.add_argument("--text", help="FILE or name from which documents are made; by default tasks_dir has them")
    counts = {"type": int, "nargs": len(MADE), "metavar": "N", "default": [200, 600]}
    parser.add_argument("--documents", **counts, help=f"documents that --text gives: {', '.join(MADE)}")
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
    results = open_results(parser, options, (*WINDOWS, "eval", "text", "documents", "tasks_dir"))
    language = LanguageModel(options)
    metrics = [f"{name} {metric}" for name in names for metric in ("acc", "acc_norm")]
    table = columns(f"{options.model}: zero-shot accuracy ± standard error", "", "goal", "perplexity", *metrics)
    dense = results("dense", "", "", partial(measure, language, tasks, language.measure_dense))
    table.add_row("dense", "", *accuracies(dense, names))
    for name in options.methods:
        for goal in options.goals:
            chosen = choices(TEXT[name], goal)
            step = partial(measure, language, tasks, partial(language.measure, chosen))
            table.add_row(name, goal, *accuracies(results(name, goal, chosen, step), names))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
