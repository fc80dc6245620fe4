"""`wanda-lightning pack` and `unpack`, and packed models in the other commands."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.cli import everything_in, run
from support.modules import same_weights

from wanda_lightning import load_packed, pack

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*and the model has .* outputs"),
]


@pytest.fixture
def pruned(inputs):
    """A folder with a model of which each second weight is zero, and the same folder packed."""
    shutil.copytree(inputs / "llama", "pruned")
    path = "pruned/model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor[:, ::2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    pack("pruned", "packed")


def test_pack_and_unpack(pruned, capsys):
    assert run("pack", "pruned", "new") == 0
    out, err = capsys.readouterr()
    dense, packed = (sum(t.nbytes for t in load_file(file).values()) for file in (
        "pruned/model.safetensors", "new/packed-model.safetensors"
    ))  # fmt: skip
    assert re.search(rf"all weights .* {packed / dense:.4f} ", out)
    assert re.search(r"zstd / dense|zstd was not measured", out)
    assert "Packed matrices: 16 2:4." in out  # 14 in the blocks, and both embeddings
    assert "To load new, import wanda_lightning first." in out
    assert re.search(r"Packing 21/21 done", err)
    assert run("unpack", "new", "again") == 0
    assert everything_in(Path("again")) == everything_in(Path("pruned"))
    for name, tensor in load_file("again/model.safetensors").items():
        assert tensor.equal(load_file("pruned/model.safetensors")[name])


def test_zstd_is_what_the_library_gives(pruned):
    zstandard = pytest.importorskip("zstandard")
    from wanda_lightning.cli.pack import zstd_size

    content = Path("pruned/model.safetensors").read_bytes()
    assert abs(zstd_size(Path("pruned")) / len(zstandard.compress(content)) - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["pack"], "IN is required: Folder of a Hugging Face or timm model", 2),
        (["pack", "pruned"], "OUT is required: Folder to write", 2),
        (["pack", "pruned", "out", "more"], "pack takes IN and OUT and options, but 'more' is not one.", 2),
        (
            ["pack", "nowhere", "out"],
            "IN must be the folder of a model, but nowhere is not a folder. Check the path.",
            2,
        ),
        (["pack", "pruned", "packed"], "OUT packed is a folder that is not empty. Choose another, or allow", 2),
        (["pack", "pruned", "pruned", "--overwrite"], "pruned must lie outside of pruned", 1),
        (["pack", "packed", "out"], "must be a dense model to be packed, but it is packed already", 1),
        (["unpack", "pruned", "out"], "pruned must be packed to be unpacked", 1),
    ],
)
def test_bad_input_is_refused_in_one_line(pruned, capsys, arguments, message, status):
    before = everything_in(Path("."))
    assert run(*arguments) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert everything_in(Path(".")) == before


def test_overwrite(pruned):
    assert run("pack", "pruned", "packed", "--overwrite") == 0


def test_prune_saves_packed(text, capsys):
    assert run(*text, "--sparsity_type", "2:4", "--sparsity_ratio", "0.5", "--save_model", "out", "--packed") == 0
    assert json.loads(Path("out/config.json").read_text())["quantization_config"]["patterns"] == {"2:4": 14}
    dense = run(*text, "--sparsity_type", "2:4", "--sparsity_ratio", "0.5", "--save_model", "dense")
    models = [transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("out", "dense")]
    assert dense == 0
    assert same_weights(*models)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--packed"], "--packed has no meaning for pruning without --save_model"),
        (["--packed", "--save_model", "out", "--stream"], "pack the model afterward: wanda-lightning pack out OUT."),
    ],
)
def test_packed_where_it_has_no_meaning_is_refused(text, capsys, more, message):
    assert run(*text, *more) == 2
    assert message in capsys.readouterr().err


def test_the_other_commands_load_packed_models(pruned, inputs, capsys):
    data = ["--eval", inputs / "other.txt", "--seqlen", "32", "--limit", "4"]
    assert run("evaluate", "--model", "pruned,packed", *data, "--save", "measured.json") == 0
    measured = json.loads(Path("measured.json").read_text())["models"]
    assert measured["packed"] == measured["pruned"]
    assert run("inspect", "--model", "packed") == 0
    assert "14 layers" in capsys.readouterr().out
    steps = ["--steps", "2", "--data", inputs / "long.txt", "--save_model", "tuned", "--packed"]
    assert run("finetune", "--model", "packed", *data, *steps) == 0
    tuned = transformers.AutoModelForCausalLM.from_pretrained("tuned")
    before = transformers.AutoModelForCausalLM.from_pretrained("packed")
    zeros = [torch.cat([(p == 0).flatten() for p in model.parameters()]) for model in (tuned, before)]
    assert zeros[0].equal(zeros[1])


def test_streaming_a_packed_model_is_refused(pruned, text, capsys):
    text[text.index("--model") + 1] = "packed"
    for command in ([*text, "--stream", "--save_model", "out"], ["inspect", "--model", "packed", "--stream"]):
        assert run(*command) == 1
        assert "'packed' is packed, so it cannot be read block by block. Unpack it first: wanda-lightning unpack" in (
            capsys.readouterr().err
        )


def test_packed_image_classifiers(images, inputs, capsys):
    assert run(*images, "--save_model", "vit", "--packed") == 0
    classifiers = ["--model", "timm:local-dir:vit", "--data_path", inputs / "images"]
    assert run("evaluate", *classifiers, "--save", "measured.json") == 0
    sparsity = json.loads(Path("measured.json").read_text())["models"]["timm:local-dir:vit"]["sparsity"]
    assert sparsity["layers"] == 0.5
    weights = load_packed("vit", timm.create_model("test_vit")).state_dict()
    assert sum(int((tensor == 0).sum()) for tensor in weights.values()) > 0
