"""Directives that write tables from the package and from `benchmarks/results`, so that nothing is copied by hand.

- `{choices} METHODS` or `PRESETS`: what each name of `wanda_lightning.methods` stands for.
- `{measured} NAME ...`: perplexity and seconds of methods, from the files in `benchmarks/results/methods`.
- `{options} COMMAND`: the options of a command with their help and defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from wanda_lightning import methods
from wanda_lightning.cli.options import OPTIONS
from wanda_lightning.cli.parser import default_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "methods"
GOALS = ("50 %", "60 %", "2:4")
PARTS = ("criterion", "solver", "allocation", "recovery", "permutation")


class Table(SphinxDirective):
    """A table in Markdown that a subclass writes from the directive's arguments."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Parse the table."""
        header, *rows = self.rows(self.arguments[0].split())
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
        lines.insert(1, "| --- " * len(header) + "|")
        return self.parse_text_to_nodes("\n".join(lines))

    def rows(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        """Return the header and the rows."""
        raise NotImplementedError


class Choices(Table):
    """What the names in a table of methods stand for."""

    def rows(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """One row for each name."""
        (table,) = names
        yield ("name", "criterion", "solver", "allocation", "also", "within", "sequential")
        for name, method in getattr(methods, table).items():
            made = {part: make() for part in PARTS if (make := getattr(method, part))}
            shown = {part: _short(made[part]) if part in made else "its own" for part in PARTS}
            also = ", ".join(filter(None, (shown.pop("permutation"), shown.pop("recovery"))))
            group = method.group or made["solver"].group(made.get("criterion", made["solver"].own_criterion))
            yield (f"`{name}`", *shown.values(), also, group.replace("_", ", rows "), f"`{method.sequential}`")


class Measured(Table):
    """Perplexity and seconds of methods, as the benchmarks saved them."""

    def rows(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """One row for each method, and one column for each goal."""
        runs = []
        for file in sorted(RESULTS.glob("*.json")):
            self.env.note_dependency(str(file))
            runs.append(json.loads(file.read_text(encoding="utf-8")))
        yield ("perplexity, seconds", *GOALS)
        for name in names:
            own = {_goal(run): run["measured"] for run in runs if run["method"] == name and run["code"] == OURS}
            if not own:
                raise self.error(f"no file in {RESULTS} has the method {name!r}")
            yield (f"`{name}`", *(_cell(own[goal]) if goal in own else "" for goal in GOALS))


class Options(Table):
    """The options of a command."""

    def rows(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """One row for each option."""
        (command,) = names
        yield ("option", "default", "meaning")
        for each in fields(OPTIONS[command]):
            default, rule = default_of(each), each.metadata["rule"]
            shown = "required" if default is MISSING else "" if default in (None, False, []) else f"`{default}`"
            allowed = f" O{str(rule)[1:]}." if str(rule).startswith("one of") else ""
            name = each.metadata["position"] or f"--{each.name}"
            yield (f"`{name}`", shown, f"{each.metadata['help']}{allowed}".replace("*", "\\*"))


OURS = "wanda_lightning"


def _goal(run: dict[str, Any]) -> str:
    return run["pattern"] if ":" in run["pattern"] else f"{100 * run['sparsity']:g} %"


def _cell(measured: dict[str, float]) -> str:
    perplexity, seconds = f"{measured['perplexity']:#.4g}".rstrip("."), measured.get("seconds")
    return perplexity + (f", {seconds:.0f} s" if seconds else "")


def _short(choice: Any) -> str:
    """Return a choice with the hyperparameters that are not the defaults of its class; nothing if it does nothing."""
    name = type(choice).__name__
    if name.startswith("No"):
        return ""
    usual = type(choice)()
    given = {each.name: getattr(choice, each.name) for each in fields(choice)}
    shown = [f"{key}={value!r}" for key, value in given.items() if value != getattr(usual, key)]
    return f"`{name}({', '.join(shown)})`" if shown else f"`{name}`"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    for name, directive in (("choices", Choices), ("measured", Measured), ("options", Options)):
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
