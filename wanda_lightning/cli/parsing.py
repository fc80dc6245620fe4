"""Read options from arguments and files, show them in help, and turn them back into a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Yaml

from wanda_lightning.common.words import did_you_mean


def split_names(type_: Any, tokens: Iterable[Any]) -> tuple[str, ...]:
    """Split texts at commas; a regular expression (re:...) is an argument of its own.

    Example:
        >>> from cyclopts import Token
        >>> split_names(None, [Token(value="lm_head, *.down_proj"), Token(value="re:x{1,3}")])
        ('lm_head', '*.down_proj', 're:x{1,3}')
    """
    texts = (token.value for token in tokens)
    parts = (part.strip() for text in texts for part in ([text] if text.startswith("re:") else text.split(",")))
    return tuple(part for part in parts if part)


def names_in(known: Collection[str], form: str = "") -> Any:
    """Return a validator that refuses other names, with those that are meant."""

    def check(type_: Any, given: str | Collection[str]) -> None:
        for name in [given] if isinstance(given, str) else given:
            if name not in known and not (form and re.fullmatch(form, name)):
                raise ValueError(f"Choose from: {', '.join(known)}.{did_you_mean(name, known)}")

    return check


class _File(Yaml):
    """A YAML file with options, which are read as text, since YAML reads 2:4 as 124; null stands for the default."""

    def _load_config(self, path: Path) -> Any:
        import yaml

        class Texts(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
            yaml_implicit_resolvers = {"n": [("tag:yaml.org,2002:null", re.compile("null$"))]}  # noqa: RUF012

        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Texts) or {}
        return {k: v for k, v in content.items() if v is not None} if isinstance(content, dict) else content


def read_files(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Read the options that were not given as arguments from the files of `Session.config`, the last file first."""
    tokens = arguments["--config"].tokens if arguments.get("--config", None) else []
    for path in reversed(split_names(None, tokens)):
        _File(path, must_exist=True, use_commands_as_keys=False)(app, commands, arguments)


def shown_default(value: Any) -> str | None:
    """Return a default as it is typed; None for what help does not show."""
    return ",".join(value) if isinstance(value, tuple) and value else str(value) if value else None


def values_of(*groups: Any) -> dict[str, Any]:
    """Return all options by name."""
    return {each.name: getattr(group, each.name) for group in groups for each in fields(group)}


def given_in(*groups: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    defaults = {each.name: each.default for group in groups for each in fields(group)}
    return {name: value for name, value in values_of(*groups).items() if value != defaults[name]}


def as_command(command: str, *groups: Any, always: Collection[str] = ()) -> str:
    """Return a shell command with the options that differ from their defaults, and with those in `always`."""
    options = {name: value for name, value in values_of(*groups).items() if name in {*given_in(*groups), *always}}
    words = ["wanda-lightning", command]
    for name, value in options.items():
        for each in value if isinstance(value, tuple) and value else [value]:
            words += [f"--{name}"] if each is True else [f"--{name}", "" if each == () else str(each)]
    return shlex.join(words)
