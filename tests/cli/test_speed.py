"""`wanda-lightning speed`: 2:4 weights against dense ones, in turn, with the spread of the rounds."""

import re

import pytest
import torch
from support.cli import run
from transformers import AutoModelForCausalLM

from wanda_lightning.acceleration import semi_structured
from wanda_lightning.cli import speed

SIZES = ["--seqlen", "8", "--tokens", "3"]


@pytest.fixture
def pruned(inputs):
    """A folder with a model in bfloat16 in which the linear layers are 2:4."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama").bfloat16()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data[:, ::2] = 0
    model.save_pretrained("pruned")
    return "pruned"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_sparse_tensor_cores(pruned, refused):
    refused("speed", "--model", pruned, *SIZES, message="needs a model on a CUDA device of compute capability 8.0")


def test_the_command_with_dense_tensors_in_place_of_semi_structured_ones(pruned, capsys, monkeypatch):
    monkeypatch.setattr(speed, "refuse_devices", lambda devices: None)
    monkeypatch.setattr(semi_structured, "refuse_devices", lambda devices: None)
    monkeypatch.setattr(semi_structured, "compressed", lambda weight: weight.clone())
    monkeypatch.setattr(semi_structured.Accelerated, "nbytes", 1000)
    assert run("speed", "--model", pruned, *SIZES) == 0
    out, err = capsys.readouterr()
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if "│" in line}
    for name in ("dense", "2:4"):
        for cell in cells[name][:2]:
            middle, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert 0 < low <= middle <= high
    assert float(cells["2:4"][3]) == 0  # the same products
    assert float(cells["2:4"][2].split()[0]) < float(cells["dense"][2].split()[0])
    assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == ["prefill", "decoding"]
    assert "Timing 10/10" in err


def test_bad_input(pruned, refused, monkeypatch):
    refused("speed", "--model", "timm:test_vit", message="--model must be a language model", code=2)
    refused("speed", "--model", "/no/such", message="--model /no/such does not exist", code=2)
    monkeypatch.setattr(speed, "refuse_devices", lambda devices: None)
    refused("speed", "--model", pruned, "--tokens", "500", message="--seqlen plus --tokens must be at most 64", code=2)
