"""The direction of the imports, for every file of the package, also those to come."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "wanda_lightning").rglob("*.py"))
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
LIGHTNING_ROOMS = {"callbacks", "modules", "data", "cli"}  # each a file or a folder


def imports(tree, package):
    """Full dotted names of all that is imported, and whether inside a function."""
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from ((".".join([*module, alias.name]), id(node) in inside) for alias in node.names)


def violations(file, source):
    """What a file, named from the root of the repository, imports against the rules."""
    path = Path(file)
    room = path.parts[1].removesuffix(".py")
    for name, in_function in imports(ast.parse(source), list(path.parent.parts)):
        top = name.split(".")[0]
        own = f"{name}.".startswith("wanda_lightning.core.")
        if room == "core" and not (own or top in {"torch", "jaxtyping"} or top in sys.stdlib_module_names):
            yield f"{file}: core imports only torch, jaxtyping, the standard library and itself, not {name}"
        if top in LIGHTNING and room not in LIGHTNING_ROOMS:
            yield f"{file}: only {sorted(LIGHTNING_ROOMS)} import lightning, not {room} ({name})"
        if room == "models" and top in {"transformers", "timm"} and not in_function:
            yield f"{file}: models imports {top} only inside functions ({name})"


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_architecture(file):
    assert list(violations(file, (ROOT / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        (
            "core/new.py",
            "import torch.nn\nfrom jaxtyping import Float\nfrom .types import Weight\nfrom . import types",
            True,
        ),
        ("core/new.py", "import numpy", False),
        ("core/new.py", "def f():\n    import transformers", False),
        ("core/new.py", "from wanda_lightning.core import types", True),
        ("core/new.py", "from wanda_lightning import core", True),
        ("core/new.py", "from wanda_lightning.models import find_layers", False),
        ("core/new.py", "from ..models import find_layers", False),
        ("core/criteria/new.py", "from ..types import Weight", True),
        ("core/criteria/new.py", "from ... import models", False),
        ("core/new.py", "from wanda_lightning.core_tools import f", False),
        ("callbacks.py", "from lightning.pytest import f", True),
        ("data/text.py", "import lightning", True),
        ("cli/__init__.py", "import lightning", True),
        ("new.py", "def f():\n    import lightning.pytorch as pl", False),
        ("__init__.py", "from pytorch_lightning import Callback", False),
        ("models/new.py", "import timm", False),
        ("models/llama.py", "if True:\n    from transformers.models import llama", False),
        ("models/new.py", "class A:\n    def f(self):\n        import timm\n        from transformers import X", True),
    ],
)
def test_the_rules_cover_files_to_come(file, source, allowed):
    assert allowed == (not list(violations(f"wanda_lightning/{file}", source)))
