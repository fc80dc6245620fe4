"""`wanda-lightning speed`: every execution that is possible, the reasons for others, and one sentence."""

import re

import pytest
import torch
from support.cli import run
from transformers import AutoModelForCausalLM

from wanda_lightning.acceleration import packed
from wanda_lightning.cli.speed import _Speed, _verdict

SIZES = ["--seqlen", "8", "--tokens", "3"]


@pytest.fixture
def pruned(inputs):
    """A folder with a model in which 60 % of the weights of linear layers are zero."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data[:, : round(0.6 * module.weight.shape[1])] = 0
    model.save_pretrained("pruned")
    return "pruned"


def test_a_machine_with_a_compiler(pruned, capsys):
    try:
        packed.kernel()
    except ImportError as error:
        pytest.skip(str(error))
    assert run("speed", "--model", pruned, *SIZES) == 0
    out, err = capsys.readouterr()
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if "│" in line}
    assert {"dense", "packed (CPU)"} <= cells.keys()
    assert all(float(cell) > 0 for name in ("dense", "packed (CPU)") for cell in cells[name][:2])
    assert 0 < float(cells["packed (CPU)"][3]) < 1e-4  # the order of summation differs
    model = AutoModelForCausalLM.from_pretrained(pruned)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert abs(float(cells["dense"][2].split()[0]) - size / 1000) < 0.1 * size / 1000
    assert re.search(r"Not possible here: 2:4 \(CUDA\)\. accelerate_2to4 needs a model on a CUDA device", out)
    assert "faster here" in out.splitlines()[-1]
    assert "Timing 10/10" in err


def test_a_machine_without_a_compiler(pruned, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    packed.kernel.cache_clear()
    assert run("speed", "--model", pruned, *SIZES) == 0
    out = capsys.readouterr().out
    assert "neither g++ nor c++ is in PATH" in out
    assert out.splitlines()[-1].startswith("Nothing is faster here than dense weights")


def test_verdicts():
    dense = _Speed(100, 10)
    assert _verdict({"dense": dense, "packed (CPU)": _Speed(101, 10.2)}).startswith("Nothing is faster")
    assert _verdict({"dense": dense, "packed (CPU)": _Speed(80, 15)}) == (
        "packed (CPU) is faster here: decoding runs at 1.50 times the speed of dense weights, prefill at 0.80."
    )


def test_bad_input(inputs, pruned, refused):
    refused("speed", "--model", inputs / "llama", *SIZES, message="has no zeros to make it faster. Prune it first")
    refused("speed", "--model", pruned, "--tokens", "500", message="the model's context, but they are 128", code=2)
    refused("speed", "--model", "timm:test_vit", message="--model must be a language model", code=2)
    refused("speed", "--model", "/no/such", message="--model /no/such does not exist", code=2)
    assert torch.get_num_threads() == 1
