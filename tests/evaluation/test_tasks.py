"""Zero-shot accuracy against prompts and log-likelihoods written by hand, and documents that are refused."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path

import pytest
from support.callbacks import same
from support.pairwise import with_nightly
from support.refusals import refuses
from support.tasks import DOCUMENTS, accuracies_by_hand, tiny_llama, tiny_tokenizer, write_tasks

from wanda_lightning.evaluation import PAPER_TASKS, load_tasks, zero_shot


@pytest.mark.parametrize(
    "name", with_nightly(["boolq", "rte", "arc_easy", "openbookqa"], ["arc_challenge"])
)
def test_accuracy_is_the_one_counted_by_hand(tmp_path, name):
    write_tasks(tmp_path)
    tasks = load_tasks([name], tmp_path)
    tokenizer = tiny_tokenizer()
    seen = set()
    for seed in range(40):
        model = tiny_llama(seed)
        measured = zero_shot(model, tokenizer, tasks, batch_size=2)[name]
        expected = accuracies_by_hand(model, tokenizer, name, DOCUMENTS[name])
        if name in ("boolq", "rte"):
            del expected["acc_norm"]
        # One degree of freedom of two documents.
        expected["acc_stderr"] = pytest.approx(math.sqrt(expected["acc"] * (1 - expected["acc"])))
        expected["documents"] = 2
        measured.pop("acc_norm_stderr", None)
        assert measured == expected
        seen.add(measured["acc"])
        if len(seen) > 1:
            break
    assert len(seen) > 1  # else these models could not tell one way of counting from another


def test_a_limit_takes_the_first_documents_and_the_model_stays_as_it_was(tmp_path):
    write_tasks(tmp_path)
    model = tiny_llama(3).train()
    model.model.layers[0].eval()  # frozen
    modes = [module.training for module in model.modules()]
    before = deepcopy(model)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "!"
    measured = zero_shot(model, tokenizer, load_tasks(["arc_easy", "rte"], tmp_path), limit=1)

    assert [module.training for module in model.modules()] == modes
    assert same(model, before)
    assert tokenizer.pad_token is None
    for name in ("arc_easy", "rte"):
        by_hand = accuracies_by_hand(model.eval(), tokenizer, name, DOCUMENTS[name][:1])
        assert measured[name]["acc"] == by_hand["acc"]
        assert measured[name]["documents"] == 1
    assert measured["mean"] == {"acc": (measured["arc_easy"]["acc"] + measured["rte"]["acc"]) / 2}


FITS = '{"passage": "a", "question": "b", "label": 1}\n'
UNFIT = [
    ("boolq", '{"passage": "a", "question": "b", "answer": 1}', "document 1 has no label"),
    ("boolq", '{"passage": "a", "question": "b", "label": null}', "document 1 has no label"),
    (
        "boolq",
        FITS + '{"passage": "a", "question": "b", "label": 2}',
        "the answer of document 2 is 2, but there are 2",
    ),
    ("boolq", "{", "JSON parse error"),
    (
        "winogrande",
        '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}',
        "do not fit",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), UNFIT)
def test_documents_that_do_not_fit(tmp_path, name, content, message):
    (tmp_path / f"{name}.jsonl").write_text(content)
    with refuses(re.escape(message)):
        load_tasks([name], tmp_path)


def test_names_of_tasks(tmp_path):
    write_tasks(tmp_path)
    for names in (["paper"], ["all"], ["boolq", "paper"]):
        assert list(load_tasks(names, tmp_path)) == list(PAPER_TASKS)
    assert load_tasks([], tmp_path) == {}


def test_an_unknown_task_is_refused_with_the_nearest_one():
    with refuses(r"^tasks must be among .* but one is 'arc_eazy'\. Did you mean arc_easy"):
        load_tasks(["boolq", "arc_eazy"])


PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8").splitlines()


def test_the_documented_fields_are_the_ones_that_are_read():
    rows = [line.split("|") for line in PAGE if line.startswith("| ")]
    table = {}
    tasks = ""
    for _, task, _, field, *_ in rows[2:]:
        tasks = task.strip() or tasks  # empty in the further rows of a task
        for name in tasks.split(", "):
            table[name] = (*table.get(name, ()), field.strip(" `"))
    assert table == PAPER_TASKS


def test_the_documented_examples_can_be_used(tmp_path):
    examples = {json.loads(line)["task"]: line for line in PAGE if line.startswith('{"task"')}
    for name, line in examples.items():
        (tmp_path / f"{name}.jsonl").write_text(line)
    assert list(load_tasks(list(PAPER_TASKS), tmp_path)) == list(examples) == list(PAPER_TASKS)
