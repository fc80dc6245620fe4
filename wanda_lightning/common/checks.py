"""Checks of values and installed packages, which import no library."""

from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.errors import MissingPackageError, UserError


@dataclass(frozen=True)
class Number:
    """A finite number in a range: `above` and `below` exclude the bound, `minimum` and `maximum` include it."""

    above: float = -inf
    minimum: float = -inf
    below: float = inf
    maximum: float = inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = Integral if self.whole else Real
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        return (
            is_number and self.above < value < self.below and self.minimum <= value <= self.maximum
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        words = ("above", "of at least", "below", "at most")
        bounds = (self.above, self.minimum, self.below, self.maximum)
        limits = [
            f"{word} {bound:.10g}"
            for word, bound in zip(words, bounds, strict=True)
            if isfinite(bound)
        ]
        return f"{kind} {' and '.join(limits)}".rstrip()


Rule = Number | tuple[object, ...]
SEED = Number(minimum=0, maximum=2**32 - 1, whole=True)
COUNT = Number(minimum=1, whole=True)


def check(method: object, **rules: Rule) -> None:
    """Raise a ValueError for an attribute of a method that breaks its rule."""
    for name, rule in rules.items():
        attribute = {f"{name} of {type(method).__name__}": getattr(method, name)}
        check_values(rule, **attribute)


def check_values(rule: Rule, **values: object) -> None:
    """Raise a ValueError that names a value which breaks the rule: a `Number`, or one of several names."""
    allowed = str(rule)
    if isinstance(rule, tuple):
        allowed = f"one of {', '.join(map(str, rule))}"
    for name, value in values.items():
        if value not in rule:
            raise UserError(f"{name} must be {allowed}, but it is {shown(value)}.")


def check_at_least(minimum: int, **values: object) -> None:
    """Raise a ValueError for a value that is not a whole number of at least `minimum`."""
    check_values(Number(minimum=minimum, whole=True), **values)


def shown(value: object) -> str:
    """Return a wrong value for a message: a number or a text as it is written, anything else by its class."""
    if value is None or isinstance(value, str | Real):
        return repr(value)
    # The text of a tensor or a model may fill a screen.
    return f"a {type(value).__name__}"


def check_flags(**values: object) -> None:
    """Raise a ValueError for a value that is neither True nor False, such as the text "false", which is true."""
    check_values((True, False), **values)


def require_extra(extra: str, *packages: str, purpose: str) -> None:
    """Raise an ImportError that names the extra if one of its packages is missing; `purpose` is a plural subject."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{purpose} need {' and '.join(missing)}: pip install '.[{extra}]' in the source folder"
        )


def check_report_path(path: StrPath, option: str = "report") -> None:
    """Raise an error for the path of a report that cannot be written; it names the option with the path."""
    if Path(path).suffix.lower() not in (".html", ".png"):
        raise UserError(f"{option} must end with .html or .png, but it is {str(path)!r}.")
    require_extra("report", "matplotlib", purpose="Reports with figures")
