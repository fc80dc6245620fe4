"""`wanda-lightning check`: lost zeros, counted by hand, and what cannot be compared."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import run
from support.gguf import write_gguf
from support.zoo import ZOO
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from wanda_lightning import pack, prune


@pytest.fixture
def pruned(inputs):
    """A folder with a pruned model."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    prune(model, None, 0.5, criterion="magnitude", progress=False)
    model.save_pretrained("pruned")
    return "pruned"


def change(source, target, edit):
    """Copy a folder, and edit its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(f"{target}/model.safetensors")
    edit(tensors)
    save_file(tensors, f"{target}/model.safetensors", metadata={"format": "pt"})


def test_a_copy_keeps_all_zeros(pruned, capsys):
    shutil.copytree(pruned, "copy")
    zeros = sum(int((t == 0).sum()) for name, t in load_file("pruned/model.safetensors").items() if "proj" in name)
    assert run("check", "copy", "--against", pruned) == 0
    assert f"copy keeps all {zeros:,} zeros of the 14 layers of pruned." in capsys.readouterr().out


def test_packed_folders_are_compared_like_dense_ones(pruned, capsys):
    pack(pruned, "packed")
    assert run("check", "packed", "--against", pruned) == 0
    assert "packed keeps all 10,240 zeros of the 14 layers of pruned." in capsys.readouterr().out
    name = "model.layers.1.mlp.up_proj.weight"
    change(pruned, "tuned", lambda tensors: tensors[name].fill_(1.0))
    assert run("check", "tuned", "--against", "packed") == 1
    assert "tuned lost 1,024 of the 10,240 zeros of packed (10.00%), in 1 of 14 layers." in capsys.readouterr().out


def test_lost_zeros_are_counted_worst_first(pruned, capsys):
    up, q, k = (f"model.layers.{name}.weight" for name in ("1.mlp.up_proj", "0.self_attn.q_proj", "0.self_attn.k_proj"))

    def fill(tensors):
        tensors[up][tensors[up] == 0] = 1.0  # all 1024
        tensors[q].view(-1)[torch.nonzero(tensors[q].view(-1) == 0)[:7]] = 1e-30
        tensors[k][tensors[k] != 0] = 0  # more zeros lose none

    change(pruned, "tuned", fill)
    assert run("check", "tuned", "--against", pruned) == 1
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in out.splitlines() if "model.layers" in row]
    assert rows == [[up[:-7], "1,024", "1,024", "100.00%"], [q[:-7], "512", "7", "1.37%"]]
    assert "tuned lost 1,031 of the 10,240 zeros of pruned (10.07%), in 2 of 14 layers." in out
    assert "error" not in err


@pytest.mark.parametrize("qtype", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_gguf_files(capsys, qtype):
    tensors = write_gguf("pruned.gguf", 0.5)
    write_gguf("quantized.gguf", 0.5, qtype)
    lost = {}
    for name, tensor in tensors.items():
        if name.startswith("blk") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            back = gguf.dequantize(gguf.quantize(tensor, qtype), qtype)
            lost[name] = sum(1 for was, now in zip(tensor.flat, back.flat, strict=True) if was == 0 and now != 0)
    total = sum(lost.values())
    assert (total == 0) == (qtype is gguf.GGMLQuantizationType.Q8_0)
    assert run("check", "quantized.gguf", "--against", "pruned.gguf") == int(total > 0)
    zeros = sum(int(np.sum(tensor == 0)) for name, tensor in tensors.items() if tensor.ndim == 2)
    said = f"lost {total:,} of the {zeros:,} zeros" if total else f"keeps all {zeros:,} zeros"
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_model_quantized_by_torchao(pruned, capsys):
    quantization = pytest.importorskip("torchao.quantization")
    method = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(pruned, quantization_config=method).save_pretrained("quantized")
    assert run("check", "quantized", "--against", pruned) == 0
    codes = load_file("quantized/model.safetensors")["model.layers.0.mlp.up_proj._weight_qdata"]
    assert (codes[load_file("pruned/model.safetensors")["model.layers.0.mlp.up_proj.weight"] == 0] == 0).all()
    assert "quantized keeps all 10,240 zeros of the 14 layers of pruned." in capsys.readouterr().out


def test_a_quantized_model_as_the_pruned_one_is_refused(pruned, refused):
    quantization = pytest.importorskip("torchao.quantization")
    method = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(pruned, quantization_config=method).save_pretrained("quantized")
    message = "--against must be a model in floating point, but model.layers.0.mlp.gate_proj of quantized is not"
    refused("check", pruned, "--against", "quantized", message=message)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_quantized_by_bitsandbytes(pruned, bits):
    pytest.importorskip("bitsandbytes")
    method = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(pruned, quantization_config=method).save_pretrained("quantized")
    assert run("check", "quantized", "--against", pruned) == 0


def test_at_most_twenty_layers_are_listed(capsys):
    model = ZOO["mixtral"].build()
    prune(model, None, 0.5, criterion="magnitude", progress=False)
    model.save_pretrained("pruned")

    def fill(tensors):
        for tensor in tensors.values():
            tensor[tensor == 0] = 1.0

    change("pruned", "filled", fill)
    assert run("check", "filled", "--against", "pruned") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("100.00%") == 21  # 20 rows and the sum
    assert "4 more layers lost zeros." in out
    assert "(100.00%), in 24 of 24 layers." in out


def without_a_block(folder):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    change(folder, "shallow", drop)
    edit_config("shallow", num_hidden_layers=1)
    return "shallow"


def edit_config(folder, **values):
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config | values, file)


def test_models_of_different_depth_are_refused(pruned, refused):
    shallow = without_a_block(pruned)
    message = "--against must be the pruned model from which the other one was made, but {} has model.layers.1{} and {}"
    refused("check", pruned, "--against", shallow, message=message.format(pruned, "", shallow))
    refused("check", shallow, "--against", pruned, message=message.format(pruned, ".self_attn.q_proj", shallow))


def test_models_of_different_width_are_refused(pruned, refused):
    def cut(tensors):
        for name, tensor in tensors.items():
            if "mlp" in name:
                tensors[name] = (tensor[:, :48] if "down" in name else tensor[:48]).contiguous()

    change(pruned, "narrow", cut)
    edit_config("narrow", intermediate_size=48)
    refused("check", "narrow", "--against", pruned, message="gate_proj are 64 x 32 and 48 x 32. Give two versions")


def test_a_dense_model_has_no_zeros_to_lose(inputs, pruned, refused):
    message = f"--against must be a pruned model, but no layer of {inputs / 'llama'} holds a zero"
    refused("check", pruned, "--against", inputs / "llama", message=message)


@pytest.mark.parametrize(
    ("folder", "against", "message"),
    [
        ("pruned", "./pruned", "--against must be another model than FOLDER, but both are pruned."),
        ("timm:test_vit", "pruned", "FOLDER and --against must be language models, but one is timm:test_vit."),
        ("pruned", "/gone", "--against /gone does not exist. Check the path."),
    ],
)
def test_wrong_usage(pruned, refused, folder, against, message):
    refused("check", folder, "--against", against, message=message, code=2)


def test_a_folder_that_does_not_exist(pruned, refused):
    refused("check", "gone", "--against", pruned, message="The configuration of 'gone' cannot be found")
