"""Private names of other libraries: one file uses each, for a reason, and the library still has it.

The table is `private_names.txt`. The scan is pragmatic: it takes `x._name`, `import _name`, the text `"_name"`, and
methods that nothing in the package calls, unless the same file defines the name.
"""

import ast
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "wanda_lightning"


class Use(NamedTuple):
    """Which file needs a private name, where the library has it, and what we need it for."""

    file: str
    owner: str
    purpose: str


def read_table():
    """The rows of `private_names.txt`, by name."""
    table = {}
    text = Path(__file__).with_name("private_names.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            name, *row = line.split(" | ")
            table[name] = Use(*row)
    return table


USES = read_table()

# Documented by Python, in spite of the underscore.
PUBLIC = {"_asdict", "_current_frames", "_fields", "_make", "_name_", "_replace", "_value_"}
TEXTS = {"_stderr", "_token_id"}  # ends of names


def is_private(name):
    return bool(re.fullmatch(r"_[^\W_]\w*", name)) and name not in PUBLIC | TEXTS


def nodes(tree, *kinds):
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def names_in(tree):
    """The parts of imported names, and texts that are not a part of an f-string."""
    formatted = {id(part) for text in nodes(tree, ast.JoinedStr) for part in text.values}
    for constant in nodes(tree, ast.Constant):
        if isinstance(constant.value, str) and id(constant) not in formatted:
            yield constant.value

    for node in nodes(tree, ast.Import, ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        for name in (module, *(alias.name for alias in node.names)):
            yield from name.split(".")


def methods_in(tree):
    methods = set()
    for node in nodes(tree, ast.ClassDef):
        methods.update(inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
    return methods


def members_in(tree):
    """The methods, annotated fields and attributes of the classes in a file."""
    members = methods_in(tree)
    for node in nodes(tree, ast.AnnAssign):
        if isinstance(node.target, ast.Name):
            members.add(node.target.id)
    for attribute in nodes(tree, ast.Attribute):
        if isinstance(attribute.ctx, ast.Store) and ast.unparse(attribute.value) == "self":
            members.add(attribute.attr)
    return members


def defined_in(tree):
    defined = {node.name for node in nodes(tree, ast.FunctionDef, ast.ClassDef)}
    stored = {node.id for node in nodes(tree, ast.Name) if isinstance(node.ctx, ast.Store)}
    return defined | stored | members_in(tree)


def foreign_names(tree, inherited=frozenset(), called=frozenset()):
    """The private names that a file reads or imports, but does not define.

    `self` may also have what classes in other files define: `inherited`. `super()` has what the package calls itself.
    """
    names = set(names_in(tree)) - defined_in(tree)
    members = members_in(tree)
    for attribute in nodes(tree, ast.Attribute):
        owner = ast.unparse(attribute.value)
        known = members
        if owner.startswith("super("):
            known = called
        elif owner == "self":
            known = members | inherited
        if attribute.attr not in known:
            names.add(attribute.attr)
    return {name for name in names if is_private(name)}


def used_in(folder):
    """The files that use each private name of another library."""
    trees = {}
    for file in sorted(folder.rglob("*.py")):
        trees[file.relative_to(folder).as_posix()] = ast.parse(file.read_text(encoding="utf-8"))
    members = set()
    called = set()
    for tree in trees.values():
        members |= members_in(tree)
        attributes = nodes(tree, ast.Attribute)
        called |= methods_in(tree) & {
            node.attr for node in attributes if ast.unparse(node.value) != "super()"
        }

    files = {}
    for file, tree in trees.items():
        # Nothing in the package calls it, so a library does: it replaces a method there.
        replaced = {name for name in methods_in(tree) - called if is_private(name)}
        for name in sorted(foreign_names(tree, members, called) | replaced):
            files.setdefault(name, []).append(file)
    return files


def test_the_table_has_every_name_with_its_file():
    """If this fails: find a public way, or change `private_names.txt`."""
    assert {name: ", ".join(files) for name, files in used_in(PACKAGE).items()} == {
        name: use.file for name, use in USES.items()
    }


@pytest.mark.parametrize("name", USES)
def test_the_library_has_the_name(name):
    use = USES[name]
    owner = pkgutil.resolve_name(use.owner)
    # An attribute of instances is only in the text of the class.
    exists = hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner))
    assert exists, f"{use.owner} has no {name}, which {use.file} needs {use.purpose}."


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model._hooks", {"_hooks"}),
        ("super()._run()\ndef _run(self): ...", {"_run"}),
        ("getattr(model, '_args', None)", {"_args"}),
        ("from a._b.c import _d", {"_b", "_d"}),
        ("class A:\n    def _own(self): return other._own", set()),
        ("def _version(x): return x._version", {"_version"}),
        ("self._own = 1\nself._own", set()),
        ("f'{a}_loss', x._replace(a=1), x.__dict__, _", set()),
    ],
)
def test_the_scan_finds_names_of_others(source, names):
    assert foreign_names(ast.parse(source)) == names


def test_a_method_that_nothing_calls_is_called_by_a_library(tmp_path):
    (tmp_path / "a.py").write_text("class A:\n    def _hook(self): ...\n    def _own(self): ...")
    (tmp_path / "b.py").write_text("class B(A):\n    def _own(self): self._own()")
    assert used_in(tmp_path) == {"_hook": ["a.py"]}
