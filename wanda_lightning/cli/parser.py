"""Parse arguments and YAML files into a dataclass of options, and turn options back into a command.

Only argparse and PyYAML are needed, so help and refusals appear at once. Every refusal is one sentence that names the
option, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from wanda_lightning.cli.explain import UsageError
from wanda_lightning.common.checks import Number, OneOf, shown
from wanda_lightning.common.words import did_you_mean


def option(help: str, default: Any = None, rule: Number | OneOf | None = None, alias: str | None = None) -> Any:
    """Make a field of a dataclass of options: MISSING as default if it is required, and a rule for the values.

    The `alias` is a second name, which the reference or an earlier version gives to the option.
    """
    allowed = f" O{str(rule)[1:]}." if isinstance(rule, OneOf) else ""
    metadata = {"help": help + allowed, "rule": rule, "alias": alias}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(each: Field[Any]) -> Any:
    """Return the default of a field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def default_text(each: Field[Any]) -> str:
    """Return the default of a field as it is typed; empty for None, False, an empty list and a required option."""
    default = default_of(each)
    if default is MISSING or default is None or default is False:
        return ""
    return ",".join(default) if isinstance(default, list) else str(default)


def flags_of(each: Field[Any]) -> list[str]:
    """Return the flags of an option, such as `["--sparsity", "--sparsity_ratio"]`."""
    return [f"--{name}" for name in (each.name, each.metadata["alias"]) if name]


class _Store(argparse.Action):
    """Store the text of an option under the flag by which it is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        namespace.options[flag] = self.const if self.nargs == 0 else values


class CommandParser(argparse.ArgumentParser):
    """Parse the arguments of one command into its dataclass, whose fields were made by `option`."""

    def __init__(self, command: str, options: type, description: str) -> None:
        super().__init__(f"wanda-lightning {command}", description=description, allow_abbrev=False)
        self._command, self._options = command, options
        self._fields: dict[str, Field[Any]] = {flag: each for each in fields(options) for flag in flags_of(each)}
        self._kinds = {name: _kind(hint) for name, hint in get_type_hints(options).items()}
        self.add_argument("--config", action="append", default=[], metavar="FILE", help="Read options from YAML files.")
        self.add_argument("--print_config", action="store_true", help="Print all options as YAML.")
        self.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
        for each in fields(options):
            self.add_argument(*flags_of(each), action=_Store, **_argument(each, self._kinds[each.name]))

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`, where argparse would end the process."""
        raise UsageError(f"{message.removeprefix('argument ').replace(': ', ' ', 1)}.")

    def parse_options(self, arguments: Sequence[str]) -> Any:
        """Return the dataclass of options; arguments take precedence over files, and later files over earlier ones."""
        given, unknown = self.parse_known_args(list(arguments), argparse.Namespace(options={}))
        if unknown:
            raise UsageError(self._unknown(unknown[0].partition("=")[0]))
        texts: dict[str, Any] = {}
        for path in given.config:
            texts |= self._by_name(self._read(path))
        texts |= self._by_name(given.options)
        values = {each.name: default_of(each) for each in fields(self._options)}
        values |= {name: self._value(self._fields[f"--{name}"], text) for name, text in texts.items()}
        if given.print_config:
            known = {name: None if value is MISSING else value for name, value in values.items()}
            print(yaml.safe_dump(known, sort_keys=False), end="")
            raise SystemExit(0)
        for name, value in values.items():
            if value is MISSING:
                raise UsageError(f"--{name} is required: {self._fields[f'--{name}'].metadata['help']}")
        return self._options(**values)

    def _by_name(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the texts by the names of their options, and refuse two values for the two names of an option."""
        texts: dict[str, Any] = {}
        for flag, text in given.items():
            each = self._fields[flag]
            other = texts.setdefault(each.name, text)
            if other is not text and self._value(each, text) != self._value(each, other):
                raise UsageError(
                    f"{' and '.join(flags_of(each))} are names of one option, but they are {other} and {text}. Give "
                    "one of them."
                )
        return texts

    def _unknown(self, flag: str) -> str:
        if not flag.startswith("-"):
            near = did_you_mean(f"--{flag}", self._fields)
            return f"{self._command} takes only options, but {flag!r} is not one.{near}"
        return f"{flag} is not an option of {self._command}.{did_you_mean(flag, self._fields)}"

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
            if f"--{name}" not in self._fields:
                raise UsageError(f"--config {path}: {self._unknown(f'--{name}').removeprefix('--')}")
        return {f"--{name}": text for name, text in content.items()}

    def _value(self, each: Field[Any], text: Any) -> Any:
        """Convert the text of an argument, or a value of a YAML file, to the type of the option, and check it."""
        kind, rule = self._kinds[each.name], each.metadata["rule"]
        if text == "null":
            return default_of(each)
        if text == "" and kind is str:  # such as "$UNSET" in a script
            raise UsageError(f"--{each.name} must not be empty. Leave it out, or give a value.")
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
                raise UsageError(f"--{each.name} must be {rule}, but it is {shown(one)}.{near}")
        return value


def _argument(each: Field[Any], kind: type) -> dict[str, Any]:
    text, default = each.metadata["help"], default_text(each)
    if kind is bool:
        return {"nargs": 0, "const": "true", "help": text}
    if kind is list:
        text += " Commas separate several."
    text += " (required)" if default_of(each) is MISSING else f" (default: {default})" if default else ""
    is_name = isinstance(each.metadata["rule"], OneOf)
    metavar = "NAME" if is_name else {int: "N", float: "X", str: "TEXT", list: "LIST"}[kind]
    return {"metavar": metavar, "help": text.replace("%", "%%")}


def _kind(hint: Any) -> type:
    """Return the class of a value: list for `list[str] | None`."""
    hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    return get_origin(hint) or hint


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


def as_given(options: Any) -> dict[str, Any]:
    """Return the options that were given or have a default, for reports."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def as_command(command: str, options: Any, always: Collection[str] = ()) -> str:
    """Return a shell command with the options that differ from their defaults, and with those in `always`."""
    words = ["wanda-lightning", command]
    for each in fields(options):
        value = getattr(options, each.name)
        if value == default_of(each) and each.name not in always:
            continue
        if isinstance(value, list):
            listed, value = value, ",".join(value)
            if as_list(value) != listed:
                value = yaml.safe_dump(listed, default_flow_style=True, width=math.inf).strip()
        words += [f"--{each.name}"] if value is True else [f"--{each.name}", str(value)]
    return shlex.join(words)
