"""All public names with their signatures, in a file, so that a review sees each change of them.

    python tests/test_public_interface.py     (writes tests/public_interface.txt)

The signatures are those of the source, as text: they look the same under every version of Python and of the libraries.
"""

import ast
import inspect
import sys
import textwrap
from functools import cache
from pathlib import Path

import wanda_lightning
from wanda_lightning import core, loop

FILE = Path(__file__).with_name("public_interface.txt")
SHOWN_DECORATORS = ("classmethod", "staticmethod", "property", "cached_property", "dataclass")
SHOWN_METHODS = ("__init__", "__call__")  # besides those without an underscore


def interface():
    """Return the text of the file: one paragraph for each public name."""
    paragraphs = []
    in_rooms = {**vars(core), **vars(loop)}
    public_names = {name for name, value in in_rooms.items() if hasattr(value, "__qualname__")}
    for name in sorted(public_names.union(wanda_lightning.__all__)):
        public = in_rooms.get(name) or getattr(wanda_lightning, name)
        if public.__name__ != name:
            lines = [f"{name} = {public.__name__}"]
        elif inspect.isclass(public):
            lines = lines_of_class(public)
        else:
            lines = [line for definition in definitions(public) for line in lines_of(definition)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


@cache
def tree_of(module):
    return ast.parse(Path(sys.modules[module].__file__).read_text(encoding="utf-8"))


def definitions(public):
    """Return where a class or function is defined; functions with `@overload` are defined several times."""
    body = tree_of(public.__module__).body
    return [node for node in body if getattr(node, "name", "") == public.__name__]


def lines_of_class(public):
    """Return the head of a class, and its members with those that it inherits from classes of the package."""
    (definition,) = definitions(public)
    head = f"class {public.__name__}"
    if definition.bases:
        head += f"({', '.join(map(ast.unparse, definition.bases))})"
    lines = [*decorators(definition), head]
    known = set()
    for owner in public.__mro__:
        if owner.__module__.partition(".")[0] == "wanda_lightning":
            (definition,) = definitions(owner)
            members = dict(members_of(definition))
            for name, member in members.items():
                if name not in known:
                    lines += [f"    {line}" for line in member]
            known |= members.keys()
    return lines


def members_of(definition):
    """Yield the name and the lines of each public field and method of a class."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef):
            name = node.name
            lines = lines_of(node)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = ast.unparse(target)
            lines = [ast.unparse(node)]
        else:
            continue
        if name in SHOWN_METHODS or not name.startswith("_"):
            yield name, lines


def lines_of(function):
    """Return a signature in lines of at most 100 characters."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    text = f"{function.name}({ast.unparse(function.args)}){returns}"
    return [*decorators(function), *textwrap.wrap(text, 100, subsequent_indent="    ")]


def decorators(definition):
    shown = [f"@{ast.unparse(decorator)}" for decorator in definition.decorator_list]
    return [text for text in shown if text.partition("(")[0].removeprefix("@") in SHOWN_DECORATORS]


def test_a_change_of_the_public_interface_is_seen_in_review():
    assert interface() == FILE.read_text(encoding="utf-8"), (
        "if that is meant, say it in CHANGELOG.md and run: python tests/test_public_interface.py"
    )


if __name__ == "__main__":
    FILE.write_text(interface(), encoding="utf-8")
