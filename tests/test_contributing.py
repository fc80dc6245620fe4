"""The sample method in CONTRIBUTING.md, applied to a copy of the package, and the lists of files there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import forks

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(DIFF,) = re.findall(r"^```diff\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)

PRUNE = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "wanda_lightning"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from wanda_lightning import WandaPrune, prune
from wanda_lightning.cli import parse_options

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
x = torch.randn(50, 16) * torch.linspace(0.1, 5, 16)
dense = model[0].weight.detach().clone()
report = prune(model, [x], 0.5, method="soft_wanda", skip=["2"], progress=False)
expected = dense.clone()
scores = dense.abs() * x.norm(dim=0).sqrt()
for row, score in zip(expected, scores):
    row[score.argsort()[:8]] = 0
assert torch.equal(model[0].weight, expected)
assert "SoftWanda" in str(report.config["criterion"])
parse_options("prune", ["--model=any", "--method=soft_wanda"])
"""


def test_the_sample_method_is_a_file_of_twelve_lines_and_two_lines_elsewhere():
    _, *changed = re.findall(r"^\+\+\+ b/(.*)$", DIFF, flags=re.MULTILINE)
    assert changed == ["wanda_lightning/core/__init__.py", "wanda_lightning/methods.py"]

    added = re.findall(r"^\+(?!\+\+) *(.*)$", DIFF, flags=re.MULTILINE)
    code = [line for line in added if line and not line.startswith('"""')]
    assert len(code) <= 12 + 2
    assert not re.search(r"^-(?!--)", DIFF, flags=re.MULTILINE)  # no line is removed


@forks.IN_ONE_WORKER
def test_the_sample_method_prunes(tmp_path):
    package = tmp_path / "wanda_lightning"
    shutil.copytree(ROOT / "wanda_lightning", package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-"], input=DIFF, text=True, check=True, cwd=tmp_path)
    done = forks.run(forks.execute, PRUNE, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace(DIFF, "")
    named = set(re.findall(r"[`(]((?:[\w-]+/)*\w+\.(?:py|md|yaml|cff))[`)]", text))
    assert len(named) > 5
    for file in named - {"FILE.yaml"}:
        assert (ROOT / file).exists() or (ROOT / "wanda_lightning" / file).exists(), file
