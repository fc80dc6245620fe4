"""Text files are read exactly, and errors name the line or row."""

import codecs
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.data import write_jsonl, write_parquet

from wanda_lightning.data import TextDataModule
from wanda_lightning.data.text_files import read_file


def test_files_keep_their_characters(tmp_path, tokenizer):
    text = "a\u2028b\u00e9" * 10
    write_jsonl(tmp_path / "a.jsonl", [text])  # \u2028 ends a line for str.splitlines
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (tmp_path / "pair.jsonl").write_text(json.dumps({"text": "\U0001f600"}))
    assert read_file(tmp_path / "pair.jsonl") == ["\U0001f600"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = torch.tensor(tokenizer(text).input_ids[:70]).view(1, 70)
    for name in ("a.jsonl", "raw.jsonl", "bom.txt"):
        data = TextDataModule(tokenizer, evaluation=str(tmp_path / name), seqlen=70)
        assert torch.equal(data.evaluation_windows, expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not: byte 3 \(0xe9\)"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not: byte 10 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl .* but line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', "but line 2 has 'body', 'id'. Rename"),
        ("a.jsonl", b"{}\n", "but line 1 has nothing"),
        ("a.jsonl", b'["a"]\n', "but line 1 is a list"),
        ("a.jsonl", b'{"text": null}\n', "but line 1 has a 'text' of type NoneType"),
        ("a.txt", "caf\u00e9".encode("utf-16"), r"a\.txt seems to be in UTF-16\. .*iconv -f UTF-16 -t"),
        ("a.txt", codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), r"in UTF-16\. .*iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "caf\u00e9".encode("utf-32"), r"in UTF-32\. .*iconv -f UTF-32 -t UTF-8"),
        ("a.txt", "au lait".encode("utf-16-le"), r"in UTF-16LE\. .*iconv -f UTF-16LE -t UTF-8"),
        ("a.txt", "\u20acuro".encode("utf-16-be"), r"in UTF-16BE, since byte 2 is NUL\. "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\ud83d"}', "but line 2 has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "n": ["\\uDE00"]}', "but line 1 has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "but line 2 is nested too deep"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "but line 1 is not JSON"),
        ("a.txt", b" \n", "must have text, but it has none"),
        ("a.jsonl", b"\n", "must have text, but it has none"),
        ("a.jsonl", b'{"text": ""}\n', "must have text, but it has none"),
        ("a.parquet", b"PAR? no", r"a\.parquet must be in the format Parquet, but it has another format or is damaged"),
    ],
)
def test_bad_files_are_refused_when_read(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    source = str(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, evaluation=source).setup("validate")
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, calibration=source).calibration_dataloader()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, "must have a column 'text', but it has 'body', 'id'"),
        ({"text": ["a", None]}, "row 1 has a NoneType"),
        ({"text": [1, 2]}, "row 0 has a int"),
        ({"text": pa.array([], pa.string())}, "must have text, but it has none"),
    ],
)
def test_bad_tables_are_refused_when_read(tmp_path, tokenizer, columns, message):
    source = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, evaluation=source).setup("validate")


def test_a_damaged_page_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["".join(random.Random(i).choices("abcdefgh", k=400)) for i in range(30)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, write_page_checksum=True, use_dictionary=False)
    assert read_file(path) == texts
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet must be in the format Parquet, but it .* is damaged") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
