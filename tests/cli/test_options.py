"""Every option: its help, its default, and what is refused before a library is loaded."""

import inspect
import shlex
from dataclasses import fields

import psutil
import pytest
from support.cli import run

from wanda_lightning import PruningConfig, Refit
from wanda_lightning.cli import parse_options
from wanda_lightning.cli.common_options import DTYPES
from wanda_lightning.cli.explain import UsageError
from wanda_lightning.cli.options import OPTIONS, PRECISIONS, TASKS, EvaluateOptions
from wanda_lightning.cli.parser import as_command
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.evaluation import PAPER_TASKS
from wanda_lightning.modules import loading

VIT = ["--model", "timm:test_vit", "--data", "digits"]

REFUSED = {
    "prune": [
        (["--sparsity", "1"], "sparsity must be the fraction of weights that become zero, at least 0 and below 1, but"),
        (["--sparsity", "half"], "--sparsity must be a number, but it is 'half'."),
        (["--pattern", "diagonal"], "--pattern must be one of unstructured, unstructured_row, "),
        (["--pattern", "4:2"], "any other N:M with 1 <= N < M, but it is '4:2'."),
        (["--method", "wnada"], "thorough, but it is 'wnada'. Did you mean wanda?"),
        (["--seed", "-1"], "--seed must be a whole number of at least 0 and at most 4294967295, but it is -1."),
        (["--num_samples", "many"], "--num_samples must be a whole number of at least 1, but it is 'many'."),
        (["--num_samples", "9" * 400], "of at least 1, but it is a number with hundreds of digits."),
        (["--skip", "re:("], "skip='re:(' must be a regular expression after 're:', but missing )"),
        (["--use_variant", "--method", "magnitude"], "Use --method wanda within rows"),
        (["--use_variant", "--pattern", "2:4"], "--use_variant has no meaning for --pattern 2:4. Leave it"),
        (["--data", "digits"], "--data has no meaning for a language model. Leave it out."),
        (["--evaluation", ","], "--evaluation must name at least one text, and each only once, but it names none."),
        (
            ["--evaluation", "c4,c4"],
            "--evaluation must name at least one text, and each only once, but it names c4, c4.",
        ),
        (["--tasks_dir", "x"], "--tasks_dir has no meaning for pruning without --eval_zero_shot. Leave it out."),
        ([*VIT, "--seqlen", "8", "--limit", "2"], "--seqlen, --limit have no meaning for an image classifier. Leave"),
        (["--model", "timm:vit_base"], "--data is required for the image classifier timm:vit_base: give a folder"),
        (["--colour", "red"], "--colour is not an option of prune."),
        (["--nsample", "3"], "--nsample is not an option of prune. Did you mean --nsamples or --num_samples"),
        (["red"], "prune takes only options, but 'red' is not one."),
        (["--seqlen"], "--seqlen expected one argument."),
        (["--pattern", "2:4", "--sparsity", "0.7"], "sparsity must be 0.5 for the pattern 2:4,"),
        (["--solver", "admm", "--criterion", "ria"], "criterion='ria' cannot be combined with solver='admm'"),
        (["--recovery", "reconstruct", "--sequential", "layer"], "sequential='layer'"),
        (["--criterion", "magnitude", "--use_variant"], "Use --method wanda within rows"),
        (["--config", "gone.yaml"], "--config gone.yaml cannot be read: No such file or directory."),
    ],
    "finetune": [
        (["--lr", "-1"], "--lr must be a number above 0, but it is -1.0."),
        (["--lora_dropout", "1"], "--lora_dropout must be a number of at least 0 and below 1, but it is 1.0."),
        (["--method", "keep-zeros"], "but it is 'keep-zeros'. Did you mean keep-zeros-lora?"),
        (["--model", "timm:test_vit"], "--model and --dense must be language models, but one is timm:test_vit."),
        (["--method", "full", "--lora_r", "4"], "--lora_r has no meaning for --method full, which trains no adapters."),
    ],
    "evaluate": [
        (["--tasks", "rte,arc_eazy"], "paper, all, but it is 'arc_eazy'. Did you mean arc_easy?"),
        (["--task_limit", "2"], "--task_limit has no meaning for an evaluation without --tasks."),
        (["--model", "x,timm:test_vit"], "language models or image classifiers, but both were given."),
        (["--model", ""], "language models or image classifiers, but none was given."),
        (
            [*VIT, "--evaluation", "python-docs", "--limit", "2"],
            "--evaluation, --limit have no meaning for an image classifier.",
        ),
        ([*VIT, "--checkpoint", "a,b"], "--checkpoint must have one file for each --model, but it has 2 for 1."),
    ],
    "inspect": [
        ([*VIT[:2], "--revision", "v1"], "--revision has no meaning for an image classifier"),
        (["--dtype", "float32"], "--dtype has no meaning for inspect, which reads no weight and no data"),
    ],
}
CASES = [(command, *case) for command, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("command", "more", "message"), CASES, ids=[f"{c} {' '.join(m)}" for c, m, _ in CASES])
def test_a_wrong_value_is_one_line_and_status_2(command, more, message, capsys):
    assert run(command, "--model", "x", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wanda-lightning: error: ")
    assert message in line
    assert line.endswith((".", "?"))


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_has_help(command):
    for field in fields(OPTIONS[command]):
        assert field.metadata["help"].rstrip().endswith(".")
        assert "`" not in field.metadata["help"]


def test_the_revision_is_that_of_the_model():
    options = parse_options("finetune", ["--model=a/b", "--dense=c/d", "--revision=v1", "--cache_dir=cache"])
    assert options.source(options.model) == ModelSource("a/b", "v1", "cache")
    assert options.source(options.dense) == ModelSource("c/d", "main", "cache")
    options = parse_options("evaluate", ["--model=a/b,c/d", "--pruned=e/f", "--revision=v1"])
    assert [options.source(name).revision for name in options.models] == ["main", "v1", "v1"]


ARGUMENTS = inspect.signature(PruningConfig.from_names).parameters
WITHOUT_EFFECT = ("sparsity", "keep_batch_norm")  # on what is pruned and on the memory


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("prune", name) for name in ARGUMENTS),
        *(("inspect", name) for name in ARGUMENTS if name not in WITHOUT_EFFECT),
    ],
)
def test_every_argument_of_the_config_is_an_option_that_reaches_it(command, name):
    values = {"sparsity": 0.25, "pattern": "unstructured_layer", "skip": ["a"], "only": ["b", "c"]}
    values |= {"keep_batch_norm": True, "sequential": "layer"}
    values |= {"method": "sparsegpt", "criterion": "ria", "allocation": "owl", "solver": "refit"}
    value = (values | {"permutation": "assignment", "recovery": "reconstruct"})[name]
    text = ",".join(value) if isinstance(value, list) else str(value)
    given = [f"--{name}", *([] if value is True else [text])]
    others = {"pattern": "2:4"} if name == "permutation" else {}
    base = ["--model", "x", *(["--pattern", "2:4"] if others else [])]
    options = parse_options(command, [*base, *given])
    chosen = PruningConfig.from_names(**others, **{name: value})
    assert PruningConfig.from_names(**options.choices) == chosen
    assert chosen != PruningConfig.from_names(**parse_options(command, base).choices)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "wanda"),
        (["--method", "ria"], "ria"),
        (["--method", "best"], "best"),
        (["--solver", "sparsegpt"], "sparsegpt"),
        (["--method", "wanda", "--criterion", "magnitude"], "magnitude"),
        (["--recovery", "distil"], "wanda_distil"),
        (["--pattern", "experts"], "reap"),
        (["--pattern", "structured"], "refit"),
        (["--pattern", "structured", "--method", "wanda"], "wanda"),
        (["--method", "fast", "--allocation", "owl", "--recovery", "distil"], "fast_owl_distil"),
    ],
)
def test_results_are_labeled_with_what_was_chosen(given, name):
    assert parse_options("prune", ["--model", "x", *given]).name == name


def test_hidden_units_are_pruned_as_in_python():
    options = parse_options("prune", ["--model", "x", "--pattern", "structured"])
    chosen = PruningConfig.from_names(**options.choices)
    assert chosen == PruningConfig.from_names(pattern="structured")
    assert chosen.solver == Refit()


@pytest.mark.parametrize("name", [*WITHOUT_EFFECT, "use_variant", "prune_granularity", "save", "seed"])
def test_inspect_has_no_option_without_effect(name):
    with pytest.raises(UsageError, match=f"--{name} is not an option of inspect"):
        parse_options("inspect", ["--model", "x", f"--{name}", "1"])


def test_the_choices_are_those_of_the_package():
    assert set(DTYPES) == {"auto", *loading.DTYPES}
    assert (*PAPER_TASKS, "paper", "all") == TASKS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precisions_are_those_of_the_trainer(precision):
    from lightning.fabric.connector import _convert_precision_to_unified_args

    assert _convert_precision_to_unified_args(precision)


def test_the_fields_of_the_task_files_are_in_the_help():
    (text,) = [field.metadata["help"] for field in fields(EvaluateOptions) if field.name == "tasks_dir"]
    described = text.split("fields: ")[1].rstrip(".")
    found = {}
    for part in described.split("; "):
        names, rest = [], part.replace(",", " ").split()
        while rest[0] in PAPER_TASKS or rest[0] == "and":
            names.append(rest.pop(0))
        found |= {name: tuple(rest) for name in names if name != "and"}
    assert found == PAPER_TASKS


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("prune", ["--model", "x", "--calibration", "gone.txt"], "--calibration gone.txt does not exist"),
        ("prune", ["--model", "x", "--evaluation", "wikitext3"], "but it is 'wikitext3'. Did you mean wikitext2?"),
        (
            "evaluate",
            ["--model", "x", "--evaluation", "python-docs,wikitext3"],
            "--evaluation must be one of c4, wikitext2, ",
        ),
        ("finetune", ["--model", "x", "--data", "wikitext3"], "--data must be one of c4, wikitext2, python-docs"),
        ("prune", ["--model", "timm:x", "--data", "digts"], "data must be a folder or a known data set"),
        ("prune", ["--model", "x", "--save", "/dev/null/x"], "--save [Errno 20] Not a directory"),
        ("finetune", ["--model", "x", "--save_model", "/dev/null"], "--save_model /dev/null must be a folder"),
        ("prune", [*VIT, "--checkpoint", "gone"], "--checkpoint gone does not exist"),
        (
            "prune",
            ["--model", "x", "--num_samples", "1000000000"],
            "--num_samples must fit in memory, but 1000000000 win",
        ),
        ("finetune", ["--model", "x", "--dense", "/gone"], "--dense /gone does not exist"),
        ("finetune", ["--model", "x", "--steps", "1000000000"], "--steps times --batch_size must fit in memory"),
        ("evaluate", ["--model", "x,gone.gguf"], "--model gone.gguf does not exist"),
    ],
)
def test_missing_files_and_too_many_samples_are_refused_early(command, more, message, capsys):
    assert run(command, *more) == 2
    assert message in capsys.readouterr().err


def test_samples_that_fit_in_memory_are_not_refused(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=8 * 100 * 32)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    options = ["--model", "x", "--seqlen", "32", "--num_samples"]
    parse_options("prune", [*options, "100"]).refuse_early()
    with pytest.raises(ValueError, match="must fit in memory"):
        parse_options("prune", [*options, "101"]).refuse_early()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("prune", ["--model", "m"]),
        ("prune", ["--model=it's here", "--pattern", "2:4", "--seed", "3", "--stream", "--save_model", "a b"]),
        ("prune", ["--model", "m", "--skip", "lm_head,re:x{1,3}(a,b)", "--sparsity", "0.25", "--overwrite"]),
        ("prune", ["--model", "m", "--skip", '["re:a,b", "[ab]"]', "--only", "[ab]*"]),
        ("finetune", ["--model", "m", "--target_modules", "q_proj", "--lr", "1e-05"]),
    ],
)
def test_a_command_is_parsed_into_the_options_from_which_it_was_made(command, arguments):
    options = parse_options(command, arguments)
    program, name, *again = shlex.split(as_command(command, options))
    assert (program, name) == ("wanda-lightning", command)
    assert parse_options(command, again) == options
    assert len(again) <= len(arguments) + sum("=" in argument for argument in arguments)


def test_a_command_shows_defaults_only_on_request():
    options = parse_options("prune", ["--model", "m", "--sparsity", "0.5"])
    assert as_command("prune", options) == "wanda-lightning prune --model m"
    assert as_command("prune", options, ["sparsity"]) == "wanda-lightning prune --model m --sparsity 0.5"
