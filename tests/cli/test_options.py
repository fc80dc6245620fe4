"""Arguments and YAML files become options; what help shows, what is refused, and what repeats a run."""

import inspect
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from support.cli import run

from wanda_lightning import PruningConfig
from wanda_lightning.cli import parse, parse_options
from wanda_lightning.cli.commands import app
from wanda_lightning.cli.options import Model, as_command
from wanda_lightning.common.dtypes import DTYPE_NAMES
from wanda_lightning.common.model_source import ModelSource

COMMANDS = ["prune", "evaluate", "inspect", "shrink"]
GROUPS = ["Model", "Pruning", "Shrinking", "Data", "Results", "Session"]
X = ["--model", "x"]


def options(*arguments, command="prune"):
    return parse_options(command, [*X, *arguments])


def groups_of(command, *arguments):
    return parse([command, *X, *arguments])[1]


def test_names_are_separated_by_commas_or_given_one_by_one():
    skip = options("--skip", "a, *.b ,[ab]*", "--skip", "re:x{1,3}")["skip"]
    assert skip == ("a", "*.b", "[ab]*", "re:x{1,3}")
    assert options("--only", "")["only"] == ()
    assert options("--evaluation", "")["evaluation"] == ()
    assert options("--model", "a,b", command="evaluate")["model"] == ("x", "a", "b")


def test_a_file_is_read_as_text():
    Path("a.yaml").write_text(
        "model: x\nsparsity_type: 2:4\nnum_samples: 4\nskip: [a, 're:x{1,3}']\nstream: true\n"
    )
    found = parse_options("prune", ["--config", "a.yaml"])
    assert found["pattern"] == "2:4"
    assert found["num_samples"] == 4
    assert found["skip"] == ("a", "re:x{1,3}")
    assert found["stream"] is True


def test_arguments_win_over_files_and_later_files_over_earlier_ones():
    Path("a.yaml").write_text("model: x\nnum_samples: 4\nseqlen: 8\n")
    Path("b.yaml").write_text("nsamples: 5\nseqlen: null\nevaluation: ''\n")
    files = ["--config", "a.yaml", "--config", "b.yaml"]
    both = parse_options("prune", files)
    assert (both["num_samples"], both["seqlen"], both["evaluation"]) == (5, 8, ())
    assert parse_options("prune", [*files, "--num_samples", "6"])["num_samples"] == 6


def test_options_below_a_name_in_a_file_are_refused(refused):
    """cyclopts ignores what is below the name of a command."""
    Path("a.yaml").write_text("model: x\nprune:\n  sparsity: 0.25\n")
    refused("prune", "--config", "a.yaml", message="a.yaml, prune holds others. Move them up.")


@pytest.mark.parametrize("content", ["model: [", "[" * 5000 + "]" * 5000])
def test_a_file_that_is_not_yaml(refused, content):
    Path("a.yaml").write_text(content)
    refused(
        "prune", "--config", "a.yaml", message="--config must name YAML files with options, but"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_model_may_stand_first(command):
    assert parse_options(command, ["x"]) == options(command=command)


def test_several_models_may_stand_first():
    assert parse_options("evaluate", ["a,b", "c", "--dense", "d"])["model"] == ("a", "b", "c")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_reads_back(capsys, command):
    more = {"prune": ["--pattern", "2:4", "--skip", "re:x{1,3}"], "shrink": ["--no_refit"]}
    more = more.get(command, [])
    assert run(command, *X, *more, "--print_config") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["dtype"] == "auto"
    Path("printed.yaml").write_text(printed)
    assert parse_options(command, ["--config", "printed.yaml"]) == options(*more, command=command)


# Names of the reference, and one of an earlier version.
ALIASES = """
prune sparsity_ratio sparsity 0.25
prune prune_method method magnitude
prune nsamples num_samples 3
prune resume checkpoint a.safetensors
inspect sparsity_type pattern 2:4
prune eval evaluation c4,wikitext2
evaluate data_path data digits
"""


@pytest.mark.parametrize("case", ALIASES.strip().splitlines())
def test_another_name_of_an_option(case):
    command, alias, name, value = case.split()
    expected = options(f"--{name}", value, command=command)
    assert expected != options(command=command)
    Path("old.yaml").write_text(f"{alias}: {value}\n")
    assert options(f"--{alias}", value, command=command) == expected
    assert options("--config", "old.yaml", command=command) == expected


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--use_variant --prune_granularity row", "equal_share"),
        ("--use_variant --sparsity_type unstructured", "equal_share"),
        ("--prune_granularity row", "unstructured_row"),
        ("--prune_granularity layer --prune_method magnitude", "unstructured_layer"),
    ],
)
def test_flags_of_the_reference_that_stand_for_a_pattern(flags, pattern):
    assert groups_of("prune", *flags.split())["pruning"].choices["pattern"] == pattern


# A wrong command line without its model, and what the line about it says.
REFUSED = """
prune --sparsity half -> Invalid value for --sparsity: unable to convert "half" into float.
prune --sparsity 0.5 --sparsity_ratio 0.6 -> --sparsity_ratio specified multiple times
prune --num_samples 0 -> Must be >= 1.
prune --nsamples 1.5 -> Invalid value for --nsamples: must be a whole number, but it is 1.5.
prune --seqlen 1_0 -> Invalid value for --seqlen: must be a whole number, but it is 1_0.
prune --batch_size 2147483648 -> Must be <= 2147483647.
prune --seed 4294967296 -> value "4294967296" for --seed. Must be <= 4294967295.
prune --config . -> --config must name YAML files with options, but
prune extra -> Unused Tokens: ['extra'].
prune --use_variant --pattern 2:4 -> --use_variant must be left out for --pattern 2:4, or it would be ignored.
prune --data digits -> --data must be left out for a language model
prune --model timm:test_vit --data digits --seqlen 8 --limit 2 -> --seqlen, --limit must be left out for an image
prune --model timm:test_vit --data digits --packing none -> --packing must be left out for an image classifier
prune --model timm:test_vit -> with classes only, but it is missing.
prune --nsample 3 -> Did you mean --nsamples?
prune -x -> Unknown option: -x.
prune --solver admm --criterion ria -> criterion='ria' cannot be combined with solver='admm'
prune --save '' -> --save must not be empty.
prune --calibration gone.txt -> text must be an existing file, but there is no gone.txt. Check the path.
prune --calibration gone -> --calibration: text must be one of c4, wikitext2
prune --calibration python-docs,gone.jsonl -> text must be an existing file, but there is no gone.jsonl.
prune --calibration '' -> --calibration: text must be one of c4, wikitext2
prune --packing rows -> Invalid value "rows" for --packing. Choose from
prune --stream --eval_zero_shot --save_model x -> --eval_zero_shot must be left out for --stream
prune --device cuda -> --device must be left out for a run without --stream
prune --stream -> --stream must be left out for a command without --save_model
prune --pattern structured:16 -> Use shrink(model, batches, units=0.5), `wanda-lightning shrink --units 0.5` or
inspect --pattern experts_reap -> Use shrink(model, batches, experts=0.5), `wanda-lightning shrink --experts 0.5` or
prune --report report.pdf -> report must end with .html or .png, but it is 'report.pdf'.
evaluate --data digits --checkpoint a,b -> --checkpoint must have one file for each --model, but it has 2.
evaluate --model gpt2,timm:resnet18 -> --model must name language models, or image classifiers.
evaluate --task_limit 3 -> --task_limit must be left out for
evaluate --evaluation c4,gone.txt -> --evaluation: text must be an existing file
inspect --seed 1 -> Unknown option: --seed.
shrink --overwrite -> --overwrite must be left out for a command that writes nothing
shrink --seqlen 8 --seed 1 --save x -> --seed, --seqlen, --save must be left out for shrink without --units, --experts
shrink --model timm:test_vit --data digits -> --data must be left out for shrink without --units, --experts and
shrink --skip lm_head -> skip=('lm_head',) would be ignored without units. Give units=0.5, for example, or leave
shrink --experts 0.5 --no_refit -> refit=False would be ignored without units.
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_a_wrong_value_is_one_line_and_status_2(case, capsys):
    arguments, message = case.split(" -> ")
    command, *more = shlex.split(arguments)
    model = ["--model", "timm:test_vit"] if "--checkpoint" in more else X
    assert run(command, *model, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wanda-lightning: error: ")
    assert message in line


def test_the_revision_is_that_of_the_model():
    options = ["--model=a/b,c/d", "--dense=e/f", "--revision=v1", "--cache_dir=cache"]
    models = parse(["evaluate", *options])[1]["models"]
    assert models.source("c/d") == ModelSource("c/d", "v1", "cache")
    assert [models.source(name).revision for name in models.all] == ["main", "v1", "v1"]


# Another value than the default for each argument of `PruningConfig`, as it is typed.
VALUES = {
    "sparsity": "0.25",
    "pattern": "unstructured_layer",
    "skip": "a",
    "only": "b,c",
    "method": "sparsegpt",
    "criterion": "ria",
    "allocation": "owl",
    "solver": "refit",
    "sequential": "layer",
    "recovery": "distill",
    "keep_batch_norm": True,
}
TYPED = {"sparsity": 0.25, "only": ["b", "c"]}


def config(*arguments):
    return PruningConfig(**groups_of("prune", *arguments)["pruning"].choices)


@pytest.mark.parametrize("name", inspect.signature(PruningConfig).parameters)
def test_every_argument_of_the_config_is_an_option_that_reaches_it(name):
    value = VALUES[name]
    option = [f"--{name}"] if value is True else [f"--{name}", value]
    choices = {name: TYPED.get(name, value)}
    expected = PruningConfig(**choices)
    assert config(*option) == expected
    assert config() != expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("prune", "wanda"),
        ("prune --method fast --allocation owl --recovery distill", "fast_owl_distill"),
        ("shrink --units 0.5 --experts 0.25", "units_experts"),
        ("shrink --max_size 60GB", "experts"),
    ],
)
def test_results_are_labeled_with_what_was_chosen(arguments, name):
    _, choices, *_ = groups_of(*arguments.split()).values()
    assert choices.name == name


def test_the_types_of_weights_are_those_that_can_be_loaded():
    assert set(get_args(get_type_hints(Model)["dtype"])) == set(DTYPE_NAMES)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_in_a_group(command):
    for option in app[command].assemble_argument_collection(parse_docstring=True):
        if option.children:
            (group,) = option.parameter.group
            assert group.name in GROUPS
        else:
            assert option.parameter.help.endswith("."), option.name
            assert "`" not in option.parameter.help


@pytest.mark.parametrize(
    "command",
    [
        "--pattern 2:4 --seed 3 --stream --save_model 'a b'",
        "--skip lm_head --skip 're:x{1,3}(a,b)' --evaluation '' --use_variant",
        '--evaluation c4 --evaluation wikitext2 --save "it\'s here"',
    ],
)
def test_a_command_is_parsed_into_the_options_from_which_it_was_made(command):
    arguments = shlex.split(command)
    groups = groups_of("prune", *arguments)
    program, name, *again = shlex.split(as_command("prune", *groups.values()))
    assert (program, name) == ("wanda-lightning", "prune")
    assert parse(["prune", *again])[1] == groups
    assert set(again) == {*X, *arguments}
    assert as_command("prune", *groups.values(), always=["sparsity"]).count("--sparsity") == 1
