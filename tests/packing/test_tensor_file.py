"""Files of tensors: what the safetensors library reads and writes, and nothing that is damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanda_lightning.packing.tensor_file import Entry, TensorFile, writing


@pytest.fixture
def dense(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=generator, dtype=torch.bfloat16),
        "b": torch.randn(7, generator=generator),
        "ä/é": torch.arange(6, dtype=torch.int64).view(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "dense.safetensors", metadata={"format": "pt"})
    return tmp_path / "dense.safetensors", tensors


def test_reads_what_safetensors_wrote(dense):
    path, tensors = dense
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.entries[name].shape == tuple(tensor.shape)
        assert file.words(name).tobytes() == tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert file.integers("ä/é") == (0, 1, 2, 3, 4, 5)


def test_safetensors_reads_what_is_written(dense, tmp_path):
    path, tensors = dense
    file = TensorFile(path)
    with writing(tmp_path / "copy.safetensors", file.entries, {"format": "pt", "key": "text"}) as out:
        for name in file.entries:
            out.write(file.words(name).data)
    copy = load_file(tmp_path / "copy.safetensors")
    assert all(copy[name].equal(tensor) and copy[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "copy.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "key": "text"}


def test_a_file_that_is_cut_off_anywhere_is_refused(dense):
    path, _ = dense
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"dense\.safetensors is not a complete safetensors file .* Copy, download"
        ):
            TensorFile(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="instead of"):
        TensorFile(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F32"},
        {"shape": [3, 4]},
        {"shape": "x"},
        {"data_offsets": [1, 31]},
        {"data_offsets": [0, 10**12]},
        {"data_offsets": [30, 0]},
        {"data_offsets": None},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, change):
    entry = {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]} | change
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(30))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        TensorFile(path)


def test_entries_without_whole_bytes_are_copied_as_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    with writing(path, {"a": Entry("F4", (2, 3), 3)}, {}) as out:
        out.write(b"\1\2\3")
    assert TensorFile(path).words("a").tolist() == [1, 2, 3]


def test_a_full_disk_is_named():
    full = Path("/dev/full")  # a device of Linux on which every write fails
    if not full.exists():
        pytest.skip("/dev/full does not exist")
    with pytest.raises(OSError, match="No space left on device"), writing(full, {}, {}):
        pass


def test_a_file_that_shrinks_while_it_is_read_is_refused(dense):
    path, _ = dense
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match="must not change while it is read"):
        file.words(list(file.entries)[-1])
