"""`wanda-lightning inspect`: what it counts, and that no weight is allocated."""

import shutil

import pytest
from support.cli import IGNORED_WARNINGS, run
from support.gguf import write_gguf
from support.zoo import ZOO
from transformers import AutoModelForCausalLM, T5Config

from wanda_lightning.cli import measuring

pytestmark = IGNORED_WARNINGS


def test_inspect_a_folder_without_weights(inputs, capsys):
    shutil.copytree(inputs / "llama", "[red]x[/green]", ignore=shutil.ignore_patterns("*.safetensors"))  # no markup
    assert run("inspect", "--model", "[red]x[/green]", "--skip", "model.layers.0.mlp") == 0
    out = capsys.readouterr().out
    assert "[red]x[/green]: would be pruned" in out
    assert "11 layers in 2 units hold 14,336 weights" in out  # 8 attention matrices of 32 x 32, three of 32 x 64
    for line in (
        ("model.layers.1", "self_attn.q_proj"),
        ("output head", "lm_head"),
        ("skip='model.layers.0.mlp'", "3"),
    ):
        assert any(all(part in row for part in line) for row in out.splitlines()), line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny.gguf", ["14 layers in 2 units hold 17,408 weights"]),  # 2 x (4 of 32 x 32 and 3 of 32 x 48)
        ("timm:convnext_tiny", ["with --sequential none", "depthwise", "output head", "in 1 unit hold"]),
        ("experts", ["24 layers in 2 units", "router", "gate_up_proj.*"]),
    ],
)
def test_inspect_allocates_no_weights(capsys, monkeypatch, name, expected):
    built, build = [], measuring.model_from_config
    monkeypatch.setattr(measuring, "model_from_config", lambda source: built.append(build(source)) or built[0])
    write_gguf("tiny.gguf")
    ZOO["mixtral"].build().config.save_pretrained("experts")
    assert run("inspect", "--model", name) == 0
    assert all(parameter.is_meta for parameter in built[0].parameters())
    out = " ".join(capsys.readouterr().out.split())
    assert all(part in out for part in expected)
    assert "gate_up_proj.0" not in out


def test_inspect_says_what_the_pattern_does_not_fit_or_does(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    sparsity = ["--sparsity", "0.75"]
    assert run("inspect", "--model", inputs / "llama", "--pattern", "16:64", *sparsity) == 0
    out = capsys.readouterr().out
    assert any("input width 32 is not a multiple of 64" in row and " 12 " in row for row in out.splitlines())
    assert "Note: the pattern does not fit 12 layers, model.layers.0.mlp.gate_proj largest (input width 32 is" in out
    assert "Note: only 20% of the weights" in out
    assert run("inspect", "--model", inputs / "llama", "--pattern", "structured") == 0
    assert "prunes only those of these layers that write or read hidden units" in capsys.readouterr().out


def test_blocks_that_are_alike_share_a_row_and_the_memory_of_streaming_is_named(inputs, capsys):
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    model.config.num_hidden_layers = 30
    model.config.save_pretrained("deep")
    assert run("inspect", "--model", "deep") == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split("│")[1].strip() for row in rows if "self_attn.q_proj" in row] == [
        "model.layers.0 to model.layers.29, each of 30"
    ]
    block = sum(each.nbytes for each in model.model.layers[0].parameters())
    held = 2 * block + 128 * 64 * 32 * 4
    assert last.startswith(f"prune --stream holds {held / 1e6:.3g} MB for a while: twice the largest block ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pattern", "3:6"], "pattern=NM(n=3, m=6) fits none of the 14 layers"),
        (["--skip", "model"], "model has nothing to prune"),
        (["--model", "gone"], "configuration of 'gone' cannot be loaded"),
        (["--model", "t5"], "model must be a decoder-only language model, but t5 is an encoder-decoder."),
        (["--model", "timm:test_vit", "--pattern", "experts"], "pattern='experts' needs a mixture of experts"),
    ],
)
def test_inspect_refuses(inputs, refused, more, message):
    T5Config(num_layers=1).save_pretrained("t5")
    refused("inspect", "--model", inputs / "llama", *more, message=message)
