"""Parse arguments and YAML files into a dataclass of options.

Only argparse and PyYAML are needed, so help and refusals appear at once. Every refusal is one sentence that names the
option, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn

import yaml

from wanda_lightning.common.checks import Number, OneOf
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import did_you_mean


class UsageError(UserError):
    """A wrong option. The command ends with status 2."""


def option(help: str, default: Any = None, rule: Number | OneOf | None = None, keyword: str | None = None) -> Any:
    """Make a field of a dataclass of options: MISSING as default if it is required, and a rule for the values.

    An unknown option that has the `keyword`, its name in Python, is refused with a suggestion of this one.
    """
    metadata = {"help": help, "rule": rule, "keyword": keyword}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(each: Field[Any]) -> Any:
    """Return the default of a field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


class CommandParser(argparse.ArgumentParser):
    """Parse the arguments of one command into its dataclass, whose fields were made by `option`."""

    def __init__(self, command: str, options: type, description: str) -> None:
        super().__init__(f"wanda-lightning {command}", description=description, allow_abbrev=False)
        self._command, self._options = command, options
        self._fields: dict[str, Field[Any]] = {each.name: each for each in fields(options)}
        self.add_argument("--config", action="append", default=[], metavar="FILE", help="Read options from YAML files.")
        self.add_argument("--print_config", action="store_true", help="Print all options as YAML.")
        self.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
        for each in self._fields.values():
            self.add_argument(f"--{each.name}", **_argument(each))

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`, where argparse would end the process."""
        raise UsageError(f"{message.removeprefix('argument ').replace(': ', ' ', 1)}.")

    def parse_options(self, arguments: Sequence[str]) -> Any:
        """Return the dataclass of options; arguments take precedence over files, and later files over earlier ones."""
        given, unknown = self.parse_known_args(list(arguments))
        if unknown:
            raise UsageError(self._unknown(unknown[0].partition("=")[0]))
        texts: dict[str, Any] = {}
        for path in given.config:
            texts |= self._read(path)
        texts |= {name: text for name in self._fields if (text := getattr(given, name)) is not None}
        values = {name: default_of(each) for name, each in self._fields.items()}
        values |= {name: _value(self._fields[name], text) for name, text in texts.items()}
        if given.print_config:
            known = {name: None if value is MISSING else value for name, value in values.items()}
            print(yaml.safe_dump(known, sort_keys=False), end="")
            raise SystemExit(0)
        for name, value in values.items():
            if value is MISSING:
                raise UsageError(f"--{name} is required: {self._fields[name].metadata['help']}")
        return self._options(**values)

    def _unknown(self, name: str) -> str:
        known = [f"--{each}" for each in self._fields]
        if not name.startswith("-"):
            return f"{self._command} takes only options, but {name!r} is not one.{did_you_mean(f'--{name}', known)}"
        meant = [f"--{each.name}" for each in self._fields.values() if f"--{each.metadata['keyword']}" == name]
        near = f" Did you mean {meant[0]}?" if meant else did_you_mean(name, known)
        return f"{name} is not an option of {self._command}.{near}"

    def _read(self, path: str) -> dict[str, Any]:
        """Read a YAML file without converting its values, since YAML reads 2:4 as 124."""
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                content = yaml.load(file, Loader=yaml.BaseLoader) or {}
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content, Mapping):
            raise UsageError(f"--config {path} must map options to values, but it is a {type(content).__name__}.")
        for name in content:
            if name not in self._fields:
                raise UsageError(f"--config {path}: {self._unknown(f'--{name}').removeprefix('--')}")
        return dict(content)


def _argument(each: Field[Any]) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field."""
    text, rule, kind, default = each.metadata["help"], each.metadata["rule"], _kind(each), default_of(each)
    if kind is bool:
        return {"action": "store_const", "const": "true", "help": text}
    if kind is list:
        text += " Commas separate several."
    if isinstance(rule, OneOf):
        text += f" O{str(rule)[1:]}."
    if default is MISSING:
        text += " (required)"
    elif default not in (None, []):
        text += f" (default: {','.join(default) if kind is list else default})"
    metavar = "NAME" if isinstance(rule, OneOf) else {int: "N", float: "X", str: "TEXT", list: "LIST"}[kind]
    return {"metavar": metavar, "help": text.replace("%", "%%")}


_KINDS = {"Sequence": list, "list": list, "str": str, "bool": bool, "float": float, "int": int}


def _kind(each: Field[Any]) -> type:
    """Return the type of a value: list for `str | Sequence[str]`, str for `Solver | str | None`."""
    words = re.findall(r"\w+", str(each.type))
    return next((kind for word, kind in _KINDS.items() if word in words), str)


def expanded(text: str) -> str:
    """Replace a leading `~` by the home directory, also in a timm name such as timm:local-dir:~/model."""
    prefix = "timm:local-dir:" if text.startswith("timm:local-dir:~") else ""
    return prefix + os.path.expanduser(text.removeprefix(prefix))


def as_list(given: Any) -> list[str]:
    """Split a text at its commas, except inside brackets; a YAML list, also as text, is a list already.

    >>> as_list("lm_head, re:x{1,3}(a,(b|c))")
    ['lm_head', 're:x{1,3}(a,(b|c))']
    >>> as_list("[a, b]")
    ['a', 'b']
    """
    if isinstance(given, str) and given.startswith("["):
        try:
            listed = yaml.load(given, Loader=yaml.BaseLoader)
        except yaml.YAMLError:  # a glob such as [ab]*.weight
            listed = None
        given = listed if isinstance(listed, list) else given
    if isinstance(given, str):
        given = _split(given)
    return [expanded(str(each).strip()) for each in given if str(each).strip()]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\.|.", text, flags=re.DOTALL):
        if piece == "," and depth == 0:
            parts.append("")
            continue
        depth = max(0, depth + (piece in "([{") - (piece in ")]}"))
        parts[-1] += piece
    return parts


_CONVERTERS: Mapping[type, Callable[[Any], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: int,
    float: float,
    str: expanded,
    list: as_list,
}


def _value(each: Field[Any], text: Any) -> Any:
    """Convert the text of an argument, or a value of a YAML file, to the type of the option, and check it."""
    kind, rule = _kind(each), each.metadata["rule"]
    if text == "null" and each.default is None:
        return None
    if not isinstance(text, str) and kind is not list:
        raise UsageError(f"--{each.name} must be one value, but it is {text!r}.")
    try:
        value = _CONVERTERS[kind](text)
    except (KeyError, ValueError) as error:
        what = rule or {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"--{each.name} must be {what}, but it is {text!r}.") from error
    for one in value if kind is list else [value]:
        if rule is not None and not rule.accepts(one):
            near = did_you_mean(one, rule.names) if isinstance(rule, OneOf) else ""
            raise UsageError(f"--{each.name} must be {rule}, but it is {one!r}.{near}")
    return value
