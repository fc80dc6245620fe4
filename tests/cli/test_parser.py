"""Arguments and YAML files become a dataclass; what they print and refuse."""

import re
from pathlib import Path

import pytest
import yaml

from wanda_lightning.cli import parse_options
from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.parser import as_command, as_list


def parse(*arguments, command="prune"):
    return parse_options(command, list(arguments))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ["a"]),
        ("a, *.b ,c", ["a", "*.b", "c"]),
        ("re:x{1,3}", ["re:x{1,3}"]),
        ("re:x{1,3},lm_head", ["re:x{1,3}", "lm_head"]),
        (r"re:\{,b", [r"re:\{", "b"]),
        ("re:(a,b),c", ["re:(a,b)", "c"]),
        ("[a, 're:x{1,3}']", ["a", "re:x{1,3}"]),
        ('["*.down_proj", "b"]', ["*.down_proj", "b"]),
        ("[ab]*.weight", ["[ab]*.weight"]),
        ("", []),
        (["a", "re:x{1,3}"], ["a", "re:x{1,3}"]),
    ],
)
def test_lists(given, expected):
    assert as_list(given) == expected
    assert parse("--model", "x", "--skip", given).skip == expected if isinstance(given, str) else True


def test_a_file_is_read_as_text_and_the_command_line_wins():
    Path("a.yaml").write_text("model: x\nsparsity_type: 2:4\nnum_samples: 4\nskip: [a, b]\n")
    Path("b.yaml").write_text("nsamples: 5\nseqlen: null\n")
    options = parse("--num_samples", "6", "--config", "a.yaml", "--sparsity=0.25", "--keep_batch_norm")
    assert (options.pattern, options.num_samples, options.skip) == ("2:4", 6, ["a", "b"])
    assert (options.sparsity, options.keep_batch_norm) == (0.25, True)
    assert (options.only, options.seed, options.save) == ([], 0, None)
    assert parse("--config", "a.yaml", "--config", "b.yaml").num_samples == 5


def test_what_is_printed_reads_back(capsys):
    arguments = ["--model", "x", "--pattern", "2:4", "--skip", "re:x{1,3}", "--use_variant"]
    with pytest.raises(SystemExit) as stop:
        parse(*arguments, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert (yaml.safe_load(printed)["pattern"], yaml.safe_load(printed)["method"]) == ("2:4", None)
    Path("printed.yaml").write_text(printed.replace("use_variant: true", "use_variant: false"))
    assert parse("--config", "printed.yaml") == parse(*arguments[:-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x\n", "modle is not an option of prune. Did you mean --model"),
        ("- a\n", "must map options to values, but it is a list"),
        ("model: [a\n", "is not YAML"),
        ("model: {a: b}\n", "--model must be one value, but it is {'a': 'b'}"),
        ("model: x\nuse_variant: maybe\n", "--use_variant must be true or false, but it is 'maybe'"),
        ("model: x\nnsamples: many\n", "--num_samples must be a whole number of at least 1, but it is 'many'"),
    ],
)
def test_files_that_are_refused(content, message):
    Path("a.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        parse("--config", "a.yaml")
    assert message in str(caught.value)


ALIASES = [
    ("prune --model x", "sparsity_ratio", "sparsity", "0.25"),
    ("inspect --model x", "sparsity_type", "pattern", "2:4"),
    ("prune --model x", "prune_method", "method", "magnitude"),
    ("prune --model x", "nsamples", "num_samples", "3"),
    ("prune --model x", "eval", "evaluation", "a.txt,b.txt"),
    ("finetune --model x", "eval", "evaluation", "a.txt"),
    ("evaluate --model x", "eval", "evaluation", "[]"),
    ("prune --model timm:x", "data_path", "data", "digits"),
    ("evaluate --model timm:x --data digits", "resume", "checkpoint", "a.safetensors"),
]


@pytest.mark.parametrize(("start", "alias", "name", "value"), ALIASES)
def test_an_earlier_name_of_an_option(start, alias, name, value, capsys):
    command, *base = start.split()
    expected = parse(*base, f"--{name}", value, command=command)
    assert f"--{name}" in as_command(command, expected).split()  # and so it is not the default
    Path("old.yaml").write_text(yaml.safe_dump({alias: value}))
    for given in ([f"--{alias}", value], [f"--{alias}", value, f"--{name}", value], ["--config", "old.yaml"]):
        assert parse(*base, *given, command=command) == expected
    with pytest.raises(SystemExit):
        parse("--help", command=command)
    assert re.search(rf"--{name} \w+, --{alias} \w+", capsys.readouterr().out)


def test_two_names_with_two_values():
    with pytest.raises(UsageError) as caught:
        parse("--model", "x", "--sparsity", "0.5", "--sparsity_ratio", "0.6")
    message = "--sparsity and --sparsity_ratio are names of one option, but they are 0.5 and 0.6. Give one of them."
    assert str(caught.value) == message
    assert parse("--model", "x", "--sparsity", "0.5", "--sparsity_ratio", "5e-1").sparsity == 0.5
    Path("old.yaml").write_text("sparsity_ratio: 0.6\n")
    assert parse("--model", "x", "--config", "old.yaml", "--sparsity", "0.5").sparsity == 0.5


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"use_variant": "true"}, "equal_share"),
        ({"use_variant": "true", "prune_granularity": "row", "sparsity_type": "unstructured"}, "equal_share"),
        ({"prune_granularity": "row"}, "unstructured_row"),
        ({"prune_granularity": "layer", "prune_method": "magnitude"}, "unstructured_layer"),
        ({"prune_granularity": "layer", "pattern": "unstructured_layer"}, "unstructured_layer"),
    ],
)
def test_flags_of_the_reference_that_stand_for_a_pattern(given, pattern):
    flags = [word for name, value in given.items() for word in (f"--{name}", value) if word != "true"]
    options = parse("--model", "x", *flags)
    method = ["--method", options.method] if options.method else []
    assert options == parse("--model", "x", "--pattern", pattern, *method)
    Path("old.yaml").write_text(yaml.safe_dump(given))
    assert parse("--model", "x", "--config", "old.yaml") == options


def test_null_is_the_default():
    Path("printed.yaml").write_text("model: x\nmethod: null\nseqlen: null\nskip: null\nseed: null\n")
    assert parse("--config", "printed.yaml") == parse("--model", "x")


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.yaml").write_text("save_model: ~/out\nmodel: timm:local-dir:~/m\ndata_path: ~/images\n")
    options = parse("--config", "a.yaml", "--save", "~/log")
    assert (options.save, options.save_model) == (f"{tmp_path}/log", f"{tmp_path}/out")
    assert (options.model, options.data) == (f"timm:local-dir:{tmp_path}/m", f"{tmp_path}/images")
    assert parse("--model", "~/a,~/b", command="evaluate").model == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_an_empty_text_is_not_the_default():
    assert parse("--model", "x", "--evaluation", "", command="evaluate").evaluation == []
    assert parse("--model", "x", command="evaluate").evaluation is None


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        parse("--help", command="evaluate")
    text = " ".join(capsys.readouterr().out.split())
    assert "sklearn-docs (these two need no network)" in text
    assert "--overwrite Replace a --save file." in text
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "or timm:NAME of an image classifier. (required)" in text
    assert "(default: 0.5)" in text
    assert "calibration samples. (default: 0)" in text
    assert "id of a data set on the hub (OWNER/NAME)" in text
    assert "One of block, layer, none, auto, one_pass." in text
    assert "--keep_batch_norm Leave the running statistics" in text
