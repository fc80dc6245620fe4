"""The named texts against a stand-in for the hub, and names that are refused."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from support.data import documents, slow_document_windows, slow_text_windows, write_jsonl, write_parquet

from wanda_lightning.data import TextDataModule
from wanda_lightning.data.text_sources import python_docs, sklearn_docs


def hub_of(tables):
    """A stand-in for `datasets.load_dataset` with the two text sets, which also records its arguments."""
    asked = []

    def load_dataset(name, config=None, *, split, data_files=None, cache_dir=None, **options):
        asked.append((name, config, split, data_files, cache_dir))
        return datasets.Dataset.from_dict({"text": tables[name, split]})

    return load_dataset, asked


def test_c4_is_read_as_the_reference_reads_it(monkeypatch, tokenizer):
    train, validation = documents([50, 90, 10]), documents([7] * 1105)
    load, asked = hub_of({("allenai/c4", "train"): train, ("allenai/c4", "validation"): validation})
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextDataModule(tokenizer, "c4", "c4", seqlen=30, num_samples=4, cache_dir="cache")
    assert torch.equal(data.calibration_windows, slow_document_windows(train, tokenizer, 30, 4, 0))
    ids = tokenizer(" ".join(validation[:1100])).input_ids
    assert len(ids) == 8800  # 1100 documents of 7 bytes, 1099 spaces, <s>
    assert torch.equal(data.evaluation_windows, torch.tensor(ids)[: 256 * 30].view(256, 30))
    assert asked == [
        ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}, "cache"),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "cache"),
    ]
    data = TextDataModule(tokenizer, "c4", "c4", seqlen=64)  # 137 windows are fewer than 256
    assert torch.equal(data.evaluation_windows, torch.tensor(ids)[: 137 * 64].view(137, 64))


def test_wikitext2_is_read_as_the_reference_reads_it(monkeypatch, tokenizer):
    train, test = documents([50, 0, 90]), documents([30, 0, 71])
    load, asked = hub_of({("Salesforce/wikitext", "train"): train, ("Salesforce/wikitext", "test"): test})
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextDataModule(tokenizer, "wikitext2", "wikitext2", seqlen=30, num_samples=4)
    assert torch.equal(data.calibration_windows, slow_text_windows(tokenizer(" ".join(train)).input_ids, 30, 4, 0))
    ids = tokenizer("\n\n".join(test)).input_ids
    assert torch.equal(data.evaluation_windows, torch.tensor(ids[:90]).view(3, 30))
    assert [call[:3] for call in asked] == [("Salesforce/wikitext", "wikitext-2-raw-v1", s) for s in ("train", "test")]


def test_several_texts_are_measured_one_by_one(tokenizer):
    data = TextDataModule(tokenizer, evaluation=("sklearn-docs", "python-docs"), seqlen=64, limit=3)
    assert data.evaluation == "sklearn-docs"
    loaders = data.val_dataloader()
    for number, (source, loader) in enumerate(zip(data.evaluations, loaders, strict=True)):
        alone = TextDataModule(tokenizer, evaluation=source, seqlen=64, limit=3)
        (batch,) = loader
        assert torch.equal(batch["input_ids"], alone.evaluation_windows)
        assert data.describe_evaluation(number) == alone.describe_evaluation() == f"{source}, 3 windows of 64 tokens"
    assert tokenizer(sklearn_docs()).input_ids[:64] == data.evaluation_windows[0].tolist()


def test_descriptions_of_data_sets_name_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"need sklearn: pip install '\.\[demo\]' in"):
        TextDataModule(tokenizer, evaluation="sklearn-docs")


def test_python_docs_has_two_parts_without_a_common_paragraph():
    from pydoc_data.topics import topics

    calibration, evaluation = python_docs()
    assert {**calibration, **evaluation} == topics
    assert not calibration.keys() & evaluation.keys()
    share = sum(map(len, evaluation.values())) / sum(map(len, topics.values()))
    assert 0.25 < share < 0.35
    long = [
        {p.strip() for text in part.values() for p in text.split("\n\n") if len(p.strip()) >= 80}
        for part in (calibration, evaluation)
    ]
    assert all(long)
    assert not long[0] & long[1]
    assert python_docs() == (calibration, evaluation)


def test_files_keep_their_characters(tmp_path, tokenizer):
    text = "a\u2028b\u00e9\U0001f600" * 10  # \u2028 ends a line for str.splitlines
    write_jsonl(tmp_path / "a.jsonl", [text])
    write_parquet(tmp_path / "a.parquet", text=[text])
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = torch.tensor(tokenizer(text).input_ids[:70]).view(1, 70)
    for name in ("a.jsonl", "a.parquet", "raw.jsonl", "bom.txt"):
        data = TextDataModule(tokenizer, evaluation=str(tmp_path / name), seqlen=70)
        assert torch.equal(data.evaluation_windows, expected)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), "can't decode byte 0xe9 in position 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "JSON parse error"),
        ("a.jsonl", b"", ""),
        ("a.parquet", b"PAR? no", "Parquet file size is 7 bytes"),
    ],
)
def test_bad_files_are_refused_when_read(tmp_path, tokenizer, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"The data set .*{name}' cannot be loaded: .*{cause}"):
        TextDataModule(tokenizer, evaluation=str(tmp_path / name)).setup("validate")


def test_tables_have_a_column_of_text(tmp_path, tokenizer):
    for rows, has in (
        ({"body": ["a"]}, "columns body, and 'text' is missing"),
        ({"text": [5]}, "is int64"),
        ({"text": ["a", None]}, "or not in each row"),
    ):
        for source in (write_parquet(tmp_path / "a.parquet", **rows), datasets.Dataset.from_dict(rows)):
            with pytest.raises(ValueError, match=f"must have a column 'text' with a string in each row, .*{has}"):
                TextDataModule(tokenizer, evaluation=source).setup("validate")


def test_names_are_checked_without_torch():
    code = """
import sys
from wanda_lightning.data.text_sources import check_source
from wanda_lightning.data.image_sources import check_source as check_images
from wanda_lightning.common.model_source import ModelSource
check_source("c4"), check_images("cifar10"), ModelSource("owner/name").locate()
assert not {"torch", "lightning", "transformers", "timm", "datasets"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
