"""Zero-shot accuracy against prompts and log-likelihoods written by hand; the command, its refusals, its JSON."""

import json
import math
import os
import re
import shutil
import signal
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wanda_lightning.cli import main
from wanda_lightning.evaluation import PAPER_TASKS, Evaluation, load_tasks, sparsity_of, task_names, zero_shot
from wanda_lightning.modules import ImageClassifierModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*tells .* apart"),  # tiny classifiers are made without regard to the images
]
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

SEQLEN, VOCABULARY = 32, 400
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])

DOCUMENTS = {
    "boolq": [
        {"passage": "A cat is an animal.", "question": "is a cat an animal", "label": 1},
        {"passage": "Stones sink.", "question": "do stones swim", "label": 0},
    ],
    "rte": [
        {"sentence1": "A cat sleeps.", "sentence2": "An animal sleeps.", "label": 0},
        {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1},
    ],
    "hellaswag": [
        {
            "activity_label": "Cooking",
            "ctx_a": "A man cuts an onion.",
            "ctx_b": "he",
            "endings": ["flies [step] away and is not seen again.", "cries.", "sings  a song.", "[title] ends"],
            "label": "1",
        },
        {
            "activity_label": "Sleeping",
            "ctx_a": "[header] A cat lies down.",
            "ctx_b": "",
            "endings": ["it sleeps.", "it writes a long letter to its sister in London."],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "The cup did not fit; _ was too big.", "option1": "the cup", "option2": "a box", "answer": "1"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "arc_easy": [
        {"question": "What do plants need?", "choices": {"text": ["light", "a hammer"], "label": ["A", "B"]}},
        {"question": "What is hot?", "choices": {"text": ["ice", "the sun", "deep snow"], "label": ["1", "2", "3"]}},
    ],
    "arc_challenge": [
        {"question": "What is 2 + 2?", "choices": {"text": ["four", "a large number"], "label": ["A", "B"]}},
        {"question": "Which is wet?", "choices": {"text": ["dust", "the sea"], "label": ["A", "B"]}},
    ],
    "openbookqa": [
        {"question_stem": "A magnet attracts", "choices": {"text": ["iron", "dry wood"], "label": ["A", "B"]}},
        {"question_stem": "Frogs begin as", "choices": {"text": ["eagles", "tadpoles"], "label": ["A", "B"]}},
    ],
}
for name in ("arc_easy", "arc_challenge", "openbookqa"):
    DOCUMENTS[name][0]["answerKey"] = "A"
    DOCUMENTS[name][1]["answerKey"] = DOCUMENTS[name][1]["choices"]["label"][1]


def by_hand(name, doc):
    """What is scored: (prompt, continuation) of each choice, the choices themselves, and which one is right."""
    if name == "boolq":
        prompt, choices = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:", ["no", "yes"]
    elif name == "rte":
        prompt = f"{doc['sentence1']}\nQuestion: {doc['sentence2']} True or False?\nAnswer:"
        choices = ["True", "False"]
    elif name == "hellaswag":
        text = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        prompt, *choices = (
            re.sub(r"\[.*?\]", "", part.strip().replace(" [title]", ". ")).replace("  ", " ")
            for part in [text, *doc["endings"]]
        )
    elif name == "winogrande":
        before, after = doc["sentence"].split("_")
        choices = [before + doc["option1"], before + doc["option2"]]
        return [(choice, f" {after.strip()}") for choice in choices], choices, int(doc["answer"]) - 1
    else:
        prompt = doc["question_stem"] if name == "openbookqa" else f"Question: {doc['question']}\nAnswer:"
        choices = doc["choices"]["text"]
    gold = int(doc["label"]) if "label" in doc else doc["choices"]["label"].index(doc["answerKey"])
    # Blanks at the end of a prompt belong to what follows: tokens begin with them.
    blanks = prompt[len(prompt.rstrip()) :]
    return [(prompt.rstrip(), f"{blanks} {choice}") for choice in choices], choices, gold


def log_likelihood(model, tokenizer, prompt, continuation):
    given, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + continuation).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(given, len(ids)))


def accuracies_by_hand(model, tokenizer, name, documents):
    hits = {"acc": 0, "acc_norm": 0}
    for doc in documents:
        pairs, choices, gold = by_hand(name, doc)
        scores = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        normed = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        hits["acc"] += scores.index(max(scores)) == gold
        hits["acc_norm"] += normed.index(max(normed)) == gold
    return {metric: count / len(documents) for metric, count in hits.items()}


def tiny_llama(seed):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.3, **SIZES, **SPECIAL)
        ).eval()


def tiny_tokenizer():
    """Whole words are tokens, so that short choices are not always the likelier ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(DOCUMENTS), " yes no True False" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_tasks(folder, documents=DOCUMENTS):
    folder.mkdir(exist_ok=True)
    for name, rows in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def shell(tmp_path, monkeypatch):
    """An empty working directory and no network; what a command changes in its process is put back."""
    import datasets
    import huggingface_hub.constants
    from lightning.pytorch import _logger

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "no_cache")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["wanda-lightning"])
    monkeypatch.chdir(tmp_path)
    level, handler, threads = _logger.level, signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)  # what is as small as this is slower with more
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    _logger.setLevel(level)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Language models dense and with zeros, a text, tasks; image classifiers and images. No command may change them."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("dense", "pruned"):
        model = tiny_llama(0)
        if name == "pruned":
            model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)))
    (folder / "short.txt").write_text("too short")
    write_tasks(folder / "tasks")
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.default_generator.manual_seed(seed)
            module = ImageClassifierModule("test_vit", pretrained=False, num_classes=8)
            nn.init.normal_(module.model.get_classifier().weight)
            module.save_pretrained(folder / f"vit{seed}")
    for label in range(8):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{i}.png")
    return folder


def run(*arguments):
    """The exit status of `wanda-lightning ARGUMENTS`."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def everything_in(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, capsys, inputs, monkeypatch):
    """Runs a command that must fail with one message before anything is measured, and leave every folder as it was."""

    def measured(*arguments, **options):
        raise AssertionError("something was measured")

    for name in ("measure", "measure_all", "zero_shot"):
        monkeypatch.setattr(f"wanda_lightning.cli.evaluate.{name}", measured)

    def check(*arguments, message):
        before = everything_in(tmp_path), everything_in(inputs)
        assert run(*arguments) == 1
        out, err = capsys.readouterr()
        assert message in err
        assert "Traceback" not in out + err
        assert (everything_in(tmp_path), everything_in(inputs)) == before

    return check


# ------------------------------------------------------------------------------------------------------ zero-shot tasks


@needs_lm_eval
@pytest.mark.parametrize("name", PAPER_TASKS)
def test_accuracy_is_the_one_counted_by_hand(tmp_path, name):
    write_tasks(tmp_path / "tasks")
    (task,) = load_tasks([name], tmp_path / "tasks").values()
    tokenizer, seen = tiny_tokenizer(), set()
    for seed in range(8):
        model = tiny_llama(seed)
        found = zero_shot(model, tokenizer, {name: task}, batch_size=2)[name]
        expected = accuracies_by_hand(model, tokenizer, name, DOCUMENTS[name])
        assert {"acc": found["acc"], "acc_norm": found.get("acc_norm", expected["acc_norm"])} == expected
        assert ("acc_norm" in found) == (name not in ("boolq", "rte", "winogrande"))
        assert found["documents"] == 2
        assert found["acc_stderr"] == pytest.approx(math.sqrt(expected["acc"] * (1 - expected["acc"])))  # n - 1 = 1
        seen.add(found["acc"])
    assert len(seen) > 1  # else these models could not tell one way of counting from another


@needs_lm_eval
def test_a_limit_takes_the_first_documents(tmp_path):
    write_tasks(tmp_path)
    model, tokenizer = tiny_llama(3), tiny_tokenizer()
    found = zero_shot(model, tokenizer, load_tasks(["arc_easy", "rte"], tmp_path), limit=1)
    for name in ("arc_easy", "rte"):
        assert found[name]["documents"] == 1
        assert found[name]["acc"] == accuracies_by_hand(model, tokenizer, name, DOCUMENTS[name][:1])["acc"]
    assert found["mean"] == {"acc": (found["arc_easy"]["acc"] + found["rte"]["acc"]) / 2}


@needs_lm_eval
def test_model_and_tokenizer_are_as_they_were(tmp_path):
    write_tasks(tmp_path)
    tasks = load_tasks(["boolq"], tmp_path)
    model, tokenizer = tiny_llama(0).train(), tiny_tokenizer()
    tokenizer.eos_token = "!"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    zero_shot(model, tokenizer, tasks)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert tokenizer.pad_token is None


@needs_lm_eval
def test_fields_that_are_not_needed_may_be_anything(tmp_path):
    rows = [{**row, "id": [1, "a"][i], "source": None} for i, row in enumerate(DOCUMENTS["boolq"])]
    write_tasks(tmp_path, {"boolq": [*rows, {**rows[0], "more": 1}]})
    (tmp_path / "boolq.jsonl").write_text("\n" + (tmp_path / "boolq.jsonl").read_text() + "\n\n")
    (task,) = load_tasks(["boolq"], tmp_path).values()
    assert len(task.eval_docs) == 3


FITS = '{"passage": "a", "question": "b", "label": 1}\n'
UNFIT = [
    ("boolq", '{"passage": "a", "question": "b", "answer": 1}', "line 1 has 'passage', 'question', 'answer'"),
    ("boolq", '{"passage": "a", "question": "b", "label": null}', "line 1 has no value for label"),
    ("boolq", FITS + '{"passage": "a", "question": "b", "label": 2}', "the answer of document 2 is 2, but there are 2"),
    ("boolq", FITS + '{"passage": "a", "question": "b", "label": -1}', "the answer of document 2 is -1, but there are"),
    ("boolq", "[1]", "line 1 is a list"),
    ("boolq", "{", "line 1 is not JSON"),
    ("boolq", "", "is empty. Give another file"),
    ("boolq", b"\xff", "must be in UTF-8"),
    ("arc_easy", '{"question": "a", "choices": ["x", "y"], "answerKey": "A"}', "do not fit lm-eval's definition"),
    (
        "openbookqa",
        '{"question_stem": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}\n'
        '{"question_stem": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "E"}',
        "document 2 raises ValueError",
    ),
    ("winogrande", '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}', "do not fit"),
    (
        "hellaswag",
        '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": ""}',
        "do not fit lm-eval's definition of hellaswag",
    ),
]


@needs_lm_eval
@pytest.mark.parametrize(("name", "content", "message"), UNFIT, ids=[f"{n} {m[:30]}" for n, _, m in UNFIT])
def test_documents_that_do_not_fit(tmp_path, name, content, message):
    (tmp_path / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tasks([name], tmp_path)


def test_names_of_tasks():
    assert task_names([]) == []
    assert task_names(["paper"]) == task_names(["all"]) == task_names(["boolq", "paper"]) == list(PAPER_TASKS)
    with pytest.raises(ValueError, match=r"^tasks must be among .* but one is 'arc_eazy'\. Did you mean arc_easy"):
        task_names(["boolq", "arc_eazy"])


# --------------------------------------------------------------------------------------------------------- the command


def perplexity_by_hand(folder, text, windows):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text).input_ids[: windows * SEQLEN]).view(windows, SEQLEN)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture
def side_by_side(inputs):
    """The options of a fast run on two language models."""
    text = ["--eval", inputs / "text.txt", "--limit", "5", "--seqlen", SEQLEN]
    return ["evaluate", "--model", inputs / "pruned", "--dense", inputs / "dense", *text]


@needs_lm_eval
def test_models_side_by_side(inputs, side_by_side, tmp_path, capsys):
    write_tasks(tmp_path / "mine")
    tasks = ["--tasks", "arc_easy,boolq", "--tasks_dir", "mine", "--batch_size", "3"]
    assert run(*side_by_side, *tasks, "--save", "out/results.json") == 0
    out = capsys.readouterr().out
    written = json.loads(Path("out/results.json").read_text())
    dense, pruned = f"{inputs}/dense", f"{inputs}/pruned"
    assert list(written["models"]) == [dense, pruned]
    assert written["dense"] == dense
    assert written["config"]["limit"] == 5
    assert written["versions"]["lm_eval"]
    text, tokenizer = inputs / "text.txt", tiny_tokenizer()
    for folder, found in written["models"].items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = pytest.approx(perplexity_by_hand(folder, text.read_text(), 5), rel=1e-6)
        assert found[str(text)] == {"perplexity": expected, "windows": 5}
        for name in ("arc_easy", "boolq"):
            assert found[name]["acc"] == accuracies_by_hand(model, tokenizer, name, DOCUMENTS[name])["acc"]
        weights = [m.weight for name, m in model.named_modules() if name.endswith("proj")]
        zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        assert found["sparsity"]["layers"] == zeros / size
        assert found["sparsity"]["model"] == zeros / sum(p.numel() for p in model.parameters())
        assert zeros == (0 if folder == dense else 64 * 32 / 2)
    before, after = (written["models"][folder][str(text)]["perplexity"] for folder in (dense, pruned))
    (shown,) = [line for line in out.splitlines() if "perplexity" in line]
    assert [cell.strip() for cell in shown.strip("│").split("│")[1:]] == [
        f"{before:.2f}",
        f"{after:.2f} ({after - before:+.2f})",
    ]
    (shown,) = [line for line in out.splitlines() if "sparsity of prunable layers" in line]
    sparsity = 100 * written["models"][pruned]["sparsity"]["layers"]
    assert [cell.strip() for cell in shown.strip("│").split("│")[1:]] == ["0.00%", f"{sparsity:.2f}% (+{sparsity:.2f})"]
    assert all(f"{row} " in out for row in ("arc_easy acc", "arc_easy acc_norm", "boolq acc", "mean acc"))
    assert "boolq acc_norm" not in out
    assert "stderr" not in out
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_several_texts_and_models_without_a_dense_one(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "dense", tmp_path / "copy")
    several = [f"{inputs}/pruned, {inputs}/dense,copy", "--eval", f"{inputs}/text.txt,python-docs"]
    assert run("evaluate", "--model", *several, "--limit", "2", "--save", "results.json") == 0
    assert not re.search(r"\([+-]", capsys.readouterr().out)
    written = json.loads(Path("results.json").read_text())
    assert list(written["models"]) == [f"{inputs}/pruned", f"{inputs}/dense", "copy"]
    assert written["dense"] is None
    pruned, dense, copy = written["models"].values()
    assert list(dense) == ["sparsity", f"{inputs}/text.txt", "python-docs"]
    assert dense == copy
    assert dense != pruned


@pytest.mark.parametrize("kind", ["text", "images"])
def test_one_model_in_memory_at_a_time(inputs, kind, monkeypatch):
    import wanda_lightning.cli.evaluate as evaluate_command

    loaded = []

    def recorded(module_class):
        def load(*arguments, **options):
            assert [module for module in loaded if module() is not None] == []
            module = module_class(*arguments, **options)
            loaded.append(weakref.ref(module.model))
            return module

        return load

    for name in ("CausalLMModule", "ImageClassifierModule"):
        monkeypatch.setattr(evaluate_command, name, recorded(getattr(evaluate_command, name)))
    if kind == "text":
        tasks = ["--tasks", "boolq", "--tasks_dir", inputs / "tasks"] if find_spec("lm_eval") else []
        options = ["--eval", inputs / "text.txt", "--limit", "1", *tasks]
        assert run("evaluate", "--model", f"{inputs}/dense,{inputs}/pruned", *options) == 0
    else:
        names = ",".join(f"timm:local-dir:{inputs}/vit{seed}" for seed in (1, 2))
        assert run("evaluate", "--model", names, "--data_path", inputs / "images") == 0
    assert len(loaded) == 4


def test_the_context_is_the_window_and_nothing_is_written_unasked(inputs, tmp_path, capsys):
    assert run("evaluate", "--model", f"[{inputs}/dense]", "--eval", inputs / "text.txt") == 0
    expected = perplexity_by_hand_in_windows(inputs / "dense", (inputs / "text.txt").read_text(), 256)
    assert f" {expected:.2f} " in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def perplexity_by_hand_in_windows(folder, text, seqlen):
    model, ids = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()(text).input_ids
    windows = [torch.tensor(ids[i : i + seqlen]) for i in range(0, len(ids) - seqlen + 1, seqlen)]
    with torch.no_grad():
        return math.exp(np.mean([model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]))


def test_image_classifiers_side_by_side(inputs, capsys):
    names = [f"timm:local-dir:{inputs}/vit{seed}" for seed in (1, 2)]
    options = ["--data_path", inputs / "images", "--batch_size", "5", "--save", "results.json"]
    assert run("evaluate", "--model", names[1], "--dense", names[0], *options) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "top-5" in out
    found = json.loads(Path("results.json").read_text())["models"]
    assert list(found) == names
    for name in names:
        model = timm.create_model(name.removeprefix("timm:"), pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        hits = {1: 0, 5: 0}
        for label in range(8):
            for path in sorted((inputs / "images" / str(label)).iterdir()):
                with torch.no_grad():
                    order = model(transform(Image.open(path))[None])[0].argsort(descending=True).tolist()
                for k in hits:
                    hits[k] += label in order[:k]
        assert found[name][f"{inputs}/images"] == {
            "top-1": pytest.approx(hits[1] / 24),
            "top-5": pytest.approx(hits[5] / 24),
            "images": 24,
        }
        assert found[name]["sparsity"] == {"layers": 0.0, "model": sparsity_of(model)["model"]}


# ------------------------------------------------------------------------------------------- what is refused, and how


OF_TASKS = [
    (["--tasks", "arc_eazy"], "Did you mean arc_easy?"),
    (["--tasks", "rte,boolq", "--tasks_dir", "{}"], "there is no rte.jsonl, boolq.jsonl"),
    (["--tasks", "paper", "--tasks_dir", "{}/gone"], "gone does not exist"),
    (["--tasks", "boolq"], "cannot be had from the Hugging Face hub. Put them into files: --tasks_dir DIR"),
]
OF_LANGUAGE_MODELS = [
    (["--eval", "wikitext3"], "Did you mean wikitext2?"),
    (["--eval", "{}/text.txt,{}/gone.txt"], "gone.txt does not exist"),
    (["--eval", "{}/short.txt"], f"A window of --seqlen {SEQLEN} tokens was asked for"),
    (["--eval", "wikitext2"], "Use python-docs, which needs no network"),
    (["--seqlen", "257"], "--seqlen must be at most 256, the model's context, but it is 257"),
    (["--model", "{}/pruned,{}/gone"], "gone does not exist"),
    (["--dense", "{}/images"], "has no config.json"),
    (["--save", "{}"], "is a folder. Name a file inside it"),
    (["--save", "{}/text.txt"], "text.txt exists. Choose another name, or replace it with --overwrite"),
]


@pytest.mark.parametrize(("more", "message"), OF_LANGUAGE_MODELS, ids=[" ".join(m) for m, _ in OF_LANGUAGE_MODELS])
def test_refused_before_anything_is_measured(inputs, side_by_side, refused, more, message):
    refused(*side_by_side, *(option.replace("{}", str(inputs)) for option in more), message=message)


@needs_lm_eval
@pytest.mark.parametrize(("more", "message"), OF_TASKS, ids=[" ".join(more) for more, _ in OF_TASKS])
def test_tasks_refused_before_anything_is_measured(inputs, side_by_side, refused, more, message):
    refused(*side_by_side, *(option.replace("{}", str(inputs)) for option in more), message=message)


OF_IMAGES = [
    (["--data_path", "{}/gone"], "gone does not exist"),
    (["--model", "timm:local-dir:{}/vit1,timm:test_vitt"], "Did you mean test_vit"),
]


@pytest.mark.parametrize(("more", "message"), OF_IMAGES, ids=[" ".join(more) for more, _ in OF_IMAGES])
def test_refused_for_an_image_classifier(inputs, refused, more, message):
    options = ["evaluate", "--model", f"timm:local-dir:{inputs}/vit1", "--data_path", inputs / "images"]
    refused(*options, *(option.replace("{}", str(inputs)) for option in more), message=message)


def test_models_that_read_different_windows(inputs, refused, tmp_path):
    shutil.copytree(inputs / "dense", tmp_path / "shorter")
    config = json.loads(Path("shorter/config.json").read_text())
    Path("shorter/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    several = ["--model", f"{inputs}/dense,shorter", "--eval", inputs / "text.txt"]
    refused("evaluate", *several, message="reads 64 tokens at once and another model 256. Use --seqlen 64")


def test_a_model_without_a_tokenizer(side_by_side, refused, tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "mute")
    refused(*side_by_side, "--model", "mute", message="mute must have a tokenizer")


def test_without_lm_eval_the_extra_is_named(inputs, side_by_side, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tasks = ["--tasks", "boolq", "--tasks_dir", inputs / "tasks"]
    refused(*side_by_side, *tasks, message="Zero-shot tasks need lm_eval: pip install 'wanda_lightning[eval]'")


@needs_lm_eval
@pytest.mark.parametrize("moment", ["zero_shot", "to_json", "replace"])
def test_the_json_is_whole_or_not_there(inputs, side_by_side, tmp_path, monkeypatch, moment):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    Path("results.json").write_text("mine")
    command = [*side_by_side, "--save", "results.json", "--overwrite"]
    tasks = ["--tasks", "boolq", "--tasks_dir", inputs / "tasks"]
    with monkeypatch.context() as patch:
        if moment == "zero_shot":
            patch.setattr("wanda_lightning.cli.evaluate.zero_shot", full)
        elif moment == "to_json":
            patch.setattr(Evaluation, "to_json", full)
        else:
            patch.setattr(os, "replace", full)
        assert run(*command, *tasks) == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"results.json": "mine"}
    if moment == "replace":
        assert run(*command, *tasks) == 0
        assert len(json.loads(Path("results.json").read_text())["models"]) == 2


def test_options_from_a_file(inputs, capsys):
    lines = [f"model: [{inputs}/dense, {inputs}/pruned]", f"eval: [{inputs}/text.txt]", "limit: 2", "save: out.json"]
    Path("options.yaml").write_text("\n".join(lines))
    assert run("evaluate", "--config", "options.yaml", "--seqlen", SEQLEN) == 0
    assert len(json.loads(Path("out.json").read_text())["models"]) == 2


# ----------------------------------------------------------------------------------------------- after pruning


@pytest.fixture
def pruning(inputs):
    sizes = ["--nsamples", "4", "--seqlen", SEQLEN, "--limit", "2", "--calibration", inputs / "text.txt"]
    return ["prune", "--model", inputs / "dense", *sizes, "--eval", inputs / "text.txt"]


@needs_lm_eval
def test_zero_shot_after_pruning(inputs, pruning, capsys):
    command = [*pruning, "--eval_zero_shot", "--tasks_dir", inputs / "tasks", "--save", "log", "--save_model", "model"]
    assert run(*command) == 0
    out = capsys.readouterr().out
    measured = json.loads(Path("log/pruning_report.json").read_text())["config"]["measured"]
    assert list(measured["zero_shot"]) == [*PAPER_TASKS, "mean"]
    pruned = AutoModelForCausalLM.from_pretrained("model")
    assert sparsity_of(pruned)["layers"] == 0.5
    for name in PAPER_TASKS:
        found = measured["zero_shot"][name]
        expected = accuracies_by_hand(pruned, tiny_tokenizer(), name, DOCUMENTS[name])
        assert {"acc": found["acc"], "acc_norm": found.get("acc_norm", expected["acc_norm"])} == expected
        assert f"{name} acc " in out
    assert f"{measured['zero_shot']['mean']['acc']:.2%}" in out
    assert AutoTokenizer.from_pretrained("model").pad_token is None


@needs_lm_eval
def test_a_pruned_model_is_saved_before_its_tasks(inputs, pruning, monkeypatch):
    def fails(*arguments):
        raise OSError("out of patience")

    monkeypatch.setattr("wanda_lightning.cli.prune.zero_shot", fails)
    assert run(*pruning, "--eval_zero_shot", "--tasks_dir", inputs / "tasks", "--save_model", "model") == 1
    assert sparsity_of(AutoModelForCausalLM.from_pretrained("model"))["layers"] == 0.5


def test_zero_shot_is_refused_before_pruning(inputs, pruning, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(*pruning, "--eval_zero_shot", "--save", "log", message="pip install 'wanda_lightning[eval]'")


@needs_lm_eval
def test_missing_tasks_are_refused_before_pruning(inputs, pruning, refused):
    options = ["--eval_zero_shot", "--tasks_dir", inputs, "--save", "log"]
    refused(*pruning, *options, message="there is no boolq.jsonl, rte.jsonl")
