"""`wanda-lightning inspect`: what it shows without weights, and what is refused."""

import shutil

import pytest
from support.cli import IGNORED_WARNINGS, run
from support.embedding import tiny_folder as tiny_folder
from support.gguf import write_gguf
from support.zoo import model_of
from transformers import AutoModelForCausalLM, T5Config

from wanda_lightning.cli import inspect_command

pytestmark = IGNORED_WARNINGS


def test_inspect_a_folder_without_weights(inputs, capsys):
    name = "[red]x[/green]"  # which rich would take for markup
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(inputs / "llama", name, ignore=weights)
    assert run("inspect", "--model", name, "--skip", "model.layers.0.mlp") == 0
    out = capsys.readouterr().out
    assert f"{name}: would be pruned" in out
    # 8 attention matrices of 32 x 32, three of 32 x 64.
    assert "11 layers at 2 stops hold 14,336 weights" in out
    assert "A stop is where all calibration batches wait until" in out
    for first, second in (("output head", "lm_head"), ("skip='model.layers.0.mlp'", "3")):
        assert any(first in row and second in row for row in out.splitlines())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 2 x (4 of 32 x 32 and 3 of 32 x 48).
        ("tiny.gguf", ["14 layers at 2 stops hold 17,408 weights"]),
        (
            "timm:convnext_tiny",
            ["with --sequential none", "depthwise", "output head", "at 1 stop hold"],
        ),
        ("experts", ["24 layers at 2 stops", "router", "gate_up_proj.*"]),
        ("embedding", ["encoder.layer.0"]),
    ],
)
def test_inspect_allocates_no_weights(capsys, monkeypatch, tiny_folder, options, expected):
    built = []
    build = inspect_command.model_from_config

    def model_from_config(source):
        built.append(build(source))
        return built[0]

    monkeypatch.setattr(inspect_command, "model_from_config", model_from_config)
    write_gguf("tiny.gguf")
    model_of("mixtral").config.save_pretrained("experts")
    shutil.copytree(tiny_folder, "embedding")
    assert run("inspect", "--model", *options.split()) == 0
    assert all(parameter.is_meta for parameter in built[0].parameters())
    out = " ".join(capsys.readouterr().out.split())
    assert all(part in out for part in expected)
    assert "gate_up_proj.0" not in out


def test_inspect_says_which_layers_the_pattern_does_not_fit(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    pattern = ["--pattern", "16:64", "--sparsity", "0.75"]
    assert run("inspect", "--model", inputs / "llama", *pattern) == 0
    out = capsys.readouterr().out
    reason = "input width 32 is not a multiple of 64"
    assert any(reason in row and " 12 " in row for row in out.splitlines())
    assert (
        "Note: the pattern does not fit 12 layers, model.layers.0.mlp.gate_proj largest (input"
        in out
    )
    assert "Note: only 20% of the weights" in out


def test_blocks_that_are_alike_share_a_row(inputs, capsys):
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    model.config.num_hidden_layers = 30
    model.config.save_pretrained("deep")
    assert run("inspect", "--model", "deep") == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if "self_attn.q_proj" in line)
    assert "│ model.layers.0 to model.layers.29, each of 30 " in row


# Options, and what is said about them.
REFUSED = """
--pattern 3:6 -> pattern=NM(n=3, m=6) fits none of the 14 layers
--revision v1 -> --revision must be left out for a local model, or
--skip model -> model has nothing to prune
--model gone -> configuration of 'gone' cannot be loaded: no file or folder has this name:
--model t5 -> model must be a decoder, but t5 is an encoder-decoder.
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_inspect_refuses(inputs, refused, case):
    T5Config(num_layers=1).save_pretrained("t5")
    options, message = case.split(" -> ")
    refused("inspect", "--model", inputs / "llama", *options.split(), message=message)
