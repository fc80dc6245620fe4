"""`wanda-lightning shrink`: units or experts leave, and what is saved loads; without amounts, zero units leave."""

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from support.cli import IGNORED_WARNINGS, OUT, everything_in, perplexity_by_hand, run
from support.quantized import CAN_DEQUANTIZE, fp8
from support.reports import Page, read_json
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from wanda_lightning import PruningReport
from wanda_lightning.cli import parse_options
from wanda_lightning.streaming.streamed_weights import StreamedWeights

pytestmark = IGNORED_WARNINGS

IDS = torch.arange(40).reshape(2, 20)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.fixture
def shrink(text):
    """The options of a fast run on the language model."""
    return ["shrink", *text[1:]]


def test_units_leave_a_language_model_and_the_report_describes_it(shrink, inputs, capsys):
    command = [*shrink, "--units", "0.5", "--no_refit", "--skip", "*.0.mlp.down_proj", *OUT]
    assert run(*command, "--report", "page.html") == 0
    small = AutoModelForCausalLM.from_pretrained("out/model", trust_remote_code=True)
    widths = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert widths == [64, 32]

    report = PruningReport.load("out")
    text = (inputs / "other.txt").read_text()
    assert report.run.after == pytest.approx(perplexity_by_hand(small, text, 6), rel=1e-6)
    dense = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    assert report.parameters == dense.num_parameters()
    assert report.zeros == dense.num_parameters() - small.num_parameters()
    start = "Shrunk: Wanda (hidden units)"
    assert str(report).startswith(f"{start}, calibrated on {inputs}/long.txt, 4 windows")
    assert f"{start} in " in Page(Path("page.html")).text
    program, name, *arguments = shlex.split(report.run.command)
    assert (program, name) == ("wanda-lightning", "shrink")
    assert parse_options("shrink", arguments) == parse_options(
        "shrink", [*command[1:], "--report", "page.html"]
    )
    assert "--no_refit" in arguments
    assert "Note: 32 of 64 hidden units removed" in capsys.readouterr().out
    assert Path("out/log_units.txt").read_text().startswith("method\tactual_sparsity\tppl_test")


def test_from_disk_the_same_units_leave_even_if_a_run_was_interrupted(
    shrink, tmp_path, monkeypatch
):
    command = [*shrink, "--units", "0.5"]
    assert run(*command, "--save_model", "memory") == 0
    streamed = [*command, "--stream", "--save_model", "small", "--save", "out"]
    with monkeypatch.context() as patched:
        patched.setattr(
            "wanda_lightning.streaming.shrinking_from_disk.refuse_unloadable",
            lambda *_: signal.raise_signal(signal.SIGINT),
        )
        assert run(*streamed) != 0
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "small"}
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 64
    monkeypatch.setattr(StreamedWeights, "visits", None)  # nothing is scored again

    assert run(*streamed) == 0
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 32
    assert_close(logits("small"), logits("memory"), rtol=1e-4, atol=1e-5)
    card = ModelCard.load("small/README.md")
    assert "this report has the shapes of the larger model" in card.text
    assert "were taken out" in card.text
    assert "sparse" not in card.data.tags
    assert not (tmp_path / "small/.pruning_progress.json").exists()


@CAN_DEQUANTIZE
@pytest.mark.filterwarnings("ignore:The model .* is quantized")
@pytest.mark.parametrize("stream", [True, False])
def test_experts_that_fit_into_a_size(inputs, shrink, capsys, stream):
    tokens = transformers.AutoTokenizer.from_pretrained(inputs / "llama")
    fp8(Path("mixture"), vocab_size=len(tokens))
    tokens.save_pretrained("mixture")
    weights = sum(file.stat().st_size for file in Path("mixture").glob("*.safetensors"))
    size = f"{weights * (0.8 if stream else 1.1) / 1e6:.4f}MB"
    options = [*shrink, *OUT, "--model", "mixture", "--max_size", size]
    assert run(*options, *["--stream"] * stream) == 0
    printed = capsys.readouterr().out
    number = re.search(r"max_size=.* GB keeps (\d) of 8 experts in each layer: about", printed)
    config = transformers.AutoConfig.from_pretrained("out/model")
    assert config.num_experts == int(number[1]) < 8
    assert hasattr(config, "quantization_config") == stream
    report = PruningReport.load("out")
    assert str(report).startswith("Shrunk: summed REAP (experts), calibrated on ")


def test_an_image_classifier_is_saved_with_the_code_that_loads_it(inputs):
    data = ["--data", inputs / "images"]
    options = f"""
    shrink --model timm:test_convnext --checkpoint {inputs}/test_convnext.safetensors --num_samples 4
    --units 0.5 --save_model small
    """
    assert run(*options.split(), *data) == 0
    assert "\nimport modeling_shrunk\n" in Path("small/README.md").read_text()
    assert run("evaluate", "--model", "timm:local-dir:small", *data) == 0


# ---- without amounts


@pytest.fixture
def zeros(inputs):
    """A folder `zeros` with the language model, half of whose hidden units are zero."""
    shutil.copytree(inputs / "llama", "zeros")
    model = AutoModelForCausalLM.from_pretrained("zeros")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[::2] = 0
        layer.mlp.gate_proj.weight.data[::2] = 0
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    model.save_pretrained("zeros")
    return "zeros"


TOOK = "Took out 64 of 128 hidden units in 2 layers; 30,880 of 37,024 parameters are left."


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_zero_units_leave_and_the_rest_computes_the_same(zeros, capsys, stream):
    before = everything_in(Path(zeros))
    capsys.readouterr()
    assert run("shrink", "--model", zeros, "--save_model", "small", *stream) == 0
    assert capsys.readouterr().out == f"{TOOK}\nThe model is in small.\n"
    assert read_json("small/config.json")["intermediate_size"] == 32
    assert_close(logits("small"), logits(zeros), rtol=1e-4, atol=1e-5)
    assert everything_in(Path("small"))["tokenizer.json"] == before["tokenizer.json"]
    assert everything_in(Path(zeros)) == before


def test_shows_what_could_be_taken_out(zeros, capsys, tmp_path):
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert run("shrink", "--model", zeros) == 0
    advice = "Nothing was saved. To save the smaller model, add --save_model DIR."
    assert capsys.readouterr().out == f"{TOOK}\n{advice}\n"
    assert everything_in(tmp_path) == before


def test_scattered_zeros_are_an_error_only_if_asked_to_write(pruned, refused, capsys):
    assert run("shrink", "--model", pruned) == 0
    nothing = "Nothing can be removed: no hidden unit is zero on both sides."
    advice = "Give --units 0.5, for example."
    assert capsys.readouterr().out.endswith(f"{nothing}\nNothing was saved. {advice}\n")
    saving = ["shrink", "--model", pruned, "--save_model", "small"]
    refused(*saving, message=f"{nothing} {advice}")
    refused(*saving, "--stream", message=nothing)
