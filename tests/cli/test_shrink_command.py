"""`wanda-lightning shrink`, and `prune --shrink`: what is left computes the same."""

import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.cli import IGNORED_WARNINGS, everything_in, run
from support.reports import read_json
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from wanda_lightning.streaming.streamed_weights import StreamedWeights

pytestmark = IGNORED_WARNINGS

STRUCTURED = ["--pattern", "structured", "--sparsity", "0.5"]
IDS = torch.arange(40).reshape(2, 20)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.fixture
def structured(text):
    """A folder `zeros` with the language model, half of whose hidden units are zero."""
    assert run(*text, *STRUCTURED, "--save_model", "zeros") == 0
    return "zeros"


TOOK = "Took out 64 of 128 hidden units in 2 layers; 30,880 of 37,024 parameters are left."


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_shrinks_a_language_model(structured, capsys, stream):
    before = everything_in(Path(structured))
    capsys.readouterr()
    assert run("shrink", "--model", structured, "--save_model", "small", *stream) == 0
    assert capsys.readouterr().out == f"{TOOK}\nThe model is in small.\n"
    assert read_json("small/config.json")["intermediate_size"] == 32
    assert_close(logits("small"), logits(structured), rtol=1e-4, atol=1e-5)
    assert everything_in(Path("small"))["tokenizer.json"] == before["tokenizer.json"]
    assert everything_in(Path(structured)) == before


def test_shows_what_could_be_taken_out(structured, capsys, tmp_path):
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert run("shrink", "--model", structured) == 0
    advice = "Nothing was saved. To save the smaller model, add --save_model DIR."
    assert capsys.readouterr().out == f"{TOOK}\n{advice}\n"
    assert everything_in(tmp_path) == before


def test_scattered_zeros_are_an_error_only_if_asked_to_write(pruned, refused, capsys):
    assert run("shrink", "--model", pruned) == 0
    out = capsys.readouterr().out
    assert "Nothing can be removed: no hidden unit is zero on both sides.\nPrune with" in out
    assert "--save_model" not in out
    refused(
        "shrink",
        "--model",
        pruned,
        "--save_model",
        "small",
        message="shrink must remove something. Nothing can be removed",
    )


@pytest.mark.parametrize(
    ("sparsity", "smaller", "text"),
    [
        ("0.5", True, "Took out "),
        ("0.01", False, "Note: the model is saved with its zeros. shrink must remove"),
    ],
)
def test_prune_takes_out_the_zeros_of_an_image_classifier(sparsity, smaller, text, inputs, capsys):
    data = ["--data", inputs / "images"]
    options = f"""
    prune --model timm:test_convnext --checkpoint {inputs}/test_convnext.safetensors --num_samples 4
    --pattern structured --sparsity {sparsity} --shrink --save_model small
    """
    assert run(*options.split(), *data) == 0
    assert text in capsys.readouterr().out
    assert Path("small/modeling_shrunk.py").exists() == smaller
    assert ("\nimport modeling_shrunk\n" in Path("small/README.md").read_text()) == smaller
    assert run("evaluate", "--model", "timm:local-dir:small", *data) == 0


def test_prune_from_disk_saves_the_smaller_model(text, structured, tmp_path, monkeypatch):
    """If it is interrupted, the pruned model stays, and the same command goes on from there."""
    saving = ["--stream", "--shrink", "--save_model", "small", "--save", "out"]
    command = [*text, *STRUCTURED, *saving]
    with monkeypatch.context() as patched:
        patched.setattr(
            "wanda_lightning.streaming.shrinking_from_disk.refuse_unloadable",
            lambda *_: signal.raise_signal(signal.SIGINT),
        )
        assert run(*command) != 0
    assert {path.name for path in tmp_path.iterdir()} == {"zeros", "small"}
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 64
    monkeypatch.setattr(StreamedWeights, "visits", None)  # nothing is pruned again

    assert run(*command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"zeros", "small", "out"}
    assert_close(logits("small"), logits(structured), rtol=1e-4, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 32
    card = ModelCard.load("small/README.md")
    assert "not in the saved model" in card.text
    assert "were taken out" in card.text
    assert "sparse" not in card.data.tags
    assert not (tmp_path / "small/.pruning_progress.json").exists()
