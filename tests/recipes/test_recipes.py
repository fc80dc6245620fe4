"""What every recipe promises: its first lines, and options that the commands know."""

import ast
import shlex
from pathlib import Path

import pytest
import yaml

from wanda_lightning import cli

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
SCRIPTS = sorted((ROOT / "recipes").glob("*/*.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


def command_in(text, prefix=""):
    """The first command in a text, and whether it names the file that it stands in."""
    return next(line[len(prefix) :].strip() for line in text.splitlines() if line.startswith(f"{prefix}   "))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_yaml_recipe_opens_with_command_cost_and_result(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert name(path) in command_in("\n".join(head), prefix="#")
    assert any(line.startswith("# Cost") for line in head)
    assert any(line.startswith(("# Result", "# Cost and result")) for line in head)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_opens_with_a_command_and_a_result(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert name(path) in text
    assert "esult" in text


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name != "paper"], ids=name)
def test_the_commands_know_every_option_of_a_recipe(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command_in(path.read_text(), prefix="#"))
    assert arguments[0] == "wanda-lightning"
    monkeypatch.setattr("sys.argv", [*arguments, "--print_config"])
    try:
        status = cli.main()
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    content = yaml.safe_load(path.read_text())
    assert content.keys() <= shown.keys()
