"""`wanda-lightning prune`: the flags of the reference, every refusal; what it writes is measured again by hand."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.cli import IGNORED_WARNINGS, OUT, SEQLEN, everything_in, perplexity_by_hand, run, zeros_by_layer
from support.reports import Page
from transformers import AutoModelForCausalLM

from wanda_lightning import PruningReport
from wanda_lightning.cli import parse_options
from wanda_lightning.cli.examples import PROMPTS
from wanda_lightning.report import Run

pytestmark = IGNORED_WARNINGS

METHODS = [
    ("wanda", "unstructured", "0.5", []),
    ("wanda", "2:4", "0.5", []),
    ("wanda", "unstructured", "0.25", ["--use_variant"]),
    ("magnitude", "unstructured", "0.25", []),
    ("sparsegpt", "unstructured", "0.5", []),
    pytest.param("ablate_mag_iter", "4:8", "0.5", [], marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("method", "kind", "ratio", "more"), METHODS)
def test_the_flags_of_the_reference_work_verbatim(inputs, tmp_path, capsys, method, kind, ratio, more):
    flags = f"--model {inputs}/llama --seed 0 --nsamples 4 --sparsity_ratio {ratio} --sparsity_type {kind} "
    flags += f"--prune_method {method} --cache_dir llm_weights --save out/logs --save_model out/model"
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
    measured, before = (pytest.approx(perplexity_by_hand(model, text, 6), rel=1e-6) for model in (pruned, dense))

    report = PruningReport.from_json((tmp_path / "out/logs/pruning_report.json").read_text())
    header, row, end = (tmp_path / f"out/logs/log_{method}.txt").read_text().split("\n")
    assert (header, end) == ("method\tactual_sparsity\tppl_test", "")
    assert row == f"{method}\t{reached:.4f}\t{report.run.after:.4f}"
    assert {layer.name: layer.sparsity for layer in report.layers} == {
        name: pytest.approx(where.float().mean().item()) for name, where in zeros.items()
    }
    assert {layer.tokens for layer in report.layers} == {0 if method == "magnitude" else 4 * SEQLEN}
    program, command, *arguments = shlex.split(report.run.command)
    assert (program, command) == ("wanda-lightning", "prune")
    given = parse_options("prune", [*flags.split(), *more, *ours.split()])
    assert parse_options("prune", arguments) == given
    recorded = report.config["command"]
    assert all(
        recorded[name] == (list(value) if isinstance(value, tuple) else value)
        for name, value in given.items()
        if value not in (None, ())
    )
    assert ("--sparsity" in arguments) == (kind == "unstructured")
    assert report.run == Run(
        command=report.run.command,
        model=f"{inputs}/llama",
        metric="perplexity",
        before=before,
        after=measured,
        data=f"{inputs}/other.txt, 6 windows of {SEQLEN} tokens",
        calibration="" if method == "magnitude" else f"{inputs}/long.txt, 4 windows of {SEQLEN} tokens, seed 0",
    )
    (shown,) = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith(f"│ {method} ")]
    assert shown[1].strip() == f"{reached:.2%}"
    assert [cell.strip() for cell in shown[3:5]] == [f"{value:,.2f}" for value in (report.run.before, report.run.after)]
    assert "Pruning 2/2 done" in err
    assert sorted(os.listdir(tmp_path / "out/logs")) == [f"log_{method}.txt", "pruning_report.json"]
    assert {*os.listdir(tmp_path)} == {"out", "llm_weights"}

    for name, where in zeros.items():
        weight = dense.get_submodule(name).weight
        if kind != "unstructured":
            size = int(kind[-1])
            assert (where.reshape(-1, size).sum(dim=1) == size // 2).all()
        elif method == "magnitude":  # the smallest of the layer
            assert weight[where].abs().max() < weight[~where].abs().min()
        elif not more and method != "sparsegpt":
            assert (where.sum(dim=1) == where.shape[1] // 2).all()
        kept_as_they_were = torch.equal(pruned.get_submodule(name).weight[~where], weight[~where])
        assert kept_as_they_were == (method in ("wanda", "magnitude"))
    assert torch.equal(pruned.lm_head.weight, dense.lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model")("ab").input_ids
    (found,) = ModelCard.load(tmp_path / "out/model/README.md").data.eval_results
    assert (found.dataset_name, found.metric_value) == (Path(report.run.data).name, report.run.after)


@pytest.mark.nightly
def test_a_preset_of_an_image_classifier(inputs, images, tmp_path, refused):
    refused(*images, "--method", "best", message="of shape (1, 1) without logits of two or more classes")
    weights = load_file(inputs / "test_vit.safetensors")
    torch.manual_seed(0)
    weights["head.bias"].zero_()
    save_file(weights, tmp_path / "trained.safetensors")
    assert run(*images, "--checkpoint", "trained.safetensors", "--method", "best", "--save", "out") == 0
    report = PruningReport.from_json((tmp_path / "out/pruning_report.json").read_text())
    assert report.config["sequential"] == "layer"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert len({layer.target for layer in report.layers}) > 1


def test_skip_only_and_dtype(text, tmp_path):
    more = ["--skip", "*.down_proj,model.layers.0.self_attn", "--only", "re:.*(self_attn|mlp).*"]
    more += ["--dtype", "bfloat16", "--sequential", "layer", "--batch_size", "2"]
    assert run(*text, *more, *OUT) == 0
    pruned = AutoModelForCausalLM.from_pretrained("out/model")
    assert pruned.dtype == torch.bfloat16
    for name, where in zeros_by_layer(pruned).items():
        skipped = name.endswith("down_proj") or name.startswith("model.layers.0.self_attn")
        assert where.float().mean() == (0 if skipped else 0.5), name
    config = json.loads(Path("out/pruning_report.json").read_text())["config"]
    assert config["sequential"] == "layer"
    assert config["calibration_batches"] == 2


def test_the_seed_draws_the_calibration(text):
    found = []
    for name in ("0", "1"):
        assert run(*text, "--seed", name, "--save_model", name) == 0
        found.append(zeros_by_layer(AutoModelForCausalLM.from_pretrained(name)))
    assert not all(torch.equal(where, found[1][name]) for name, where in found[0].items())


@pytest.fixture
def undrawn(monkeypatch):
    """The reports that would be drawn, which takes longer than pruning."""
    drawn = []
    monkeypatch.setattr("wanda_lightning.PruningReport.write", lambda report, path: drawn.append(report))
    return drawn


def test_the_report_has_text_by_both_models_and_changes_nothing_else(text, undrawn):
    method = ["--method", "magnitude", "--sparsity", "0.8"]
    assert run(*text, *method, "--save", "a", "--save_model", "a/model", "--report", "a.html") == 0
    assert run(*text, *method, "--save", "b", "--save_model", "b/model") == 0
    a, b = (json.loads(Path(name, "pruning_report.json").read_text())["run"] for name in "ab")
    assert [sample["prompt"] for sample in a.pop("samples")] == list(PROMPTS)
    assert b.pop("samples") == []
    assert a.pop("command") != b.pop("command")
    assert a == b
    weights = [load_file(f"{name}/model/model.safetensors") for name in "ab"]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert len(undrawn) == 1


def test_the_report_has_images_whose_prediction_changed(inputs, images, tmp_path, undrawn):
    weights = load_file(inputs / "test_vit.safetensors")
    weights["head.bias"].zero_()  # else it says the same of every image
    save_file(weights, tmp_path / "sure.safetensors")
    method = ["--method", "magnitude", "--sparsity", "0.8"]
    assert run(*images, "--checkpoint", "sure.safetensors", *method, "--report", "out/page.html") == 0
    shown = undrawn[0].run.images
    assert 0 < len(shown) <= 8
    assert {image.label for image in shown} <= {"ape", "bee", "cat", "dog"}
    assert all(image.before != image.after for image in shown)


def test_nothing_is_written_that_was_not_asked_for(text, tmp_path, capsys):
    assert run(*text) == 0
    assert "Nothing was saved. To save the model, add --save_model DIR" in capsys.readouterr().out
    assert everything_in(tmp_path) == {}


def test_python_docs_need_no_network(inputs, capsys):
    sources = ["--calibration", "python-docs", "--evaluation", "python-docs", "--limit", "2", "--num_samples", "2"]
    assert run("prune", "--model", inputs / "llama", *sources, "--save", "out") == 0
    command = json.loads(Path("out/pruning_report.json").read_text())["config"]["command"]
    assert [command["calibration"]] == command["evaluation"] == ["python-docs"]
    assert command["seqlen"] == 64  # the model's context


@pytest.mark.parametrize(
    ("name", "method", "group"), [("test_vit", "wanda", "layer"), ("test_convnext", "magnitude", "row")]
)
def test_an_image_classifier(inputs, images, tmp_path, capsys, name, method, group):
    options = [str(option).replace("test_vit", name) for option in images]
    more = ["--prune_granularity", group, "--method", method, "--save", "out", "--save_model", "out/model"]
    assert run(*options, *more) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert out.count("25.00%") == 2  # dense and pruned: it says "bee" to all of four classes

    pruned = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True)
    dense = load_file(inputs / f"{name}.safetensors")
    report = PruningReport.from_json((tmp_path / "out/pruning_report.json").read_text())
    assert report.layers
    assert {layer.tokens > 0 for layer in report.layers} == {method == "wanda"}
    rowwise = []
    for layer in report.layers:
        zeros = pruned.get_submodule(layer.name).weight.flatten(1) == 0
        assert int(zeros.sum()) == pytest.approx(zeros.numel() / 2, abs=zeros.shape[0] if group == "row" else 1)
        rowwise.append(bool((zeros.sum(dim=1) == zeros.shape[1] // 2).all()))
    assert all(rowwise) if group == "row" else not any(rowwise)
    assert torch.equal(pruned.get_classifier().weight, dense["head.weight" if name == "test_vit" else "head.fc.weight"])
    _, row, _ = (tmp_path / f"out/log_{method}.txt").read_text().split("\n")
    assert row == f"{method}\t{report.sparsity:.4f}\t0.2500"
    assert {"data": f"{inputs}/images", "num_samples": 6}.items() <= report.config["command"].items()
    assert report.run is not None
    assert (report.run.metric, report.run.before, report.run.after) == ("top-1", 0.25, 0.25)
    assert report.run.data == f"{inputs}/images, 8 images"
    assert report.run.calibration == ("" if method == "magnitude" else f"{inputs}/images, 6 images, seed 0")


def test_the_digits_that_need_no_network(inputs, few_digits):
    weights = ["--model", "timm:test_vit", "--checkpoint", inputs / "test_vit.safetensors"]
    assert run("prune", *weights, "--data", "digits", "--num_samples", "8") == 0


REFUSED = [
    (["--model", "{}/images"], "key in its config.json"),
    (["--model", "{}/long.txt"], "long.txt' cannot be loaded"),
    (["--seqlen", "65"], "--seqlen must be at most 64, the model's context, but it is 65"),
    (["--calibration", "{}/short.txt"], f"needs a text of at least {SEQLEN + 1} tokens, but"),
    (["--calibration", "c4"], "The data of 'allenai/c4' cannot be loaded: "),
    (["--evaluation", "c4,c4"], "evaluation must name each text only once"),
    (["--pattern", "3:6"], "pattern=NM(n=3, m=6) fits none of"),
    (["--pattern", "experts"], "pattern='experts' needs a mixture of experts, but"),
    (["--skip", "[down_proj]"], "skip='[down_proj]' matches no matrix of the model; the nearest is"),
    (["--stream", "--device", "cuda:99"], "device must be one that PyTorch can use on this machine"),
    (["--stream", "--model", "{}/gone.gguf"], "gone.gguf does not exist"),
    (["--stream", "--calibration", "self"], "--calibration has no meaning for --stream"),
    (["--stream", "--method", "thorough"], "needs the whole model in memory"),
    (["--stream", "--sequential", "none", "--solver", "admm"], "needs the Gram matrices of all layers in memory"),
    (["--stream", "--sequential", "none", "--recovery", "reconstruct"], "trains blocks in memory"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_refused_for_a_language_model(inputs, text, refused, monkeypatch, more, message):
    monkeypatch.setattr("wanda_lightning.cli.pruning.measure", None)
    given = [option.replace("{}", str(inputs)) for option in more]
    err = refused(*text, *OUT, *given, message=message)
    assert err.splitlines()[-1].startswith("wanda-lightning: error: ")


@pytest.mark.parametrize(("command", "target"), [("prune", "all/x"), ("shrink", "all")])
def test_a_model_that_is_read_is_never_replaced(pruned, refused, command, target):
    shutil.copytree(pruned, "all/x")
    shutil.copy("all/x/config.json", "all")
    given = ["--model", "all/x", "--save_model", target, "--overwrite"]
    refused(command, *given, message=f"--save_model {target} would replace --model all/x. Choose another")


def test_the_model_may_write_the_text_to_calibrate_on(inputs, text, capsys):
    command = [*text, "--calibration", "self", "--method", "sparsegpt", "--save", "out", "--model"]
    assert run(*command, inputs / "llama") == 2
    error = capsys.readouterr().err
    assert "calibration='self' and sample_windows need a tokenizer with a token that begins or ends a text" in error
    shutil.copytree(inputs / "llama", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained("model")
    assert run(*command, "model") == 0
    report = PruningReport.from_json(Path("out/pruning_report.json").read_text())
    assert report.run.calibration.startswith("text by the dense model, 4 windows of ")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", ["sparsegpt", pytest.param("best", marks=pytest.mark.nightly)])
def test_a_streamed_model_is_the_one_pruned_in_memory(text, tmp_path, method):
    more = ["--method", method, "--sequential", "layer"]
    assert run(*text, *more, "--save", "memory", "--save_model", "memory/model") == 0
    assert run(*text, *more, "--save", "disk", "--save_model", "disk/model", "--stream") == 0
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    in_memory, streamed = load_file(memory / "model/model.safetensors"), {}
    for file in (disk / "model").glob("*.safetensors"):
        streamed |= load_file(file)
    assert in_memory.keys() == streamed.keys()
    assert all(torch.equal(in_memory[key], streamed[key]) for key in in_memory)
    others = [{file.name for file in (out / "model").iterdir() if "model" not in file.name} for out in (memory, disk)]
    assert others[0] == others[1]
    reports = [PruningReport.from_json((out / "pruning_report.json").read_text()) for out in (memory, disk)]
    assert reports[0].layers == reports[1].layers
    for when in ("before", "after"):
        assert getattr(reports[1].run, when) == pytest.approx(getattr(reports[0].run, when), rel=1e-6)
    assert (memory / f"log_{method}.txt").read_text() == (disk / f"log_{method}.txt").read_text()


def test_results_on_further_texts_are_printed_and_recorded(text, inputs, capsys):
    texts = f"{inputs}/other.txt,{inputs}/long.txt"
    found = []
    for number, how in enumerate(([], ["--stream", *OUT])):
        command = [*text, "--method", "magnitude", "--evaluation", texts, *how, "--save", f"log{number}"]
        assert run(*command) == 0
        found.append(PruningReport.from_json(Path(f"log{number}/pruning_report.json").read_text()).run)
        (other,) = found[-1].others
        assert f"Perplexity on {inputs}/long.txt (" in capsys.readouterr().out
        assert found[-1].data.startswith(f"{inputs}/other.txt, ")
        assert other.data.startswith(f"{inputs}/long.txt, ")
    for own, streamed in zip(*(each.results for each in found), strict=True):
        assert (streamed.before, streamed.after) == pytest.approx((own.before, own.after), rel=1e-5)
    assert found[0].results[0].after != found[0].results[1].after


def test_the_report_of_a_streamed_model_says_why_it_has_no_text(text, capsys, undrawn):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    assert run(*text, "--method", "magnitude", "--stream", *OUT, "--report", "page.html") == 0
    note = "no text by the dense and the pruned model is shown, since --stream"
    assert f"Note: {note}" in capsys.readouterr().out
    assert PruningReport.from_json(Path("out/pruning_report.json").read_text()).run.samples == ()
    (report,) = undrawn
    assert note in report.notes[-1]
    assert "--stream" in report.run.command.split()


def test_a_streamed_model_whose_measurement_was_interrupted_is_measured_by_the_same_command(
    text, tmp_path, monkeypatch
):
    command = [*text, "--method", "magnitude", "--save", "out", "--save_model", "out/model", "--stream"]

    def interrupted(source, *arguments, **options):
        if source == "out/model":
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patched:
        patched.setattr("wanda_lightning.cli.pruning.perplexity_from_disk", interrupted)
        assert run(*command) != 0
    assert not (tmp_path / "out" / "pruning_report.json").exists()
    assert run(*command) == 0
    measured = PruningReport.from_json((tmp_path / "out" / "pruning_report.json").read_text()).run
    assert min(measured.after, measured.before) > 1
    assert not (tmp_path / "out" / "model" / ".pruning_progress.json").exists()


def test_evaluation_images_alone_are_measured_but_not_pruned_with(inputs, images, refused, tmp_path):
    (tmp_path / "val").symlink_to(inputs / "images" / "val")
    message = "data must have training images, but"
    refused(*images, "--data", tmp_path, message=message)
    assert run("evaluate", *images[1:5], "--data", tmp_path) == 0


REFUSED_FOR_IMAGES = [
    (["--data", "{}/llama"], "Couldn't find any class folder in"),
    (["--checkpoint", "{}/long.txt"], "must be a .safetensors file"),
    (["--model", "timm:test_vitt"], "Unknown model (test_vitt)"),
]


@pytest.mark.parametrize(
    ("more", "message"), REFUSED_FOR_IMAGES, ids=[" ".join(more) for more, _ in REFUSED_FOR_IMAGES]
)
def test_refused_for_an_image_classifier(inputs, images, refused, more, message):
    more, message = [option.format(inputs) for option in more], message.format(inputs)
    refused(*images, *OUT, *more, message=message)


@pytest.mark.parametrize("option", ["--save", "--save_model"])
def test_a_folder_that_is_not_empty(text, refused, tmp_path, option):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(*text, option, "mine", message=f"{option} mine exists and is not empty")
    refused(*text, option, "mine/notes.txt", message=f"{option} mine/notes.txt must be a folder")
    if option == "--save_model":
        refused(*text, option, "mine", "--overwrite", message="must be empty or a model")
        (tmp_path / "mine/config.json").write_text("{}")
    assert run(*text, option, "mine", "--overwrite") == 0
    assert ("pruning_report.json" if option == "--save" else "config.json") in os.listdir("mine")


def test_the_report_is_also_a_page(inputs, text, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    assert run(*text, "--method", "sparsegpt", "--report", "out/report.html") == 0
    assert "The report is in out/report.html." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    page = Page(tmp_path / "out/report.html")
    assert f"{inputs}/llama" in page.text
    assert "--method sparsegpt" in page.text
    assert re.search(r"Perplexity on \S+ \(6 windows of 32 tokens\) (rose|fell) from [\d,.]+ to [\d,.]+\.", page.text)


def test_a_report_that_cannot_be_written_is_refused_before_pruning(text, tmp_path, refused, monkeypatch):
    pytest.importorskip("matplotlib", reason="pages need the extra report")
    (tmp_path / "old.html").write_text("old")
    message = "--report old.html exists and is not empty. Choose another path, or allow it with overwrite."
    refused(*text, "--report", "old.html", message=message)
    refused(*text, "--report", "old.html/a.html", message="--report [Errno 20] Not a directory")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    refused(*text, "--report", "a.html", message="Reports with figures need matplotlib: pip install")


def test_pruning_without_measuring(text, images, capsys):
    for command in (text, images):
        assert run(*command, "--method", "magnitude", "--evaluation", "", "--save", "out", "--overwrite") == 0
        run_, report = (PruningReport.load("out/pruning_report.json").run for _ in range(2))
        assert (run_.before, run_.after, run_.metric, report.results) == (None, None, "", ())
        assert "perplexity" not in capsys.readouterr().out
    assert Path("out/log_magnitude.txt").read_text() == "method\tactual_sparsity\nmagnitude\t0.5000\n"
