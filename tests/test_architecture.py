"""What each file of the package imports, against the table of rooms in CONTRIBUTING.md."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "wanda_lightning").rglob("*.py"))
ENTRANCES = {"__init__", "__main__"}  # they name what others define


def read_table(text):
    """Rooms in the order of the table, each with what it may import; a star means inside functions only."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, flags=re.MULTILINE)
    return {room: set(re.findall(r"`([\w*]+)`", allowed)) for room, allowed in rows}


TABLE = read_table((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def room_of(file):
    """The folder, or the file at the top of the package, without its suffix."""
    return Path(file).parts[1].removesuffix(".py")


def within(tree, kinds, condition=lambda node: True):
    return {id(n) for node in ast.walk(tree) if isinstance(node, kinds) and condition(node) for n in ast.walk(node)}


def imports(tree, package):
    """Rooms and libraries that are imported, and whether only when a function runs; not those for type checking."""
    functions = within(tree, ast.FunctionDef | ast.AsyncFunctionDef)
    unseen = within(tree, ast.If, lambda node: ast.unparse(node.test) == "TYPE_CHECKING")
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        for name in () if id(node) in unseen else names:
            top, *rest = name.split(".")
            if top == "wanda_lightning" and rest and rest[0] in TABLE:
                top = rest[0]
            yield top, id(node) in functions


def violations(file, source):
    """What a file, named from the root of the repository, imports against the table."""
    room = room_of(file)
    allowed = TABLE[room] | {room}
    for top, in_function in imports(ast.parse(source), list(Path(file).parent.parts)):
        if top in sys.stdlib_module_names or top in allowed or (in_function and f"{top}*" in allowed):
            continue
        where = " at its top" if f"{top}*" in allowed else ""
        yield f"{file}: {room} may not import {top}{where}; it may import {', '.join(sorted(allowed))}"


def test_the_table_has_every_room():
    assert set(map(room_of, FILES)) - ENTRANCES == set(TABLE)


def test_every_room_imports_only_rooms_below_it():
    rooms = list(TABLE)
    for place, room in enumerate(rooms):
        upward = {name.rstrip("*") for name in TABLE[room]} & set(rooms[: place + 1])
        assert not upward, f"{room} stands below {', '.join(upward)}"


def test_what_the_package_promises_about_libraries():
    """The rules of the architecture that the table must not soften."""
    assert TABLE["core"] == {"torch", "jaxtyping"}
    assert {room for room, allowed in TABLE.items() if "lightning" in allowed} == {
        "callbacks",
        "modules",
        "data",
        "cli",
    }
    homes = {"transformers": {"modules", "lora"}, "timm": {"modules"}, "peft": {"lora"}, "lm_eval": set()}
    for library, rooms in homes.items():
        assert {room for room, allowed in TABLE.items() if library in allowed} == rooms


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in ENTRANCES])
def test_imports_follow_the_table(file):
    assert list(violations(file, (ROOT / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("room", list(TABLE))
def test_the_table_allows_nothing_that_a_room_does_not_import(room):
    used = set()
    for file in FILES:
        if room_of(file) == room:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            used |= {top for top, _ in imports(tree, list(Path(file).parent.parts))}
    assert {name for name in TABLE[room] if name.rstrip("*") not in used} == set()


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("core/new.py", "import torch.nn\nfrom jaxtyping import Float\nfrom .types import Weight", True),
        ("core/new.py", "import numpy", False),
        ("core/new.py", "def f():\n    import transformers", False),
        ("core/new.py", "from wanda_lightning.core import types", True),
        ("core/new.py", "from wanda_lightning import core", True),
        ("core/new.py", "from wanda_lightning import prune", False),
        ("core/new.py", "from wanda_lightning.models import find_layers", False),
        ("core/new.py", "from ..models import find_layers", False),
        ("core/criteria/new.py", "from ..types import Weight", True),
        ("core/criteria/new.py", "from ... import models", False),
        ("core/new.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm", True),
        ("core/new.py", "from wanda_lightning.core_tools import f", False),
        ("callbacks.py", "from lightning.pytest import f", True),
        ("data/text.py", "import lightning", True),
        ("plan.py", "def f():\n    import lightning.pytorch as pl", False),
        ("models/new.py", "import timm", False),
        ("models/llama.py", "if True:\n    from transformers.models import llama", False),
        ("models/new.py", "class A:\n    def f(self):\n        import timm\n        from transformers import X", True),
    ],
)
def test_the_rules_cover_files_to_come(file, source, allowed):
    assert allowed == (not list(violations(f"wanda_lightning/{file}", source)))
