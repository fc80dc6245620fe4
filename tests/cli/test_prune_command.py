"""`wanda-lightning prune`: the flags of the reference; what it writes is measured again by hand."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from statistics import fmean

import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.cli import (
    IGNORED_WARNINGS,
    OUT,
    SEQLEN,
    agreement_by_hand,
    everything_in,
    perplexity_by_hand,
    run,
    zeros_by_layer,
)
from support.layers import assert_same
from support.reports import Page
from transformers import AutoModelForCausalLM

from wanda_lightning import CausalLMModule, PruningReport, TextDataModule, prune
from wanda_lightning.cli import parse_options
from wanda_lightning.cli.sample_text import PROMPTS
from wanda_lightning.report import Measured
from wanda_lightning.streaming.measure_perplexity import measured_from_disk
from wanda_lightning.streaming.streamed_weights import StreamedWeights

pytestmark = IGNORED_WARNINGS


report_in = PruningReport.load


def reference_flags(inputs, method, pattern="unstructured", sparsity="0.5"):
    """The flags of the reference's main.py, and those that make a run fast."""
    return f"""
    --model {inputs}/llama --seed 0 --nsamples 4 --sparsity_ratio {sparsity} --sparsity_type {pattern}
    --prune_method {method} --cache_dir llm_weights --save out/logs --save_model out/model
    --calibration {inputs}/long.txt --evaluation {inputs}/other.txt --seqlen {SEQLEN} --limit 6
    """.split()


METHODS = [
    "wanda unstructured 0.5",
    "wanda 2:4 0.5",
    "wanda unstructured 0.25 --use_variant",
    "magnitude unstructured 0.25",
    "sparsegpt unstructured 0.5",
    pytest.param("ablate_mag_iter 4:8 0.5", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("choices", METHODS)
def test_the_flags_of_the_reference_prune_and_measure(inputs, choices):
    method, pattern, sparsity, *more = choices.split()
    assert run("prune", *reference_flags(inputs, method, pattern, sparsity), *more) == 0
    dense = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    pruned = AutoModelForCausalLM.from_pretrained("out/model")
    zeros = zeros_by_layer(pruned)
    assert len(zeros) == 14
    reached = torch.cat([is_zero.flatten() for is_zero in zeros.values()]).float().mean().item()
    assert reached == pytest.approx(float(sparsity), abs=0.01 if more else 1e-9)
    if pattern != "unstructured":
        size = int(pattern[-1])
        for name, is_zero in zeros.items():
            assert (is_zero.reshape(-1, size).sum(dim=1) == size // 2).all(), name

    text = (inputs / "other.txt").read_text()
    measured = report_in("out/logs").run
    assert measured.before == pytest.approx(perplexity_by_hand(dense, text, 6), rel=1e-6)
    assert measured.after == pytest.approx(perplexity_by_hand(pruned, text, 6), rel=1e-6)
    agreement = measured.agreement
    assert agreement.items() >= agreement_by_hand(dense, pruned, text, 6).items()
    titles, values = Path(f"out/logs/log_{method}.txt").read_text().splitlines()
    assert titles == "\t".join(["method", "actual_sparsity", "ppl_test", *agreement])
    assert values.startswith(f"{method}\t{reached:.4f}\t{measured.after:.4f}\t")
    assert f"\t{agreement['same_top']:.6g}\t" in values


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "2:4"), ("magnitude", "unstructured")])
def test_the_report_describes_the_run_which_says_what_it_found_and_writes_nothing_else(
    inputs, tmp_path, capsys, method, pattern
):
    flags = reference_flags(inputs, method, pattern)
    assert run("prune", *flags) == 0
    out, err = capsys.readouterr()
    report = report_in("out/logs")
    reads_data = method == "wanda"
    assert {layer.tokens for layer in report.layers} == {4 * SEQLEN if reads_data else 0}
    assert report.config["command"]["num_samples"] == 4
    calibration = f"{inputs}/long.txt, 4 windows of {SEQLEN} tokens, seed 0"

    # Besides the numbers, which other tests measure again.
    assert report.run == replace(
        report.run,
        model=f"{inputs}/llama",
        metric="perplexity",
        data=f"{inputs}/other.txt, 6 windows of {SEQLEN} tokens",
        others=(),
        calibration=calibration if reads_data else "",
        zero_shot={},
        samples=(),
    )
    program, command, *arguments = shlex.split(report.run.command)
    assert (program, command) == ("wanda-lightning", "prune")
    assert parse_options("prune", arguments) == parse_options("prune", flags)
    assert ("--sparsity" in arguments) == (pattern == "unstructured")

    assert f" from {report.run.before:,.2f} to {report.run.after:,.2f}." in out
    assert date.today() - date.fromisoformat(report.run.date) <= timedelta(days=1)
    assert "Pruning 2/2 done" in err
    assert sorted(os.listdir(tmp_path)) == ["llm_weights", "out"]
    assert sorted(os.listdir("out/logs")) == [f"log_{method}.txt", "pruning_report.json"]
    assert transformers.AutoTokenizer.from_pretrained("out/model")("ab").input_ids
    (result,) = ModelCard.load("out/model/README.md").data.eval_results
    assert result.dataset_name == Path(report.run.data).name
    assert result.metric_value == report.run.after


def test_skip_dtype_and_seed(text):
    more = [
        "--skip",
        "*.down_proj,model.layers.0.self_attn",
        "--dtype",
        "bfloat16",
        "--batch_size",
        "2",
    ]
    assert run(*text, *more, *OUT) == 0
    pruned = AutoModelForCausalLM.from_pretrained("out/model")
    assert pruned.dtype == torch.bfloat16
    for name, is_zero in zeros_by_layer(pruned).items():
        is_skipped = name.endswith("down_proj") or name.startswith("model.layers.0.self_attn")
        assert is_zero.float().mean() == (0 if is_skipped else 0.5), name
    assert report_in("out").config["calibration_batches"] == 2
    assert run(*text, *more, "--seed", "1", "--save", "other") == 0
    assert report_in("other").run.after != report_in("out").run.after


def test_a_page_changes_nothing_else_and_the_size_of_the_files_is_a_cost(text):
    for more in ("--save a --save_model a/model --report a.html", "--save b --save_model b/model"):
        assert run(*text, "--method", "sparsegpt", "--sparsity", "0.8", *more.split()) == 0
    with_page = report_in("a").run
    without = report_in("b").run
    assert [sample.prompt for sample in with_page.samples] == list(PROMPTS)
    described = {"command": without.command, "costs": without.costs}
    assert replace(with_page, samples=(), **described) == without
    saved = Path("b/model/model.safetensors").stat().st_size / 2**20
    assert without.costs == (Measured("MiB of weights", pytest.approx(saved, rel=0.1), saved),)
    weights = load_file("a/model/model.safetensors")
    assert_same(weights, load_file("b/model/model.safetensors"))
    assert re.search(
        r"Perplexity on \S+ \(6 windows of 32 tokens\) (rose|fell) from [\d,.]+ to [\d,.]+\.",
        Page(Path("a.html")).text,
    )


@pytest.mark.parametrize(
    ("name", "method", "group"),
    [("test_vit", "wanda", "layer"), ("test_convnext", "magnitude", "row")],
)
def test_an_image_classifier(inputs, images, capsys, name, method, group):
    options = [str(option).replace("test_vit", name) for option in images]
    assert run(*options, "--prune_granularity", group, "--method", method, *OUT) == 0
    # Dense and pruned: it says "bee" to all of four classes.
    assert "stayed at 25.00%." in capsys.readouterr().out
    report = report_in("out")
    log = Path(f"out/log_{method}.txt").read_text()
    assert f"\n{method}\t{report.sparsity:.4f}\t0.2500\t" in log

    assert report.run == replace(
        report.run,
        model=f"timm:{name} ({inputs}/{name}.safetensors)",
        metric="top-1",
        before=0.25,
        after=0.25,
        before_error=pytest.approx((0.25 * 0.75 / 8) ** 0.5),
        after_error=pytest.approx((0.25 * 0.75 / 8) ** 0.5),
        agreement=report.run.agreement,
        data=f"{inputs}/images, 8 images",
        others=(),
        calibration="" if method == "magnitude" else f"{inputs}/images, 6 images, seed 0",
        zero_shot={},
        samples=(),
    )

    assert report.run.agreement["same_top"] == 1
    assert report.run.agreement["predictions"] == 8

    pruned = timm.create_model("local-dir:out/model", pretrained=True)
    for layer in report.layers:
        assert (layer.tokens > 0) == (method == "wanda")
        is_zero = pruned.get_submodule(layer.name).weight.flatten(1) == 0
        rows, columns = is_zero.shape
        allowed = rows if group == "row" else 1
        assert int(is_zero.sum()) == pytest.approx(rows * columns / 2, abs=allowed)
        assert (is_zero.sum(dim=1) == columns // 2).all() == (group == "row")
    dense = load_file(inputs / f"{name}.safetensors")
    head = "head.weight" if name == "test_vit" else "head.fc.weight"
    assert torch.equal(pruned.get_classifier().weight, dense[head])


# Options, and what is said about them.
REFUSED = f"""
--model INPUTS/images -> key in its config.json
--seqlen 65 -> --seqlen must be at most 64, the model's context, but it is 65
--calibration INPUTS/short.txt -> needs a text of at least {SEQLEN + 1} tokens, but
--calibration c4 -> Without a network, use --calibration python-docs
--calibration c4 --model bin -> the only format that is read, but bin has config.json. Convert a
--pattern 3:6 -> pattern=NM(n=3, m=6) fits none of
--stream --model INPUTS/gone.gguf -> gone.gguf does not exist
--stream --method thorough -> needs the whole model in memory
--packing none -> packing='none' needs chats, but
--calibration self -> tokenizer must have a token that begins or ends a text
--save mine -> mine exists and is not empty
--save_model mine -> mine exists and is not empty
--save_model mine --overwrite -> must be empty or a model
--report mine/a.html -> mine/a.html exists and is not empty. Choose another
--report c.html -> Reports with figures need matplotlib: pip install
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_refused_for_a_language_model(inputs, text, refused, monkeypatch, case):
    for name in ("measure", "measured_from_disk"):
        monkeypatch.setattr(f"wanda_lightning.cli.run_job.{name}", None)
    if "matplotlib" in case:  # as if it were not installed
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    Path("mine").mkdir()
    Path("mine/a.html").write_text("mine")
    Path("bin").mkdir()
    shutil.copy(inputs / "llama/config.json", "bin")
    options, message = case.replace("INPUTS", str(inputs)).split(" -> ")
    refused(*text, *OUT, *options.split(), message=message)


@pytest.mark.parametrize(("command", "target"), [("prune", "all/x"), ("shrink", "all")])
def test_a_model_that_is_read_is_never_replaced(pruned, refused, command, target):
    shutil.copytree(pruned, "all/x")
    shutil.copy("all/x/config.json", "all")
    message = f"--save_model {target} would replace --model all/x. Choose another"
    options = ["--model", "all/x", "--save_model", target, "--overwrite"]
    refused(command, *options, message=message)


def test_the_model_may_write_the_text_to_calibrate_on(inputs, text):
    shutil.copytree(inputs / "llama", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained("model")
    more = "--calibration self --method sparsegpt --save out --model model"
    assert run(*text, *more.split()) == 0
    assert report_in("out").run.calibration.startswith("text by the dense model, 4 windows of ")


@pytest.fixture
def streamed_options(inputs, text):
    """The options of a run from disk on two texts, except what to save."""
    return [*text, "--method", "magnitude", "--evaluation", f"{inputs}/other.txt,{inputs}/long.txt"]


def test_a_streamed_run_measures_what_one_in_memory_does(streamed_options, inputs, capsys):
    assert run(*streamed_options, "--save", "memory") == 0
    assert f"Perplexity on {inputs}/long.txt (" in capsys.readouterr().out
    assert run(*streamed_options, "--stream", "--save_model", "model", "--save", "disk") == 0
    expected = report_in("memory").run.results
    results = report_in("disk").run.results
    for result, by_memory in zip(results, expected, strict=True):
        assert result.data == by_memory.data
        assert result.before == pytest.approx(by_memory.before, rel=1e-5)
        assert result.after == pytest.approx(by_memory.after, rel=1e-5)
        assert result.after_error == pytest.approx(by_memory.after_error, rel=1e-4)
        assert result.agreement == pytest.approx(by_memory.agreement, rel=1e-3)
    assert results[0].after != results[1].after


@pytest.fixture
def chats(inputs, text):
    """The options of a run that calibrates on chats and text, and measures on the chats; `model` has a template."""
    shutil.copytree(inputs / "llama", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained("model")
    words = (inputs / "long.txt").read_text().split()
    lines = []
    for number in range(12):  # most of them shorter than a window
        content = " ".join(words[: 2 + number // 3])
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    Path("chats.jsonl").write_text("\n".join(lines))
    sources = ["--calibration", f"chats.jsonl,{inputs}/other.txt", "--evaluation", "chats.jsonl"]
    return [*text, "--model", "model", "--method", "wanda", *sources]


@pytest.mark.parametrize("packing", ["windows", "none"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_command_calibrates_on_chats_and_text(inputs, chats, stream, packing):
    more = ["--stream"] if stream else []
    assert run(*chats, "--packing", packing, *more, *OUT) == 0
    module = CausalLMModule("model")
    sources = ["chats.jsonl", f"{inputs}/other.txt"]
    data = TextDataModule(
        module.tokenizer, sources, "chats.jsonl", SEQLEN, 4, limit=6, packing=packing
    )
    described = data.describe_calibration(4)
    assert described.startswith("chats.jsonl (")
    assert report_in("out").run.calibration == described
    assert described.replace(f"{inputs}/", "") in Path("out/model/README.md").read_text()
    prune(module.model, data.calibration_dataloader(), 0.5, method="wanda", progress=False)
    written = AutoModelForCausalLM.from_pretrained("out/model")
    for name, is_zero in zeros_by_layer(written).items():
        assert torch.equal(is_zero, zeros_by_layer(module.model)[name]), name

    windows = data.evaluation_windows
    assert windows.shape == (6, SEQLEN)
    losses = [written(ids[None], labels=ids[None]).loss.item() for ids in windows]
    assert report_in("out").run.after == pytest.approx(math.exp(fmean(losses)), rel=1e-5)


def test_a_streamed_run_that_was_interrupted_goes_on_only_with_the_same_packing(
    inputs, chats, monkeypatch, capsys
):
    command = [*chats, "--evaluation", f"chats.jsonl,{inputs}/other.txt", "--stream", *OUT]
    calls = itertools.count()

    def interrupt(*arguments, **options):
        if next(calls) == 2:  # after both texts by the dense model
            signal.raise_signal(signal.SIGINT)
        return measured_from_disk(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr("wanda_lightning.cli.run_job.measured_from_disk", interrupt)
        assert run(*command) == 130
    assert not Path("out/pruning_report.json").exists()
    assert run(*command, "--packing", "none") == 2
    assert "begun with other choices, data or weights: calibration data" in capsys.readouterr().err
    monkeypatch.setattr(StreamedWeights, "visits", None)  # nothing is pruned again
    assert run(*command) == 0
    assert not Path("out/model/.pruning_progress.json").exists()
    assert report_in("out").sparsity == 0.5


def test_pruning_without_saving(text, tmp_path, capsys):
    assert run(*text) == 0
    assert "Nothing was saved. To save the model, add --save_model DIR" in capsys.readouterr().out
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("kind", ["text", "images"])
def test_pruning_without_measuring(request, capsys, kind):
    nothing = ["--method", "magnitude", "--evaluation", "", "--save", "out"]
    assert run(*request.getfixturevalue(kind), *nothing) == 0
    assert report_in("out").run.metric == ""
    assert report_in("out").run.results == ()
    assert "perplexity" not in capsys.readouterr().out
    assert (
        Path("out/log_magnitude.txt").read_text() == "method\tactual_sparsity\nmagnitude\t0.5000\n"
    )
