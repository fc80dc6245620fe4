"""The named texts against a stand-in for the hub, and names that are refused."""

import json

import datasets
import pytest
import torch
from support.data import (
    documents,
    slow_document_windows,
    slow_text_windows,
    write_jsonl,
    write_parquet,
)
from support.refusals import refuses

from wanda_lightning import SentenceDataModule, TextDataModule
from wanda_lightning.data.text_sources import python_docs, sklearn_docs


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_named_texts_are_read_as_the_reference_reads_them(monkeypatch, tokenizer, name):
    first = documents([50, 0, 90, 10])
    second = documents([7] * 1105)
    asked = []

    def load_dataset(*names, split, data_files=None, cache_dir=None, **options):
        assert cache_dir == "cache"
        asked.append((*names, split, data_files))
        return datasets.Dataset.from_dict({"text": first if split == "train" else second})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = TextDataModule(tokenizer, name, name, seqlen=30, num_samples=4, cache_dir="cache")
    if name == "c4":
        expected = slow_document_windows(first, tokenizer, 30, 4, 0)
        text = " ".join(second[:1100])
        limit = 256
        train = {"train": "en/c4-train.00000-of-01024.json.gz"}
        validation = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        calls = [("allenai/c4", "train", train), ("allenai/c4", "validation", validation)]
    else:
        expected = slow_text_windows(tokenizer(" ".join(first)).input_ids, 30, 4, 0)
        text = "\n\n".join(second)
        limit = None
        names = ("Salesforce/wikitext", "wikitext-2-raw-v1")
        calls = [(*names, "train", None), (*names, "test", None)]
    assert torch.equal(data.calibration_windows, expected)
    ids = tokenizer(text).input_ids
    windows = torch.tensor(ids[: len(ids) // 30 * 30]).view(-1, 30)
    assert torch.equal(data.evaluation_windows, windows[:limit])
    assert asked == calls


def test_several_texts_are_measured_one_by_one(tokenizer):
    data = TextDataModule(tokenizer, evaluation=("sklearn-docs", "python-docs"), seqlen=64, limit=3)
    assert data.evaluation == "sklearn-docs"
    loaders = data.val_dataloader()
    for number, (source, loader) in enumerate(zip(data.evaluations, loaders, strict=True)):
        alone = TextDataModule(tokenizer, evaluation=source, seqlen=64, limit=3)
        (batch,) = loader
        assert torch.equal(batch["input_ids"], alone.evaluation_windows)
        assert data.describe_evaluation(number) == f"{source}, 3 windows of 64 tokens"
        assert alone.describe_evaluation() == f"{source}, 3 windows of 64 tokens"
    assert tokenizer(sklearn_docs()).input_ids[:64] == data.evaluation_windows[0].tolist()


def test_python_docs_has_two_parts_without_a_common_paragraph():
    from pydoc_data.topics import topics

    calibration, evaluation = python_docs().values()
    assert {**calibration, **evaluation} == topics
    assert not calibration.keys() & evaluation.keys()
    share = sum(map(len, evaluation.values())) / sum(map(len, topics.values()))
    assert 0.25 < share < 0.35
    first, second = (
        {paragraph.strip() for text in part.values() for paragraph in text.split("\n\n")}
        for part in (calibration, evaluation)
    )
    assert all(len(paragraph) < 80 for paragraph in first & second)


def test_files_keep_their_characters(tmp_path, tokenizer):
    text = "a\u2028b\u00e9\U0001f600" * 10  # \u2028 ends a line for str.splitlines
    write_jsonl(tmp_path / "a.jsonl", [text])
    write_parquet(tmp_path / "a.parquet", text=[text])
    (tmp_path / "raw.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = torch.tensor(tokenizer(text).input_ids[:70]).view(1, 70)
    for name in ("a.jsonl", "a.parquet", "raw.jsonl", "bom.txt"):
        data = TextDataModule(tokenizer, evaluation=str(tmp_path / name), seqlen=70)
        assert torch.equal(data.evaluation_windows, expected)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param("A sentence of seven words, each time. " * 40, id="longer than a path"),
        pytest.param("word " * 200_000, id="a megabyte"),
        pytest.param("\u65e5\u672c\u8a9e\u6587 " * 100, id="unicode"),
        pytest.param("a null byte\0 in a text. " * 20, id="a null byte"),
    ],
)
@pytest.mark.parametrize("others", [[], ["", "short"]])
def test_a_list_holds_documents_of_any_size(tokenizer, document, others):
    documents = [*others, document]
    sizes = {"seqlen": 8, "num_samples": 2, "limit": 2}
    data = TextDataModule(tokenizer, documents, [documents], **sizes)
    expected = tokenizer("\n\n".join(documents)).input_ids[:16]
    assert data.evaluation_windows.flatten().tolist() == expected
    assert data.calibration_windows.shape == (2, 8)
    assert SentenceDataModule(None, documents).calibration_sentences


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), "can't decode byte 0xe9 in position 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "JSON parse error"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.parquet", b"PAR? no", "Parquet file size is 7 bytes"),
    ],
)
def test_bad_files_are_refused_when_read(tmp_path, tokenizer, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with refuses(rf"The data of .*{name}' cannot be loaded: .*{cause}"):
        TextDataModule(tokenizer, evaluation=str(tmp_path / name)).setup("validate")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({"body": ["a"]}, "columns body, and 'text' is missing"),
        ({"text": [5]}, "is int64"),
        ({"text": ["a", None]}, "row 2 has no text"),
    ],
)
def test_tables_have_a_column_of_text(tmp_path, tokenizer, rows, found):
    file = write_parquet(tmp_path / "a.parquet", **rows)
    message = f"must have a column 'text' with a string in each row, .*{found}"
    for source in (file, datasets.Dataset.from_dict(rows)):
        with refuses(message):
            TextDataModule(tokenizer, evaluation=source).setup("validate")
