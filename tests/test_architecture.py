"""Which room may import which, for every file of the package: the table is the one in CONTRIBUTING.md."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "wanda_lightning"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))


class Room(NamedTuple):
    """What a room may import, anywhere and only inside functions, and how many syntax nodes it may have."""

    anywhere: set
    in_functions: set
    nodes: int


def rows_of(text, heading):
    """The cells of the first table whose first column has this heading."""
    (table,) = re.findall(rf"^\| *{heading} *\|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)[:1]
    for line in table.splitlines():
        yield [cell.strip() for cell in line.strip("| ").split("|")]


def read_table(text):
    """The rooms; rows have a room, a description, two lists of names, and a number of nodes."""
    rooms = {}
    for room, _, anywhere, in_functions, nodes in rows_of(text, "room"):
        (name,) = names_in(room)
        assert name not in rooms, f"{name} stands twice in the table"
        rooms[name] = Room(set(names_in(anywhere)), set(names_in(in_functions)), int(nodes))
    return rooms


def names_in(cell):
    return [name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)]


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = read_table(CONTRIBUTING)


def room_of(file):
    return Path(file).parts[1].removesuffix(".py")


class Import(NamedTuple):
    """A room or library that is imported, and whether only functions or type checkers do so."""

    name: str
    is_late: bool


def runs_late(node):
    """Whether what is below a node does not run when the file is imported."""
    if isinstance(node, ast.If):
        return getattr(node.test, "id", "") == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imported_modules(node, package):
    """The modules or names that a statement imports; `package` is the path of the file's folder."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join(filter(None, (*base, node.module)))
    return [f"{module}.{alias.name}" for alias in node.names]


def imports(source, package):
    tree = ast.parse(source)
    late = set()
    for node in ast.walk(tree):
        if runs_late(node):
            late.update(map(id, ast.walk(node)))

    for node in ast.walk(tree):
        for module in imported_modules(node, package):
            name, *inner = module.split(".")
            if name == PACKAGE and inner:
                name = inner[0]
            yield Import(name, id(node) in late)


def violations(file, source):
    """What a file, named from the root of the repository, imports against the table."""
    room = room_of(file)
    allowed = ROOMS[room]
    for name, is_late in imports(source, list(Path(file).parent.parts)):
        if name in sys.stdlib_module_names or name in (room, *allowed.anywhere):
            continue
        if not is_late:
            yield f"{file}: {room} must not import {name} outside of functions"
        elif name not in allowed.in_functions:
            yield f"{file}: {room} must not import {name}"


def text_of(file):
    return (ROOT / file).read_text(encoding="utf-8")


def test_imports_follow_the_table():
    wrong = []
    for file in FILES:
        if room_of(file) not in ("__init__", "__main__"):
            wrong += violations(file, text_of(file))
    assert wrong == []


def test_every_room_is_in_the_table_and_nothing_else():
    assert {room_of(file) for file in FILES} - {"__init__", "__main__"} == ROOMS.keys()


def test_what_the_table_allows_points_downwards():
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        below = order[order.index(room) + 1 :]
        for other in (allowed.anywhere | allowed.in_functions) & ROOMS.keys():
            assert other in below, f"{room} stands below {other} in the table, but may import it"


def test_no_files_import_each_other_in_a_circle():
    files = {}
    for file in FILES:
        files[file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")] = file

    imported = {}
    for module, file in files.items():
        imported[module] = set()
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    imported[module].add(name if name in files else node.module)
        imported[module] &= files.keys()
    assert set(TopologicalSorter(imported).static_order()) == files.keys()


# Each room exports its names from this file.
SAME_NAMES = {"__init__"}


def test_a_file_has_another_name_than_the_files_of_other_rooms():
    rooms = {}
    for file in FILES:
        rooms.setdefault(Path(file).stem, set()).add(room_of(file))
    twice = {name: sorted(homes) for name, homes in rooms.items() if len(homes) > 1}
    assert twice.keys() <= SAME_NAMES, f"a name says what is inside, and in which room: {twice}"


def nodes_in(source):
    """The number of nodes in the syntax tree, without docstrings: it does not change when lines are joined or split."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    number = 0
    for node in ast.walk(ast.parse(source)):
        number += 1
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            number -= 2  # an expression and a constant
    return number


def nodes_of(files):
    return sum(map(nodes_in_file, files))


@cache
def nodes_in_file(file):
    return nodes_in(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_its_budget(room):
    files = [ROOT / file for file in FILES if room_of(file) == room]
    assert nodes_of(files) <= ROOMS[room].nodes, f"take out what is worth least in {room}"


@pytest.mark.parametrize("row", list(rows_of(CONTRIBUTING, "all")), ids=lambda row: row[0])
def test_the_whole_keeps_its_budget(row):
    (folder,) = names_in(row[0])
    assert nodes_of((ROOT / folder).rglob("*.py")) <= int(row[1])


def test_layout_and_documentation_cost_nothing():
    dense = "def f(x): return x if x else -x"
    airy = '''
"""A module."""


def f(x):
    """Return x, or its negative."""
    # A comment.

    return (
        x
        if x
        else -x
    )
'''
    assert nodes_in(dense) == nodes_in(airy)
    assert nodes_in(dense) < nodes_in(dense + "\nf(1)")


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("core/new.py", "import torch.nn\nimport json\nfrom . import types", True),
        ("core/deep/new.py", "from ... import verbs", False),
        ("data/new.py", "class A:\n    def f(self):\n        import timm", True),
        ("data/new.py", "if True:\n    from timm.layers import x", False),
    ],
)
def test_the_rules_can_be_broken(file, source, allowed):
    assert allowed == (not list(violations(f"{PACKAGE}/{file}", source)))
