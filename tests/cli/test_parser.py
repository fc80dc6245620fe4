"""Arguments and YAML files become a dataclass; what they print and refuse."""

from pathlib import Path

import pytest
import yaml

from wanda_lightning.cli import parse_options
from wanda_lightning.cli.options import FLAGS
from wanda_lightning.cli.parser import UsageError, as_list


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
    Path("a.yaml").write_text("model: x\nsparsity_type: 2:4\nnsamples: 4\nskip: [a, b]\ninclude_grouped: true\n")
    Path("b.yaml").write_text("nsamples: 5\nseqlen: null\n")
    options = parse("--nsamples", "6", "--config", "a.yaml", "--sparsity_ratio=0.25", "--keep_batch_norm")
    assert (options.sparsity_type, options.nsamples, options.skip) == ("2:4", 6, ["a", "b"])
    assert (options.sparsity_ratio, options.include_grouped, options.keep_batch_norm) == (0.25, True, True)
    assert (options.only, options.seed, options.save) == ([], 0, None)
    assert parse("--config", "a.yaml", "--config", "b.yaml").nsamples == 5


def test_what_is_printed_reads_back(capsys):
    arguments = ["--model", "x", "--sparsity_type", "2:4", "--skip", "re:x{1,3}", "--use_variant"]
    with pytest.raises(SystemExit) as stop:
        parse(*arguments, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["sparsity_type"] == "2:4"
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
        ("model: x\nnsamples: many\n", "--nsamples must be a whole number of at least 1, but it is 'many'"),
    ],
)
def test_files_that_are_refused(content, message):
    Path("a.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        parse("--config", "a.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("keyword", FLAGS)
@pytest.mark.parametrize("command", ["prune", "inspect"])
def test_the_name_of_an_option_in_python_leads_to_its_flag(command, keyword):
    with pytest.raises(UsageError) as caught:
        parse("--model", "x", f"--{keyword}", "0.5", command=command)
    assert str(caught.value) == f"--{keyword} is not an option of {command}. Did you mean --{FLAGS[keyword]}?"


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.yaml").write_text("save_model: ~/out\nmodel: timm:local-dir:~/m\ndata_path: ~/images\n")
    options = parse("--config", "a.yaml", "--save", "~/log")
    assert (options.save, options.save_model) == (f"{tmp_path}/log", f"{tmp_path}/out")
    assert (options.model, options.data_path) == (f"timm:local-dir:{tmp_path}/m", f"{tmp_path}/images")
    assert parse("--model", "~/a,~/b", command="evaluate").model == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_an_empty_text_is_not_the_default():
    assert parse("--model", "x", "--eval", "", command="evaluate").eval == []
    assert parse("--model", "x", command="evaluate").eval is None


def test_a_required_option():
    with pytest.raises(UsageError, match="--model is required: Hub id"):
        parse("--seed", "1")


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        parse("--help", command="evaluate")
    text = " ".join(capsys.readouterr().out.split())
    assert "sklearn-docs (these two need no network)" in text
    assert "--overwrite Replace a --save file." in text
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.5)" in text
    assert "One of block, layer, none, auto." in text
    assert "--include_grouped Also prune grouped convolutions" in text
