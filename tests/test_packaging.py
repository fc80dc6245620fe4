"""Versions, extras and the workflow agree with pyproject.toml."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import wanda_lightning

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_all_files_name_one_version_and_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert wanda_lightning.__version__ == version("wanda_lightning")
    released = re.findall(
        r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert citation["version"] == released[0] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert PROJECT["urls"]["Changelog"] == f"{citation['repository-code']}/blob/main/CHANGELOG.md"


def test_every_extra_that_a_message_or_a_page_names_exists():
    files = [
        *(ROOT / "wanda_lightning").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
    ]
    texts = [file.read_text(encoding="utf-8") for file in files]
    named = {extra for text in texts for extra in re.findall(r'require_extra\(\s*"(\w+)"', text)}
    lists = [
        found
        for text in texts
        for found in re.findall(r"pip install '(?:wanda_lightning|\.)\[([\w,]+)\]'", text)
    ]
    named |= {extra for extras in lists for extra in extras.split(",")}
    assert {"demo", "eval", "lora"} <= named <= set(EXTRAS)


def test_an_extra_installs_what_its_message_names():
    names = {"sklearn": "scikit-learn", "lm_eval": "lm-eval"}
    for file in (ROOT / "wanda_lightning").rglob("*.py"):
        for extra, rest in re.findall(
            r'require_extra\(\s*"(\w+)",(.*?)purpose=', file.read_text(encoding="utf-8"), re.S
        ):
            for package in re.findall(r'"(\w+)"', rest):
                name = names.get(package, package)
                assert any(re.match(rf"{name}\b", requirement) for requirement in EXTRAS[extra]), (
                    extra,
                    name,
                )


def test_the_workflow_runs_ci_on_every_python_that_the_project_names():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))[
        "jobs"
    ]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    names = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each)
        for each in PROJECT["classifiers"]
    ]
    assert job["strategy"]["matrix"]["python"] == [name[1] for name in names if name]


def test_the_oldest_python_is_the_same_everywhere():
    names = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    nightly = yaml.safe_load(
        (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    )
    setup = nightly["jobs"]["oldest"]["steps"][1]
    # No upper bound: a new Python is tried, not refused.
    assert PROJECT["requires-python"] == f">={names[0]}"
    assert setup["with"]["python-version"] == names[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{names[0].replace('.', '')}"


def test_users_see_the_types():
    assert (ROOT / "wanda_lightning/py.typed").exists()  # or mypy skips an installed package
