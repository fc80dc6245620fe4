"""Packing folders: every bit comes back, other files are kept, and bad input leaves nothing behind."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.modules import same_weights, tiny_llama
from transformers import AutoModelForCausalLM

from wanda_lightning import pack, save_packed, unpack
from wanda_lightning.packing import codec
from wanda_lightning.packing import folder as folders

OLD = Path(__file__).parent / "compressed_tensors"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
DTYPES += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and raw(a[name]) == raw(b[name]) for name in a
    )


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def sparse(shape, dtype, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).mul(40)
    tensor[torch.rand(shape, generator=generator) < share] = 0
    return tensor.to(dtype)


@pytest.fixture
def dense(tmp_path):
    """A folder with every dtype and several shapes, and other files."""
    tensors = {f"a.{i}.weight": sparse((12, 40), dtype, 0.6, i) for i, dtype in enumerate(DTYPES)}
    pairs = sparse((8, 32), torch.bfloat16, 0)
    pairs.view(-1, 4)[:, 1:3] = 0
    special = sparse((8, 24), torch.bfloat16, 0.7)
    special.view(torch.int16)[0, :4] = torch.tensor([-32768, 32705, -1, 1], dtype=torch.int16)  # -0.0, two NaN
    tensors |= {"pairs": pairs, "special": special, "bias": sparse((40,), torch.float32, 0.9)}
    tensors |= {"conv": sparse((6, 5, 3, 3), torch.float32, 0.8), "full": sparse((8, 8), torch.float32, 0)}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(0.0), "zeros": torch.zeros(3, 5)}
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (folder / "config.json").write_text('{"hidden_size": 40}')
    (folder / "sub").mkdir()
    (folder / "sub" / "tokens.txt").write_text("a b")
    return folder, tensors


def test_every_bit_comes_back(dense, tmp_path):
    folder, tensors = dense
    size = pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"hidden_size": 40}
    assert (tmp_path / "again" / "sub" / "tokens.txt").read_text() == "a b"
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    assert size.codes["pairs"] == "pairs"
    assert size.codes["special"] == size.codes["conv"] == size.codes["zeros"] == "bitmask"
    assert not {"full", "bias", "empty", "scalar"} & size.codes.keys()


def test_the_layout_is_that_of_a_bitmask_by_hand(dense, tmp_path):
    folder, tensors = dense
    size = pack(folder, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "config.json",
        "packed-model.safetensors",
        "sub",
    ]
    stored = load_file(tmp_path / "packed" / "packed-model.safetensors")
    matrix = tensors["special"]
    kept = matrix.view(torch.int16) != 0
    assert raw(stored["special.compressed"]) == raw(matrix[kept])
    assert stored["special.shape"].tolist() == [8, 24]
    bits = [[sum(int(row[8 * byte + i]) << i for i in range(8)) for byte in range(3)] for row in kept.tolist()]
    assert stored["special.bitmask"].tolist() == bits
    assert stored["pairs.compressed"].equal(tensors["pairs"][tensors["pairs"] != 0])
    assert stored["pairs.pairs"].tolist() == [2 + 6 * 2 + 36 * 2] * 21 + [2]  # places 0 and 3: pair 2 of 6; 64 groups
    assert stored["full"].equal(tensors["full"])
    assert size.dense == sum(tensor.nbytes for tensor in tensors.values())
    assert size.packed == sum(tensor.nbytes for tensor in stored.values())
    assert size.dense_matrices == sum(tensors[name].nbytes for name in size.codes)
    assert size.packed_matrices == size.packed - size.dense + size.dense_matrices
    patterns = {"unstructured": len(size.codes) - 1, "2:4": 1}
    with safe_open(tmp_path / "packed" / "packed-model.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["packed_by"], header["packed_version"]) == ("wanda_lightning", "1")
    assert json.loads(header["packed_patterns"]) == patterns
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "wanda_lightning",
        "version": 1,
        "weights": "packed-model.safetensors",
        "patterns": patterns,
    }


def zeroed_llama(seed):
    torch.manual_seed(seed)
    model = tiny_llama()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter)
            parameter.data[:, ::2] = 0
    return model


def test_shards_and_their_index(tmp_path):
    zeroed_llama(0).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    pack(tmp_path / "dense", tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "packed-model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "packed" / file)
    unpack(tmp_path / "packed", tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert same_bits(load_file(tmp_path / "again" / file), load_file(tmp_path / "dense" / file))
    old, new = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("dense", "again")
    )
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"]


@pytest.mark.parametrize("stale", ["no", "gone", "broken"])
def test_a_single_file_supersedes_shards(tmp_path, stale):
    model = zeroed_llama(0)
    zeroed_llama(1).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "dense")
    if stale != "no":
        for shard in (tmp_path / "dense").glob("model-*.safetensors"):
            shard.unlink()
    if stale == "broken":
        (tmp_path / "dense" / "model.safetensors.index.json").write_text("[]")
    pack(tmp_path / "dense", tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").glob("*safetensors*")] == ["packed-model.safetensors"]
    for folder in ("dense", "packed"):
        assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / folder), model)


def test_the_same_weights_in_other_formats_are_left_out(tmp_path):
    zeroed_llama(0).save_pretrained(tmp_path / "dense")
    left_out = {"pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"}
    for name in (*left_out, "tokenizer.json", "training_args.bin", "q8.gguf"):
        (tmp_path / "dense" / name).write_text("{}")
    pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = ({path.name for path in (tmp_path / folder).iterdir()} for folder in ("dense", "packed"))
    assert dense - packed == {*left_out, "model.safetensors"}
    assert packed - dense == {"packed-model.safetensors"}


# ------------------------------------------------------------------------------------- folders of compressed-tensors


def old_folder(folder, file, format="sparse-bitmask", **quantization):
    """A folder with a file that compressed-tensors wrote (its own compressor, of the version in the name)."""
    folder.mkdir()
    shutil.copy(OLD / file, folder / "model.safetensors")
    sparsity = {"format": format, "global_sparsity": 0.5, "sparsity_structure": "unstructured"}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity, **quantization}
    (folder / "config.json").write_text(json.dumps({"hidden_size": 20, "quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("bitmask_0_6.safetensors", "sparse-bitmask"),
        ("bitmask_0_9.safetensors", "sparse-bitmask"),
        ("bitmask_24_0_9.safetensors", "sparse-24-bitmask"),
    ],
)
def test_what_compressed_tensors_wrote_is_unpacked(tmp_path, file, format):
    dense = load_file(OLD / "dense.safetensors")
    if format == "sparse-24-bitmask":
        del dense["layers.0.up.weight"]
    unpack(old_folder(tmp_path / "old", file, format), tmp_path / "dense")
    assert same_bits(load_file(tmp_path / "dense" / "model.safetensors"), dense)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"hidden_size": 20}


def test_tensors_in_the_old_layout_by_hand(tmp_path):
    tensors = {
        "q.compressed": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16),
        "q.bitmask": torch.tensor([[0b00000100, 0b1], [0, 0b10]], dtype=torch.uint8),
        "q.shape": torch.tensor([2, 10]),
        "q.row_offsets": torch.tensor([0, 2]),
    }
    folder = old_folder(tmp_path / "old", "bitmask_0_9.safetensors")
    save_file(tensors, folder / "model.safetensors")
    unpack(folder, tmp_path / "dense")
    expected = torch.zeros(2, 10, dtype=torch.float16)
    expected[0, 2], expected[0, 8], expected[1, 9] = 1, 2, 3
    assert same_bits(load_file(tmp_path / "dense" / "model.safetensors"), {"q.weight": expected})


def test_a_quantized_folder_of_compressed_tensors_is_refused(tmp_path):
    folder = old_folder(tmp_path / "old", "bitmask_0_9.safetensors", config_groups={"group_0": {}})
    with pytest.raises(ValueError, match="must be packed to be unpacked"):
        unpack(folder, tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def packed(dense, tmp_path):
    pack(dense[0], tmp_path / "packed")
    return tmp_path / "packed"


def change(folder, **replaced):
    """Replace tensors of a packed file, or remove them (None), and keep its header."""
    path = folder / "packed-model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | {name.replace("_", "."): tensor for name, tensor in replaced.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def relabel(folder, version):
    path = folder / "packed-model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"packed_by": "wanda_lightning", "packed_version": version})


DAMAGES = {
    "truncated": (
        lambda folder: os.truncate(folder / "packed-model.safetensors", 5_000),
        r"packed-model\.safetensors is not a complete safetensors file",
    ),
    "fewer values": (
        lambda folder: change(folder, special_compressed=torch.zeros(3, dtype=torch.bfloat16)),
        "the parts of special disagree: 3 values are stored, but .* positions",
    ),
    "another bitmask": (
        lambda folder: change(folder, special_bitmask=torch.zeros(8, 3, dtype=torch.uint8)),
        "the parts of special disagree: .* values are stored, but 0 positions",
    ),
    "a bitmask without dimensions": (
        lambda folder: change(folder, special_bitmask=torch.tensor(1, dtype=torch.uint8)),
        r"the parts of special disagree: a bitmask of \(\) bytes does not fit the shape \(8, 24\)",
    ),
    "another shape": (
        lambda folder: change(folder, special_shape=torch.tensor([8, 25])),
        "the parts of special disagree: a bitmask of .* does not fit the shape",
    ),
    "a code that is none": (
        lambda folder: change(folder, pairs_pairs=torch.full((22,), 250, dtype=torch.uint8)),
        "the parts of pairs disagree: a code is 250",
    ),
    "no bitmask": (
        lambda folder: change(folder, special_bitmask=None),
        r"must store special as special\.compressed, its shape, and one of \.bitmask and \.pairs, but it has special\.",
    ),
    "a dense file": (
        lambda folder: save_file({"special": torch.ones(8, 24)}, folder / "packed-model.safetensors"),
        "must be packed, as config.json says, but it is an ordinary file",
    ),
    "another version of the file": (
        lambda folder: relabel(folder, "2"),
        "must have version 1 of the packed format, but it has 2. Upgrade wanda_lightning",
    ),
    "another version of the folder": (
        lambda folder: change_config(folder, version=2),
        r"config\.json must have version 1 of the packed format, but it has 2",
    ),
    "no file": (
        lambda folder: (folder / "packed-model.safetensors").unlink(),
        "must have weights in safetensors, but it has config.json",
    ),
    "a broken configuration": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_nothing_written(packed, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    spoil(packed)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        unpack(packed, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_packed_or_unpacked_is_refused(dense, packed, tmp_path):
    folder, _ = dense
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must be a dense model to be packed, but it is packed already"):
        pack(packed, tmp_path / "out")
    with pytest.raises(ValueError, match="must be packed to be unpacked"):
        unpack(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="must be the folder of a model, but it is not a folder"):
        pack(tmp_path / "nothing", tmp_path / "out")
    for target in (folder, folder / "inside", tmp_path):
        with pytest.raises(FileExistsError, match="must lie outside of"):
            pack(folder, target, overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder that is not empty"):
        pack(folder, packed)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ValueError, match="but it is quantized"):
        pack(folder, tmp_path / "out")
    (folder / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with pytest.raises(ValueError, match=r"must have its weights in model\.safetensors"):
        pack(folder, tmp_path / "out")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names model-00001-of-00001\.safetensors, which is missing"):
        pack(folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weights"):
        pack(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["W.shape", "W.bitmask", "W.pairs", "W.compressed", "W.row_offsets", "V.compressed"])
def test_names_of_parts_of_packed_matrices_are_refused(tmp_path, name):
    folder = tmp_path / "dense"
    folder.mkdir()
    tensors = {"W": sparse((8, 24), torch.float32, 0.7), "alone.shape": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), tensors)
    save_file(tensors | {name: torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"dense must have no tensor {re.escape(name)} to be packed"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_a_model(dense, packed):
    pack(dense[0], packed, overwrite=True)
    assert (packed / "packed-model.safetensors").is_file()


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_a_full_disk_leaves_nothing_behind(dense, packed, tmp_path, monkeypatch, direction):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(codec, direction, full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot be written, because its disk is full"):
        pack(dense[0], tmp_path / "out") if direction == "pack" else unpack(packed, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_holds_only_the_dense_model_is_refused_before_it_is_packed(tmp_path, monkeypatch):
    def examine(*arguments):  # after the dense model was written
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
        return examined(*arguments)

    usage, examined = shutil.disk_usage(tmp_path), folders._parts_to_pack
    monkeypatch.setattr(folders, "_parts_to_pack", examine)
    monkeypatch.setattr(folders, "_write_packed", None)
    with pytest.raises(OSError, match=r"needs .* MB, but 0\.00 MB are free"):
        save_packed(zeroed_llama(0), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    dense, packed, tmp_path, monkeypatch, direction
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(OSError, match=r"needs .* MB, but 0\.00 MB are free"):
        pack(dense[0], tmp_path / "out") if direction == "pack" else unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
