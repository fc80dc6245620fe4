"""Match the names of layers with the patterns of `skip` and `only`."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from wanda_lightning.common.errors import UserError


def matches(name: str, pattern: str, option: str) -> bool:
    """Whether a pattern names a layer or a module that holds the layer.

    A pattern is a name, a glob, or `re:` and a regular expression that matches the whole name. If that is not a regular
    expression, the ValueError names `option`.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(
                f"{option}={pattern!r} must be a regular expression after 're:', but {error}."
            ) from error
    # Everything inside counts, too: PEFT's adapters put the weight itself one level deeper.
    inside = f"{pattern}.*"
    return (
        name.startswith(f"{pattern}.")  # also if the name has brackets, which mean more in a glob
        or fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(name, inside)
    )


def check_patterns(option: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of an option as a tuple, or raise a ValueError; a string is a single pattern."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    checked = tuple(patterns)
    for pattern in checked:
        matches("", pattern, option)
    return checked


def refuse_unmatched(patterns: Sequence[str], names: Sequence[str], option: str, kind: str) -> None:
    """Raise a ValueError with the nearest of the `names` if a pattern matches none; `kind` says what they name."""
    for pattern in patterns:
        if not any(matches(name, pattern, option) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            nearest = f"the nearest is {near[0]!r}" if near else "the model has none"
            raise UserError(
                f"{option}={pattern!r} matches no {kind} of the model; {nearest}. Give a name, a glob such as "
                "'*.down_proj', or 're:' and a regular expression."
            )
