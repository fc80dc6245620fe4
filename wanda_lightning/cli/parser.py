"""Make a parser of the command line and of YAML files from a dataclass of options.

It needs only argparse and PyYAML, so that help and refusals answer at once, and its messages are one sentence.
"""

from __future__ import annotations

import argparse
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from wanda_lightning.core.name_patterns import did_you_mean

Options = TypeVar("Options")

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT", list: "LIST"}


class UsageError(argparse.ArgumentError):
    """An option that does not exist, or a value that it does not take."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
        must: In words, after "must".
        holds: Whether a value is so.
    """

    must: str
    holds: Callable[[Any], bool]


def option(text: str, default: Any = None, *, choices: Sequence[str] = (), rule: Rule | None = None) -> Any:
    """A field of a dataclass of options.

    Args:
        text: The help, one sentence without the default.
        default: The default; `MISSING` for an option that must be given.
        choices: The names that it takes, where it takes only these.
        rule: What the value must be.
    """
    metadata = {"help": text, "choices": tuple(choices), "rule": rule}
    if default == []:
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


class CommandParser(Generic[Options]):
    """Parse the arguments of one command into its dataclass of options.

    Args:
        command: The name of the command.
        options: A dataclass whose fields were made by `option`.
    """

    def __init__(self, command: str, options: type[Options], description: str) -> None:
        self._command, self._options = command, options
        self._fields: dict[str, Field[Any]] = {each.name: each for each in fields(options)}  # type: ignore[arg-type]
        self._types = {name: _plain(hint) for name, hint in typing.get_type_hints(options).items()}
        self._parser = _Parser(prog=f"wanda-lightning {command}", description=description, allow_abbrev=False)
        self._parser.add_argument("--config", action="append", metavar="FILE", help="Read options from a YAML file.")
        self._parser.add_argument("--print_config", action="store_true", help="Print all options as YAML.")
        self._parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
        for name, each in self._fields.items():
            self._parser.add_argument(f"--{name}", **self._argument(each))

    def _argument(self, each: Field[Any]) -> dict[str, Any]:
        text = each.metadata["help"].replace("%", "%%")
        if self._types[each.name] is bool:
            return {"action": "store_const", "const": "true", "help": text}
        if each.metadata["choices"]:
            text += f" One of {', '.join(each.metadata['choices'])}."
        if each.default is MISSING and each.default_factory is MISSING:
            text += " (required)"
        elif each.default not in (None, MISSING):
            text += f" (default: {each.default})"
        return {"metavar": "NAME" if each.metadata["choices"] else _METAVARS[self._types[each.name]], "help": text}

    def parse_args(self, arguments: Sequence[str]) -> Options:
        """Read the arguments; those on the command line win over those in files.

        Raises:
            UsageError: If an option is unknown or a value is not allowed.
            SystemExit: After `--help` and `--print_config`.
        """
        given, unknown = self._parser.parse_known_args(list(arguments))
        for name in unknown:
            raise UsageError(self._unknown(name.partition("=")[0]))
        texts: dict[str, Any] = {}
        for path in given.config or ():
            texts |= self._read(path)
        texts |= {name: getattr(given, name) for name in self._fields if getattr(given, name) is not None}
        values = {name: self._value(name, text) for name, text in texts.items()}
        if given.print_config:
            known = {name: None if value is MISSING else value for name, value in (self._defaults() | values).items()}
            print(_yaml().safe_dump(known, sort_keys=False), end="")
            raise SystemExit(0)
        missing = [n for n, each in self._fields.items() if n not in values and self._defaults()[n] is MISSING]
        for name in missing:
            raise UsageError(f"--{name} is required: {self._fields[name].metadata['help']}")
        try:
            return self._options(**values)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _defaults(self) -> dict[str, Any]:
        return {
            name: each.default if each.default_factory is MISSING else each.default_factory()
            for name, each in self._fields.items()
        }

    def _unknown(self, name: str) -> str:
        known = [f"--{each}" for each in self._fields]
        if not name.startswith("-"):
            return f"{self._command} takes only options, but {name!r} is none.{did_you_mean(f'--{name}', known)}"
        return f"{name} is not an option of {self._command}.{did_you_mean(name, known)}"

    def _read(self, path: str) -> dict[str, Any]:
        """The texts in a YAML file: every scalar is text here, since 2:4 is 124 in YAML."""
        yaml = _yaml()
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                content = yaml.load(file, Loader=yaml.BaseLoader)
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content or {}, Mapping):
            raise UsageError(f"--config {path} must map options to values, but it holds a {type(content).__name__}.")
        for name in content or {}:
            if name not in self._fields:
                raise UsageError(f"--config {path}: {self._unknown(f'--{name}').removeprefix('--')}")
        return dict(content or {})

    def _value(self, name: str, text: Any) -> Any:
        metadata, kind = self._fields[name].metadata, self._types[name]
        if text == "null" and self._fields[name].default is None:
            return None
        value = as_list(text) if kind is list else self._scalar(name, text, kind)
        if metadata["choices"] and value not in metadata["choices"]:
            allowed = ", ".join(metadata["choices"])
            near = did_you_mean(str(value), metadata["choices"])
            raise UsageError(f"--{name} must be one of {allowed}, but it is {value!r}.{near}")
        rule: Rule | None = metadata["rule"]
        for each in value if kind is list else [value]:
            if rule is not None and not rule.holds(each):
                raise UsageError(f"--{name} must {rule.must}, but it is {each!r}.")
        return value

    def _scalar(self, name: str, text: Any, kind: type) -> Any:
        if not isinstance(text, str):
            raise UsageError(f"--{name} must be one value, but it is {text!r}.")
        if kind is bool:
            if text not in ("true", "false"):
                raise UsageError(f"--{name} must be true or false, but it is {text!r}.")
            return text == "true"
        if kind is str:
            return expanded(text)
        try:
            return kind(text)
        except ValueError as error:
            raise UsageError(f"--{name} must be {_KINDS[kind]}, but it is {text!r}.") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}.")


def _yaml() -> Any:
    import yaml

    return yaml


def _plain(hint: Any) -> type:
    """`int` for `int | None`, `list` for `list[str]`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    return typing.get_origin(hint) or hint


def expanded(text: str) -> str:
    """Replace a leading `~` by the home directory, also in a timm name such as timm:local-dir:~/model."""
    prefix = "timm:local-dir:" if text.startswith("timm:local-dir:~") else ""
    return prefix + os.path.expanduser(text.removeprefix(prefix))


def as_list(given: Any) -> list[str]:
    """Several values from one text, where commas separate them except inside brackets; or a YAML list.

    >>> as_list("lm_head, re:x{1,3}")
    ['lm_head', 're:x{1,3}']
    >>> as_list("[a, b]")
    ['a', 'b']
    """
    if isinstance(given, str) and given.startswith("["):
        yaml = _yaml()
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


def as_options(options: Any) -> dict[str, Any]:
    """The options that were given or have a default, for reports."""
    return {name: value for name, value in asdict(options).items() if value is not None}
