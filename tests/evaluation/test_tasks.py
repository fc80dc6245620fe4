"""Zero-shot accuracy against prompts and log-likelihoods written by hand, and documents that are refused."""

import json
import math
import re
import sys
from copy import deepcopy
from pathlib import Path

import datasets
import pytest
from support.callbacks import same
from support.pairwise import with_nightly
from support.refusals import refuses
from support.tasks import DOCUMENTS, accuracies_by_hand, tiny_llama, tiny_tokenizer, write_tasks

from wanda_lightning.evaluation import PAPER_TASKS, answer, load_tasks
from wanda_lightning.evaluation.tasks import flips


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
        results, _ = answer(model, tokenizer, tasks, batch_size=2)
        measured = results[name]
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
    measured, _ = answer(model, tokenizer, load_tasks(["arc_easy", "rte"], tmp_path), limit=1)

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
    with refuses(r"^tasks must be names that lm-eval knows, .* 'arc_eazy'\. Did you mean arc_easy"):
        load_tasks(["boolq", "arc_eazy"])


GSM8K = [
    {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"},
    {"question": "What is 2 + 3?", "answer": "It is 5.\n#### 5"},
    {"question": "What is 9 - 8?", "answer": "It is 1.\n#### 1"},
]


@pytest.fixture
def written_answers(tmp_path):
    """A task whose answers the model writes, with one example in each prompt."""
    lines = [json.dumps(document) for document in GSM8K]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
    return load_tasks(["gsm8k"], tmp_path, num_fewshot=1)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that a model sees, which writes the same three answers each time."""
    seen = []

    def generate_until(self, requests, **_):
        seen.extend(request.args[0] for request in requests)
        return ["I do not know.", "#### 5", "It may be 1"]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", generate_until)
    return seen


def test_answers_that_the_model_writes(written_answers, prompts):
    results, answers = answer(tiny_llama(0), tiny_tokenizer(), written_answers, 2, None)
    assert answers == {"gsm8k": [False, True, False]}
    metrics = results["gsm8k"]
    assert metrics["exact_match,strict-match"] == pytest.approx(1 / 3)
    assert metrics["exact_match,flexible-extract"] == pytest.approx(2 / 3)
    for name in ("strict-match", "flexible-extract"):
        # The standard error of three samples, one or two of which are right.
        assert metrics[f"exact_match,{name}_stderr"] == pytest.approx(1 / 3)
    assert metrics["documents"] == 3
    assert len(metrics) == 5
    for prompt, document in zip(prompts, GSM8K, strict=True):
        assert prompt.count("Question:") == 2
        assert prompt.endswith(f"Question: {document['question']}\nAnswer:")
        assert prompt.count(document["question"]) == 1  # an example is another document


def test_a_tiny_model_writes_answers(written_answers):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # lm-eval ends answers with it
    model = tiny_llama(0)
    model.config.max_position_embeddings = 512  # an answer may have 256
    results, answers = answer(model, tokenizer, written_answers, 2, 1)
    assert answers == {"gsm8k": [False]}
    assert results["gsm8k"]["documents"] == 1


def test_each_model_sees_the_same_examples(written_answers, prompts):
    for _ in range(3):
        answer(tiny_llama(0), tiny_tokenizer(), written_answers, 2, None)
    assert prompts[:3] == prompts[3:6] == prompts[6:]


def test_examples_need_other_documents(written_answers, tmp_path):
    with refuses(r"gsm8k\.jsonl must have more documents than .* has 3, and .* is 5\. Add"):
        load_tasks(["gsm8k"], tmp_path)
    with refuses("is 3"):
        load_tasks(["gsm8k"], tmp_path, num_fewshot=3)


def test_a_group_has_its_members_and_its_own_accuracy(tmp_path, monkeypatch):
    caches = []

    def load_dataset(path, name, **_):
        caches.append(datasets.config.HF_DATASETS_CACHE)
        number = 1 if name == "wmdp-bio" else 3
        row = {"question": "What is it?", "choices": ["a", "b", "c", "d"], "answer": 2}
        return datasets.DatasetDict(test=datasets.Dataset.from_list([row] * number))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tasks = load_tasks(["wmdp"], cache_dir=str(tmp_path))
    assert {*tasks} == {"wmdp", "wmdp_bio", "wmdp_chem", "wmdp_cyber"}
    assert {*caches} == {str(tmp_path)}
    assert str(tmp_path) != datasets.config.HF_DATASETS_CACHE
    results, answers = answer(tiny_llama(0), tiny_tokenizer(), tasks, 4, None)
    assert {*answers} == {"wmdp_bio", "wmdp_chem", "wmdp_cyber"}
    assert {*results} == {*tasks}
    right = sum(sum(given) for given in answers.values())
    assert results["wmdp"]["acc"] == pytest.approx(right / 7)
    assert results["wmdp"]["documents"] == 7

    monkeypatch.undo()
    (tmp_path / "wmdp.jsonl").write_text('{"question": "a"}')
    with refuses("wmdp is a group of tasks"):
        load_tasks(["wmdp"], tmp_path)


def test_a_task_that_needs_another_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.utils", raising=False)
    (tmp_path / "ifeval.jsonl").write_text('{"prompt": "a"}')
    with refuses("The task ifeval needs another package: .*langdetect"):
        load_tasks(["ifeval"], tmp_path)


def test_prompts_in_a_chat_template(written_answers, prompts):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    )
    answer(tiny_llama(0), tokenizer, written_answers, 2, None, apply_chat_template=True)
    assert all(prompt.startswith("<user>Question:") for prompt in prompts)
    assert all(prompt.count("<assistant>") == 1 for prompt in prompts)


def test_code_by_the_model_runs_only_with_permission(tmp_path, monkeypatch):
    (tmp_path / "humaneval.jsonl").write_text('{"prompt": "a"}')
    for folder in (tmp_path, None):
        with refuses("humaneval runs code that the model writes. .* HF_ALLOW_CODE_EVAL=1"):
            load_tasks(["humaneval"], folder)


def test_flips_are_counted_by_task():
    dense = {"a": [True, True, False, False], "b": []}
    pruned = {"a": [True, False, True, False], "b": []}
    assert flips(dense, pruned) == {
        "a": {
            "right_to_wrong": 0.25,
            "wrong_to_right": 0.25,
            "right_to_wrong_stderr": (0.25 * 0.75 / 4) ** 0.5,
            "wrong_to_right_stderr": (0.25 * 0.75 / 4) ** 0.5,
        }
    }


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
