"""Versions, extras and the workflow agree with pyproject.toml."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import wanda_lightning

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_all_files_name_one_version_and_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert wanda_lightning.__version__ == version("wanda_lightning")
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == released[0] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert PROJECT["urls"]["Changelog"] == f"{citation['repository-code']}/blob/main/CHANGELOG.md"


def test_every_extra_that_a_message_or_a_page_names_exists():
    files = [*(ROOT / "wanda_lightning").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    texts = [file.read_text(encoding="utf-8") for file in files]
    named = {extra for text in texts for extra in re.findall(r'require_extra\(\s*"(\w+)"', text)}
    lists = [found for text in texts for found in re.findall(r"pip install '(?:wanda_lightning|\.)\[([\w,]+)\]'", text)]
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
                assert any(re.match(rf"{name}\b", requirement) for requirement in EXTRAS[extra]), (extra, name)


def test_the_workflow_runs_ci_on_the_oldest_and_the_newest_python():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    oldest, after_newest = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert job["strategy"]["matrix"]["python"] == [f"3.{oldest}", f"3.{int(after_newest) - 1}"]


def test_users_see_the_types():
    assert (ROOT / "wanda_lightning/py.typed").exists()  # or mypy skips an installed package
