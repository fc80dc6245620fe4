"""Windows of text against slow versions of the two protocols, and what the data module refuses."""

from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
from support.callbacks import SaveAt, batches_of_each_step, validate_module
from support.data import (
    byte_tokenizer,
    documents,
    ids_of,
    slow_document_windows,
    slow_text_windows,
    write_jsonl,
    write_parquet,
)
from support.gguf import write_gguf
from support.modules import tiny_llama
from support.refusals import refuses

from wanda_lightning import TextDataModule
from wanda_lightning.data.text_sources import python_docs
from wanda_lightning.data.windows import draw_from_documents
from wanda_lightning.lightning_modules import CausalLMModule


@pytest.fixture(autouse=True)
def few_topics(monkeypatch):
    """All of python-docs would take a second to tokenize."""
    few = dict(sorted(topics.items(), key=lambda topic: len(topic[1]))[:30])
    monkeypatch.setattr("pydoc_data.topics.topics", few)


def test_calibration_on_documents_draws_the_references_windows(tmp_path, tokenizer):
    # With <s>, 19 gives 20 tokens: not more than seqlen.
    texts = documents([3, 40, 19, 20, 200, 0, 21])
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    parquet = write_parquet(tmp_path / "a.parquet", text=texts)
    for seed, source in enumerate((jsonl, parquet)):
        data = TextDataModule(tokenizer, source, seqlen=20, num_samples=9, batch_size=4, seed=seed)
        loader = data.calibration_dataloader()
        for batch, size in zip(loader, (4, 4, 1), strict=True):
            assert batch.keys() == {"input_ids"}
            assert batch["input_ids"].shape == (size, 20)
        assert torch.equal(ids_of(loader), slow_document_windows(texts, tokenizer, 20, 9, seed))


def test_drawing_tokenizes_only_what_is_drawn_and_ends_where_one_document_is_long_enough(tokenizer):
    seen = []

    def tokenize(text):
        seen.append(text)
        return tokenizer(text).input_ids

    draw_from_documents(documents([100] * 1000), tokenize, 20, 5, 0, "a.jsonl")
    assert len(seen) == 5
    texts = documents([5] * 300 + [100])
    windows = draw_from_documents(texts, tokenize, 50, 3, 0, "a.jsonl")
    assert torch.equal(windows, slow_document_windows(texts, tokenizer, 50, 3, 0))


def test_calibration_on_one_text_draws_the_references_windows(tmp_path, tokenizer):
    (text,) = documents([500])
    (tmp_path / "a.txt").write_text(text)
    docs = "\n\n".join(python_docs()["calibration"].values())
    for source, whole in ((str(tmp_path / "a.txt"), text), ("python-docs", docs)):
        data = TextDataModule(tokenizer, source, seqlen=16, num_samples=10, seed=3)
        assert torch.equal(
            ids_of(data.calibration_dataloader()),
            slow_text_windows(tokenizer(whole).input_ids, 16, 10, 3),
        )


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_evaluation_cuts_the_joined_text(tmp_path, tokenizer, kind):
    texts = documents([30, 41, 10])
    file = tmp_path / f"texts.{kind}"
    file.write_text("\n\n".join(texts)) if kind == "txt" else write_parquet(file, text=texts)
    ids = tokenizer("\n\n".join(texts)).input_ids
    assert len(ids) == 1 + 81 + 4
    expected = torch.tensor([ids[k : k + 20] for k in (0, 20, 40, 60)])
    data = TextDataModule(tokenizer, evaluation=str(file), seqlen=20, batch_size=3)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(ids_of(loader), expected)
    data = TextDataModule(tokenizer, evaluation=str(file), seqlen=20, limit=3)
    assert torch.equal(ids_of(data.val_dataloader()), expected[:3])


TEXTS = documents([30, 41, 10])
TABLE = datasets.Dataset.from_dict({"text": TEXTS})


@pytest.mark.parametrize("source", [TEXTS, TABLE, "own/news", "own/one"])
def test_texts_in_memory_and_from_the_hub(tmp_path, tokenizer, monkeypatch, source):
    name = source if isinstance(source, str) else "texts in memory"
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    expected = TextDataModule(tokenizer, file, file, seqlen=20, num_samples=5)
    windows = expected.calibration_windows
    evaluation_windows = expected.evaluation_windows
    empty = datasets.Dataset.from_dict({"text": [""]})
    hub = {"own/news": {"train": TABLE, "test": TABLE, "unused": empty}, "own/one": {"all": TABLE}}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: hub[name])
    data = TextDataModule(tokenizer, source, [source], seqlen=20, num_samples=5)
    assert torch.equal(data.calibration_windows, windows)
    assert torch.equal(data.evaluation_windows, evaluation_windows)
    assert data.describe_calibration(5) == f"{name}, 5 windows of 20 tokens, seed 0"
    assert data.describe_calibration(1).startswith(f"{name}, 1 window of 20 tokens")
    assert data.describe_evaluation() == f"{name}, 4 windows of 20 tokens"


def test_several_texts_in_memory_have_names_of_their_own(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = TextDataModule(tokenizer, evaluation=[TEXTS, file, TEXTS[::-1]], seqlen=20)
    first, *_, third = data.evaluations
    assert data.evaluations == ("texts in memory", file, "texts in memory (3)")
    assert not torch.equal(data.windows_of(first), data.windows_of(third))


def language_model(embeddings, tokenizer=None):
    return CausalLMModule(tiny_llama(vocab_size=embeddings), tokenizer)


def test_the_tokenizer_may_be_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "a.txt").write_text("theta" * 4)
    data = TextDataModule(str(tmp_path / "tiny.gguf"), evaluation=str(tmp_path / "a.txt"), seqlen=3)
    tokens = data.evaluation_windows.flatten().tolist()
    assert tokens[tokens.index(29) :][:3] == [29, 21, 2]  # transformers 5.2 puts <s> in front


def test_a_tokenizer_that_cannot_be_found_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    # The environment variable was read when huggingface_hub was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf does not exist"):
        TextDataModule(str(tmp_path / "missing.gguf"))
    with refuses(r"^tokenizer must be given, since no Trainer runs a module that has one"):
        TextDataModule().setup("validate")
    with pytest.raises(OSError, match="tokenizer of 'no/such' cannot be loaded"):
        TextDataModule("no/such").setup("validate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 1}, "^seqlen must be a whole number of at least 2, but it is 1"),
        (
            {"calibration": "wikitxt2"},
            r"^calibration must be one of c4, .* 'wikitxt2'\. .* mean wikitext2\?",
        ),
        (
            {"calibration": ["a", 1]},
            r"^calibration must be .* a list of strings or a .*Dataset, or .*, but it is \['a', 1\]",
        ),
        (
            {"evaluation": ["one line\nand another"]},
            "^evaluation must be .* a list of documents, but it is 'one line",
        ),
        (
            {"calibration": "Once upon a time.\n" * 1000},
            r"^calibration must be .* but it is 'Once .* Put a text .* in Python in a list: \[text\]\.$",
        ),
        (
            {"evaluation": ["~ " + "word " * 200_000]},
            r"^evaluation must be .* but it is '~ word .* in a list: \[\[text\]\]\.$",
        ),
        ({"evaluation": "a.csv"}, r"ends in \.txt, \.jsonl, \.parquet, or .* but it is .*a\.csv"),
        (
            {"calibration": "gone.jsonl"},
            r"^calibration must be an existing file, but there is no gone\.jsonl\. Check",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(tokenizer, options, message):
    with refuses(message):
        TextDataModule(tokenizer, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", r"needs a text of at least 21 tokens, but .*a\.txt has 20"),
        (
            "a.jsonl",
            r"at least 21 tokens, but the longest of the 3 documents of .* has 20.*\.txt file",
        ),
        (None, "the longest of the 0 documents of texts in memory has 0"),
    ],
)
def test_too_short_texts_to_calibrate_on_are_refused_with_counts(
    tmp_path, tokenizer, name, message
):
    (tmp_path / "a.txt").write_text("x" * 19)  # 20 tokens with <s>
    write_jsonl(tmp_path / "a.jsonl", documents([5, 19, 12]))
    source = str(tmp_path / name) if name else []
    with refuses(message):
        TextDataModule(tokenizer, calibration=source, seqlen=20).calibration_dataloader()


def test_the_longest_windows_of_a_text(tmp_path, tokenizer):
    text = str(tmp_path / "a.txt")
    Path(text).write_text("x" * 19)  # 20 tokens with <s>
    data = TextDataModule(tokenizer, text, seqlen=19, num_samples=2)
    assert data.calibration_windows.shape == (2, 19)
    data = TextDataModule(tokenizer, evaluation=text, seqlen=20)
    assert data.evaluation_windows.shape == (1, 20)
    data = TextDataModule(tokenizer, evaluation=text, seqlen=21)
    with refuses(r"seqlen=21 needs a text of at least 21 tokens, but .*a\.txt has 20\."):
        data.setup("validate")


def test_tokens_without_an_embedding_are_refused_before_any_batch(tokenizer):
    module = language_model(97)
    data = TextDataModule(tokenizer, seqlen=32, num_samples=2, limit=2)
    message = r"^input_ids must be from 0 to 96, since the model has 97 embeddings, but one is \d+"
    with refuses(message):
        validate_module(module, data=data)
    data._cut["python-docs"] = torch.zeros(2, 32, dtype=torch.long)
    validate_module(module, data=data)
    with refuses(message):
        data.calibration_dataloader()


def test_another_tokenizer_than_the_models_own_is_refused(tokenizer, monkeypatch):
    from lightning.pytorch.trainer.connectors import data_connector

    # With as many cores, Lightning would recommend workers.
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 31)
    reverse = byte_tokenizer(reverse=True)
    module = language_model(257, reverse)
    for given in (None, reverse, byte_tokenizer(reverse=True)):
        validate_module(module, data=TextDataModule(given, seqlen=32, limit=2))
    with refuses(
        r"^tokenizer must be the tokenizer of the model, but .* splits the text diff",
    ):
        validate_module(module, data=TextDataModule(tokenizer, seqlen=32, limit=2))


@pytest.mark.parametrize("lr_decay", [False, True])
@pytest.mark.parametrize("limit", [1.0, 0.5, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_that_is_resumed_at_any_step_reads_the_batches_of_an_uninterrupted_one(
    tmp_path, limit, lr_decay
):
    def fit(*callbacks, **options):
        module = CausalLMModule(tiny_llama(vocab_size=300), lr_decay=lr_decay)
        data = TextDataModule(byte_tokenizer(), seqlen=32, num_samples=16, limit=1)
        options["limit_train_batches"] = limit
        return batches_of_each_step(module, data, *callbacks, **options)

    whole = fit(SaveAt(tmp_path, *range(1, 8)))
    assert whole[0] != whole[len(whole) // 2]  # each epoch has an order of its own
    for checkpoint in tmp_path.iterdir():
        assert fit(ckpt_path=checkpoint) == whole[int(checkpoint.stem) :]
