"""Versions, extras and the workflow agree with pyproject.toml."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import wanda_lightning

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"


def text_of(file):
    return file.read_text(encoding="utf-8")


PYPROJECT = tomllib.loads(text_of(ROOT / "pyproject.toml"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


def test_all_files_name_one_version_and_one_address():
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert wanda_lightning.__version__ == version("wanda_lightning")
    changelog = text_of(ROOT / "CHANGELOG.md")
    released = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert citation["version"] == released[0] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert PROJECT["urls"]["Changelog"] == f"{citation['repository-code']}/blob/main/CHANGELOG.md"


def test_every_extra_that_a_message_or_a_page_names_exists():
    files = [
        *(ROOT / "wanda_lightning").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
    ]
    named = set()
    for file in files:
        text = text_of(file)
        named.update(re.findall(r'require_extra\(\s*"(\w+)"', text))
        for extras in re.findall(r"pip install '(?:wanda_lightning|\.)\[([\w,]+)\]'", text):
            named.update(extras.split(","))
    assert {"demo", "eval", "lora"} <= named <= set(EXTRAS)


def test_an_extra_installs_what_its_message_names():
    names = {
        "sklearn": "scikit-learn",
        "lm_eval": "lm-eval",
        "compressed_tensors": "compressed-tensors",
    }
    names["sentence_transformers"] = "sentence-transformers"
    for file in (ROOT / "wanda_lightning").rglob("*.py"):
        calls = re.findall(r'require_extra\(\s*"(\w+)",(.*?)purpose=', text_of(file), re.DOTALL)
        for extra, arguments in calls:
            installed = [re.match(r"[\w-]+", requirement)[0] for requirement in EXTRAS[extra]]
            for package in re.findall(r'"(\w+)"', arguments):
                assert names.get(package, package) in installed, (extra, package)


def test_the_workflow_runs_ci_on_every_python_that_the_project_names():
    job = yaml.safe_load(text_of(WORKFLOWS / "ci.yml"))["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert job["strategy"]["matrix"]["python"] == PYTHONS


def test_the_oldest_python_is_the_same_everywhere():
    nightly = yaml.safe_load(text_of(WORKFLOWS / "nightly.yml"))
    setup = nightly["jobs"]["oldest"]["steps"][1]
    oldest = PYTHONS[0]
    # No upper bound: a new Python is tried, not refused.
    assert PROJECT["requires-python"] == f">={oldest}"
    assert setup["with"]["python-version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_users_see_the_types():
    assert (ROOT / "wanda_lightning/py.typed").exists()  # or mypy skips an installed package
