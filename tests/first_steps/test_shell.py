"""The commands, with files in folders that have spaces in their names."""

from pathlib import Path

import pytest
from support.cli import run
from transformers import AutoModelForCausalLM


@pytest.fixture
def command(folder):
    Path("my texts").mkdir()
    Path("my texts/my notes.txt").write_text(
        "The quick brown fox jumps over the lazy dog.\n" * 2_000
    )
    text = ["--calibration", "my texts/my notes.txt", "--evaluation", "my texts/my notes.txt"]
    sizes = ["--num_samples", 8, "--seqlen", 256, "--limit", 4]
    return ["prune", "--model", folder, "--sparsity", 0.5, *text, *sizes]


def test_prune_and_save(command, sparsity):
    assert run(*command, "--save_model", "out/my model", "--report", "out/my report.html") == 0
    saved = AutoModelForCausalLM.from_pretrained("out/my model")
    assert sparsity(saved.model) == 0.5
    assert "my texts/my notes.txt" in Path("out/my report.html").read_text()


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("--sparsity", "50%", "0.5"),
        ("--pattern", "4:2", "2:4"),
        ("--calibration", "my texts/nofile.txt", "my texts/nofile.txt"),
        ("--save_model", "my texts", "--overwrite"),
        ("--model", "my models", "my models/tiny llama"),
    ],
)
def test_a_mistake_is_explained(command, capsys, option, value, advice):
    assert run(*command, option, value) == 2
    message = capsys.readouterr().err
    assert advice in message
    assert "('" not in message  # a tuple
