"""`wanda-lightning prune` and `shrink`: the flags of the reference; what they write is measured again by hand."""

import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

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
    everything_in,
    perplexity_by_hand,
    run,
    zeros_by_layer,
)
from support.hub import hub as hub
from support.reports import Page
from transformers import AutoModelForCausalLM

from wanda_lightning import PruningReport
from wanda_lightning.cli import parse_options
from wanda_lightning.cli.sample_text import PROMPTS, continuation, continuations
from wanda_lightning.report import Circumstances, Measured
from wanda_lightning.streaming.streamed_weights import StreamedWeights

pytestmark = IGNORED_WARNINGS


def report_in(folder):
    return PruningReport.from_json(Path(folder, "pruning_report.json").read_text())


METHODS = [
    ("wanda", "unstructured", "0.5", []),
    ("wanda", "2:4", "0.5", []),
    ("wanda", "unstructured", "0.25", ["--use_variant"]),
    ("magnitude", "unstructured", "0.25", []),
    ("sparsegpt", "unstructured", "0.5", []),
    pytest.param("ablate_mag_iter", "4:8", "0.5", [], marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("method", "kind", "ratio", "more"), METHODS)
def test_the_flags_of_the_reference_work_verbatim(
    inputs, tmp_path, capsys, method, kind, ratio, more
):
    flags = f"--model {inputs}/llama --seed 0 --nsamples 4 --sparsity_ratio {ratio} --sparsity_type {kind} "
    flags += (
        f"--prune_method {method} --cache_dir llm_weights --save out/logs --save_model out/model"
    )
    ours = f"--calibration {inputs}/long.txt --evaluation {inputs}/other.txt --seqlen {SEQLEN} --limit 6"
    assert run("prune", *flags.split(), *more, *ours.split()) == 0
    out, err = capsys.readouterr()

    dense = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    zeros = zeros_by_layer(pruned)
    assert len(zeros) == 14
    reached = torch.cat([where.flatten() for where in zeros.values()]).float().mean().item()
    assert reached == pytest.approx(float(ratio), abs=0.01 if more else 1e-9)
    text = (inputs / "other.txt").read_text()
    measured, before = (
        pytest.approx(perplexity_by_hand(model, text, 6), rel=1e-6) for model in (pruned, dense)
    )

    report = report_in("out/logs")
    assert Path(f"out/logs/log_{method}.txt").read_text() == (
        f"method\tactual_sparsity\tppl_test\n{method}\t{reached:.4f}\t{report.run.after:.4f}\n"
    )
    assert {layer.tokens for layer in report.layers} == {0 if method == "magnitude" else 4 * SEQLEN}
    program, command, *arguments = shlex.split(report.run.command)
    assert (program, command) == ("wanda-lightning", "prune")
    given = parse_options("prune", [*flags.split(), *more, *ours.split()])
    assert parse_options("prune", arguments) == given
    assert ("--sparsity" in arguments) == (kind == "unstructured")
    assert report.config["command"]["num_samples"] == 4
    assert report.run == Circumstances(
        command=report.run.command,
        model=f"{inputs}/llama",
        metric="perplexity",
        before=before,
        after=measured,
        data=f"{inputs}/other.txt, 6 windows of {SEQLEN} tokens",
        calibration=""
        if method == "magnitude"
        else f"{inputs}/long.txt, 4 windows of {SEQLEN} tokens, seed 0",
        costs=report.run.costs,
    )
    assert f" from {report.run.before:,.2f} to {report.run.after:,.2f}." in out
    assert "Pruning 2/2 done" in err
    assert sorted(os.listdir("out/logs")) == [f"log_{method}.txt", "pruning_report.json"]
    assert {*os.listdir(tmp_path)} == {"out", "llm_weights"}

    for name, where in zeros.items() if kind != "unstructured" else ():
        assert (where.reshape(-1, int(kind[-1])).sum(dim=1) == int(kind[-1]) // 2).all(), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model")("ab").input_ids
    (found,) = ModelCard.load(tmp_path / "out/model/README.md").data.eval_results
    assert (found.dataset_name, found.metric_value) == (
        Path(report.run.data).name,
        report.run.after,
    )


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
    for name, where in zeros_by_layer(pruned).items():
        skipped = name.endswith("down_proj") or name.startswith("model.layers.0.self_attn")
        assert where.float().mean() == (0 if skipped else 0.5), name
    assert report_in("out").config["calibration_batches"] == 2
    assert run(*text, *more, "--seed", "1", "--save", "other") == 0
    assert report_in("other").run.after != report_in("out").run.after


def test_the_page_has_results_and_text_by_both_models_and_changes_nothing_else(
    text, tmp_path, refused, monkeypatch
):
    method = ["--method", "sparsegpt", "--sparsity", "0.8"]
    assert run(*text, *method, "--save", "a", "--save_model", "a/model", "--report", "a.html") == 0
    assert run(*text, *method, "--save", "b", "--save_model", "b/model") == 0
    a, b = (report_in(name).run for name in "ab")
    assert ([sample.prompt for sample in a.samples], b.samples) == (list(PROMPTS), ())
    assert replace(a, samples=(), command=b.command, costs=b.costs) == b
    weights = [load_file(f"{name}/model/model.safetensors") for name in "ab"]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    found = Page(tmp_path / "a.html").text
    assert re.search(
        r"Perplexity on \S+ \(6 windows of 32 tokens\) (rose|fell) from [\d,.]+ to [\d,.]+\.", found
    )
    refused(*text, "--report", "a.html", message="a.html exists and is not empty. Choose another")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    refused(
        *text, "--report", "c.html", message="Reports with figures need matplotlib: pip install"
    )


def test_the_size_of_the_files_and_the_speed_are_beside_the_results(text, monkeypatch, capsys):
    clock = itertools.count(step=0.5)  # each batch takes half a second
    monkeypatch.setattr("wanda_lightning.cli.measure.perf_counter", lambda: next(clock))
    assert run(*text, "--batch_size", "2", "--save", "out", "--save_model", "out/model") == 0
    size, speed = report_in("out").run.costs
    saved = Path("out/model/model.safetensors").stat().st_size / 2**20
    assert size == Measured("MiB of weights", pytest.approx(saved, rel=0.1), saved)
    assert speed == Measured("tokens per second", 2 * SEQLEN / 0.5, 2 * SEQLEN / 0.5)
    assert (
        f"Tokens per second: {2 * SEQLEN / 0.5:,.1f} (dense: {2 * SEQLEN / 0.5:,.1f})."
        in capsys.readouterr().out
    )


def test_text_is_the_most_likely_one_however_the_model_samples(inputs, caplog):
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "llama")
    ids = tokenizer(PROMPTS[0]).input_ids
    start = len(ids)
    for _ in range(min(40, 64 - start)):  # the context has 64
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids[start:])
    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, top_k=7)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert continuation(model, tokenizer, PROMPTS[0]) == expected
    assert caplog.messages == []
    model.generate = None
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM cannot continue a prompt, so the report has no text"
    ):
        assert continuations(model, tokenizer) == []


@pytest.mark.parametrize(
    ("name", "method", "group"),
    [("test_vit", "wanda", "layer"), ("test_convnext", "magnitude", "row")],
)
def test_an_image_classifier(inputs, images, tmp_path, capsys, name, method, group):
    options = [str(option).replace("test_vit", name) for option in images]
    more = [
        "--prune_granularity",
        group,
        "--method",
        method,
        "--save",
        "out",
        "--save_model",
        "out/model",
    ]
    assert run(*options, *more) == 0
    # Dense and pruned: it says "bee" to all of four classes.
    assert "stayed at 25.00%." in capsys.readouterr().out

    pruned = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True)
    dense = load_file(inputs / f"{name}.safetensors")
    report = report_in("out")
    assert {layer.tokens > 0 for layer in report.layers} == {method == "wanda"}
    for layer in report.layers:
        zeros = pruned.get_submodule(layer.name).weight.flatten(1) == 0
        assert int(zeros.sum()) == pytest.approx(
            zeros.numel() / 2, abs=zeros.shape[0] if group == "row" else 1
        )
        assert (zeros.sum(dim=1) == zeros.shape[1] // 2).all() == (group == "row")
    assert torch.equal(
        pruned.get_classifier().weight,
        dense["head.weight" if name == "test_vit" else "head.fc.weight"],
    )
    assert (
        f"\n{method}\t{report.sparsity:.4f}\t0.2500\n" in Path(f"out/log_{method}.txt").read_text()
    )
    calibration = "" if method == "magnitude" else f"{inputs}/images, 6 images, seed 0"
    expected = ("top-1", 0.25, 0.25, f"{inputs}/images, 8 images", calibration)
    assert (
        *map(vars(report.run).get, ("metric", "before", "after", "data", "calibration")),
    ) == expected


REFUSED = [
    (["--model", "{}/images"], "key in its config.json"),
    (["--seqlen", "65"], "--seqlen must be at most 64, the model's context, but it is 65"),
    (["--calibration", "{}/short.txt"], f"needs a text of at least {SEQLEN + 1} tokens, but"),
    (["--calibration", "c4"], "Without a network, use --calibration python-docs"),
    (
        ["--calibration", "c4", "--model", "bin"],
        "the only format that is read, but bin has config.json. Convert a ",
    ),
    (["--pattern", "3:6"], "pattern=NM(n=3, m=6) fits none of"),
    (["--stream", "--model", "{}/gone.gguf"], "gone.gguf does not exist"),
    (["--stream", "--method", "thorough"], "needs the whole model in memory"),
    (["--stream", "--pattern", "experts"], "needs a mixture of experts, but no module"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refused_for_a_language_model(inputs, text, refused, monkeypatch, more, message):
    for name in ("measure", "perplexity_from_disk"):
        monkeypatch.setattr(f"wanda_lightning.cli.prune_command.{name}", None)
    Path("bin").mkdir()
    shutil.copy(inputs / "llama/config.json", "bin")
    refused(*text, *OUT, *(option.replace("{}", str(inputs)) for option in more), message=message)


@pytest.mark.parametrize(("command", "target"), [("prune", "all/x"), ("shrink", "all")])
def test_a_model_that_is_read_is_never_replaced(pruned, refused, command, target):
    shutil.copytree(pruned, "all/x")
    shutil.copy("all/x/config.json", "all")
    given = ["--model", "all/x", "--save_model", target, "--overwrite"]
    refused(
        command,
        *given,
        message=f"--save_model {target} would replace --model all/x. Choose another",
    )


def test_the_model_may_write_the_text_to_calibrate_on(inputs, text, capsys):
    command = [*text, "--calibration", "self", "--method", "sparsegpt", "--save", "out", "--model"]
    assert run(*command, inputs / "llama") == 2
    assert "tokenizer must have a token that begins or ends a text" in capsys.readouterr().err
    shutil.copytree(inputs / "llama", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained("model")
    assert run(*command, "model") == 0
    assert report_in("out").run.calibration.startswith("text by the dense model, 4 windows of ")


def test_a_streamed_run_that_was_interrupted_goes_on_and_measures_what_one_in_memory_does(
    text, inputs, capsys, monkeypatch
):
    texts = f"{inputs}/other.txt,{inputs}/long.txt"
    command = [*text, "--method", "magnitude", "--evaluation", texts]
    stream = ["--stream", "--save_model", "b/model"]
    assert run(*command, "--save", "a") == 0
    assert f"Perplexity on {inputs}/long.txt (" in capsys.readouterr().out
    with monkeypatch.context() as patched:

        def interrupt(source, *_, **__):
            if source == "b/model":
                signal.raise_signal(signal.SIGINT)
            return 1.0

        patched.setattr("wanda_lightning.cli.prune_command.perplexity_from_disk", interrupt)
        assert run(*command, *stream, "--save", "b") == 130
    assert not Path("b/pruning_report.json").exists()
    assert run(*command, *stream, "--save", "b") == 0
    assert not Path("b/model/.pruning_progress.json").exists()
    found = [report_in(folder).run.results for folder in "ab"]
    assert [each.data.partition(", ")[0] for each in found[0]] == texts.split(",")
    for own, streamed in zip(*found, strict=True):
        assert (streamed.before, streamed.after) == pytest.approx((own.before, own.after), rel=1e-5)
    assert found[0][0].after != found[0][1].after


def test_a_folder_that_is_not_empty(text, refused):
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    for option in ("--save", "--save_model"):
        refused(*text, option, "mine", message="mine exists and is not empty")
    refused(*text, "--save_model", "mine", "--overwrite", message="must be empty or a model")


def test_pruning_without_saving_or_measuring(text, images, tmp_path, capsys):
    assert run(*text) == 0
    assert "Nothing was saved. To save the model, add --save_model DIR" in capsys.readouterr().out
    assert everything_in(tmp_path) == {}
    for command in (text, images):
        assert (
            run(
                *command,
                "--method",
                "magnitude",
                "--evaluation",
                "",
                "--save",
                "out",
                "--overwrite",
            )
            == 0
        )
        measured = report_in("out").run
        assert (measured.metric, measured.results) == ("", ())
        assert "perplexity" not in capsys.readouterr().out
    assert (
        Path("out/log_magnitude.txt").read_text() == "method\tactual_sparsity\nmagnitude\t0.5000\n"
    )


PUSH = ["--push_to_hub", "us/tiny"]


def test_a_pruned_model_is_uploaded_without_the_results(hub, text, capsys, monkeypatch):
    monkeypatch.setattr(
        "wanda_lightning.PruningReport.write", lambda report, path: Path(path).write_text("drawn")
    )
    more = ["--save", "out/logs", "--report", "out/page.html", "--private"]
    assert run(*text, "--stream", "--save_model", "out", *PUSH, *more) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Uploaded out to {hub.url}/us/tiny."
    saved = {
        name: content
        for name, content in everything_in(Path("out")).items()
        if content is not False
    }
    private = {name for name in saved if name.startswith(("logs", "page"))}
    assert len(private) == 3
    assert hub.repositories == {"us/tiny": {name: saved[name] for name in saved.keys() - private}}
    assert hub.private == {"us/tiny"}
    assert 'from_pretrained("us/tiny")' in hub.repositories["us/tiny"]["README.md"].decode()


def test_an_upload_that_cannot_succeed_is_refused_before_pruning(hub, text, refused, monkeypatch):
    refused(
        *text, *PUSH, message="--push_to_hub must be left out for a command without --save_model"
    )
    monkeypatch.setenv("HF_TOKEN", "")
    refused(
        *text, "--save_model", "out", *PUSH, message="push_to_hub must be left out without a token"
    )
    assert hub.requests == []


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


def test_shrinks_a_language_model(structured, capsys):
    before = everything_in(Path(structured))
    took = "Took out 64 of 128 hidden units in 2 layers; 30,880 of 37,024"
    capsys.readouterr()
    assert run("shrink", "--model", structured) == 0  # only shows what could be taken out
    assert took in capsys.readouterr().out
    for stream in ([], ["--stream"]):
        assert (
            run("shrink", "--model", structured, "--save_model", "small", "--overwrite", *stream)
            == 0
        )
        assert capsys.readouterr().out == f"{took} parameters are left.\nThe model is in small.\n"
        assert json.loads(Path("small/config.json").read_text())["intermediate_size"] == 32
        torch.testing.assert_close(logits("small"), logits(structured), rtol=1e-4, atol=1e-5)
        assert everything_in(Path("small"))["tokenizer.json"] == before["tokenizer.json"]
    assert everything_in(Path(structured)) == before


def test_scattered_zeros_are_an_error_only_if_asked_to_write(pruned, refused, capsys):
    assert run("shrink", "--model", pruned) == 0
    assert (
        "Nothing can be removed: no hidden unit is zero on both sides." in capsys.readouterr().out
    )
    message = "shrink must remove something. Nothing can be removed"
    refused("shrink", "--model", pruned, "--save_model", "small", message=message)


@pytest.mark.parametrize(
    ("sparsity", "smaller", "text"),
    [
        ("0.5", True, "Took out "),
        ("0.01", False, "Note: the model is saved with its zeros. shrink must remove"),
    ],
)
def test_prune_takes_out_the_zeros_of_an_image_classifier(sparsity, smaller, text, inputs, capsys):
    data = [
        "--data",
        inputs / "images",
        "--num_samples",
        "4",
        "--checkpoint",
        inputs / "test_convnext.safetensors",
    ]
    pattern = [
        "--pattern",
        "structured",
        "--sparsity",
        sparsity,
        "--shrink",
        "--save_model",
        "small",
    ]
    assert run("prune", "--model", "timm:test_convnext", *data, *pattern) == 0
    assert text in capsys.readouterr().out
    assert Path("small/modeling_shrunk.py").exists() == smaller
    assert ("\nimport modeling_shrunk\n" in Path("small/README.md").read_text()) == smaller
    assert run("evaluate", "--model", "timm:local-dir:small", *data[:2]) == 0


def test_prune_from_disk_saves_the_smaller_model(text, structured, tmp_path, monkeypatch):
    """If it is interrupted, the pruned model stays, and the same command goes on from there."""
    command = [*text, *STRUCTURED, "--stream", "--shrink", "--save_model", "small", "--save", "out"]
    with monkeypatch.context() as patched:
        stop = "wanda_lightning.streaming.shrinking_from_disk.write_modeling_file"
        patched.setattr(stop, lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(*command) != 0
    assert {path.name for path in tmp_path.iterdir()} == {"zeros", "small"}
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 64
    monkeypatch.setattr(StreamedWeights, "stops", None)  # nothing is pruned again
    assert run(*command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"zeros", "small", "out"}
    torch.testing.assert_close(logits("small"), logits(structured), rtol=1e-4, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 32
    card = ModelCard.load("small/README.md")
    assert "not in the saved model" in card.text
    assert "were taken out" in card.text
    assert "sparse" not in card.data.tags
    assert not (tmp_path / "small/.pruning_progress.json").exists()
